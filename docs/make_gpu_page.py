"""Write the table of sizes in docs/gpu.md: what `marl check --memory` says for the shapes that the GPU check measures, on CUDA.

    python docs/make_gpu_page.py

The models are shapes without weights: config.json and the headers of safetensors files, which is all that the estimate reads.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- sizes -->", "<!-- /sizes -->"
GIB = 2.0**30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
"""Llama 3.1 8B."""


def main() -> None:
    """Replace what stands between the two marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(f"{before}{BEGIN}\n{table(Path(folder))}\n{END}{after}", encoding="utf-8")


def table(folder: Path) -> str:
    """A row for each shape and dtype: policy alone, four roles on one base, four models, and what a pass keeps of it; GiB."""
    from workloads import shape_config

    models = {"1B": shape_config("1b").to_dict(), "7B": shape_config("7b").to_dict(), "8B": llama().to_dict()}
    rows = [
        "| shape | base | policy alone | four roles, one base | four models | of it, one pass of the update |",
        "|" + " --- |" * 6,
    ]
    for name, config in models.items():
        path = write_shapes(config, folder / name)
        for held, quantization in (("bfloat16", "none"), ("4-bit", "bnb-4bit")):
            whole, alone = (estimated(path, quantization, roles) for roles in (True, False))
            update = next(role.shared for role in whole.roles if role.name == "update")
            figures = (alone.peak, whole.peak, whole.separate, update)
            rows.append(f"| {name} | {held} | " + " | ".join(f"{value / GIB:.1f}" for value in figures) + " |")
    return "\n".join(rows)


def estimated(path: str, quantization: str, roles: bool) -> Any:
    """The estimate of 64 responses of 256 tokens to prompts of 64, LoRA of rank 16 on all linear layers, by default budgets."""
    changes = {} if roles else {
        "value": "none",
        "reward": {"use": "function", "target": "builtins:len"},
        "ppo": {"batch": 64, "minibatch": 16, "advantage": "grpo", "samples_per_prompt": 4, "kl": {"coef": 0.0}},
    }  # fmt: skip
    return estimate_of(
        {
            "model": {"path": path, "dtype": "bfloat16"},
            "quantization": quantization,
            "policy": {"r": 16},
            "reference": "disabled-adapter",
            "reward": {"use": "adapter", "path": f"{path}/reward"},
            "value": "policy",
            "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 64},
            "sampling": {"max_new_tokens": 256},
            "ppo": {"batch": 64, "minibatch": 16, "kl": {"coef": 0.05}},
            "run": {"device": "cuda"},
            **changes,
        }
    )


def estimate_of(config: dict[str, Any]) -> Any:
    """What `marl check --memory` reckons."""
    from marl_core import Catalog, Plan
    from marl_core.config.load import parse_config
    from marl_core.plan.memory import estimate

    catalog = Catalog.installed()
    return estimate(Plan.of(parse_config(config, "docs/make_gpu_page.py", catalog), catalog))


def llama() -> Any:
    """Llama 3.1 8B's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA_8B, max_position_embeddings=8192, tie_word_embeddings=False)


def write_shapes(config: dict[str, Any], folder: Path) -> str:
    """A model folder that has shapes and no weights: the file's bytes behind its header are a hole."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    write_header(folder / "model.safetensors", shapes, "BF16", 2)
    write_reward(model, folder / "reward")
    return str(folder)


def write_reward(model: Any, folder: Path) -> None:
    """A reward adapter of rank 16 on all linear layers, by its shapes."""
    from torch import nn

    shapes = {"base_model.model.score.weight": [1, model.config.hidden_size]}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            shapes[f"base_model.model.{name}.lora_A.weight"] = [16, layer.in_features]
            shapes[f"base_model.model.{name}.lora_B.weight"] = [layer.out_features, 16]
    folder.mkdir()
    written = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 16, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    write_header(folder / "adapter_model.safetensors", shapes, "F32", 4)


def write_header(file: Path, shapes: dict[str, list[int]], dtype: str, width: int) -> None:
    """A safetensors file whose tensors are a hole on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + width * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(written).to_bytes(8, "little") + written)
        os.truncate(opened.fileno(), 8 + len(written) + end)


if __name__ == "__main__":
    main()
