"""The command line in process: exit codes, what goes to which stream, nothing but one message for a user's mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from marl_core import ConfigError, DataError, NumericError, Plan, PluginError
from marl_core.cli.app import main


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: owner/model}\nreference: disabled-adapter\nreward: {use: function, target: 'mine.py:score'}\n"
        "data: {prompts: prompts.jsonl}\nrun: {folder: runs/x}\n"
    )
    return file


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Runner that notes how it was made, and may be told to raise."""
    noted: dict[str, Any] = {"error": None}

    class Runner:
        def __init__(self, plan: Plan, **options: Any) -> None:
            noted.update(options, config=plan.config)
            self.folder = None

        def prepare(self) -> None:
            """Nothing to load."""

        def train(self) -> None:
            if noted["error"] is not None:
                raise noted["error"]

    module = ModuleType("marl_core.run.runner")
    module.Runner = Runner  # type: ignore[attr-defined]  # a module made for the test
    monkeypatch.setitem(sys.modules, "marl_core.run.runner", module)
    monkeypatch.setattr("marl_core.run.host.quiet_libraries", lambda: None)
    monkeypatch.setattr("marl_core.artifacts.hub.hub_away", lambda: None)
    return noted


def test_run_hands_the_config_on(config: Path, runner: dict[str, Any]) -> None:
    assert main(["run", str(config), "--set", "ppo.steps=3", "--set", "run.seed=7", "--resume"]) == 0
    assert runner["config"].ppo.steps == 3
    assert runner["config"].run.seed == 7
    assert (runner["resume"], runner["override"]) == (True, False)
    assert [choice.use for choice in runner["config"].observers] == ["console", "json-lines"]


def test_named_observers_join_those_that_always_watch(config: Path, runner: dict[str, Any]) -> None:
    named = "observers=[{use: json-lines, samples: 9}, {use: trackers, to: [tensorboard]}]"
    assert main(["run", str(config), "--set", named, "--override"]) == 0
    assert [choice.use for choice in runner["config"].observers] == ["json-lines", "trackers", "console"]
    assert runner["config"].observers[0].options == {"samples": 9}
    assert runner["override"] is True


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a"), 2, "marl: a"),
        (PluginError("b"), 3, "marl: b"),
        (DataError("c"), 4, "marl: c"),
        (NumericError("d"), 5, "marl: d"),
        (KeyboardInterrupt(), 130, "marl: interrupted"),
        (ZeroDivisionError("e"), 1, "marl: a bug in marl: ZeroDivisionError('e'). Run again with --debug"),
    ],
)
def test_exit_codes(
    config: Path, runner: dict[str, Any], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    runner["error"] = error
    assert main(["run", str(config)]) == code
    streams = capsys.readouterr()
    assert streams.err.startswith(text)
    assert "Traceback" not in streams.err + streams.out


def test_debug_shows_the_traceback(config: Path, runner: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    runner["error"] = ZeroDivisionError("e")
    assert main(["run", str(config), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::marl_core.errors.MarlWarning")
def test_check_says_who_is_who(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config), "--set", "sampling.top_p=0.9"]) == 0
    out, err = capsys.readouterr()
    assert "reward function" in out
    assert err.startswith("marl: warning: sampling.top_p: 0.9")
    assert "note: model.path: 'owner/model' isn't on this machine yet" in out
    assert "`hf download owner/model`" in out
    assert out.rstrip().endswith("nothing speaks against this run, as far as could be checked.")
    assert not (config.parent / "runs").exists()


def test_check_has_no_note_where_the_model_is_here(
    config: Path, wide_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config), "--set", f"model.path={wide_folder}"]) == 0
    out = capsys.readouterr().out
    assert "note:" not in out
    assert out.rstrip().endswith("nothing speaks against this run.")


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--set", "reward.use=functoin"], 2, "did you mean 'function'"),
        (["--set", "ppo.batch=x"], 2, "ppo.batch"),
        (["--set", "data.prompts=no.jsonl"], 4, "there is no file 'no.jsonl'"),
        (["--set", "data=null"], 2, "data: is needed"),
        (["--set", "policy.lora={bias: all}"], 2, "policy.lora.bias"),
        (["--memory"], 4, "isn't on this machine"),
    ],
)
def test_check_refuses(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, text: str
) -> None:
    assert main(["check", str(config), *options]) == code
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_config_that_is_not_there_is_2(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that the config names would be 4: see the table in docs/cli.md."""
    assert main([command, str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: can't read the config: No such file" in capsys.readouterr().err


def test_plugins_of_one_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--family", "observer"]) == 0
    families = {line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert families == {"observer"}


@pytest.mark.parametrize("command", [["plugins"], ["new-plugin", "politeness"]])
@pytest.mark.parametrize(
    ("family", "said"),
    [
        (
            "rewards",
            "'rewards' is none of reference, reward, adapter, quantization, advantage, observer. Did you mean 'reward'?",
        ),
        ("refernce", "Did you mean 'reference'?"),
        ("zzz", "is none of reference, reward, adapter, quantization, advantage, observer.\n"),
    ],
)
def test_a_family_that_is_none_gets_the_names(
    command: list[str], family: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--family", family]) == 2
    assert said in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "marl run"


def test_merge_and_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    merge, report = ModuleType("marl_core.bank.merge"), ModuleType("marl_core.report.page")
    given: dict[str, Any] = {}

    def merge_adapter(model: str, adapter: str, out: Path, **options: Any) -> Any:
        given.update(options, model=model, adapter=adapter)
        return SimpleNamespace(out=out, seconds=1.0, max_logit_difference=1e-5, mean_kl_nats=1e-9)

    merge.merge_adapter = merge_adapter  # type: ignore[attr-defined]  # a module made for the test
    report.write_report = lambda runs, out: runs[0] / "report.html"  # type: ignore[attr-defined]  # a module made for the test
    monkeypatch.setattr("marl_core.run.host.quiet_libraries", lambda: None)
    monkeypatch.setitem(sys.modules, "marl_core.bank.merge", merge)
    monkeypatch.setitem(sys.modules, "marl_core.report.page", report)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("marl_core.artifacts.adapter_files.read_adapter", lambda *arguments: None)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}", encoding="utf-8")
    assert main(["merge", "--model", "m", "--adapter", "a", "--out", "o", "--dtype", "bfloat16"]) == 0
    assert given == {"model": "m", "adapter": "a", "dtype": "bfloat16", "revision": None}
    assert main(["report", "runs/x"]) == 0
    out = capsys.readouterr().out
    assert "logits differ by at most 1e-05" in out
    assert "runs/x/report.html" in out
    assert main(["merge", "--model", "m", "--adapter", "a", "--out", "o", "--dtype", "int8"]) == 2


@pytest.mark.parametrize("arguments", [["frob"], ["run"], ["check", "x", "--nope"], []])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: marl" in "".join(capsys.readouterr())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "check" in out
    assert "marl-core " in out
