"""Whatever stands in a config: an exit code of the design and a message, never a traceback, a hang or torch."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from marl_core import MarlError
from marl_core.store.folder import RunFolder

Command = Callable[..., int]
REWARD = "def score(completions, **columns):\n    return [0.0] * len(completions)\n"
VALID: dict[str, Any] = {
    "model": {"path": "owner/model"},
    "reference": "disabled-adapter",
    "reward": {"use": "function", "target": "mine.py:score"},
    "data": {"prompts": "prompts.jsonl"},
    "sampling": {"max_new_tokens": 8, "temperature": 1.0, "stop": []},
    "ppo": {"steps": 2, "batch": 4, "minibatch": 2, "kl": {"coef": 0.1}, "clip": 0.2},
    "shaping": {"clip": 3.0},
    "eval": {"prompts": "prompts.jsonl", "every": 1},
    "observers": ["json-lines"],
    "run": {"folder": "runs/x", "seed": 1},
}
TEXT = yaml.safe_dump(VALID)
VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    " ",
    "3",
    "yes",
    0,
    -1,
    1,
    3.5,
    -0.0,
    5e-324,
    1e400,
    float("nan"),
    float("-inf"),
    2**63,
    10**40,
    [],
    {},
    [[]],
    [None],
    {"use": None},
    {"use": "function"},
    {"use": {"use": "function"}},
    {"use": "adapter", "path": 3},
    "disabled-adapter",
    "none",
    "marl-core/none",
    "no/such/strategy",
    "..",
    "/",
    "//",
    "~",
    "~nobody",
    ".",
    "prompts.jsonl",
    "a\0b",
    "\ud800",
    "x" * 300,
    "é" * 200,
    "__base__",
    "*",
    "(",
    "[",
    "{0}",
    "%s",
    "$HOME",
    "mine.py",
    "mine.py:",
    ":score",
    "mine.py:score:score",
    "os:system",
    "builtins:eval",
    "a\nb",
    "\t",
    "1_000",
    "0x10",
    "010",
    "2026-01-01",
    "1e-5",
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    return tmp_path


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in items for place in places(inner, (*prefix, key))]


@st.composite
def edited_configs(draw: st.DrawFn) -> Any:
    """The valid config with a few values, keys or sections exchanged."""
    config = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(config)))
        holder: Any = config
        for key in place[:-1]:
            holder = holder[key]
        value = draw(st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=20))
        if isinstance(holder, dict) and draw(st.booleans()):
            holder[draw(st.sampled_from(["use", "path", "from", "r", "kl", "Model", "ppo ", "", "max-grad-norm"]))] = (
                value
            )
        else:
            holder[place[-1]] = copy.deepcopy(value)
    return config


@st.composite
def edited_texts(draw: st.DrawFn) -> bytes:
    """The valid config's bytes with pieces put in, cut out or doubled."""
    text = TEXT.encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        piece = draw(
            st.binary(max_size=6)
            | st.sampled_from(
                [
                    b"&a ",
                    b"*a",
                    b"<<: ",
                    b"!!python/object:os.system ",
                    b"---\n",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b"\r\n",
                    b"\t",
                    b"? ",
                    b"- ",
                    b": ",
                    b"{",
                    b"[",
                    b"|\n",
                    b"#",
                    b"'",
                    b'"',
                ]
            )
        )
        text = text[:start] + piece * draw(st.integers(0, 3)) + text[draw(st.sampled_from([start, end])) :]
    return text


