"""What TRL's PPO trainers do where nobody says otherwise, version by version, and what its own scripts set inside.

The numbers are those of each release's PPOConfig, PPOv2Config, OnPolicyConfig, ModelConfig and examples. Only keys that become something
in marl's config stand here, and of these only where TRL's value isn't marl's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from marl_core import ConfigError
from marl_plugins.migrate.foreign_config import Default

Trainer = Literal["classic", "last"]
Version = tuple[int, ...]

CLASSIC_KEYS = {
    "adap_kl_ctrl",
    "batch_size",
    "early_stopping",
    "horizon",
    "init_kl_coef",
    "kl_penalty",
    "log_with",
    "mini_batch_size",
    "model_name",
    "ppo_epochs",
    "query_dataset",
    "reward_adapter",
    "reward_model",
    "rm_adapter",
    "steps",
    "target",
    "use_score_norm",
    "use_score_scaling",
}
"""Keys that only the classic trainer and its scripts had."""
LAST_KEYS = {
    "kl_coef",
    "kl_estimator",
    "local_rollout_forward_batch_size",
    "missing_eos_penalty",
    "num_mini_batches",
    "num_ppo_epochs",
    "num_sample_generations",
    "response_length",
    "sft_model_path",
    "stop_token",
    "stop_token_id",
    "total_episodes",
}
"""Keys that only the trainer after it has."""
SENTIMENT = "sentiment-analysis:lvwerra/distilbert-imdb"
"""The reward of TRL's own ppo.py: a pipeline's task and its model."""
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
"""Of ModelConfig, which the last trainer's scripts use, and of ppo_multi_adapter.py."""


@dataclass(frozen=True)
class Era:
    """Releases of one trainer, and how their defaults changed: each entry counts from its release on."""

    first: Version
    end: Version | None
    """The first release without it; None while it is there."""
    newest: str
    """Taken where nobody names a release."""
    named: str
    changes: tuple[tuple[Version, Mapping[str, Any]], ...]


ERAS: dict[Trainer, Era] = {
    "classic": Era(
        (0, 4, 2),
        (0, 12),
        "0.11.4",
        "the classic PPOTrainer, with a loop of generate and step (0.4.2 to 0.11.4)",
        (
            (
                (0, 4, 2),
                {
                    "batch_size": 256,
                    "mini_batch_size": 1,
                    "gradient_accumulation_steps": 1,
                    "learning_rate": 1e-5,
                    "steps": 20000,
                    "ppo_epochs": 4,
                    "init_kl_coef": 0.2,
                    "target": 6.0,
                    "horizon": 10000.0,
                    "target_kl": 0.1,
                },
            ),
            ((0, 7, 2), {"target_kl": 1.0}),
            (
                (0, 7, 11),
                {
                    "batch_size": 128,
                    "mini_batch_size": 128,
                    "learning_rate": 1.41e-5,
                    "reward_model": SENTIMENT,
                    "query_dataset": "imdb",
                    "model_name": "gpt2",
                },
            ),
            ((0, 11), {"query_dataset": "stanfordnlp/imdb"}),
        ),
    ),
    "last": Era(
        (0, 9, 3),
        None,
        "0.29.0",
        "PPOv2Trainer, since 0.12 called PPOTrainer (0.9.3 and newer)",
        (
            (
                (0, 9, 3),
                {
                    "per_device_train_batch_size": 8,
                    "gradient_accumulation_steps": 1,
                    "num_mini_batches": 1,
                    "num_train_epochs": 3.0,
                    "num_ppo_epochs": 4,
                    "learning_rate": 5e-5,
                    "lr_scheduler_type": "linear",
                    "kl_coef": 0.05,
                    "response_length": 53,
                    "temperature": 0.7,
                    "dataset_text_field": "prompt",
                },
            ),
            ((0, 19), {"bf16": True}),
            ((0, 22), {"gradient_checkpointing": True}),
            ((0, 29), {"learning_rate": 3e-6}),
        ),
    ),
}

MULTI_ADAPTER_SCRIPT = {
    "batch_size": 8,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-5,
    **LORA,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "dtype": "bfloat16",
    "max_new_tokens": 32,
    "top_p": 0.9,
    "dataset_name": "Anthropic/hh-rlhf",
    "dataset_train_split": "train[:1%]",
}
"""What ppo_multi_adapter.py sets inside, and no argument changes."""
MULTI_ADAPTER_LABEL = 1
"""Which output of the reward adapter's head it reads."""
CLASSIC_SCRIPT = {"lora_r": 16, "lora_alpha": 16, "max_new_tokens": 32, "dataset_train_split": "train"}
"""What the classic ppo.py sets inside."""


@dataclass(frozen=True)
class Span:
    """The releases that a script of the last trainer can be for, by the names it imports."""

    first: Version
    end: Version | None
    newest: str


V2_NAMES = Span((0, 9, 3), (0, 13), "0.11.4")
"""PPOv2Config and PPOv2Trainer."""
PPO_NAMES = Span((0, 12), (0, 29), "0.25.1")
"""PPOConfig and PPOTrainer out of trl itself."""
EXPERIMENTAL = Span((0, 26), None, "0.29.0")
"""trl.experimental.ppo."""


def release(trainer: Trainer, asked: str | None, span: Span | None = None) -> str:
    """The release whose defaults count: the one asked for, else the one installed if it has this trainer, else the trainer's newest.

    `span`: what a script's imports say. ConfigError when the release that was asked for hasn't this trainer.
    """
    era = ERAS[trainer]
    within = span or era
    if asked is not None:
        if not _has(era, _parsed(asked)):
            raise ConfigError(
                f"--trl-version: {asked} has no such trainer; by their names, the arguments are those of {era.named}. Leave the option "
                "out, or name the release that the script was written for."
            )
        return asked
    try:
        installed = version("trl")
    except PackageNotFoundError:
        return within.newest
    return installed if _has(within, _parsed(installed)) else within.newest


def defaults(trainer: Trainer, number: str, *, multi_adapter: bool, script_read: bool) -> dict[str, Default]:
    """What counts where a key is absent: the script's own values first (unless the script itself was read), then the release's."""
    values: dict[str, Any] = {}
    for since, changes in ERAS[trainer].changes:
        if since <= _parsed(number):
            values.update(changes)
    known = {key: Default(value, f"TRL {number}'s default") for key, value in values.items()}
    if trainer == "last":
        return known | {key: Default(value, f"TRL {number}'s default") for key, value in LORA.items()}
    if script_read:
        return known
    name, inside = ("ppo_multi_adapter.py", MULTI_ADAPTER_SCRIPT) if multi_adapter else ("ppo.py", CLASSIC_SCRIPT)
    origin = f"what TRL's {name} sets inside: compare with your script"
    return known | {key: Default(value, origin) for key, value in inside.items()}


def only_before_last(asked: str | None) -> bool:
    """Whether the release asked for is older than the last trainer, so that nothing but the classic one can be meant."""
    return asked is not None and _parsed(asked) < ERAS["last"].first


def _has(era: Era | Span, number: Version) -> bool:
    return era.first <= number and (era.end is None or number < era.end)


def _parsed(text: str) -> Version:
    """`0.11.4` as (0, 11, 4)."""
    start = re.match(r"\d+(\.\d+)+", text)
    if start is None:
        raise ConfigError(f"--trl-version: {text!r} is no release of TRL; write it as 0.11.4.")
    return tuple(int(part) for part in start.group().split("."))
