"""Two worlds for the invariants: the tiny model in every push, a real 135M model in `make test-real`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MakeConfig = Callable[..., Any]
Write = Callable[..., str]
SCORED = {"speed": {"capture": False}}
"""Old log-probs from the pass that scores: bitwise those of the pass that trains. Captured ones round (I24)."""
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


@dataclass(frozen=True)
class World:
    """A model with an SFT and a reward adapter, a maker of configs, and how much its numbers may round.

    Tolerances are about ten times what was measured in float32. `rows`: a row alone against a row in its batch, nats,
    and relative to the number. `gradient`: relative; packed rows round elsewhere (2e-6), as far from float64 as padded ones
    (run/test_rounding.py).
    `sampled`: log-probs of generation against those of scoring, nats; the tiny model's logits at temperature 0.7 span
    tens of nats, so 5e-6 of a number near 1 is 2e-5 here.
    """

    name: str
    model: str
    sft: str
    reward: str
    make: MakeConfig
    rows: float
    gradient: float
    sampled: float

    def right_lines(self) -> dict[str, dict[str, Any]]:
        """The right pairs of policy and reference."""
        return {
            "new-on-base": {"reference": "disabled-adapter"},
            "new-on-merged": {"reference": {"use": "merged-base", "adapter": self.sft}},
            "copy-of-sft": {
                "reference": {"use": "peft-adapter", "adapter": self.sft},
                "policy": {"start": "continue", "from": self.sft},
            },
        }


@pytest.fixture(
    scope="session",
    params=["tiny", pytest.param("real", marks=[pytest.mark.real, pytest.mark.nightly])],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny world, or the real one."""
    make: MakeConfig = request.getfixturevalue("make_config")
    write_sft: Write = request.getfixturevalue("write_sft_adapter")
    write_reward: Write = request.getfixturevalue("write_reward_adapter")
    folder = tmp_path_factory.mktemp(f"world-{request.param}")
    if request.param == "tiny":
        model: str = request.getfixturevalue("wide_folder")  # bitsandbytes wants sizes divisible by 64
        sft, reward = write_sft(model, folder / "sft"), write_reward(model, folder / "reward")

        def make_tiny(**changes: Any) -> Any:
            return make(model={"path": model, **changes.pop("model", {})}, **{**SCORED, **changes})

        return World("tiny", model, sft, reward, make_tiny, rows=2e-6, gradient=5e-6, sampled=2e-5)
    model = real_model()
    targets = {"scale": 0.02, "target_modules": ["q_proj", "v_proj"]}
    sft, reward = write_sft(model, folder / "sft", **targets), write_reward(model, folder / "reward", **targets)

    def make_real(**changes: Any) -> Any:
        ppo = {"steps": 1, "batch": 4, "minibatch": 2, "epochs": 2, "learning_rate": 1e-3, **changes.pop("ppo", {})}
        return make(
            model={"path": model, "dtype": "float32", **changes.pop("model", {})},
            policy={"targets": ["q_proj", "v_proj"], **changes.pop("policy", {})},
            ppo=ppo,
            **{**SCORED, **changes},
        )

    # A sum over 30 layers of width 576 rounds more than one over 2 layers of width 32: 1.4e-5 nats were measured.
    return World("real", model, sft, reward, make_real, rows=1e-4, gradient=1e-4, sampled=1e-4)


def real_model() -> str:
    """Folder of the quickstart's model, fetched once into its cache."""
    sys.path.insert(0, str(QUICKSTART))  # its modules import each other by plain names
    try:
        spec = importlib.util.spec_from_file_location("quickstart_fetch_model", QUICKSTART / "fetch.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        folder: str = module.fetch_model()
        return folder
    finally:
        sys.path.remove(str(QUICKSTART))
