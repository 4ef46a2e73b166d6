"""A judge measures and may abstain; a reward may abstain where another judges. No number that isn't one is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import PluginError, RunConfig, Runner
from marl_core.ppo.ranks import Ranks
from marl_core.ppo.roles import RewardSource
from marl_core.ppo.types import Rollout
from marl_core.report.publish import publish_adapter
from marl_core.testing import fake_rollout

MakeConfig = Callable[..., RunConfig]
JUDGES = """
def nobody(completions, **columns):
    return [None] * len(completions)

def some(prompts, completions, **columns):
    return [float(len(p)) if p == "Bad" else None for p in prompts]

def nan_free(completions, **columns):
    return [2.0] * len(completions)

def by_token(completion_ids, steps=None, **columns):
    return [[1.0] * len(ids) if i % 2 else None for i, ids in enumerate(completion_ids)]

def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)

def fails(completions, **columns):
    raise OSError("the service is down")
"""


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    file = tmp_path_factory.mktemp("judges") / "judges.py"
    file.write_text(JUDGES, encoding="utf-8")

    def named(*names: str, **options: Any) -> dict[str, Any]:
        return {name: {"use": "function", "target": f"{file}:{name}", **options} for name in names}

    return named


def strict(file: Path) -> list[dict[str, Any]]:
    """The lines, read as a parser does that knows JSON and nothing more."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{file.name} holds {word}, which is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


class TestJudges:
    def evaluated(self, make_config: MakeConfig, folder: Path, prompts_file: str, chosen: dict[str, Any]) -> Any:
        config = make_config(
            eval={"prompts": prompts_file, "judges": chosen, "seeds": 2},
            run={"folder": str(folder)},
            observers=["console", "json-lines"],
            ppo={"steps": 1},
        )
        return Runner(config).train()

    def test_abstaining_is_no_error_and_the_mean_is_over_those_judged(
        self, make_config: MakeConfig, prompts_file: str, judges: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        chosen = {**judges("nobody", "some", "nan_free"), "weighted": {**judges("some")["some"], "weight": 10.0}}
        result = self.evaluated(make_config, tmp_path / "run", prompts_file, chosen)
        assert result.after.judges == {
            "nobody": {"mean": None, "std": None, "judged": 0.0},
            "some": {"mean": 3.0, "std": 0.0, "judged": pytest.approx(1 / 6)},  # len("Bad"), one prompt of six
            "nan_free": {"mean": 2.0, "std": 0.0, "judged": 1.0},
            "weighted": {"mean": 30.0, "std": 0.0, "judged": pytest.approx(1 / 6)},
        }
        for line in strict(tmp_path / "run" / "evals.jsonl"):
            assert line["judges"] == result.after.judges
            assert [row["judges"]["some"] for row in line["samples"]] == [None, None, None]
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        shown = page.replace("none of marl-core", "")  # the strategy of that name
        assert not re.search(r">\s*(nan|none|null)\b", shown, flags=re.IGNORECASE)
        publish_adapter(tmp_path / "run", tmp_path / "published")
        card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
        assert "| judge `nobody` | - | - |" in card
        assert "| judge `some` | 3 | 3 |" in card

    def test_one_that_scores_tokens(
        self, make_config: MakeConfig, prompts_file: str, judges: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        """Its number for a response is the sum; every second one it leaves out."""
        one = {"use": "process", "target": judges("by_token")["by_token"]["target"], "per": "token"}
        result = self.evaluated(make_config, tmp_path / "run", prompts_file, {"each": one})
        assert result.after.judges["each"]["judged"] == 0.5
        assert 1.0 <= result.after.judges["each"]["mean"] <= 6.0

    @pytest.mark.parametrize(("name", "said"), [("not_a_number", "got nan"), ("fails", "the service is down")])
    def test_what_it_does_wrong_is_a_judges(
        self, make_config: MakeConfig, prompts_file: str, judges: Callable[..., dict[str, Any]], name: str, said: str
    ) -> None:
        with pytest.raises(PluginError, match=said) as caught:
            Runner(make_config(eval={"prompts": prompts_file, "judges": judges(name)})).prepare()
        assert f"judge '{name}'" in str(caught.value)
        assert "reward '" not in str(caught.value)


def test_a_source_that_abstains_from_a_whole_batch_has_no_mean(
    make_config: MakeConfig, rewards_file: str, judges: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    reward = [
        {"use": "function", "target": f"{rewards_file}:odd", "name": "odd"},
        {**judges("nobody")["nobody"], "name": "nobody"},
    ]
    config = make_config(reward=reward, observers=["console", "json-lines"], run={"folder": str(tmp_path / "run")})
    stats = list(Runner(config).steps())[-1]
    assert "reward/odd" in stats.metrics
    assert "reward/nobody" not in stats.metrics
    assert all(math.isfinite(value) for value in stats.metrics.values())
    assert len(strict(tmp_path / "run" / "steps.jsonl")) == 2
    assert strict(tmp_path / "run" / "samples.jsonl")


class SecondOfTwo(Ranks):
    """Rank 1; the first rank's words are given."""

    rank, size = 1, 2

    def __init__(self, first_has_tokens: bool) -> None:
        self.first_has_tokens = first_has_tokens
        self.gathered: list[Tensor] = []

    def gather(self, tensor: Tensor) -> Tensor:
        self.gathered.append(tensor)
        asked = (
            tensor.dim() == 1 and sum(seen.dim() == 1 for seen in self.gathered) == 1
        )  # whether anybody has scores of tokens
        return torch.cat([torch.full_like(tensor, float(self.first_has_tokens)) if asked else tensor, tensor])


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_all_ranks_gather_the_same(make_config: MakeConfig, first: bool, mine: bool) -> None:
    """A process reward may abstain from all of one rank's responses, and give that rank no scores of tokens."""
    runner, rollout = Runner(make_config()), fake_rollout([("q", "abc"), ("q", "de"), ("q", "f"), ("q", "ghi")])

    def score(part: Rollout) -> Any:
        return part.mask.float() if mine else [None] * len(part)

    ranks = SecondOfTwo(first)
    roles = replace(runner.roles, rewards=(*runner.roles.rewards, RewardSource("process", 1.0, score)))
    found = replace(runner.algorithm, roles=roles, ranks=ranks).score(rollout)
    shapes = [tuple(tensor.shape) for tensor in ranks.gathered]
    width = rollout.ids.shape[1]
    of_models = [(2, width)] * 4  # the policy's log-probs, entropies and values, and the reference's log-probs
    assert sorted(shapes) == sorted([*of_models, (2,), (2,), (2,), (2,), *([(2, width)] if first or mine else [])])
    if first or mine:
        assert found.token_scores is not None
        assert bool((found.token_scores == 0).all()) != mine
    else:
        assert found.token_scores is None
