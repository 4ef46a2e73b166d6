"""The checks of a step: each trips on an injected fault, says what, which rows and whose, and the batch can be replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marl_core import DataError, NumericError, PluginError, RunConfig, Runner
from marl_core.cli.app import main
from marl_core.errors import MarlWarning
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.types import Advantages, ScoredRollout, UpdateStats
from marl_core.ppo.update import Update
from marl_core.run.optimizer import make_optimizer
from marl_core.run.replay import replay
from marl_core.safety import step_checks
from marl_core.safety.dump import load

MakeConfig = Callable[..., RunConfig]


def ready(config: RunConfig) -> tuple[Runner, ScoredRollout]:
    runner = Runner(config)
    runner.prepare()
    assert runner.data is not None
    return runner, runner.score(runner.generate(runner.data.take([0, 1, 2, 3])))


def spoiled(tensor: torch.Tensor | None, row: int, value: float) -> torch.Tensor:
    assert tensor is not None
    copy = tensor.clone()
    copy[row, ...] = value
    return copy


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "logprobs",
            math.nan,
            r"log-prob of the policy isn't finite: nan in 1 of 4 responses \(number 3\); the first begins",
        ),
        ("logprobs", 0.5, r"log-prob of the policy is above 0: no probability: 0.5 in 1 of 4 responses \(number 3\)"),
        ("ref_logprobs", -math.inf, r"log-prob of the reference isn't finite: -inf .* It comes from disabled-adapter"),
        ("values", math.inf, "a value isn't finite: inf .* value head"),
        (
            "shaped_scores",
            math.nan,
            r"a score isn't finite: nan .* \(number 3\).*rewards.py:odd; function of marl-core",
        ),
    ],
)
def test_a_number_that_cannot_be_is_refused(make_config: MakeConfig, name: str, value: float, said: str) -> None:
    runner, scored = ready(make_config())
    changed: dict[str, Any] = {name: spoiled(getattr(scored, name), 2, value)}
    with pytest.raises(NumericError, match=said) as caught:
        runner.checks.check_scored(runner.algorithm, replace(scored, **changed))
    assert caught.value.exit_code == 5


def test_padding_may_hold_what_is_above_zero(make_config: MakeConfig) -> None:
    runner, scored = ready(make_config())
    runner.checks.check_scored(
        runner.algorithm, replace(scored, logprobs=scored.logprobs.masked_fill(~scored.rollout.mask, 0.5))
    )


class TestWarnings:
    def test_equal_scores(self, make_config: MakeConfig) -> None:
        runner, scored = ready(make_config())
        same = replace(scored, scores=torch.full((4,), 0.25))
        with pytest.warns(
            MarlWarning, match=r"all 4 responses got the same score, 0.25, from .*rewards.py:odd; function of marl-core"
        ):
            runner.checks.check_scored(runner.algorithm, same)

    @pytest.mark.parametrize("chats", [True, False])
    def test_equal_scores_of_chats_tell_where_the_text_is(self, make_config: MakeConfig, chats: bool) -> None:
        runner, scored = ready(make_config())
        texts: Any = [[{"role": "user", "content": "Hi"}] if chats else "Hi"] * 4
        rollout = replace(scored.rollout, prompts=replace(scored.rollout.prompts, texts=texts))
        with pytest.warns(MarlWarning) as told:
            runner.checks.check_scored(runner.algorithm, replace(scored, rollout=rollout, scores=torch.zeros(4)))
        (message,) = (str(one.message) for one in told if "same score" in str(one.message))
        assert ("A completion is a list of one message here: its text is completion[0]['content']." in message) == chats

    def test_it_is_said_once(self, make_config: MakeConfig, recwarn: pytest.WarningsRecorder) -> None:
        runner, scored = ready(make_config())
        for _ in range(3):
            runner.checks.check_scored(runner.algorithm, replace(scored, scores=torch.zeros(4)))
        assert sum("the same score" in str(warning.message) for warning in recwarn) == 1

    def test_equal_scores_within_each_group(self, make_config: MakeConfig) -> None:
        runner, scored = ready(make_config(value="none", ppo={"advantage": "rloo", "samples_per_prompt": 2}))
        raw = torch.arange(len(scored.scores)) // 2 * 1.0
        with pytest.warns(MarlWarning, match="within each of the 4 prompts all responses got the same score"):
            runner.checks.check_scored(runner.algorithm, replace(scored, scores=raw))

    @pytest.mark.parametrize(("shift", "said"), [(-6.0, "next to impossible"), (2.0, "can't be negative")])
    def test_a_kl_that_is_not_plausible(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, shift: float, said: str
    ) -> None:
        runner, scored = ready(make_config())
        monkeypatch.setattr(step_checks, "TOKENS_FOR_A_MEAN", 4)
        low = replace(scored, logprobs=scored.logprobs - 3, ref_logprobs=scored.logprobs - 3 + shift)
        with pytest.warns(MarlWarning, match=said):
            runner.checks.check_scored(runner.algorithm, low)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [({"ratio_max": 1e3}, "ratio reached"), ({"first_ratio_error": 0.1}, "before anything was changed")],
    )
    def test_a_ratio_that_is_not_plausible(self, make_config: MakeConfig, changed: dict[str, float], said: str) -> None:
        runner, scored = ready(make_config())
        stats = runner.update(scored)
        with pytest.warns(MarlWarning, match=said):
            runner.checks.check_update(runner.algorithm, replace(stats, **changed))

    def test_a_good_run_says_nothing(self, make_config: MakeConfig, recwarn: pytest.WarningsRecorder) -> None:
        Runner(make_config(ppo={"learning_rate": 1e-3})).train()
        assert [str(w.message) for w in recwarn if "(Said once a run.)" in str(w.message)] == []


class TestUpdate:
    def test_stats_that_are_not_finite(self, make_config: MakeConfig) -> None:
        runner, scored = ready(make_config())
        stats: UpdateStats = runner.update(scored)
        with pytest.raises(NumericError, match="update: value_loss of this step is inf"):
            runner.checks.check_update(runner.algorithm, replace(stats, value_loss=math.inf))

    def test_weights_that_are_not_finite(self, make_config: MakeConfig) -> None:
        runner, scored = ready(make_config())
        stats = runner.update(scored)
        next(iter(runner.roles.trained.parameters(runner.bank)["policy"].values())).data[0, 0] = math.inf
        with pytest.raises(NumericError, match=r"the policy's weight .*lora_A\.policy\.weight isn't finite"):
            runner.checks.check_update(runner.algorithm, stats)


class TestFrozen:
    def test_written_between_two_calls(self, make_config: MakeConfig) -> None:
        runner, scored = ready(make_config())
        weight = runner.bank.base.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(
            PluginError,
            match=r"step 3: reward 'function' .*function of .*, or code outside any plugin's call, changed frozen weights: .*embed",
        ):
            runner.guard.step_ended(3)
        assert scored is not None

    def test_which_weights_learn(self, make_config: MakeConfig) -> None:
        runner, _ = ready(make_config())
        weight = runner.bank.base.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        weight.requires_grad_(True)
        with pytest.raises(NumericError, match="requires_grad"):
            runner.guard.step_ended(1)
        assert not weight.requires_grad

    def test_written_past_the_counter_is_found_before_a_checkpoint(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        runner, _ = ready(make_config(run={"folder": str(tmp_path / "run")}))
        weight = runner.bank.base.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        weight.data[1, 1] += 1e-3
        runner.guard.step_ended(1)
        with pytest.raises(PluginError, match="written past torch's counter"):
            runner.save()
        assert not (tmp_path / "run" / "checkpoints").exists()


FAILING = """
import os

