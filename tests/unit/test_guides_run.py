"""What the guides show happens: the first hour from file to file, the commands after training; and a run writes no file, and no field
of a file, that docs/run-folder.md leaves out."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from marl_core import MarlError, Runner
from marl_core.cli.app import main
from marl_core.report.metric_notes import note_of
from marl_core.testing import tiny_tokenizer, write_tiny_model

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Kind and text of each code block."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


# -- the run folder -----------------------------------------------------------------------------------------


def section(title: str) -> str:
    """The text below a heading of docs/run-folder.md."""
    return page("run-folder.md").split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def in_code(text: str) -> set[str]:
    """The names that stand in code quotes."""
    return {name for quoted in re.findall(r"`([^`]+)`", text) for name in (quoted, *re.split(r"[|\s,]+", quoted))}


@pytest.fixture
def run_folder(tmp_path: Path, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of everything that writes: value adapter, moving reference, judges, logging reward; resumed, then failed."""
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(
        "def talks(completions, log_metric, log_extra, **_):\n"
        "    log_metric('mine/number', 1.0)\n    log_extra('column_of_mine', [1] * len(completions))\n"
        "    return [float(len(text)) for text in completions]\n"
        "calls = []\n"
        "def breaks(completions, **_):\n"
        "    calls.append(1)\n    return [0.5 + len(calls)] * len(completions) if len(calls) < 3 else []\n",
        encoding="utf-8",
    )
    rows = [json.dumps({"prompt": f"film {i}", "label": i}) for i in range(8)]
    Path("prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    talks = {"use": "function", "target": "rewards.py:talks"}
    written: dict[str, Any] = {
        "reference": {"use": "ema-adapter"},
        "reward": talks,
        "value": {"on": "own", "r": 2},
        "data": {"prompts": "prompts.jsonl"},
        "eval": {"prompts": "prompts.jsonl", "judges": {"second": talks}, "samples": 2},
        "observers": ["json-lines"],
        "run": {"folder": "run", "checkpoint_every": 1, "device": "cpu"},
    }

    def config(steps: int, **changes: Any) -> Any:
        return make_config(**{**written, "ppo": {"steps": steps, "batch": 4, "minibatch": 2}, **changes})

    Runner(config(2)).train()
    Runner(config(3), resume=True).train()
    with contextlib.suppress(MarlError):
        broken = {"use": "function", "target": "rewards.py:breaks"}
        Runner(config(6, reward=broken), resume=True, override=True).train()
    return tmp_path / "run"


def general(name: str) -> str:
    """A file's name as the page writes it: no numbers."""
    name = re.sub(r"step-\d{6}-\w+", "step-NNNNNN-PHASE", name)
    return re.sub(r"step-\d+(?=\.)", "step-N", re.sub(r"step-\d{6}", "step-NNNNNN", name))


def test_every_file_of_a_run_is_on_the_page(run_folder: Path) -> None:
    named = page("run-folder.md")
    files = [file.relative_to(run_folder) for file in run_folder.rglob("*") if file.is_file()]
    assert {"checkpoints", "final", "dumps"} <= {file.parts[0] for file in files}
    lost = {general(file.name) for file in files if general(file.name) not in named}
    lost |= {general(part) for file in files for part in file.parts[:-1] if f"{general(part)}/" not in named}
    assert not lost, "docs/run-folder.md doesn't name them"


def test_every_field_of_a_run_is_on_the_page(run_folder: Path) -> None:
    fields: dict[str, set[str]] = {}
    for file in run_folder.rglob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        title = general(str(file.relative_to(run_folder))).split("/")[0]
        title = "preflight.json" if title.startswith("preflight") else title
        if file.name not in ("manifest.json", "adapter_config.json"):
            fields.setdefault(title, set()).update(record)
    provenance = json.loads((run_folder / "provenance.json").read_text(encoding="utf-8"))
    fields["provenance.json"] |= {*provenance["base"], *provenance["hardware"]}
    fields["provenance.json"] |= {name for session in provenance.get("sessions", ()) for name in session}
    check = json.loads((run_folder / "preflight.json").read_text(encoding="utf-8"))["checks"]
    fields["preflight.json"] |= {name for one in check for name in (*one, one["name"])}
    fields["checkpoints"] |= {"count", "mean", "squares"}
    for name in ("samples.jsonl", "evals.jsonl"):
        lines = [json.loads(line) for line in (run_folder / name).read_text(encoding="utf-8").splitlines()]
        fields[name] = {field for line in lines for field in line} - {"column_of_mine"}
        if name == "evals.jsonl":
            fields[name] |= {field for line in lines for sample in line["samples"] for field in sample}
    assert {
        "provenance.json",
        "preflight.json",
        "samples.jsonl",
        "evals.jsonl",
        "checkpoints",
        "final",
        "dumps",
    } <= set(fields)
    for title, found in fields.items():
        named = in_code(section(title.replace("run.folder", "")))
        assert not found - named, f"docs/run-folder.md, {title}"


def test_every_metric_of_a_step_is_on_its_page(run_folder: Path) -> None:
    lines = [json.loads(line) for line in (run_folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    fields = {field for line in lines for field in line} - {"step", "time", "mine/number"}
    headings = set(re.findall(r"^### `(.+)`$", page("metrics.md"), flags=re.MULTILINE))
    for field in fields:
        note = note_of(field)
        assert note is not None, field
        assert note.name in headings


def test_what_strategies_and_optimizer_keep_is_named_as_the_page_says(run_folder: Path) -> None:
    (newest, *_) = sorted((run_folder / "checkpoints").glob("step-*"), reverse=True)
    assert all(key.startswith("reference|") for key in load_file(newest / "strategies.safetensors"))
    assert {key.split("/")[0] for key in load_file(newest / "optimizer.safetensors")} == {"policy", "value"}
    batch = next((run_folder / "dumps").iterdir()) / "batch.safetensors"
    assert set(load_file(batch)) <= in_code(section("dumps"))


def test_the_steps_are_read_as_the_page_shows(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [text for kind, text in blocks(page("run-folder.md")) if kind == "python"]
    capsys.readouterr()
    exec(compile(code.replace("runs/first", str(run_folder)), "docs/run-folder.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) == 3


# -- after training -----------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_sft_adapter: Callable[..., str]) -> Path:
    """A tiny model, an SFT adapter of it and a finished run, under the names of docs/after-training.md."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model("my-model")
    write_sft_adapter("my-model", Path("sft"))
    Path("rewards.py").write_text("def low(completions, **_): return [0.0] * len(completions)\n", encoding="utf-8")
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"film {i}"}) for i in range(4)), encoding="utf-8")
    Path("run.yaml").write_text(
        "model: {path: my-model, dtype: float32}\nreference: disabled-adapter\nreward: {use: function, target: 'rewards.py:low'}\n"
        "data: {prompts: prompts.jsonl}\nsampling: {max_new_tokens: 4}\nppo: {steps: 1, batch: 2, minibatch: 2}\n"
        "run: {folder: runs/first, device: cpu}\n",
        encoding="utf-8",
    )
    assert main(["run", "run.yaml", "--quiet"]) == 0
    return tmp_path


def test_the_ways_after_training(workplace: Path) -> None:
    names: dict[str, Any] = {}
    ran = 0
    for kind, text in blocks(page("after-training.md")):
        if kind == "sh":
            for line in text.strip().splitlines():
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
                ran += 1
        elif kind == "python":
            exec(compile(text, "docs/after-training.md", "exec"), names)
            ran += 1
    assert ran == 5
    assert {file.name for file in Path("published").iterdir()} >= {"README.md", "adapter_model.safetensors"}
    told = json.loads(re.findall(r'```\n(\{"base".*?)\n```', page("after-training.md"))[0])
    assert told == json.loads(Path("runs/first/final/policy/marl.json").read_text(encoding="utf-8"))


# -- the first hour -----------------------------------------------------------------------------------------


def test_the_first_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is written and each command run, in the page's order, on a tiny model and for two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARL__RUN__DEVICE", "cpu")
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    write_tiny_model("tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained("tiny")
    commands, files = [], []
    for kind, text in blocks(page("first-hour.md")):
        name = re.match(r"# file: (\S+)\n", text)
        if name:
            Path(name[1]).write_text(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"), encoding="utf-8")
            files.append(name[1])
        elif kind == "python":
            exec(compile(text, "docs/first-hour.md", "exec"), {})
        elif kind == "sh":
            for line in text.strip().splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "marl", f"nobody runs this: {line}"
                small = ["model.path=tiny", "ppo.batch=4", "ppo.minibatch=2", "ppo.steps=2", "eval.limit=2"]
                sets = [part for one in small for part in ("--set", one)] if words[1] in ("run", "check") else []
                with contextlib.redirect_stdout(io.StringIO()):
                    assert main([*words[1:], *sets]) == 0, line
                commands.append(words[1])
    assert {"check", "run", "report"} <= set(commands)
    assert len(files) == 2
    assert Path("runs/sums/report.html").is_file()
