"""The loop by hand with all that a run has: rollouts and scores of one's own in; metrics, observers, run folder, report out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from marl_core import (
    ConfigError,
    DataError,
    Prompts,
    Rollout,
    RunConfig,
    Runner,
    RunResult,
    StepStats,
    Strategy,
    hookimpl,
)
from marl_core.cli.app import main
from marl_core.config.load import dump_config
from marl_core.plan.plan import Plan
from marl_core.report.page import write_report

MakeConfig = Callable[..., RunConfig]
TEXTS = ["A", "B", "C", "D"]
SCORES = [1.0, -1.0, 0.5, 0.0]


class Heard(Strategy):
    """Writes down what it hears."""

    api: ClassVar[int] = 1
    heard: list[Any] = []  # noqa: RUF012  # pydantic copies it for each

    @hookimpl
    def marl_run_start(self, plan: Any) -> None:
        self.heard.append("start")

    @hookimpl
    def marl_step_end(self, stats: StepStats) -> None:
        self.heard.append(stats.step)

    @hookimpl
    def marl_run_end(self, result: RunResult) -> None:
        self.heard.append(result)

    @hookimpl
    def marl_run_failed(self, step: int, error: BaseException) -> None:
        self.heard.append((step, error))


@pytest.fixture
def bare(make_config: MakeConfig) -> MakeConfig:
    """Configs without reward and data."""

    def make(**changes: Any) -> RunConfig:
        return make_config(**{"data": None, "reward": [], "ppo": {"batch": 4, "minibatch": 2, "steps": 2}, **changes})

    return make


def test_own_scores_in_and_all_that_a_run_has_out(bare: MakeConfig, tmp_path: Path) -> None:
    config = bare(run={"folder": str(tmp_path / "run")})
    config = config.with_changes("observers", ["json-lines", Heard()])
    runner = Runner(config)
    (heard,) = [one.heard for one in runner.plan.observers if isinstance(one, Heard)]
    for _ in range(2):
        rollout = runner.generate(TEXTS)
        stats = runner.step(rollout=rollout, scores=SCORES)
        assert stats.metrics["objective/scores"] == pytest.approx(0.125)
        assert math.isfinite(stats.kl_nats)
    result = runner.end()
    assert result.steps == 2
    assert result.last is not None
    assert result.last.step == 2
    assert heard[:3] == ["start", 1, 2]
    assert heard[3].folder == str(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["objective/scores"] for line in lines] == [pytest.approx(0.125)] * 2
    assert (tmp_path / "run" / "final" / "policy" / "adapter_model.safetensors").is_file()
    assert "2 of 2" in write_report([tmp_path / "run"]).read_text("utf-8")
    more = config.with_changes("ppo.steps", 4)
    again = Runner(more, resume=True)  # the folder is free, and its checkpoint is of the last step
    assert again.done == 2
    again.step(rollout=again.generate(TEXTS), scores=SCORES)


def test_the_parts_give_what_the_step_gives(bare: MakeConfig) -> None:
    one, two = Runner(bare()), Runner(bare())
    rollout = one.generate(TEXTS)
    stats = one.step(rollout=rollout, scores=SCORES)
    scored = two.score(two.generate(TEXTS), SCORES)
    advantages = two.advantages(scored)
    again = two.finish(scored, advantages, two.update(scored, advantages))
    assert {k: v for k, v in stats.metrics.items() if not k.startswith("perf/")} == {
        k: v for k, v in again.metrics.items() if not k.startswith("perf/")
    }


def test_a_block_ends_the_run_and_tells_of_failures(bare: MakeConfig, tmp_path: Path) -> None:
    config = bare(run={"folder": str(tmp_path / "run")}).with_changes("observers", [Heard()])
    with Runner(config) as runner:
        runner.step(rollout=runner.generate(TEXTS), scores=SCORES)
    (heard,) = [one.heard for one in runner.plan.observers if isinstance(one, Heard)]
    assert [type(what) for what in heard] == [str, int, RunResult]
    broken = Runner(config.with_changes("run.folder", str(tmp_path / "two")))
    with pytest.raises(ZeroDivisionError):
        fail_after_a_step(broken)
    (heard,) = [one.heard for one in broken.plan.observers if isinstance(one, Heard)]
    assert heard[0] == "start"
    assert heard[-1][0] == 1
    assert isinstance(heard[-1][1], ZeroDivisionError)
    with Runner(bare()):  # nothing was done, so there is nothing to end
        pass
    with pytest.raises(ConfigError, match="no step was made"):
        Runner(bare()).end()


def fail_after_a_step(runner: Runner) -> None:
    with runner:
        runner.step(rollout=runner.generate(TEXTS), scores=SCORES)
        raise ZeroDivisionError


def test_a_run_that_trained_isnt_ended_twice(make_config: MakeConfig) -> None:
    with Runner(make_config(ppo={"steps": 1}).with_changes("observers", [Heard()])) as runner:
        runner.train()
    (heard,) = [one.heard for one in runner.plan.observers if isinstance(one, Heard)]
    assert [type(what) for what in heard] == [str, int, RunResult]


# -- no reward in the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda runner: runner.train(),
        lambda runner: next(runner.steps()),
        lambda runner: runner.step(runner.encode(TEXTS)),
        lambda runner: runner.score(runner.generate(TEXTS)),
        lambda runner: runner.step(rollout=runner.generate(TEXTS)),
    ],
)
def test_without_a_reward_scores_must_be_brought(bare: MakeConfig, prompts_file: str, use: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)reward: this config names none.*scores of your own"):
        use(Runner(bare(data={"prompts": prompts_file})))


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_config_file_needs_a_reward(
    bare: MakeConfig, prompts_file: str, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(bare(data={"prompts": prompts_file})), encoding="utf-8")
    assert main([command, str(file)]) == 2
    assert f"{file}: reward: is needed" in capsys.readouterr().err


def test_a_plan_without_a_reward_says_where_scores_come_from(bare: MakeConfig) -> None:
    roles = {role.name: role.note for role in Plan.of(bare()).describe()}
    assert "brought by hand" in roles["reward"]


def test_an_evaluation_without_a_reward_measures_the_rest(
    bare: MakeConfig, prompts_file: str, rewards_file: str, tmp_path: Path
) -> None:
    judges = {"low": {"use": "function", "target": f"{rewards_file}:low"}}
    config = bare(eval={"prompts": prompts_file, "judges": judges, "seeds": 2}, run={"folder": str(tmp_path / "run")})
    config = config.with_changes("observers", ["console"])
    runner = Runner(config)
    runner.check_start(TEXTS)
    before = runner.evaluate()
    assert before is not None
    assert math.isnan(before.reward)
    assert before.length > 0
    assert before.judges["low"]["mean"] is not None
    runner.step(rollout=runner.generate(TEXTS), scores=SCORES)
    result = runner.end()  # the console prints both
    assert result.before is not None
    assert math.isnan(result.before.reward)
    assert result.before.length == before.length
    (first, _) = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text("utf-8").splitlines()]
    assert first["reward"] is None
    write_report([tmp_path / "run"])


def test_the_configured_reward_isnt_asked_where_scores_are_brought(make_config: MakeConfig, rewards_file: str) -> None:
    """`labels` needs a column that these prompts haven't; it still is an error where it is to score."""
    runner = Runner(make_config(data=None, reward={"use": "function", "target": f"{rewards_file}:labels"}))
    rollout = runner.generate(TEXTS)
    runner.step(rollout=rollout, scores=SCORES)
    with pytest.raises(Exception, match="label"):
        runner.step(TEXTS)


