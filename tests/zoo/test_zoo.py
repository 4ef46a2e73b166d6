"""Every causal language model class of transformers works as transformers and peft alone do, or is refused with a sentence.

A sample runs in every push; `make zoo` runs all and writes what it found, from which docs/models.md is made.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
import zoo_models

DOCS = Path(__file__).parents[2] / "docs"
SAMPLE = {
    "llama": "rotary positions",
    "gpt2": "learned positions, a head that is the embedding, Conv1D",
    "bloom": "alibi",
    "bart": "a decoder that takes no positions",
    "roberta": "positions that count from the padding id on",
    "bert without is_decoder": "not causal",
    "gemma2": "soft caps and windows",
    "granite": "scaled logits",
    "lfm2 with small weights": "short convolutions",
    "bamba": "state spaces and attention",
    "mamba": "state spaces alone",
    "qwen3_5": "linear attention, the text model of a multimodal one",
    "mixtral": "fused experts behind a router with noise",
    "deepseek_v3": "latent attention, shared experts",
}
"""One of each kind."""
NAMES = list(zoo_models.models())
RECORDED_WITH = "5.23.0"
"""The transformers that `make zoo` was last run with; others have other models, and some of the same with other attention."""
as_recorded = pytest.mark.skipif(
    transformers.__version__ != RECORDED_WITH, reason=f"docs/models.json is of transformers {RECORDED_WITH}"
)


def recorded() -> dict[str, Any]:
    """What `make zoo` found."""
    found: dict[str, Any] = json.loads((DOCS / "models.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.zoo]) for name in NAMES]
)
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    from zoo_checks import measure

    found = measure(zoo_models.models()[name], tmp_path)
    keep = os.environ.get("MARL_ZOO")
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        (Path(keep) / f"{NAMES.index(name)}.json").write_text(json.dumps({name: found}), encoding="utf-8")
    wrong = {check: one["said"] for check, one in found["checks"].items() if one["verdict"] == "wrong"}
    assert not wrong
    if not keep and transformers.__version__ == RECORDED_WITH:
        assert verdicts(found) == verdicts(recorded()[name]), "docs/models.json says otherwise; run: make zoo"


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    """Verdicts by check."""
    return {check: one["verdict"] for check, one in found["checks"].items()}


@as_recorded
def test_every_model_is_on_record() -> None:
    assert set(recorded()) == set(NAMES), "run: make zoo"


def test_nothing_on_record_is_wrong() -> None:
    wrong = [name for name, found in recorded().items() if "wrong" in verdicts(found).values()]
    assert not wrong


@as_recorded
def test_what_is_left_out_is_known_to_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    assert set(zoo_models.LEFT_OUT) <= set(CLASSES)
