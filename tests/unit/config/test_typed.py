"""What editors and type checkers know of a config made in Python, held by mypy on a user's file, without pydantic's plugin."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import marl_core
import marl_plugins
from marl_core import RunConfig
from marl_core.config import keys, run_config
from marl_core.registry.model_keys import models_in

SETTINGS = """
[mypy]
strict = true
[mypy-torch.*,transformers.*,peft.*,safetensors.*,datasets.*,numpy.*,huggingface_hub.*,jinja2.*,rich.*,typer.*,accelerate.*]
follow_imports = skip
ignore_missing_imports = true
"""
USER = """
from typing import Any

from marl_core import (
    ClipSection, DataSection, EvalSection, KLSection, ModelSection, PolicySection, PPOSection, RunConfig, Runner, RunSection,
    SamplingSection, ShapingSection, SpeedSection, ValueSection,
)
from marl_plugins import AdapterReward, DisabledAdapter, EmaAdapter, FunctionReward, HttpReward, Oft


def mine(completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


functions = [mine, mine]
config = RunConfig(
    model={"path": "m"},
    reference=DisabledAdapter(),
    reward=mine,
    value="policy",
    data=DataSection(prompts="x"),
    ppo={"batch": 32, "clip": 0.2, "kl": {"coef": 0.1}, "advantage": "rloo"},
    policy={"start": "continue", "from": "sft"},
    eval={"judges": {"mine": mine}},
)
RunConfig(model=ModelSection(path="m"), reference="none", reward=functions, observers=["console", {"use": "x", "to": ["y"]}])
RunConfig(model={"path": "m"}, reference=EmaAdapter(), reward=[AdapterReward(path="a"), {"use": mine, "weight": 0.5}])
RunConfig(model={"path": "m"}, reference="none", reward=HttpReward(url="u"), run=RunSection(), speed=SpeedSection())
PPOSection(batch=3, kl={"coef": 0.1}, clip=ClipSection(low=0.1))
PPOSection(kl=KLSection(coef=0.1))
PolicySection(start="continue", source="x")
PolicySection(use="oft", block=32), PolicySection(r=8), PolicySection(use=Oft(block=16), targets=["q_proj"])
RunConfig(model={"path": "m"}, reference="none", policy=Oft(block=8), value={"on": "own", "use": "ia3"})
RunConfig(model={"path": "m"}, reference="none", policy={"use": "oft", "block": 8})
EvalSection(judges={"mine": FunctionReward(target="m:f")})
SamplingSection(), ShapingSection(), ValueSection(on="own")
config.with_changes("ppo.kl.coef", 0.1, "ppo.steps", 20)
config.with_changes({"ppo.kl.coef": 0.1})
runner = Runner(config)
runner.generate(["A"])
runner.generate([[{"role": "user", "content": "A"}]])
runner.generate([{"prompt": "A", "answer": 3}])
runner.step(rollout=runner.rollout(["A"], ["B"]), scores=[1.0])
"""
WRONG = {
    'RunConfig(model={"paht": "m"}, reference="none")': "model",
    'RunConfig(model={"path": 3}, reference="none")': "model",
    'RunConfig(model={"path": "m"}, reference="none", ppo={"bach": 3})': "ppo",
    'RunConfig(model={"path": "m"}, reference="none", ppo={"kl": {"koef": 3.0}})': "ppo",
    'RunConfig(model={"path": "m"}, reference="none", sampling={"form": "x"})': "sampling",
    'RunConfig(model={"path": "m"}, reference="none", policy=3)': "policy",
    'RunConfig(modl={"path": "m"}, reference="none")': "modl",
    'RunConfig(model={"path": "m"})': "reference",
    "PPOSection(bach=3)": "bach",
    'FunctionReward(tarjet="m:f")': "tarjet",
    'config.with_changes("ppo.kl.coef")': "with_changes",
}


@pytest.mark.slow
def test_mypy_takes_what_works_and_refuses_what_doesnt(tmp_path: Path) -> None:
    first_wrong_line = len(USER.splitlines()) + 1
    (tmp_path / "user.py").write_text(USER + "\n".join(WRONG) + "\n", encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    folders = [str(Path(module.__file__ or "").parents[1]) for module in (marl_core, marl_plugins)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": ":".join(folders), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = re.findall(r"^user\.py:(\d+): error: (.*)$", done.stdout, flags=re.MULTILINE)
    assert not [error for error in errors if int(error[0]) < first_wrong_line], done.stdout
    by_line = {int(line): text for line, text in errors}
    for line, (code, word) in enumerate(WRONG.items(), start=first_wrong_line):
        assert word in by_line.get(line, ""), f"{code}: {done.stdout}"


def test_every_section_has_its_keys() -> None:
    """The signature for type checkers, by hand, has what RunConfig has; the rest is generated."""
    source = inspect.getsource(RunConfig)
    signature = source[source.index("def __init__") : source.index(") -> None:")]
    assert set(re.findall(r"^ +(\w+): ", signature, flags=re.MULTILINE)) == set(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        for model in models_in(field.annotation):
            if model.__name__.endswith("Section"):
                assert model.__name__ in marl_core.__all__
                kind = getattr(keys, model.__name__.removesuffix("Section") + "Keys")
                aliases = {inner.alias for inner in model.model_fields.values() if inner.alias}
                assert set(get_type_hints(kind)) == set(model.model_fields) | aliases, name


def test_sections_are_public_by_their_own_names() -> None:
    public: Any = marl_core
    assert {name for name in run_config.__all__ if name != "Section"} <= set(marl_core.__all__)
    assert public.PPOSection is run_config.PPOSection
