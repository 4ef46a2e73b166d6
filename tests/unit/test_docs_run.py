"""What the pages show is executed: docs/plugins.md block by block, each command, each option of each strategy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.main import get_command

from marl_core import Catalog, RunConfig, Runner, Strategy, dump_config
from marl_core.cli.app import app, main
from marl_core.config.choice import Choice
from marl_core.config.fields import choices_in
from marl_core.config.load import parse_config
from marl_core.config.yaml_text import parse_yaml
from marl_core.plan.plan import Plan
from marl_core.registry.families import FAMILIES, FamilyName
from marl_core.testing import write_tiny_model

DOCS = Path(__file__).parents[2] / "docs"
BASE = {"model": {"path": "m"}, "reference": "disabled-adapter", "reward": {"use": "function", "target": "m:f"}}


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and text of all code blocks of a page."""
    return re.findall(r"```(\w*)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as the pages assume it, current and importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    write_tiny_model("my-model")
    rows = [json.dumps({"prompt": f"film {i}", "label": i}) for i in range(8)]
    Path("prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "marl_politeness", "test_marl_politeness")):
            del sys.modules[name]


class Shell:
    """Runs the lines of a `sh` block: marl in this process, pip into a folder of its own, pytest on a package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self._monkeypatch = monkeypatch

    def run(self, text: str) -> None:
        for line in text.strip().splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "marl":
                self.said.append(line)
                assert main(words[1:]) == 0, line
            elif words[:2] == ["pip", "install"]:
                self._install(words[-1].partition("[")[0])  # pytest, its extra, is here
            else:
                assert words[:3] == ["python", "-m", "pytest"], f"nobody runs this: {line}"
                assert pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *words[3:]]) == 0, line

    def _install(self, package: str) -> None:
        """As pip does with -e: metadata into a folder on the path, code from where it lies."""
        alone = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "install", *alone, "--target", "site"]
        subprocess.run([*pip, f"./{package}"], check=True, capture_output=True)
        for copy in Path("site").glob("*.py"):
            copy.unlink()
        self._monkeypatch.syspath_prepend(Path("site").resolve())
        self._monkeypatch.syspath_prepend(Path(package).resolve())


def test_the_page_on_plugins(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(monkeypatch)
    for kind, text in blocks("plugins.md"):
        named = re.match(r"# file: (\S+)\n", text)
        if named:
            (workplace / named[1]).write_text(text, encoding="utf-8")
            for module in [name for name in sys.modules if "marl_politeness" in name]:
                del sys.modules[module]
        elif kind == "python":
            exec(compile(text, "docs/plugins.md", "exec"), {})
        else:
            assert kind == "sh", f"nobody runs this: {text}"
            shell.run(text)
    out = capsys.readouterr().out
    assert "Noisy: two calls on the same rollout gave different numbers" in out
    for name in ("function", "strategy"):
        lines = (workplace / "runs" / name / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 2
    assert re.search(r"^\[-?0\.0, -?\d+\.\d+\]$", out, flags=re.MULTILINE)  # the moving average's KL
    assert "tensor([-1.,  1.,  2., -2.])\n" in out
    assert re.search(r"^2 \d+ '", out, flags=re.MULTILINE)  # the observer's second step


CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def a_run_of_chats() -> None:
    """runs/chats, on a model with a chat template."""
    write_tiny_model("my-chat-model")
    file = Path("my-chat-model/tokenizer_config.json")
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**tokenizer, "chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    written = {
        **BASE,
        "model": {"path": "my-chat-model", "dtype": "float32"},
        "reward": {"use": "length-format", "pattern": "a"},
        "data": {"prompts": "prompts.jsonl", "chat": True},
        "sampling": {"max_new_tokens": 4},
        "ppo": {"steps": 1, "batch": 2, "minibatch": 2},
        "run": {"folder": "runs/chats", "device": "cpu"},
    }
    Runner(parse_config(written, "runs/chats", Catalog.installed())).train()


class NoHub:
    """Stands for the hub's interface: nothing leaves the machine."""

    def create_repo(self, name: str, **_: Any) -> str:
        return f"https://hub.example/{name}"

    def upload_folder(self, **_: Any) -> None:
        """Nothing."""


def test_every_command_and_each_of_its_options_has_an_executed_example(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_sft_adapter: Any,
    write_reward_adapter: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_sft_adapter("my-model", workplace / "sft")
    write_reward_adapter("my-model", workplace / "my-reward-adapter")
    a_run_of_chats()
    (workplace / "run.yaml").write_text(
        "model: {path: my-model, dtype: float32}\nreference: disabled-adapter\n"
        'reward: {use: function, target: "rewards.py:low"}\ndata: {prompts: prompts.jsonl, max_prompt_tokens: 16}\n'
        "sampling: {max_new_tokens: 4}\nppo: {steps: 1, batch: 2, minibatch: 2}\nrun: {folder: runs/first}\n",
        encoding="utf-8",
    )
    (workplace / "rewards.py").write_text(
        "def low(completions, **_): return [0.0] * len(completions)\n"
        "calls = []\ndef broken(completions, **_):\n    calls.append(1)\n"
        "    return [0.0] * len(completions) if len(calls) < 3 else []\n",
        encoding="utf-8",
    )
    (workplace / "ppo_lora.yaml").write_text("stage: ppo\nmodel_name_or_path: my-model\n", encoding="utf-8")
    assert (
        main(
            [
                "run",
                "run.yaml",
                "--set",
                "run.folder=runs/broken",
                "--set",
                "ppo.steps=3",
                "--set",
                "reward.target=rewards.py:broken",
            ]
        )
        == 3
    )
    assert [dump.name for dump in Path("runs/broken/dumps").iterdir()] == ["step-000002-score"]
    monkeypatch.setattr("huggingface_hub.HfApi", NoHub)
    shell = Shell(monkeypatch)
    for kind, text in blocks("cli.md"):
        if kind == "sh":
            shell.run(text)
    group: Any = get_command(app)
    for name, command in group.commands.items():
        shown = " ".join(line for line in shell.said if line.startswith(f"marl {name} ") or line == f"marl {name}")
        assert shown, f"docs/cli.md has no executed example (a ```sh block) of marl {name}"
        for parameter in command.params:
            options = [option for option in parameter.opts if option.startswith("--")]
            assert not options or any(option in shown for option in options), f"no executed example of {name} {options}"


def keys(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """All keys of a section and of those below it, dotted."""
    for name, field in model.model_fields.items():
        here = f"{path}{field.alias or name}"
        yield here
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not issubclass(inner, Choice):
            yield from keys(inner, f"{here}.")


def test_every_key_has_an_example_that_is_parsed() -> None:
    (text,) = (text for kind, text in blocks("config.md") if kind == "yaml")
    written: Any = parse_yaml(text, "config.md")
    for key in keys(RunConfig):
        place = written
        for part in key.split("."):
            assert part in place, f"docs/config.md, every key: no {key}"
            place = place[part]
    config = parse_config(written, "config.md", Catalog.installed())
    assert config.model_dump(by_alias=True) == parse_config(
        parse_yaml(dump_config(config), "again"), "again", Catalog.installed()
    ).model_dump(by_alias=True)


def strategies() -> list[tuple[FamilyName, str, type[Strategy]]]:
    catalog = Catalog.installed()
    return [
        (family, listing.name, catalog.load(family, listing.qualified_name).strategy_class)
        for family in FAMILIES
        for listing in catalog.listings(family)
        if listing.package == "marl-core"
    ]


def shown_options() -> set[tuple[str, str, str]]:
    """Family, strategy and option of everything that docs/strategies.md shows; each block is parsed and built."""
    found: set[tuple[str, str, str]] = set()
    for kind, text in blocks("strategies.md"):
        assert kind == "yaml"
        written = {**BASE, **parse_yaml(text, "strategies.md")}
        catalog = Catalog.installed()
        config = parse_config(written, "strategies.md", catalog)
        Plan.of(config, catalog)
        for _, choice in choices_in(config):
            if isinstance(choice.use, str):
                found |= {(choice.family, choice.use, option) for option in ("", *choice.options)}
                found |= (
                    {(choice.family, choice.use, "options")} if "options: {" in text else set()
                )  # told as any others
    return found


def test_every_strategy_and_each_of_its_options_has_an_example() -> None:
    wanted = {(family, name, option) for family, name, kind in strategies() for option in ("", *kind.model_fields)}
    missing = wanted - shown_options()
    assert not missing, f"docs/strategies.md shows no {sorted(missing)}"
