"""Score shaping, worked by hand: missing-EOS penalty, running normalization, clip, in this order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marl_core.config.run_config import ShapingSection
from marl_core.ppo.shaping import Shaper

YES = torch.tensor([True, True, True])


def shaper(**options: Any) -> Shaper:
    return Shaper(ShapingSection(**options))


def test_nothing_asked_for_nothing_done() -> None:
    scores = torch.tensor([1.0, -200.0, 3.0])
    assert torch.equal(shaper()(scores, ~YES), scores)


def test_missing_eos_penalty() -> None:
    found = shaper(missing_eos_penalty=1.5)(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    assert found.tolist() == [1.0, 0.5, 3.0]


def test_clip_on_both_sides() -> None:
    assert shaper(clip=2.0)(torch.tensor([-5.0, 1.0, 5.0]), YES).tolist() == [-2.0, 1.0, 2.0]


def test_normalization_of_the_first_batch() -> None:
    # mean 2, standard deviation with Bessel's correction 1
    assert shaper(normalize=True)(torch.tensor([1.0, 2.0, 3.0]), YES).tolist() == [-1.0, 0.0, 1.0]


def test_running_moments_are_those_of_all_scores_so_far() -> None:
    running = shaper(normalize=True)
    batches = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0]), torch.tensor([-4.0, 0.5])]
    for batch in batches:
        last = running(batch, YES[: len(batch)])
    seen = torch.cat(batches).double()
    assert running.mean == pytest.approx(float(seen.mean()), abs=1e-12)
    assert running.std == pytest.approx(float(seen.std()), abs=1e-12)
    torch.testing.assert_close(last, ((batches[-1] - seen.mean()) / seen.std()).float())


def test_penalty_then_normalization_then_clip() -> None:
    # scores (1, 2, 6) with the last unfinished: minus 3 gives (1, 2, 3), normalized (-1, 0, 1), clipped (-0.5, 0, 0.5)
    found = shaper(missing_eos_penalty=3.0, normalize=True, clip=0.5)(
        torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False])
    )
    assert found.tolist() == [-0.5, 0.0, 0.5]


def test_looking_without_learning() -> None:
    running = shaper(normalize=True)
    running(torch.tensor([1.0, 2.0, 3.0]), YES)
    before = running.state()
    running(torch.tensor([100.0, 200.0, 300.0]), YES, learn=False)
    assert running.state() == before


@pytest.mark.parametrize("scores", [[5.0], [5.0, 5.0, 5.0]])
def test_scores_that_do_not_vary_stay_finite(scores: list[float]) -> None:
    assert shaper(normalize=True)(torch.tensor(scores), YES[: len(scores)]).tolist() == [0.0] * len(scores)


def test_a_restored_shaper_goes_on_where_the_other_was() -> None:
    one, two = shaper(normalize=True), shaper(normalize=True)
    one(torch.tensor([1.0, 2.0, 4.0]), YES)
    two.restore(one.state())
    assert torch.equal(one(torch.tensor([7.0, 8.0, 0.0]), YES), two(torch.tensor([7.0, 8.0, 0.0]), YES))
    assert one.state() == two.state()


def test_any_dtype_becomes_float32() -> None:
    assert shaper(clip=1.0)(torch.tensor([3, -3, 0]), YES).dtype == torch.float32
