"""Write the tables of docs/sizes.md: what `marl check --memory` says for usual models, and which cards that fits.

    python docs/make_sizes_page.py

The models are shapes without weights, as in docs/make_gpu_page.py.
"""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from marl_core.plan.memory import OVERHEAD_SHARES

PAGE = Path(__file__).with_name("sizes.md")
BEGIN, END = "<!-- sizes -->", "<!-- /sizes -->"
GIB = 2.0**30
CARDS = (8, 12, 16, 24, 48, 80)
"""GB as a card's maker counts them, 10^9 bytes."""
BASES = {"bfloat16": "none", "8 bits": "bnb-8bit", "4 bits": "bnb-4bit"}
SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary, embedding tied to the output layer
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
}
"""Qwen2.5's shapes, and Llama 3.1's for 8B; all with grouped-query attention."""


def main() -> None:
    """Replace what stands between the two marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(f"{before}{BEGIN}\n{tables(Path(folder))}\n{END}{after}", encoding="utf-8")


def tables(folder: Path) -> str:
    """Which cards a run fits, then the estimates behind that."""
    gpu_page = runpy.run_path(str(Path(__file__).with_name("make_gpu_page.py")))
    peaks = {
        (name, held): tuple(peak(gpu_page, path, quantization, recompute) for recompute in (True, False))
        for name, path in written(gpu_page, folder).items()
        for held, quantization in BASES.items()
    }
    return f"{cards_table(peaks)}\n\nWhat the estimate says, in GiB (2³⁰ bytes):\n\n{estimates_table(peaks)}"


def written(gpu_page: dict[str, Any], folder: Path) -> dict[str, str]:
    """A folder of shapes for each model."""
    return {name: gpu_page["write_shapes"](config(*shape), folder / name) for name, shape in SHAPES.items()}


def config(
    hidden: int, feed_forward: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """A Llama of this shape: Qwen2.5's biases on q, k and v are left out, which are below a thousandth of it."""
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
    }


def peak(gpu_page: dict[str, Any], path: str, quantization: str, recompute: bool) -> float:
    """Bytes at the worst moment of the run that docs/sizes.md describes."""
    estimate = gpu_page["estimate_of"](
        {
            "model": {"path": path, "dtype": "bfloat16", "gradient_checkpointing": recompute},
            "quantization": quantization,
            "policy": {"r": 16},
            "reference": "disabled-adapter",
            "reward": {"use": "adapter", "path": f"{path}/reward"},
            "value": "policy",
            "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 256},
            "sampling": {"max_new_tokens": 256, "rows": 64},
            "ppo": {"batch": 64, "minibatch": 16, "kl": {"coef": 0.2}},
            "speed": {"microbatch_tokens": 2048},
            "run": {"device": "cuda"},
        }
    )
    return float(estimate.peak)


def cards_table(peaks: dict[tuple[str, str], tuple[float, ...]]) -> str:
    """A row for each model, a column for each card: how the base may be held, the most exact way first."""
    rows = ["| model | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|" + " --- |" * (len(CARDS) + 1)]
    for name in SHAPES:
        rows.append(f"| {name} | " + " | ".join(cell(name, card, peaks) for card in CARDS) + " |")
    return "\n".join(rows)


def cell(name: str, card: int, peaks: dict[tuple[str, str], tuple[float, ...]]) -> str:
    """The first way to hold the base that fits with the most that was measured on top; before it, those that fit with the least."""
    least, most = (1 + share for share in OVERHEAD_SHARES)
    perhaps = []
    for held in BASES:
        needed = peaks[name, held][0]
        if needed * most < card * 1e9:
            return ", ".join([*perhaps, f"**{held}**"])
        if needed * least < card * 1e9:
            perhaps.append(f"{held}?")
    return ", ".join(perhaps) or "–"


def estimates_table(peaks: dict[tuple[str, str], tuple[float, ...]]) -> str:
    """A row for each model and way to hold its base: GiB with layers recomputed, and with nothing recomputed."""
    rows = [
        "| model | base | `gradient_checkpointing: true` | `gradient_checkpointing: false` |",
        "|" + " --- |" * 4,
    ]
    for (name, held), values in peaks.items():
        rows.append(f"| {name} | {held} | " + " | ".join(f"{value / GIB:.1f}" for value in values) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
