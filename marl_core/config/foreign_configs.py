"""A config of another trainer, given where marl's is expected: told by its keys, in one sentence instead of dozens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marl_core.errors import ConfigError

LLAMAFACTORY = (
    "stage",
    "finetuning_type",
    "reward_model_type",
    "adapter_name_or_path",
    "lora_target",
    "lora_rank",
    "cutoff_len",
    "dataset_dir",
    "template",
)
TRL = (
    "model_name_or_path",
    "model_name",
    "reward_model_path",
    "sft_model_path",
    "use_peft",
    "lora_r",
    "num_ppo_epochs",
    "ppo_epochs",
    "init_kl_coef",
    "kl_coef",
    "mini_batch_size",
    "response_length",
    "total_episodes",
    "dataset_name",
    "output_dir",
    "per_device_train_batch_size",
    "learning_rate",
)
ENOUGH = 2
"""Keys of another trainer that tell its config: one alone may be a slip of the pen."""


def refuse_foreign(written: Mapping[str, Any], path: str) -> None:
    """ConfigError naming the command that carries the file over, when its keys are LLaMA-Factory's or TRL's."""
    theirs = [key for key in (*LLAMAFACTORY, *TRL) if key in written]
    if "model" in written or len(theirs) < ENOUGH:
        return
    factory = any(key in LLAMAFACTORY for key in theirs)
    whose, command = (
        ("LLaMA-Factory", f"marl import llamafactory {path}")
        if factory
        else ("a TRL script", f"marl import trl-args --config {path}")
    )
    raise ConfigError(
        f"{path}: a config of {whose}, by its keys {', '.join(theirs[:4])}; marl's has sections such as model, reference and reward. "
        f"Carry it over: {command} --to marl.yaml"
    )