def odd(prompts, completions, label, **columns):
    if os.path.exists({flag!r}):
        return [float("nan") if i == 1 else 0.5 for i in range(len(completions))]
    return [float(len(text)) for text in completions]
"""


class TestDumpAndReplay:
    @pytest.fixture
    def run(self, make_config: MakeConfig, tmp_path: Path) -> tuple[Runner, Path]:
        """A run of which one step is done, and the file whose presence makes its reward give NaN."""
        flag = tmp_path / "flag"
        (tmp_path / "mine.py").write_text(FAILING.format(flag=str(flag)), encoding="utf-8")
        reward = {"use": "function", "target": f"{tmp_path}/mine.py:odd"}
        runner = Runner(make_config(reward=reward, run={"folder": str(tmp_path / "run")}))
        next(runner.steps())
        return runner, flag

    def test_a_reward_that_gives_nan(
        self, run: tuple[Runner, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runner, flag = run
        flag.touch()
        with pytest.raises(PluginError, match=r"response 2 got nan.*marl replay") as caught:
            next(runner.steps())
        dump = tmp_path / "run" / "dumps" / "step-000002-score"
        assert str(dump) in str(caught.value)
        assert {file.suffix for file in dump.rglob("*") if file.is_file()} == {".json", ".safetensors"}
        words = json.loads((dump / "dump.json").read_text(encoding="utf-8"))
        assert words["step"] == 2
        assert len(words["responses"]) == 4
        assert "function of marl-core" in words["last_plugin"]
        assert [row["label"] for row in words["rows"]] != []
        again = replay(dump)
        assert isinstance(again.now, PluginError)
        assert str(again.now) in again.then
        before = sorted(path for path in (tmp_path / "run").rglob("*"))
        assert main(["replay", str(dump)]) == 3
        assert "response 2 got nan" in capsys.readouterr().err
        flag.unlink()
        assert main(["replay", str(dump)]) == 0
        out = capsys.readouterr().out
        assert "Now it passes: 4 responses were scored" in out
        assert f"Go on with the run: marl run {tmp_path / 'run'} --resume --override" in out
        assert sorted(path for path in (tmp_path / "run").rglob("*")) == before

    def test_an_object_of_a_program_is_replayed_in_that_program(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """`marl replay` reads the run's config.yaml, which can't hold the function."""
        calls: list[int] = []

        def odd(completions: list[str], **_: object) -> list[float]:
            calls.append(1)
            return [float("nan") if len(calls) == 3 else 1.0] * len(completions)

        config = make_config(reward=odd, run={"folder": str(tmp_path / "run")})
        steps = Runner(config).steps()
        next(steps)
        with pytest.raises(PluginError, match="Give a finite number, or None to abstain") as caught:
            next(steps)
        dump = tmp_path / "run" / "dumps" / "step-000002-score"
        assert "marl replay" not in str(caught.value)
        assert f"replay({str(dump)!r}, config), from marl_core.run.replay" in str(caught.value)
        assert replay(dump, config).now is None

    def test_a_secret_on_the_line_that_failed_is_struck_out(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """The message quotes the user's line; the dump is a file that may be passed on."""
        code = "calls = []\ndef odd(completions, **_):\n    calls.append(1)\n    if len(calls) > 2:\n"
        code += "        ask(token='hf_abcdefghijklmnopqrst')\n    return [float(len(c)) for c in completions]\n"
        (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        reward = {"use": "function", "target": f"{tmp_path}/mine.py:odd"}
        runner = Runner(make_config(reward=reward, run={"folder": str(tmp_path / "run")}))
        with pytest.raises(PluginError, match=r"mine\.py, line 5, in odd: `ask\("):
            runner.train()
        (words,) = (tmp_path / "run" / "dumps").glob("*/dump.json")
        text = words.read_text(encoding="utf-8")
        assert "`ask(token='[redacted]')`" in text
        assert "hf_abc" not in text

    def test_an_update_that_overflows(self, run: tuple[Runner, Path], tmp_path: Path) -> None:
        """The dump holds the minibatch that failed and the weights of that moment: the same error comes again."""
        runner, _ = run
        assert runner.data is not None
        scored = runner.score(runner.generate(runner.data.take([0, 1, 2, 3])))
        weight = next(iter(runner.roles.trained.parameters(runner.bank)["policy"].values()))
        held = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(math.nan)  # what a bad step would leave
        with pytest.raises(NumericError, match=r"in epoch 1, in the minibatch of responses 1, 2\. The batch is in"):
            runner.update(scored)
        dump = tmp_path / "run" / "dumps" / "step-000002-update"
        again = replay(dump)
        assert isinstance(again.now, NumericError)
        assert again.then.split(";")[0] == str(again.now).split(";")[0]
        with torch.no_grad():
            weight.copy_(held)
        assert runner.done == 1

    def failed(self, runner: Runner, monkeypatch: pytest.MonkeyPatch, scored: ScoredRollout, *given: Any) -> Path:
        """The dump of an update that an injected fault ends in its second minibatch; the folder."""
        real = Update._optimizer_step
        calls: list[int] = []

        def step(update: Update, roles: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise NumericError("injected.")
            real(update, roles)

        with monkeypatch.context() as patch:
            patch.setattr(Update, "_optimizer_step", step)
            with pytest.raises(NumericError, match="injected"):
                runner.update(scored, *given)
        (folder,) = (Path(str(runner.config.run.folder)) / "dumps").iterdir()
        return folder

    def again(self, runner: Runner, scored: ScoredRollout, advantages: Advantages) -> str:
        """What the second minibatch gives here and now, with the weights that the first one left."""
        rows = torch.tensor([2, 3])
        once = replace(runner.algorithm, ppo=runner.config.ppo.model_copy(update={"epochs": 1, "minibatch": 2}))
        optimizer = make_optimizer(runner.roles.trained.parameters(runner.bank), runner.config)
        stats = once.update(scored.select(rows), advantages.select(rows), optimizer, runner.kl_coef, torch.Generator())
        return f"2 rows: policy loss {stats.policy_loss:.6g}, gradient norm {stats.policy_grad_norm:.6g}"

    @pytest.mark.parametrize("own", [False, True], ids=["the estimator's", "one's own"])
    def test_an_update_is_repeated_bit_for_bit(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
    ) -> None:
        """With scores of tokens, which the advantages are made of, and with advantages that no estimator gives."""
        (tmp_path / "steps.py").write_text(
            "def each(completion_ids, **columns):\n    return [[float(t % 5) for t in ids] for ids in completion_ids]\n",
            encoding="utf-8",
        )
        reward = {"use": "process", "target": f"{tmp_path}/steps.py:each", "per": "token"}
        runner, scored = ready(make_config(reward=reward, run={"folder": str(tmp_path / "run")}))
        usual = estimate_advantages(scored, runner.config.ppo, runner.kl_coef)
        given = replace(usual, advantages=usual.advantages.flip(0).contiguous()) if own else usual
        dump = load(self.failed(runner, monkeypatch, scored, given))
        assert dump.rows == [2, 3]
        assert dump.scored is not None
        assert dump.scored.token_scores is not None
        for item in fields(ScoredRollout):
            was = getattr(scored, item.name)
            if isinstance(was, torch.Tensor):
                assert torch.equal(getattr(dump.scored, item.name), was), item.name
        assert (dump.advantages is not None) == own
        held = dump.advantages or estimate_advantages(dump.scored, runner.config.ppo, dump.state.kl_coef)
        assert torch.equal(held.advantages, given.advantages)
        assert given.returns is not None
        assert held.returns is not None
        assert torch.equal(held.returns, given.returns)
        found = replay(tmp_path / "run" / "dumps" / "step-000001-update")
        assert found.now is None
        assert found.detail == self.again(runner, scored, given)

    def test_scores_of_ones_own_are_scored_again(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner, scored = ready(make_config(run={"folder": str(tmp_path / "run")}))

        def refuse(*_: Any) -> None:
            raise NumericError("injected.")

        with monkeypatch.context() as patch:
            patch.setattr(runner.checks, "check_scored", refuse)
            with pytest.raises(NumericError, match="injected"):
                runner.score(scored.rollout, [10.0, 20.0, 30.0, 40.0])
        found = replay(tmp_path / "run" / "dumps" / "step-000001-score")
        assert found.detail == "4 responses were scored, mean 25"

    def test_a_dump_of_an_older_version(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has no scores of tokens and nothing of the caller's own."""
        runner, scored = ready(make_config(run={"folder": str(tmp_path / "run")}))
        folder = self.failed(runner, monkeypatch, scored)
        file = folder / "batch.safetensors"
        old = ("prompt_ids", "prompt_mask", "ids", "mask", "finished", "logprobs", "ref_logprobs", "values", "scores")
        tensors = load_file(file)
        tensors["scores"] = tensors["shaped_scores"]  # what its `scores` were
        save_file({name: tensor for name, tensor in tensors.items() if name in old}, file)
        words = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
        (folder / "dump.json").write_text(json.dumps({**words, "format": 1}), encoding="utf-8")
        assert replay(folder).now is None

    def test_every_field_moves_to_the_device(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        """A field that a later version adds moves too: none is named. Here moving makes a copy, as to another device."""
        runner, scored = ready(make_config())
        full = replace(scored, token_scores=torch.zeros_like(scored.logprobs))
        usual = estimate_advantages(scored, runner.config.ppo)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
        both: tuple[ScoredRollout | Advantages, ...] = (full, usual)
        for one in both:
            moved = one.to(torch.device("cpu"))
            for item in fields(one):
                was, now = getattr(one, item.name), getattr(moved, item.name)
                pairs = [(was[name], now[name]) for name in was] if item.name == "parts" else [(was, now)]
                assert all(a is not b and torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor)), item.name

    def test_a_damaged_dump(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is no whole dump"):
            replay(tmp_path)

    def test_without_a_folder_nothing_is_written(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner, scored = ready(make_config())

        def refuse(*_: Any) -> None:
            raise NumericError("words.")

        monkeypatch.setattr(runner.checks, "check_scored", refuse)
        with pytest.raises(NumericError) as caught:
            runner.score(scored.rollout)
        assert str(caught.value) == "words."
