"""The work that is measured: one PPO step on fixed shapes, as configs of marl itself."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))  # the fetched model and text are shared


@dataclass(frozen=True, slots=True)
class Work:
    """One workload: `prompts` prompts of `prompt_tokens`, `new_tokens` each, or lengths spread evenly over 1..new_tokens."""

    name: str
    prompts: int = 32
    prompt_tokens: int = 8
    new_tokens: int = 32
    ragged: bool = False
    epochs: int = 4
    minibatch: int = 8
    r: int = 16
    alpha: int = 32
    alone: bool = False
    """The policy by itself: no reference, no value, a reward that costs nothing. What the other roles add in memory."""

    def lengths(self) -> list[int]:
        """Response tokens of each row."""
        if not self.ragged:
            return [self.new_tokens] * self.prompts
        spread = [1 + index * (self.new_tokens - 1) // max(1, self.prompts - 1) for index in range(self.prompts)]
        return [spread[index * 13 % self.prompts] for index in range(self.prompts)]  # 13: neighbours differ in length

    @property
    def tokens(self) -> int:
        """Response tokens of one step."""
        return sum(self.lengths())


W1 = Work("W1")
WORKS = {
    "W1": W1,
    "W2": replace(W1, name="W2", new_tokens=64, ragged=True),
    "W3-wide": replace(W1, name="W3-wide", prompts=256),
    "W3-long": replace(W1, name="W3-long", new_tokens=128),
    "W1-alone": replace(W1, name="W1-alone", alone=True),
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""Random Llamas: the 1B and 7B shapes of the Llama family with its 32,000-word head."""


def shape_config(name: str, **changes: Any) -> Any:
    """The LlamaConfig of that shape; `changes` go into it."""
    from transformers import LlamaConfig

    shape = SHAPES[name]
    options = {
        **shape,
        "vocab_size": 32_000,
        "num_key_value_heads": 8 if name == "1b" else shape["num_attention_heads"],
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**options, **changes})


def write_shape(name: str, folder: Path, dtype: str) -> str:
    """A random Llama of that shape, with a byte tokenizer, as a model folder."""
    import torch
    from transformers import LlamaForCausalLM

    from marl_core.testing import tiny_tokenizer

    config = shape_config(name)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_cast(source: str, folder: Path, dtype: str) -> None:
    """The model's files in another dtype."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def write_reward_adapter(base: str, folder: Path, work: Work) -> str:
    """A random reward adapter as TRL writes it: LoRA on q_proj and v_proj with a score head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(1)
    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base, num_labels=1))
    config = LoraConfig(r=work.r, lora_alpha=work.alpha, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = get_peft_model(empty, config)
    state = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name or "modules_to_save" in name:
            key = name.replace(".default", "").replace("modules_to_save.", "")
            state[key] = torch.randn(tensor.shape) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file

    save_file(state, str(folder / "adapter_model.safetensors"))
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    return str(folder)


def nothing(completions: list[Any], **columns: Any) -> list[float]:
    """A reward without a model."""
    return [float(len(completion) % 7) for completion in completions]


def prompt_ids(base: str, work: Work, shape: str | None) -> list[list[int]]:
    """The first tokens of real reviews, or of a fixed text for a random model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if shape:
        return [
            tokenizer.encode(f"film number {index:04d} begins with a long shot")[: work.prompt_tokens]
            for index in range(work.prompts)
        ]
    from data import read_reviews, split
    from fetch import fetch_text

    rows = [tokenizer.encode(review.text)[: work.prompt_tokens] for review in split(read_reviews(fetch_text()))["eval"]]
    return [row for row in rows if len(row) == work.prompt_tokens][: work.prompts]


def config_of(
    work: Work, base: str, reward: str, dtype: str, device: str, threads: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """The run's config; `changes` are dotted keys of a variant, e.g. {"speed.merge_for_sampling": True}."""
    config: dict[str, Any] = {
        "model": {"path": base, "dtype": dtype},
        "policy": {"r": work.r, "alpha": work.alpha, "targets": ["q_proj", "v_proj"]},
        "reference": "disabled-adapter",
        "reward": {"use": "adapter", "path": reward},
        "sampling": {"max_new_tokens": work.new_tokens, "min_new_tokens": 0 if work.ragged else work.new_tokens},
        "ppo": {
            "steps": 1000,
            "batch": work.prompts,
            "minibatch": work.minibatch,
            "epochs": work.epochs,
            "learning_rate": 1e-5,
            "kl": {"estimator": "k1", "into": "reward", "coef": 0.05},
        },
        "run": {"device": device, "threads": threads},
    }
    if work.alone:
        config["reward"] = {"use": "function", "target": f"{Path(__file__)}:nothing"}
        config["value"] = "none"
        config["ppo"] |= {"advantage": "grpo", "samples_per_prompt": 2, "kl": {"coef": 0.0}}
    for key, value in changes.items():
        place = config
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return json.loads(json.dumps(config))