@settings(max_examples=120)
@given(config=edited_configs())
def test_edited_configs(command: Command, files: Path, config: Any) -> None:
    try:
        written = yaml.safe_dump(config, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:  # nothing that a file could hold
        return
    (files / "run.yaml").write_bytes(written)
    command("check", "run.yaml")


@settings(max_examples=120)
@given(text=edited_texts() | st.binary(max_size=200))
def test_edited_texts(command: Command, files: Path, text: bytes) -> None:
    (files / "run.yaml").write_bytes(text)
    command("check", "run.yaml", "--memory")


KEYS = st.sampled_from(
    ["ppo.kl.coef", "ppo", "reward.0.use", "reward", "run.folder", "observers.7", "a..b", "", ".", "data.prompts"]
)


@settings(max_examples=80)
@given(key=KEYS | st.text(max_size=10), value=st.text(max_size=20) | st.sampled_from([str(v) for v in VALUES]))
def test_settings_on_the_command_line(command: Command, files: Path, key: str, value: str) -> None:
    (files / "run.yaml").write_text(TEXT, encoding="utf-8")
    command("check", "run.yaml", "--set", f"{key}={value}")


@settings(max_examples=40)
@given(
    key=st.sampled_from(["PPO__KL__COEF", "RUN__SEED", "PPO", "X", "REWARD__0__WEIGHT", "A____B", "MODEL__DTYPE"]),
    value=st.sampled_from([str(v) for v in VALUES if "\0" not in str(v)]),
)
def test_settings_in_the_environment(
    command: Command, files: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    (files / "run.yaml").write_text(TEXT, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setenv(f"MARL__{key}", value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"))
        command("check", "run.yaml")


BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
NASTY: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"- a",
    "a text": b"hello",
    "a number": b"3",
    "comments only": b"# x\n",
    "deep": b"a: " + b"[" * 3000 + b"]" * 3000,
    "deeper mapping": b"".join(b" " * i + b"a:\n" for i in range(300)),
    "doubled key": b"model: {path: x}\nmodel: {path: y}\n",
    "tabs": b"model:\n\tpath: x\n",
    "python object": b"model: !!python/object/apply:os.system ['touch hacked']\n",
    "any tag": b"model: !x y\n",
    "bomb": BOMB.encode(),
    "loop": b"a: &a [*a]\n",
    "byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "utf-16": TEXT.encode("utf-16"),
    "latin": "model: {path: é}".encode("latin-1"),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "NUL": b"model: {path: a\0b}\n",
    "binary": bytes(range(256)),
    "large": b"#" * 10_000_000,
    "a long line": b"a: " + b"x" * 500_000,
    "number key": b"1: 2\n",
    "yes as a key": b"yes: {}\n",
    "list key": b"[a]: 1\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "merge key": b"a: &a {path: x}\nmodel:\n  <<: *a\n",
    "a date": b"model: {path: 2026-01-01}\n",
    "unclosed": b"model: {path: x\n",
}


@pytest.mark.parametrize("what", NASTY)
def test_nasty_texts(command: Command, files: Path, what: str) -> None:
    (files / "run.yaml").write_bytes(NASTY[what])
    code = command("check", "run.yaml")
    assert code == (0 if what in ("byte order mark", "windows") else 2)
    assert not (files / "hacked").exists()


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "broken link", "loop of links", "unreadable", "long name", "device"]
)
def test_nasty_paths(command: Command, files: Path, kind: str) -> None:
    path = files / "odd.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "loop of links":
        path.symlink_to(path)
    elif kind == "unreadable":
        path.write_text(TEXT, encoding="utf-8")
        path.chmod(0)
        if os.access(path, os.R_OK):  # root may read everything
            path.unlink()
    name = {"long name": "x" * 5000, "device": os.devnull}.get(kind, str(path))
    assert command("check", name) == 2


NUMBERS = [
    "ppo.learning_rate",
    "ppo.batch",
    "ppo.minibatch",
    "ppo.steps",
    "ppo.epochs",
    "ppo.gamma",
    "ppo.lam",
    "ppo.clip",
    "ppo.kl.coef",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.max_new_tokens",
    "policy.r",
    "policy.alpha",
    "run.seed",
    "run.threads",
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "-1", "'3'", "true", "[]", "", "3 3"])
def test_numbers_out_of_range(command: Command, files: Path, key: str, value: str) -> None:
    (files / "run.yaml").write_text(TEXT, encoding="utf-8")
    code = command("check", "run.yaml", "--set", f"{key}={value}")
    may_be_absent = value == "" and key in ("run.threads",)
    assert code == (0 if may_be_absent else 2)


