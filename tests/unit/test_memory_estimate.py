"""`marl check --memory` against what runs have taken, the figures of benchmarks/memory.py: never more, and less by what is said."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from marl_core import Catalog, Plan
from marl_core import testing as marl_testing
from marl_core.config.load import parse_config
from marl_core.plan.memory import OVERHEAD_SHARES, estimate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED: dict[str, dict[str, float]] = json.loads(
    (BENCHMARKS / "results" / "memory.json").read_text(encoding="utf-8")
)["cases"]


def write_hollow_model(folder: Path, **shape: Any) -> None:
    """A model folder whose weights are a header and a hole: the estimate reads no more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, tie_word_embeddings=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_memory", BENCHMARKS / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def inputs(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marl_testing, "write_tiny_model", write_hollow_model)
        bench.write_inputs(folder)
    return folder


def test_every_case_was_measured(bench: ModuleType) -> None:
    assert set(MEASURED) == set(bench.CASES)


def more_than_estimated(case: str, bench: ModuleType, inputs: Path) -> float:
    """How much more than the estimate a run took, as a share of the estimate."""
    plan = Plan.of(parse_config(bench.config_of(case, inputs, "cpu"), case, Catalog.installed()))
    return MEASURED[case]["measured_mib"] / (estimate(plan).peak / 2**20) - 1


@pytest.mark.parametrize("case", MEASURED)
def test_no_run_took_less_than_its_shapes_say(case: str, bench: ModuleType, inputs: Path) -> None:
    """What is counted was there: the estimate is a lower bound, and not an idle one."""
    assert 0 < more_than_estimated(case, bench, inputs) < 1


def test_what_comes_on_top_is_what_was_measured(bench: ModuleType, inputs: Path) -> None:
    """The printed range is that of the nine runs, no constant of its own."""
    shares = [more_than_estimated(case, bench, inputs) for case in MEASURED]
    assert (round(min(shares), 2), round(max(shares), 2)) == OVERHEAD_SHARES