def test_a_configured_reward_is_checked_before_the_first_update_as_before(
    make_config: MakeConfig, rewards_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marl_core.ppo.step import Step

    asked = []
    rewards = Step.rewards
    monkeypatch.setattr(Step, "rewards", lambda *given: asked.append(1) or rewards(*given))  # type: ignore[func-returns-value]
    runner = Runner(make_config(data=None))
    runner.step(TEXTS)
    assert len(asked) == 2  # the step's rollout, and the pre-flight check's


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either prompts"),
        ({"prompts": TEXTS, "rollout": True}, "either prompts"),
        ({"prompts": TEXTS, "scores": SCORES}, "scores belong to responses"),
    ],
)
def test_a_step_is_of_prompts_or_of_a_rollout(bare: MakeConfig, given: dict[str, Any], said: str) -> None:
    runner = Runner(bare())
    if "rollout" in given:
        given = {**given, "rollout": runner.generate(TEXTS)}
    with pytest.raises(ConfigError, match=said):
        runner.step(**given)


# -- texts, chats, rows ---------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def shown(runner: Runner, prompts: Prompts) -> list[str]:
    rows = [row[keep].tolist() for row, keep in zip(prompts.ids, prompts.mask, strict=True)]
    return [str(runner.bank.tokenizer.decode(row)) for row in rows]


def test_texts_are_read_as_the_data_file_is(make_config: MakeConfig) -> None:
    runner = Runner(make_config())
    assert runner.data is not None
    wanted = runner.data.take(range(6))
    texts = [str(text) for text in wanted.texts]
    for given in (texts, tuple(texts), np.array(texts), [dict(row) for row in wanted.rows], {"prompt": texts}):
        found = runner.encode(given)  # type: ignore[arg-type]  # more than promised
        assert torch.equal(found.ids, wanted.ids)
        assert torch.equal(found.mask, wanted.mask)
        assert list(found.texts) == texts
    assert runner.encode(wanted) is wanted
    assert runner.encode([dict(row) for row in wanted.rows]).rows == list(wanted.rows)


