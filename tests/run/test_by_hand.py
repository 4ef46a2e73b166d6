"""The three parts by hand: the loop of those who come from `generate / compute_reward_score / step`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import ConfigError, DataError, NumericError, Prompts, Rollout, RunConfig, Runner, RunResult
from marl_core.ppo.estimators import estimate_advantages

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def runner(make_config: MakeConfig) -> Runner:
    return Runner(make_config(data=None, ppo={"batch": 4, "minibatch": 2}))


def prompts_of(runner: Runner, *texts: str) -> Prompts:
    words = runner.bank.tokenizer
    return Prompts.of([words(text).input_ids for text in texts], words.pad_token_id, texts=texts)


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    found = runner.roles.trained.parameters(runner.bank)
    return {f"{role}/{name}": p.detach().clone() for role, named in found.items() for name, p in named.items()}


def test_the_parts_give_what_the_step_gives(make_config: MakeConfig) -> None:
    one, two = Runner(make_config()), Runner(make_config())
    assert one.data is not None
    prompts = one.data.batch(0, 4, 0)
    stats = one.step(prompts)
    rollout = two.generate(prompts)
    scored = two.score(rollout)
    advantages = estimate_advantages(scored, two.config.ppo, two.kl_coef)
    again = two.finish(scored, advantages, two.update(scored, advantages))
    numbers = {name: value for name, value in stats.metrics.items() if not name.startswith("perf/")}
    assert numbers == {name: value for name, value in again.metrics.items() if not name.startswith("perf/")}
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_own_responses_and_own_scores(runner: Runner) -> None:
    words = runner.bank.tokenizer
    prompts = prompts_of(runner, "A", "B", "C", "D")
    responses = [[*words(text).input_ids, words.eos_token_id] for text in (" good one", " bad", " fine", " so so")]
    rollout = Rollout.from_responses(prompts, responses, words)
    scored = runner.score(rollout, torch.tensor([1.0, -1.0, 0.5, 0.0]))
    assert scored.scores.tolist() == [1.0, -1.0, 0.5, 0.0]
    assert scored.parts == {}
    before = weights(runner)
    stats = runner.update(scored)
    assert stats.first_ratio_error == 0.0
    assert stats.optimizer_steps == 4.0
    assert any(not torch.equal(value, before[name]) for name, value in weights(runner).items())


def test_own_scores_teach(runner: Runner) -> None:
    """The response that is paid for becomes likelier, the one that is punished less likely."""
    words = runner.bank.tokenizer
    prompts = prompts_of(runner, *["A"] * 4)
    good, bad = (words(text).input_ids for text in (" yes", " no!"))
    rollout = Rollout.from_responses(prompts, [good, bad, good, bad], words)
    first = runner.score(rollout, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    for _ in range(4):
        scored = runner.score(rollout, torch.tensor([1.0, -1.0, 1.0, -1.0]))
        runner.update(scored)
    moved = (runner.score(rollout, torch.zeros(4)).logprobs - first.logprobs).sum(1)
    assert float(moved[0]) > 0.5
    assert float(moved[1]) < -0.5


def test_own_scores_are_shaped_too(make_config: MakeConfig) -> None:
    runner = Runner(make_config(data=None, shaping={"clip": 1.0, "missing_eos_penalty": 0.5}))
    rollout = Rollout.from_responses(prompts_of(runner, "A", "B"), [[50, 51, 2], [50, 51]], runner.bank.tokenizer)
    scored = runner.score(rollout, torch.tensor([5.0, 1.0]))
    assert scored.shaped_scores.tolist() == [1.0, 0.5]
    assert scored.scores.tolist() == [5.0, 1.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([1.0, float("nan"), 0.0, 0.0]), "scores: response 2 got nan, not a finite number"),
        ([1.0, 0.0, float("inf"), 0.0], "scores: response 3 got inf"),
        ([1.0, 0.0], "scores gave 2 rewards for 4 responses"),
        (torch.zeros(4, 2), "response 1 has . tokens and got 2 numbers"),
    ],
)
def test_own_scores_must_be_one_finite_number_for_each(runner: Runner, scores: Any, message: str) -> None:
    rollout = runner.generate(prompts_of(runner, "A", "B", "C", "D"))
    with pytest.raises(DataError, match=message):
        runner.score(rollout, scores)


def test_own_advantages_that_are_not_finite_never_reach_the_weights(runner: Runner) -> None:
    scored = runner.score(runner.generate(prompts_of(runner, "A", "B", "C", "D")), [1.0, 2.0, 3.0, 4.0])
    good = estimate_advantages(scored, runner.config.ppo)
    bad = type(good)(good.kl, good.rewards, good.advantages * float("nan"), good.returns)
    before = weights(runner)
    with pytest.raises(NumericError, match="the loss is nan"):
        runner.update(scored, bad)
    assert all(torch.equal(value, before[name]) for name, value in weights(runner).items())


def test_a_loop_of_ones_own_goes_on_from_step_to_step(runner: Runner) -> None:
    """Without `finish`: `update` ends the step, so that each rollout is sampled anew."""
    prompts = prompts_of(runner, "A", "B", "C", "D")
    seen = []
    for _ in range(3):
        rollout = runner.generate(prompts)
        seen.append(rollout.ids.tolist())
        runner.update(runner.score(rollout, [1.0, 2.0, 3.0, 4.0]))
    assert runner.done == 3
    assert seen[0] != seen[1] != seen[2]
    again, other = runner.generate(prompts), runner.generate(prompts)
    assert again.ids.tolist() != other.ids.tolist()  # two rollouts for one step differ too


def test_steps_need_data(runner: Runner) -> None:
    with pytest.raises(ConfigError, match=r"names no prompts.*call step\(prompts\)"):
        next(runner.steps())


def test_steps_hand_out_each_step(make_config: MakeConfig) -> None:
    seen = [stats.step for stats in Runner(make_config(ppo={"steps": 3})).steps()]
    assert seen == [1, 2, 3]


def test_train_gives_a_result_and_a_run_folder(make_config: MakeConfig, prompts_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = make_config(
        eval={"prompts": prompts_file, "every": 1, "judges": {"short": make_config().reward[0].model_dump()}},
        run={"folder": str(folder), "checkpoint_every": 1},
        observers=["json-lines", "console"],
    )
    result: RunResult = Runner(config).train()
    assert (result.folder, result.steps) == (str(folder), 2)
    assert result.before is not None
    assert result.after is not None
    assert (result.before.step, result.after.step) == (0, 2)
    assert set(result.after.judges) == {"short"}
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "provenance.json",
        "preflight.json",
        "steps.jsonl",
        "samples.jsonl",
        "evals.jsonl",
        "checkpoints",
        "final",
        "report.html",
    }
    assert (folder / "final" / "policy" / "adapter_model.safetensors").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".bin", ".pt", ".pkl")]


def test_the_metrics_are_consistent(make_config: MakeConfig) -> None:
    """Score minus penalty is the logged total (k1 in the reward), and times add up."""
    for stats in Runner(make_config(ppo={"steps": 3, "kl": {"coef": 0.3}})).steps():
        m: dict[str, Any] = dict(stats.metrics)
        assert m["objective/rlhf_reward"] == pytest.approx(
            m["objective/shaped_scores"] - 0.3 * m["objective/kl"], abs=1e-5
        )
        assert m["perf/seconds"] == pytest.approx(
            sum(m[f"perf/seconds_{phase}"] for phase in ("generate", "score", "update"))
        )
        assert m["reward/function"] == m["objective/scores"]
        assert 1 <= m["tokens/mean_length"] <= 6
