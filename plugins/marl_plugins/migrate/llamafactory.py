"""A PPO config of LLaMA-Factory as a marl config. Defaults are LLaMA-Factory's where a key is absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marl_core import ConfigError, near_match
from marl_plugins.migrate.adapter_section import policy_section
from marl_plugins.migrate.foreign_config import (
    DIVIDED,
    Carried,
    Default,
    ForeignConfig,
    Processes,
    lora_rate,
    names_in,
    offers,
    run_sections,
    schedule,
    steps_of,
    warm_up,
    without_none,
)
from marl_plugins.migrate.known_keys import LLAMAFACTORY_KEYS
from marl_plugins.migrate.llamafactory_data import data_section
from marl_plugins.migrate.reasons import LLAMAFACTORY, LORA_ONLY, OFT_ONLY

ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
ADAPTERS = ("lora", "oft")
"""Values of finetuning_type that train an adapter."""
WHOLE = ("full", "freeze")
"""Those that train weights of the base."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")
DEFAULTS = {
    key: Default(value, "LLaMA-Factory's default")
    for key, value in {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "ppo_buffer_size": 1,
        "ppo_epochs": 4,
        "num_train_epochs": 3.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "ppo_target": 6.0,
        "max_new_tokens": 1024,
        "temperature": 0.95,
        "finetuning_type": "lora",
        "reward_model_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "oft_block_size": 32,
        "oft_target": "all",
        "cutoff_len": 2048,
        "seed": 42,
    }.items()
}
"""What LLaMA-Factory does where a key is absent; only what becomes something in marl's config."""


def migrate(written: Mapping[str, Any], processes: int | None = None) -> Carried:
    """The marl config, each key that was not converted with the reason, and each value that was assumed.

    `processes`: how many the run had, where that is known.
    """
    foreign = ForeignConfig(dict(written), DEFAULTS, unknown=LLAMAFACTORY_KEYS.unknown(written))
    many = Processes(processes or 1, known=processes is not None)
    if not foreign.remaining.get("pissa_init"):
        for key in ("pissa_init", "pissa_iter", "pissa_convert"):
            foreign.remaining.pop(key, None)  # LLaMA-Factory reads them with pissa_init alone
    stage, kind = foreign.take("stage", default="ppo"), foreign.take("finetuning_type")
    if stage != "ppo":
        raise ConfigError(
            f"stage: {stage!r} is no PPO. marl runs PPO; train the SFT and reward adapters where you do now."
        )
    if kind not in (*ADAPTERS, *WHOLE):
        near = near_match(str(kind), (*ADAPTERS, *WHOLE))
        hint = f"Did you mean {near!r}?" if near else f"LLaMA-Factory has {', '.join((*ADAPTERS, *WHOLE))}."
        raise ConfigError(f"finetuning_type: {kind!r} is no way of training of LLaMA-Factory's. {hint}")
    if kind not in ADAPTERS:
        foreign.note(
            "finetuning_type",
            f"{kind!r}: weights of the base were trained. marl trains a LoRA on the frozen base, so it is another experiment",
        )
    model, quantization = _model(foreign)
    policy, reference = _policy(foreign, str(model["path"]), str(kind))
    data, rows = data_section(foreign)
    config: dict[str, Any] = {
        "model": model,
        "quantization": quantization,
        "policy": policy,
        "reference": reference,
        "reward": _reward(foreign, str(model["path"])),
        "data": data,
        "sampling": _sampling(foreign),
        "ppo": _ppo(foreign, rows, many),
        "shaping": {"normalize": True} if foreign.take("ppo_score_norm", default=False) else None,
        **run_sections(foreign, TRACKERS, 42),
    }
    lora_rate(foreign, config["ppo"], kind in ADAPTERS, kind == "lora")
    return foreign.carried(config, {**LLAMAFACTORY, **(LORA_ONLY if kind == "oft" else OFT_ONLY)})


def _model(foreign: ForeignConfig) -> tuple[dict[str, Any], Any]:
    path = foreign.take("model_name_or_path")
    if not path:
        raise ConfigError("model_name_or_path: is needed; a PPO config of LLaMA-Factory names its base there.")
    dtype = _dtype(foreign)
    bits, method = foreign.number("quantization_bit"), foreign.take("quantization_method", default="bnb")
    double, kind = foreign.take("double_quantization", default=True), foreign.take("quantization_type", default="nf4")
    quantization: Any = None
    if bits == 4 and method in ("bnb", "bitsandbytes"):
        quantization = {"use": "bnb-4bit", "type": kind, "double": bool(double)}
    elif bits == 8 and method in ("bnb", "bitsandbytes"):
        quantization = "bnb-8bit"
    elif bits:
        foreign.note("quantization_bit", f"{bits} bits by {method}: marl has 4 and 8 bits by bitsandbytes")
    disabled = foreign.take("disable_gradient_checkpointing")
    if disabled is None and bits != 8:
        foreign.assume(
            "disable_gradient_checkpointing",
            "not given; LLaMA-Factory checkpoints gradients then: model.gradient_checkpointing is true",
        )
    checkpointing = not disabled
    if checkpointing and bits == 8:
        foreign.note(
            "disable_gradient_checkpointing",
            "LLaMA-Factory checkpoints gradients; marl doesn't on an 8-bit base, whose kernels differ between train and eval mode",
        )
    attention = foreign.take("flash_attn", default="auto")
    model = {
        "path": path,
        "revision": foreign.take("model_revision"),
        "dtype": dtype,
        "attention": ATTENTION.get(str(attention)),
        "trust_remote_code": foreign.take("trust_remote_code") or None,
        "gradient_checkpointing": True if checkpointing and bits != 8 else None,
    }
    return without_none(model), quantization


