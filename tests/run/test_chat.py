"""`marl chat`: the policy of a run, or an adapter, beside the model that it started from."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marl_core import ConfigError, DataError, RunConfig, Runner, Strategy, hookimpl
from marl_core.cli.app import main
from marl_core.cli.chat import _printable
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.run.talk import Talk
from marl_core.testing import write_tiny_model

MakeConfig = Callable[..., RunConfig]
Told = pytest.CaptureFixture[str]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def done(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy has moved far from its base."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = {"folder": str(folder), "checkpoint_every": 1, "keep": 3}
    Runner(make_config(run=run, ppo={"steps": 3, "learning_rate": 0.1}, observers=["json-lines"])).train()
    return folder


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


@pytest.fixture(scope="module")
def chatting(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, prompts_file: str) -> Path:
    """A run whose prompts are chats."""
    root = tmp_path_factory.mktemp("chats")
    base = write_tiny_model(root / "model")
    file = Path(base) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
    data = {"prompts": prompts_file, "chat": True, "system_prompt": "Be brief."}
    changes = {"model": {"path": base}, "data": data, "ppo": {"steps": 1}, "run": {"folder": str(root / "run")}}
    Runner(make_config(**changes)).train()
    return root / "run"


def answers(capsys: Told) -> list[dict[str, str]]:
    """What was printed into a pipe, one dict for each prompt."""
    found: list[dict[str, str]] = []
    for line in capsys.readouterr().out.rstrip("\n").split("\n"):
        name, _, text = line.partition(": ")
        if name == "prompt":
            found.append({})
        found[-1][name] = text
    return found


class TestOfARun:
    def test_two_answers_to_each_prompt(self, run: Path, capsys: Told) -> None:
        assert main(["chat", str(run), "--prompt", "It was", "--prompt", "A good", "--prompt", "It was"]) == 0
        first, second, again = answers(capsys)
        assert set(first) == {"prompt", "base", "policy"}
        assert (first["prompt"], second["prompt"]) == ("It was", "A good")
        assert first["base"] != first["policy"]
        assert again == first  # each prompt is a new one, and the seed decides

    def test_they_are_the_base_and_the_policy_of_the_run(self, run: Path, make_config: MakeConfig) -> None:
        """Token for token what the run's own sampler gives."""
        changes = {"run": {"folder": str(run)}, "ppo": {"steps": 3, "learning_rate": 0.1}}
        runner = Runner(make_config(observers=["json-lines"], **changes), resume=True)
        talk = Talk.of_run(run)
        for voice, adapter in zip(talk.voices, (None, "policy"), strict=True):
            assert isinstance(runner.algorithm.sampler, PolicySampler)
            sampler = replace(runner.algorithm.sampler, adapter=adapter)
            prompts = runner.data.take([0])  # type: ignore[union-attr]
            assert talk.answer(voice, prompts.texts[0], 7).text == sampler(prompts, 7).texts[0]

    def test_a_checkpoint_by_its_step(self, run: Path, capsys: Told) -> None:
        command = ["chat", str(run), "--prompt", "It was", "--max-tokens", "20"]
        said = []
        for more in ([], ["--step", "3"], ["--step", "1"]):
            assert main([*command, *more]) == 0
            said += answers(capsys)
        assert said[0] == said[1]
        assert said[0]["policy"] != said[2]["policy"]
        assert said[0]["base"] == said[2]["base"]
        assert main([*command, "--step", "9"]) == 4
        assert "no checkpoint of step 9; it has the checkpoints of steps 1, 2, 3" in capsys.readouterr().err

    def test_a_damaged_checkpoint_is_passed_over_or_told(self, run: Path, capsys: Told) -> None:
        (run / "checkpoints" / "step-000003" / "policy" / "adapter_model.safetensors").write_bytes(b"half")
        assert Talk.of_run(run).voices[1].about == "the policy after step 2"
        assert main(["chat", str(run), "--step", "3", "--prompt", "x"]) == 4
        assert "step-000003 is damaged (policy/adapter_model.safetensors: hash differs)" in capsys.readouterr().err

    def test_without_checkpoints_the_final_adapter(self, run: Path, capsys: Told) -> None:
        shutil.rmtree(run / "checkpoints")
        assert Talk.of_run(run).voices[1].about == "the policy as the run left it"
        shutil.rmtree(run / "final")
        assert main(["chat", str(run), "--prompt", "x"]) == 4
        assert "no checkpoint and no final adapter yet" in capsys.readouterr().err

    def test_sampling_of_ones_own(self, run: Path, capsys: Told) -> None:
        command = ["chat", str(run), "--prompt", "It was", "--temperature", "0", "--max-tokens", "9"]
        said = []
        for seed in ("1", "2"):
            assert main([*command, "--seed", seed]) == 0
            said += answers(capsys)
        assert said[0] == said[1]  # the likeliest token, whatever the seed
        assert "[cut at 9 tokens]" in said[0]["policy"]
        assert main([*command, "--temperature", "-1"]) == 2
        assert "chat: temperature: Input should be greater than 0" in capsys.readouterr().err

    def test_the_runs_reward_scores_answers(self, run: Path, capsys: Told) -> None:
        assert main(["chat", str(run), "--prompt", "It was", "--score"]) == 0
        (said,) = answers(capsys)
        assert "[score 0." in said["base"] + said["policy"]

    @pytest.mark.parametrize(
        ("body", "said_last"),
        [
            ("answer", "needs the column 'answer', which a chat doesn't have]"),
            ("**columns", "A chat has no columns of the data.]"),
        ],
    )
    def test_a_reward_that_reads_a_column_leaves_the_answers(
        self, make_config: MakeConfig, prompts_file: str, tmp_path: Path, capsys: Told, body: str, said_last: str
    ) -> None:
        """A chat has no columns: both answers are shown, and why there is no score, once."""
        rows = [json.loads(line) for line in Path(prompts_file).read_text(encoding="utf-8").splitlines()]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({**row, "answer": "x"}) + "\n" for row in rows), encoding="utf-8")
        value = "answer" if body == "answer" else "columns['answer']"
        code = (
            f"def has_answer(completions, {body}):\n    return [float(a in c) for a, c in zip({value}, completions)]\n"
        )
        (tmp_path / "scores.py").write_text(code, encoding="utf-8")
        reward = {"use": "function", "target": f"{tmp_path / 'scores.py'}:has_answer"}
        changes = {"data": {"prompts": str(data)}, "reward": [reward], "ppo": {"steps": 1}}
        Runner(make_config(run={"folder": str(tmp_path / "run")}, **changes)).train()
        assert main(["chat", str(tmp_path / "run"), "--score", "--prompt", "It was", "--max-tokens", "4"]) == 0
        *said, reason = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0] for line in said if ": " in line][:2] == ["prompt", "base"]
        assert any(line.startswith("policy: ") for line in said)
        assert "scores.py:has_answer" in reason
        assert reason.endswith(said_last)

    def test_a_pipe_gives_a_prompt_a_line(self, run: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("It was\n\nA good\n"))
        assert main(["chat", str(run)]) == 0
        assert [answer["prompt"] for answer in answers(capsys)] == ["It was", "A good"]

    def test_a_prompt_of_the_runs_template(
        self, done: Path, make_config: MakeConfig, prompts_file: str, tmp_path: Path
    ) -> None:
        data = {"prompts": prompts_file, "prompt_template": "Q: {prompt} A:"}
        Runner(make_config(run={"folder": str(tmp_path / "run")}, data=data, ppo={"steps": 1})).train()
        assert Talk.of_run(tmp_path / "run").prompt("Why?") == "Q: Why? A:"
        assert Talk.of_run(done).prompt("Why?") == "Why?"

    def test_a_base_that_was_merged(
        self, make_config: MakeConfig, sft_adapter: str, tmp_path: Path, capsys: Told
    ) -> None:
        reference = {"use": "merged-base", "adapter": sft_adapter}
        Runner(make_config(run={"folder": str(tmp_path / "run")}, reference=reference, ppo={"steps": 1})).train()
        talk = Talk.of_run(tmp_path / "run")
        assert "prepared by merged-base" in talk.voices[0].about
        assert main(["chat", str(tmp_path / "run"), "--prompt", "It was"]) == 0
        assert set(answers(capsys)[0]) == {"prompt", "base", "policy"}

    def test_a_policy_that_was_continued(self, make_config: MakeConfig, sft_adapter: str, tmp_path: Path) -> None:
        policy = {"start": "continue", "from": sft_adapter}
        reference = {"use": "peft-adapter", "adapter": sft_adapter}
        changes = {"policy": policy, "reference": reference, "ppo": {"steps": 1}}
        Runner(make_config(run={"folder": str(tmp_path / "run")}, **changes)).train()
        start, after = (voice.adapter for voice in Talk.of_run(tmp_path / "run").voices)
        assert (start, after) == ("start", "policy")

    def test_objects_that_only_training_needs_need_not_be_here(self, make_config: MakeConfig, tmp_path: Path) -> None:
        class Mine(Strategy):
            """A reward of a notebook."""

            @hookimpl
            def marl_reward(self) -> Any:
                return lambda rollout: torch.zeros(len(rollout))

        from marl_plugins.quantization import NoQuantization

        changes = {"reward": [Mine()], "quantization": NoQuantization(), "ppo": {"steps": 1}}
        Runner(make_config(run={"folder": str(tmp_path / "run")}, **changes)).train()
        assert Talk.of_run(tmp_path / "run").voices[1].about == "the policy after step 1"

    def test_another_base_than_the_runs(self, run: Path, tmp_path: Path) -> None:
        other = write_tiny_model(tmp_path / "other", seed=5)
        file = run / "config.yaml"
        lines = file.read_text(encoding="utf-8").splitlines()
        changed = [f"  path: {other}" if line.startswith("  path: ") else line for line in lines]
        file.write_text("\n".join(changed), encoding="utf-8")
        with pytest.raises(DataError, match=r"the weights of .* are not those that the run was made on"):
            Talk.of_run(run)


