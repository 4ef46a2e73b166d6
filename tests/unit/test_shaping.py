"""Score shaping, worked by hand: missing-EOS penalty, running normalization, clip, in this order."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import ScoredRollout
from marl_core.config.run_config import ShapingSection
from marl_core.ppo.shaping import RewardStats, learned, shape, shape_scores
from marl_core.store.run_state import RunState
from marl_core.testing import fake_rollout

YES = torch.tensor([True, True, True])
NOTHING = RewardStats()


def shaped(
    scores: Tensor, finished: Tensor, stats: RewardStats = NOTHING, **options: Any
) -> tuple[Tensor, RewardStats]:
    """The scores as PPO sees them, and the moments with this batch."""
    section = ShapingSection(**options)
    after = learned(stats, scores, finished, section)
    return shape_scores(scores, finished, section, after), after


def test_nothing_asked_for_nothing_done() -> None:
    scores = torch.tensor([1.0, -200.0, 3.0])
    found, after = shaped(scores, ~YES)
    assert torch.equal(found, scores)
    assert after == NOTHING


def test_missing_eos_penalty() -> None:
    found, _ = shaped(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]), missing_eos_penalty=1.5)
    assert found.tolist() == [1.0, 0.5, 3.0]


def test_clip_on_both_sides() -> None:
    assert shaped(torch.tensor([-5.0, 1.0, 5.0]), YES, clip=2.0)[0].tolist() == [-2.0, 1.0, 2.0]


def test_normalization_of_the_first_batch() -> None:
    # mean 2, standard deviation with Bessel's correction 1
    assert shaped(torch.tensor([1.0, 2.0, 3.0]), YES, normalize=True)[0].tolist() == [-1.0, 0.0, 1.0]


def test_running_moments_are_those_of_all_scores_so_far() -> None:
    running = NOTHING
    batches = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0]), torch.tensor([-4.0, 0.5])]
    for batch in batches:
        last, running = shaped(batch, YES[: len(batch)], running, normalize=True)
    seen = torch.cat(batches).double()
    assert running.mean == pytest.approx(float(seen.mean()), abs=1e-12)
    assert running.std == pytest.approx(float(seen.std()), abs=1e-12)
    torch.testing.assert_close(last, ((batches[-1] - seen.mean()) / seen.std()).float())


def test_penalty_then_normalization_then_clip() -> None:
    # scores (1, 2, 6) with the last unfinished: minus 3 gives (1, 2, 3), normalized (-1, 0, 1), clipped (-0.5, 0, 0.5)
    found, _ = shaped(
        torch.tensor([1.0, 2.0, 6.0]),
        torch.tensor([True, True, False]),
        missing_eos_penalty=3.0,
        normalize=True,
        clip=0.5,
    )
    assert found.tolist() == [-0.5, 0.0, 0.5]


def test_looking_without_learning() -> None:
    """A batch is shaped by the moments as they will be with it; shaping it, once or twice, changes none."""
    section = ShapingSection(normalize=True)
    _, running = shaped(torch.tensor([1.0, 2.0, 3.0]), YES, normalize=True)
    before = RewardStats(running.count, running.mean, running.squares)
    rollout = fake_rollout()
    scored = ScoredRollout(rollout, torch.zeros(rollout.ids.shape), None, None, torch.tensor([100.0, 200.0, 300.0]))
    once, again = (shape(scored, section, running) for _ in range(2))
    assert torch.equal(once.shaped_scores, again.shaped_scores)
    assert once.scores.tolist() == [100.0, 200.0, 300.0]
    assert running == before


@pytest.mark.parametrize("scores", [[5.0], [5.0, 5.0, 5.0]])
def test_scores_that_do_not_vary_stay_finite(scores: list[float]) -> None:
    found, _ = shaped(torch.tensor(scores), YES[: len(scores)], normalize=True)
    assert found.tolist() == [0.0] * len(scores)


def test_a_restored_shaper_goes_on_where_the_other_was() -> None:
    _, one = shaped(torch.tensor([1.0, 2.0, 4.0]), YES, normalize=True)
    two = RunState.from_dict(json.loads(json.dumps(RunState(1, 0.0, one).as_dict()))).reward_stats
    further = torch.tensor([7.0, 8.0, 0.0])
    (mine, after), (theirs, also) = (shaped(further, YES, stats, normalize=True) for stats in (one, two))
    assert torch.equal(mine, theirs)
    assert after == also


def test_any_dtype_becomes_float32() -> None:
    assert shaped(torch.tensor([3, -3, 0]), YES, clip=1.0)[0].dtype == torch.float32