def test_chats_and_texts_are_rendered_as_data_says(make_config: MakeConfig, prompts_file: str) -> None:
    data = {
        "prompts": prompts_file,
        "chat": True,
        "system_prompt": "Be brief.",
        "chat_template_kwargs": {"chat_template": CHAT},
    }
    runner = Runner(make_config(data=data))
    chat = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
    ]
    system = "[system]Be brief.\n"
    assert shown(runner, runner.encode(chat)) == [f"{system}[user]Hi\n[assistant]", "[system]S\n[user]Hi\n[assistant]"]
    assert shown(runner, runner.encode(["Hi"])) == [f"{system}[user]Hi\n[assistant]"]
    assert len(runner.generate(chat)) == 2


def test_rows_fill_the_template_and_texts_are_whole(make_config: MakeConfig, prompts_file: str) -> None:
    data = {"prompts": prompts_file, "prompt_template": "{prompt} is {label}?"}
    runner = Runner(make_config(data=data))
    found = runner.encode([{"prompt": "A", "label": 3}, "whole {label}"])  # type: ignore[arg-type]  # mixed
    assert [text.lstrip("<bos>") for text in shown(runner, found)] == ["A is 3?", "whole {label}"]
    assert found.rows[0]["label"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("A", r"one str was given, not a list: write \[prompt\]"),
        ([], "an empty list was given"),
        (3, "3 was given"),
        ([{"role": "user", "content": "A"}], r"one chat was given, not a list of chats: write \[chat\]"),
        (["A", ""], "row 2 of the given prompts is empty"),
        (["A", 3], "row 2 of the given prompts is 3. Give a list of texts"),
        ([[1, 2], [3]], r"row 1 of the given prompts is \[1, 2\]. .*tokens go into Prompts.of"),
        (["A", "x<eos>y"], "row 2 of the given prompts spells the control token '<eos>'"),
        (["A", "x" * 5000], "row 2 of the given prompts has .* tokens, and .* is the most"),
        ([{"text": "A"}], "row 1 of the given prompts has no 'prompt'; it has: text"),
        ({"input_ids": [[1]], "attention_mask": [[1]]}, "this is what a tokenizer gives"),
        ([[{"role": "user", "content": "A"}]], "no chat template"),
    ],
)
def test_what_is_no_prompt_is_told_with_its_row(bare: MakeConfig, given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Runner(bare()).generate(given)


def test_long_texts_are_cut_where_data_says_so(make_config: MakeConfig, prompts_file: str) -> None:
    data = {"prompts": prompts_file, "max_prompt_tokens": 20, "on_long": "truncate-left"}
    runner = Runner(make_config(data=data))
    with pytest.warns(UserWarning, match="1 of 2 of the given prompts were cut to 20 tokens"):
        assert runner.encode(["A", "x" * 50]).mask.sum(1).max() == 20


def test_a_table_of_pandas_is_its_rows(make_config: MakeConfig) -> None:
    pandas = pytest.importorskip("pandas")
    runner = Runner(make_config())
    found = runner.encode(pandas.DataFrame({"prompt": ["A", "B"], "label": [1, 2]}))
    assert list(found.texts) == ["A", "B"]
    assert [row["label"] for row in found.rows] == [1, 2]


# -- responses of one's own -----------------------------------------------------------------------------------


def test_responses_as_texts(bare: MakeConfig) -> None:
    runner = Runner(bare())
    words = runner.bank.tokenizer
    responses = [" good one", " bad", " fine", ""]
    rollout = runner.rollout(TEXTS, responses)
    tokens = Rollout.from_responses(
        runner.encode(TEXTS),
        [[*words(text, add_special_tokens=False).input_ids, words.eos_token_id] for text in responses],
        words,
    )
    assert torch.equal(rollout.ids, tokens.ids)
    assert torch.equal(rollout.mask, tokens.mask)
    assert list(rollout.texts) == responses
    assert rollout.finished.all()
    assert runner.step(rollout=rollout, scores=SCORES).step == 1


def test_a_responses_text_goes_on_from_its_prompt() -> None:
    """A tokenizer that writes a space before the first word writes none inside of a text."""
    from marl_core.ppo.texts import response_tokens

    class Sentences:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            return type("Encoded", (), {"input_ids": [ord(letter) for letter in f"▁{text}"]})

    assert response_tokens(Sentences(), "A", "b") == [ord("b")]  # type: ignore[arg-type]
    assert response_tokens(Sentences(), [{"role": "user", "content": "A"}], "b") == [ord("▁"), ord("b")]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("responses", "said"),
    [
        (["a"], "1 responses for 4 prompts"),
        (["a"] * 5, "5 responses for 4 prompts"),
        ("abcd", "not one text"),
        (["a", "b", "c", [1]], "row 1 must be a list of token ids"),
    ],
)
def test_responses_that_dont_fit(bare: MakeConfig, responses: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Runner(bare()).rollout(TEXTS, responses)


def test_from_responses_says_who_tokenizes_prompts(bare: MakeConfig) -> None:
    words = Runner(bare()).bank.tokenizer
    with pytest.raises(DataError, match=r"expected Prompts, got list.*runner.rollout\(prompts, responses\)"):
        Rollout.from_responses(TEXTS, TEXTS, words)  # type: ignore[arg-type]