def test_what_a_model_says_is_no_command_to_the_terminal() -> None:
    assert (
        _printable("\n\x1b[2Jgone\x9b1m\tand\nback\n")
        == "\N{REPLACEMENT CHARACTER}[2Jgone\N{REPLACEMENT CHARACTER}1m\tand\nback"
    )


class TestChats:
    def test_a_run_of_chats_is_asked_in_chats(self, chatting: Path) -> None:
        talk = Talk.of_run(chatting)
        assert talk.chats
        assert talk.opened() == [{"role": "system", "content": "Be brief."}]
        assert talk.opened("Be kind.") == [{"role": "system", "content": "Be kind."}]

    def test_each_voice_has_a_history_of_its_own(
        self, chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
    ) -> None:
        asked: list[Any] = []
        real = Talk.answer

        def noted(self: Talk, voice: Any, prompt: Any, seed: int) -> Any:
            asked.append((voice.name, prompt))
            return real(self, voice, prompt, seed)

        lines = iter(["Hi", "", "/help", "And then?", "/reset", "Hi", "/quit", "never"])
        monkeypatch.setattr(Talk, "answer", noted)
        monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        assert main(["chat", str(chatting)]) == 0
        said = capsys.readouterr().out
        assert "policy: the policy after step 1" in said
        assert "chat, temperature 1, at most 6 tokens. /reset begins anew" in said
        assert "/help is no command here. /reset begins anew, /quit ends" in said
        assert next(lines) == "never"
        assert [name for name, _ in asked] == ["base", "policy"] * 3
        assert [len(prompt) for _, prompt in asked] == [2, 2, 4, 4, 2, 2]
        base, policy = asked[2][1], asked[3][1]
        assert [message["role"] for message in base] == ["system", "user", "assistant", "user"]
        assert base[2]["content"] != policy[2]["content"] or base == policy
        assert asked[4][1] == asked[0][1]

    def test_plain_on_demand_and_what_does_not_go_together(self, chatting: Path, run: Path, capsys: Told) -> None:
        assert main(["chat", str(chatting), "--plain", "--prompt", "Hi"]) == 0
        assert main(["chat", str(chatting), "--plain", "--system", "Be kind.", "--prompt", "Hi"]) == 2
        assert "a system message belongs to a chat" in capsys.readouterr().err
        assert main(["chat", str(run), "--chat", "--prompt", "Hi"]) == 2
        assert "this model's tokenizer has no chat template. Ask with --plain" in capsys.readouterr().err

    def test_a_conversation_that_is_too_long(self, chatting: Path) -> None:
        talk = Talk.of_run(chatting)
        with pytest.raises(DataError, match=r"don't fit into the model's \d+ positions. Begin anew \(/reset\)"):
            talk.answer(talk.voices[0], "word " * 2000, 0)
        with pytest.raises(ConfigError):
            talk.with_sampling(max_new_tokens=0)


