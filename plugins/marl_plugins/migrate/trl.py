"""Arguments of a TRL PPO script as a marl config: of the classic trainer (to 0.11) and of the last one (0.12 until its removal)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from marl_core import ConfigError
from marl_plugins.migrate.foreign_config import ForeignConfig, rows_of, run_sections, steps_of, warm_up, without_none
from marl_plugins.migrate.reasons import TRL

CLASSIC_KEYS = {
    "ppo_epochs",
    "init_kl_coef",
    "adap_kl_ctrl",
    "mini_batch_size",
    "kl_penalty",
    "rm_adapter",
    "reward_adapter",
    "horizon",
    "target",
    "log_with",
}
"""Keys that only the classic trainer and its scripts had."""
KL_ESTIMATORS = {"kl": "k1", "mse": "k2"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and `--flag` as a mapping; `--config FILE` is read first, and a key given beside it wins."""
    options: dict[str, Any] = {}
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if not argument.startswith("--"):
            raise ConfigError(f"{argument!r}: expected --key value, as a TRL script takes them.")
        name, _, value = argument[2:].partition("=")
        index += 1
        parts = [value] if "=" in argument else []
        while "=" not in argument and index < len(arguments) and not arguments[index].startswith("--"):
            parts.append(arguments[index])
            index += 1
        try:
            parsed = [yaml.safe_load(part) for part in parts]
        except yaml.YAMLError:
            parsed = list(parts)  # a text that YAML can't take stays a text
        options[name.replace("-", "_")] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    file = options.pop("config", None)
    return {**(read_mapping(Path(str(file))) if file else {}), **options}