def _dtype(foreign: ForeignConfig) -> str:
    """The dtype of the base's weights. Where nothing is said LLaMA-Factory takes one of 16 bits, unless the machine has none."""
    half, bf16 = foreign.take("fp16", default=False), foreign.take("bf16", "pure_bf16", default=False)
    inferred = foreign.take("infer_dtype", default="auto")
    if bf16 or half:
        return "bfloat16" if bf16 else "float16"
    if inferred in ("bfloat16", "float16", "float32"):
        return str(inferred)
    foreign.assume(
        "bf16",
        "neither bf16 nor fp16 given; LLaMA-Factory loads a base in bfloat16 then where its config.json says so and the GPU can, else in "
        "float16, on a CPU in float32. bfloat16 is written: compare model.dtype",
    )
    return "bfloat16"


def _lora(foreign: ForeignConfig, is_new: bool) -> dict[str, Any]:
    """A new LoRA, with LoRA+'s rate where it has one."""
    rank = foreign.count("lora_rank")
    alpha = foreign.number("lora_alpha")
    if alpha is None:
        alpha = 2 * rank
        foreign.assumed["lora_alpha"] = f"not given; {alpha} is LLaMA-Factory's default, twice the rank"
    options = {
        "r": rank,
        "lora_alpha": float(alpha),
        "lora_dropout": foreign.number("lora_dropout"),
        "use_rslora": foreign.take("use_rslora"),
        "use_dora": foreign.take("use_dora"),
        "target_modules": _targets(foreign, "lora_target"),
    }
    plus = foreign.number("loraplus_lr_ratio")
    if plus and not is_new:
        foreign.note(
            "loraplus_lr_ratio",
            "marl gives the factors of an adapter's rates where it makes one; of one that is continued all learns at ppo.learning_rate",
            lost=True,
        )
    return policy_section("lora", options, "LoraConfig", {}, plus).policy


def _oft(foreign: ForeignConfig) -> dict[str, Any]:
    """A new OFT. PEFT takes the size of a block, or how many there are, and refuses both."""
    block, blocks = foreign.number("oft_block_size"), foreign.number("oft_rank", default=0)
    options = {"module_dropout": foreign.number("module_dropout"), "target_modules": _targets(foreign, "oft_target")}
    if not blocks:
        return policy_section("oft", {"oft_block_size": block, **options}, "OFTConfig", {}).policy
    if block:
        foreign.note(
            "oft_rank", f"PEFT refuses it beside a block size, which was {block}: oft_rank is taken, without one"
        )
        foreign.assumed.pop("oft_block_size", None)
    return policy_section("oft", {"r": blocks, "oft_block_size": 0, **options}, "OFTConfig", {}).policy


def _targets(foreign: ForeignConfig, key: str) -> Any:
    targets = names_in(foreign.take(key))
    return "all-linear" if targets == ["all"] else targets


def _policy(foreign: ForeignConfig, base: str, kind: str) -> tuple[dict[str, Any], Any]:
    """Policy and reference belong together: LLaMA-Factory's reference is its base with the adapter switched off."""
    adapter = _last_adapter(foreign, "adapter_name_or_path")
    fresh = bool(foreign.take("create_new_adapter", default=False))
    is_new = adapter is None or fresh
    new = _oft(foreign) if kind == "oft" else _lora(foreign, is_new)
    policy: dict[str, Any]
    reference: Any
    if adapter is None:
        policy, reference = new, "disabled-adapter"
    elif fresh:
        policy, reference = new, {"use": "merged-base", "adapter": adapter}
    else:
        policy, reference = (
            {"start": "continue", "from": adapter},
            {"use": "peft-adapter", "adapter": adapter},
        )
        if foreign.remaining.get("ref_model") is None:
            foreign.note(
                "adapter_name_or_path",
                f"LLaMA-Factory's reference was {base} with the adapter off, which never saw the SFT data; here it is the SFT adapter, "
                "frozen. For the old one: reference: {use: disabled-adapter, allow_mismatch: true}",
            )
    return policy, _own_reference(foreign, base, reference)


