"""docs/gpu.md: its table is what the estimate says now, and its configs fit the cards they are for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, Plan
from marl_core.config.load import load_config
from marl_core.plan.memory import OVERHEAD_SHARES, estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> Any:
    """The script that writes the table."""
    spec = importlib.util.spec_from_file_location("make_gpu_page", ROOT / "docs" / "make_gpu_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_estimates(page: Any, tmp_path: Path) -> None:
    assert page.table(tmp_path) in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), (
        "run python docs/make_gpu_page.py"
    )


@pytest.mark.parametrize(("name", "card", "said"), [("24gb", 24e9, "10.2 of 22"), ("80gb", 80e9, "33.6 of 75")])
def test_the_configs_fit_with_what_comes_on_top(page: Any, tmp_path: Path, name: str, card: float, said: str) -> None:
    model = page.write_shapes(page.llama().to_dict(), tmp_path / "model")
    sets = [f"model.path={model}", f"reward.path={model}/reward"]
    plan = Plan.of(load_config(ROOT / "docs" / f"gpu-{name}.yaml", sets, Catalog.installed()))
    peak = estimate(plan).peak
    assert peak * (1 + OVERHEAD_SHARES[1]) < card
    assert f"{peak / 2**30:.1f} of {card / 2**30:.0f}" == said
    assert f"{said} GiB" in " ".join((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split())