def read_mapping(file: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds keys; ConfigError when it doesn't."""
    try:
        mapping = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: can't be read: {error}. Give a YAML file of keys.") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file}: holds a {type(mapping).__name__}, not keys with values.")
    return mapping


def migrate(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The marl config, and each key that was not carried over with the reason."""
    foreign = ForeignConfig(dict(written))
    classic = bool(CLASSIC_KEYS & set(written))
    model, quantization = _model(foreign)
    data, rows = _data(foreign)
    reward, value = _reward(foreign, classic)
    config = {
        "model": model,
        "quantization": quantization,
        "policy": _policy(foreign),
        "reference": _reference(foreign),
        "reward": reward,
        "value": value,
        "data": data,
        "sampling": _sampling(foreign, classic),
        "ppo": _classic_ppo(foreign) if classic else _last_ppo(foreign, rows),
        "shaping": _shaping(foreign),
        **run_sections(foreign, TRACKERS, 0 if classic else 42),
    }
    return without_none(config), foreign.refused(TRL)


def _model(foreign: ForeignConfig) -> tuple[dict[str, Any], Any]:
    sft, path = foreign.take("sft_model_path"), foreign.take("model_name_or_path", "model_name")
    if not (sft or path):
        raise ConfigError("model_name_or_path (or sft_model_path, model_name): is needed; it is the base.")
    four, eight = foreign.take("load_in_4bit", default=False), foreign.take("load_in_8bit", default=False)
    kind, nested = (
        foreign.take("bnb_4bit_quant_type", default="nf4"),
        foreign.take("use_bnb_nested_quant", default=False),
    )
    dtype = str(foreign.take("dtype", "torch_dtype", default="bfloat16" if foreign.take("bf16") else "float32"))
    checkpointing = foreign.take("gradient_checkpointing")
    if checkpointing and eight:
        foreign.note("gradient_checkpointing", "not on an 8-bit base, whose kernels differ between train and eval mode")
    model = {
        "path": sft or path,
        "revision": foreign.take("model_revision"),
        "dtype": dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16",
        "attention": foreign.take("attn_implementation"),
        "trust_remote_code": foreign.take("trust_remote_code") or None,
        "gradient_checkpointing": True if checkpointing and not eight else None,
    }
    quantization: Any = "bnb-8bit" if eight else None
    if four:
        quantization = {"use": "bnb-4bit", "type": kind, "double": bool(nested)}
    return without_none(model), quantization


def _policy(foreign: ForeignConfig) -> dict[str, Any]:
    if foreign.take("use_peft") is False:
        foreign.note("use_peft", "marl trains a LoRA, not all weights")
    targets = foreign.take("lora_target_modules")
    further = {name: True for name in ("use_rslora", "use_dora") if foreign.take(name)}
    return without_none(
        {
            "start": "new",
            "r": foreign.number("lora_r", default=16),
            "alpha": float(foreign.number("lora_alpha", default=32)),
            "targets": [targets] if isinstance(targets, str) and targets != "all-linear" else targets or "all-linear",
            "dropout": foreign.number("lora_dropout") or None,
            "lora": further or None,
        }
    )


def _reference(foreign: ForeignConfig) -> str:
    """With PEFT, TRL's reference was the model with the adapter off."""
    if foreign.take("ref_adapter_name"):
        foreign.note(
            "ref_adapter_name",
            "it named an adapter in memory: write reference: {use: peft-adapter, adapter: its folder}",
        )
    return "disabled-adapter"


def _reward(foreign: ForeignConfig, classic: bool) -> tuple[Any, Any]:
    """Reward and value: a reward adapter on the base, or the last trainer's separate reward and value models."""
    adapter = foreign.take("rm_adapter", "reward_adapter")
    model = foreign.take("reward_model_path", "reward_model", "reward_model_name")
    if adapter:
        return {"use": "adapter", "path": adapter}, {"on": "policy"}
    if model:
        if not classic:
            foreign.note(
                "reward_model_path",
                "TRL made the value model a second copy of it; here the value is an adapter of its own on the base",
            )
        return {"use": "model", "path": model}, {"on": "policy" if classic else "own"}
    foreign.note("reward_model_path", "is missing: name a reward")
    return {"use": "function", "target": "rewards.py:score"}, {"on": "policy"}


def _data(foreign: ForeignConfig) -> tuple[dict[str, Any], int | None]:
    name, split = foreign.take("dataset_name", "query_dataset"), foreign.take("dataset_train_split")
    if name is None:
        foreign.note("dataset_name", "is missing: name a file of prompts")
    if foreign.take("dataset_config") is not None:
        foreign.note("dataset_config", "marl takes a datasets name without a configuration: save it as a file")
    prompts = str(name or "prompts.jsonl")
    return without_none({"prompts": prompts, "split": split, "field": "prompt"}), rows_of(prompts)


def _sampling(foreign: ForeignConfig, classic: bool) -> dict[str, Any]:
    """The classic loop took its generation arguments in Python; the last trainer had 53 tokens at temperature 0.7."""
    if foreign.take("stop_token_id") is not None:
        foreign.note("stop_token_id", "write the token's text into sampling.stop; the tokenizer's EOS always stops")
    if foreign.take("stop_token", default="eos") != "eos":
        foreign.note("stop_token", "the tokenizer's EOS always stops; further ones stand in sampling.stop")
    return {
        "max_new_tokens": foreign.number("response_length", "max_new_tokens", default=48 if classic else 53),
        "temperature": float(foreign.number("temperature", default=1.0 if classic else 0.7)),
    }


def _classic_ppo(foreign: ForeignConfig) -> dict[str, Any]:
    mini = foreign.number("mini_batch_size", "forward_batch_size", default=1)
    many = mini * foreign.number("gradient_accumulation_steps", default=1)
    batch = foreign.number("batch_size", default=256)
    episodes = foreign.number("steps", "total_ppo_epochs", default=20000)
    adaptive = foreign.take("adap_kl_ctrl", default=True)
    target, horizon = foreign.number("target", default=6.0), foreign.number("horizon", default=10000.0)
    penalty = str(foreign.take("kl_penalty", default="kl"))
    if penalty not in KL_ESTIMATORS:
        foreign.note("kl_penalty", f"{penalty!r}: marl has k1 (kl), k2 (mse) and k3; k1 is taken")
    stops, limit = foreign.take("early_stopping", default=False), foreign.number("target_kl", default=1.0)
    kl = {
        "estimator": KL_ESTIMATORS.get(penalty, "k1"),
        "into": "reward",
        "coef": float(foreign.number("init_kl_coef", default=0.2)),
    }
    return without_none(
        {
            "steps": max(1, ceil(episodes / batch)),
            "batch": batch,
            "minibatch": many,
            "microbatch": mini if mini != many else None,
            "epochs": foreign.number("ppo_epochs", default=4),
            "learning_rate": float(foreign.number("learning_rate", default=1e-5)),
            "max_grad_norm": foreign.number("max_grad_norm"),
            "kl": {**kl, "target": float(target), "horizon": float(horizon)} if adaptive else kl,
            "max_kl": 1.5 * limit if stops else None,
            **_shared(foreign),
        }
    )


def _last_ppo(foreign: ForeignConfig, rows: int | None) -> dict[str, Any]:
    micro = foreign.number("per_device_train_batch_size", default=8)
    mini = micro * foreign.number("gradient_accumulation_steps", default=1)
    batch = mini * foreign.number("num_mini_batches", default=1)
    episodes, epochs = foreign.number("total_episodes"), foreign.number("num_train_epochs", default=3.0)
    max_steps = foreign.number("max_steps", default=-1)
    steps = (
        ceil(episodes / batch)
        if episodes
        else max_steps
        if max_steps > 0
        else steps_of(foreign, "num_train_epochs", epochs, rows, batch)
    )
    schedule = str(foreign.take("lr_scheduler_type", default="linear"))
    if schedule not in SCHEDULES:
        foreign.note("lr_scheduler_type", f"{schedule!r}: marl has constant, linear and cosine; constant is taken")
    return without_none(
        {
            "steps": steps,
            "batch": batch,
            "minibatch": mini,
            "microbatch": micro if micro != mini else None,
            "epochs": foreign.number("num_ppo_epochs", default=4),
            "learning_rate": float(foreign.number("learning_rate", default=5e-5)),
            "schedule": SCHEDULES.get(schedule, "constant"),
            "warmup_steps": warm_up(foreign, steps),
            "weight_decay": foreign.number("weight_decay"),
            "max_grad_norm": foreign.number("max_grad_norm"),
            "kl": {
                "estimator": foreign.take("kl_estimator", default="k1"),
                "into": "reward",
                "coef": float(foreign.number("kl_coef", default=0.05)),
            },
            **_shared(foreign),
        }
    )


def _shared(foreign: ForeignConfig) -> dict[str, Any]:
    """What both trainers call the same."""
    numbers = {
        "gamma": foreign.number("gamma"),
        "lam": foreign.number("lam"),
        "clip": foreign.number("cliprange"),
        "value_clip": foreign.number("cliprange_value"),
        "value_coef": foreign.number("vf_coef"),
    }
    return without_none({name: None if value is None else float(value) for name, value in numbers.items()})


def _shaping(foreign: ForeignConfig) -> dict[str, Any] | None:
    scaled, normed = foreign.take("use_score_scaling", default=False), foreign.take("use_score_norm", default=False)
    if scaled and not normed:
        foreign.note(
            "use_score_scaling",
            "without use_score_norm it divided by the running deviation only; shaping.normalize also subtracts the mean",
        )
    section = without_none(
        {
            "missing_eos_penalty": foreign.number("missing_eos_penalty"),
            "normalize": True if scaled else None,
            "clip": foreign.number("score_clip"),
        }
    )
    return section or None