def _own_reference(foreign: ForeignConfig, base: str, default: Any) -> Any:
    model, adapter = foreign.take("ref_model"), _last_adapter(foreign, "ref_model_adapters")
    if model is None:
        if adapter:
            foreign.note("ref_model_adapters", "without ref_model LLaMA-Factory doesn't read them", lost=True)
        return default
    if model == base:
        return {"use": "peft-adapter", "adapter": adapter} if adapter else default
    if adapter:
        foreign.note("ref_model_adapters", "merge them into ref_model first (marl merge)")
    if offers("reference", "model"):
        return {"use": "model", "path": model}
    foreign.note("ref_model", "no strategy for a reference that is a model of its own is installed", lost=True)
    return default


def _last_adapter(foreign: ForeignConfig, key: str) -> str | None:
    """The adapter that LLaMA-Factory leaves on: it merges all of a list but the last."""
    names = names_in(foreign.take(key))
    if len(names) > 1:
        foreign.note(key, f"merge all but the last first (marl merge): {', '.join(names[:-1])}")
    return names[-1] if names else None


def _reward(foreign: ForeignConfig, base: str) -> Any:
    kind = foreign.take("reward_model_type")
    model, adapter = foreign.take("reward_model"), _last_adapter(foreign, "reward_model_adapters")
    if model is None:
        foreign.note("reward_model", "is missing: name a reward")
        return {"use": "function", "target": "rewards.py:score"}
    if kind == "api":
        if offers("reward", "http"):
            return {"use": "http", "url": model, "format": "llama-factory"}
        foreign.note(
            "reward_model", f"{model}: no strategy for a reward service is installed; write a function that asks it"
        )
        return {"use": "function", "target": "rewards.py:score"}
    if adapter and model == base:  # the same base twice: an adapter on the shared one, whatever the type says
        return {"use": "adapter", "path": adapter}
    if kind == "full" and adapter:
        foreign.note(
            "reward_model",
            f"{model}: the reward adapter {adapter} was trained on it, and marl scores on the policy's base, {base}: the run refuses the "
            "adapter where these are other weights. Train it on the policy's base; merging it (marl merge) would lose its head",
        )
        return {"use": "adapter", "path": adapter}
    if kind == "full":
        foreign.note(
            "reward_model_type",
            "full: marl loads a sequence-classification model with one label; a model that keeps its head in value_head.safetensors "
            "has to be saved as one, or trained as an adapter (lora)",
        )
        return {"use": "model", "path": model}
    if adapter:
        foreign.note(
            "reward_model_adapters",
            "with reward_model_type lora LLaMA-Factory reads reward_model as the adapter, and not these",
            lost=True,
        )
    return {"use": "adapter", "path": model}


def _sampling(foreign: ForeignConfig) -> dict[str, Any]:
    for key, unbiased in (("top_p", 1.0), ("top_k", 0)):
        if key not in foreign.remaining:
            default = {"top_p": 0.7, "top_k": 50}[key]
            foreign.note(
                key,
                f"LLaMA-Factory's default {default:g} is left out ({unbiased:g}): it cuts what is sampled but not what is scored",
            )
    return without_none(
        {
            "max_new_tokens": foreign.number("max_new_tokens"),
            "temperature": float(foreign.number("temperature")),
            "top_p": foreign.number("top_p"),
            "top_k": foreign.number("top_k"),
        }
    )


def _ppo(foreign: ForeignConfig, rows: int | None, many: Processes) -> dict[str, Any]:
    """TRL 0.9's PPOConfig as LLaMA-Factory fills it: adaptive KL from 0.2, and TRL's defaults for the rest."""
    micro = foreign.count("per_device_train_batch_size")
    mini = micro * foreign.count("gradient_accumulation_steps") * many.count
    batch = mini * foreign.count("ppo_buffer_size")
    max_steps = foreign.number("max_steps", default=-1)
    if max_steps > 0:
        steps = max_steps
        foreign.remaining.pop("num_train_epochs", None)
    else:
        epochs = foreign.number("num_train_epochs")
        steps = steps_of(foreign, "num_train_epochs", epochs, rows, batch, whole_passes=True)
    many.assume(foreign, "LLaMA-Factory", DIVIDED if max_steps <= 0 else "")
    betas = [foreign.number("adam_beta1", default=0.9), foreign.number("adam_beta2", default=0.999)]
    return without_none(
        {
            "steps": steps,
            "batch": batch,
            "minibatch": mini,
            "microbatch": micro if micro != mini else None,
            "epochs": foreign.number("ppo_epochs"),
            "learning_rate": float(foreign.number("learning_rate")),
            "schedule": schedule(foreign),
            "warmup_steps": warm_up(foreign, steps),
            "weight_decay": foreign.number("weight_decay"),
            "adam_betas": betas if betas != [0.9, 0.999] else None,
            "adam_eps": float(foreign.number("adam_epsilon", default=1e-8)),
            "max_grad_norm": float(foreign.number("max_grad_norm")),
            "kl": {
                "estimator": "k1",
                "into": "reward",
                "coef": 0.2,
                "target": float(foreign.number("ppo_target")),
                "horizon": max(10000.0, 0.2 * batch + 1),
            },
        }
    )