class TestAdapterFolder:
    def test_beside_its_base(self, run: Path, tiny_folder: str, capsys: Told) -> None:
        adapter = str(run / "final" / "policy")
        assert main(["chat", adapter, "--model", tiny_folder, "--prompt", "It was", "--max-tokens", "6"]) == 0
        (said,) = answers(capsys)
        assert main(["chat", str(run), "--prompt", "It was", "--max-tokens", "6"]) == 0
        assert answers(capsys) == [said]

    def test_what_is_missing_or_too_much(self, run: Path, tiny_folder: str, tmp_path: Path, capsys: Told) -> None:
        adapter = str(run / "final" / "policy")
        for arguments, code, message in (
            ([adapter], 2, "is an adapter. Give the base it was trained on: --model BASE"),
            ([adapter, "--model", tiny_folder, "--step", "1"], 2, "so there is no --step"),
            ([str(run), "--model", tiny_folder], 2, "a run has its own base. Leave --model out"),
            ([str(tmp_path)], 4, "(no config.yaml). Give a run folder, or an adapter folder with --model"),
        ):
            assert main(["chat", *arguments, "--prompt", "x"]) == code
            assert message in capsys.readouterr().err

    def test_another_base_is_refused(self, run: Path, tmp_path: Path, capsys: Told) -> None:
        other = write_tiny_model(tmp_path / "other", seed=5)
        assert main(["chat", str(run / "final" / "policy"), "--model", other, "--prompt", "x"]) == 4
        assert "whose weights are not this base's" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_told(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    file = run / "final" / "policy" / "adapter_model.safetensors"
    save_file({name: tensor[:1] for name, tensor in load_file(file).items()}, file)
    with pytest.raises(DataError, match=r"policy: .* doesn't fit this base"):
        Talk.of_run(run)


class Terminal:
    """A real terminal of some width with `marl chat` in it."""

    def __init__(self, run: Path, columns: int) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "marl_core.cli", "chat", str(run)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.said = ""

    def until(self, text: str) -> str:
        """What was said, until `text` was."""
        end = time.monotonic() + 90
        while text not in self.said:
            assert time.monotonic() < end, self.said
            if select.select([self.master], [], [], 0.2)[0]:
                self.said += os.read(self.master, 4096).decode("utf-8", "replace")
        said, self.said = self.said, ""
        return said

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture
def terminal(run: Path) -> Iterator[Callable[[int], Terminal]]:
    opened: list[Terminal] = []

    def open_one(columns: int) -> Terminal:
        opened.append(Terminal(run, columns))
        return opened[-1]

    yield open_one
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "end"), [(120, "\x04"), (60, "/quit\r")])
def test_at_a_terminal(terminal: Callable[[int], Terminal], columns: int, end: str) -> None:
    shown = terminal(columns)
    shown.until("> ")
    shown.type("It was\r")
    said = shown.until("\n> ")
    wide = any("base" in line and "policy" in line for line in said.splitlines())
    assert wide == (columns == 120)
    shown.type(end)
    assert shown.process.wait(20) == 0