FOLDERS = [
    "",
    "/",
    "//",
    "///../",
    "prompts.jsonl",
    "prompts.jsonl/x",
    "/dev/null",
    "/dev/null/x",
    "~no-such-user/x",
    "a\0b",
    "x" * 300,
    "a/" * 3000,
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_run_folders_that_can_not_be(command: Command, files: Path, folder: str) -> None:
    config = {**VALID, "run": {"folder": folder}}
    (files / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert command("check", "run.yaml") == 2


PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "model.path": lambda path: {"model": {"path": path}},
    "model.tokenizer": lambda path: {"model": {"path": "owner/model", "tokenizer": path}},
    "policy.from": lambda path: {"policy": {"start": "continue", "from": path}},
    "reference.adapter": lambda path: {"reference": {"use": "merged-base", "adapter": path}},
    "reward.path": lambda path: {"reward": {"use": "adapter", "path": path}},
    "reward.path (model)": lambda path: {"reward": {"use": "model", "path": path}},
    "reward.target": lambda path: {"reward": {"use": "function", "target": f"{path}.py:score"}},
    "data.prompts": lambda path: {"data": {"prompts": f"{path}.jsonl"}},
    "eval.prompts": lambda path: {"eval": {"prompts": f"{path}.csv"}},
}
ODD_PATHS = [
    "x" * 300,
    "a/" * 3000,
    "~no-such-user/x",
    "~",
    "a\0b",
    "/dev/null/x",
    "é/ü ß",
    "..",
    "/",
    "prompts.jsonl/x",
    "$HOME/x",
    "*",
    "\n",
    "C:\\x",
]


@pytest.mark.parametrize("path", ODD_PATHS)
@pytest.mark.parametrize("place", PLACES)
def test_odd_paths(command: Command, files: Path, place: str, path: str) -> None:
    (files / "run.yaml").write_text(yaml.safe_dump({**VALID, **PLACES[place](path)}), encoding="utf-8")
    assert command("check", "run.yaml", "--memory") in (0, 2, 4)  # the user's mistake, not the plugin's


DAMAGE = st.sampled_from(
    ["config.yaml", "provenance.json", "preflight.json", "steps.jsonl", "evals.jsonl", "samples.jsonl", "curves.png"]
)


@settings(max_examples=60)
@given(
    name=DAMAGE,
    content=st.binary(max_size=60)
    | st.sampled_from(
        [
            b"{}",
            b"[]",
            b"null",
            b"3",
            b'{"step": 1}\n',
            b'{"step": "x"}',
            b"\x80\x04.",
            b'{"checks": 3}',
            b'{"checks": [{}]}',
            b'{"step": 1, "judges": 3}',
        ]
    ),
)
def test_reports_of_damaged_run_folders(command: Command, files: Path, name: str, content: bytes) -> None:
    run = files / "run"
    run.mkdir(exist_ok=True)
    for child in run.iterdir():
        child.unlink()
    (run / "config.yaml").write_text(TEXT, encoding="utf-8")
    (run / name).write_bytes(content)
    assert command("report", str(run)) in (0, 4)


@settings(max_examples=40)
@given(content=edited_texts() | st.binary(max_size=60))
def test_resuming_over_a_damaged_config(files: Path, content: bytes) -> None:
    from marl_core.config.load import load_config

    (files / "run.yaml").write_text(TEXT, encoding="utf-8")
    config = load_config(files / "run.yaml", env={})
    run = files / "runs" / "x"
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_bytes(content)
    with contextlib.suppress(MarlError):
        RunFolder.open(config, resume=True)
