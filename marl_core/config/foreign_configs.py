"""A config of another trainer, given where marl's is expected: told by its keys, in one sentence instead of dozens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marl_core.errors import ConfigError

LLAMAFACTORY_KEYS = (
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
TRL_KEYS = (
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
MIN_FOREIGN_KEYS = 2
"""Keys of another trainer that tell its config: one alone may be a slip of the pen."""


def refuse_foreign(written: Mapping[str, Any], path: str) -> None:
    """ConfigError naming the command that converts the file, when its keys are LLaMA-Factory's or TRL's."""
    matches = [key for key in (*LLAMAFACTORY_KEYS, *TRL_KEYS) if key in written]
    if "model" in written or len(matches) < MIN_FOREIGN_KEYS:
        return
    is_llamafactory = any(key in LLAMAFACTORY_KEYS for key in matches)
    trainer, command = (
        ("LLaMA-Factory", f"marl import llamafactory {path}")
        if is_llamafactory
        else ("a TRL script", f"marl import trl-args --config {path}")
    )
    raise ConfigError(
        f"{path}: a config of {trainer}, by its keys {', '.join(matches[:4])}; marl's has sections such as model, reference and reward. "
        f"Convert it: {command} --to marl.yaml"
    )
