"""A small config of every kind of adapter that the shared base holds, for whoever tests them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SMALL_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("lora", {"r": 4, "lora_alpha": 8}),
    "lora gaussian": ("lora", {"r": 4, "init_lora_weights": "gaussian"}),
    "lora orthogonal": ("lora", {"r": 4, "init_lora_weights": "orthogonal"}),
    "rslora": ("lora", {"r": 4, "use_rslora": True}),
    "lora bias": ("lora", {"r": 4, "lora_bias": True}),
    "mica": ("lora", {"r": 4, "init_lora_weights": "mica"}),
    "dora": ("lora", {"r": 4, "use_dora": True}),
    "adalora": ("adalora", {"init_r": 4, "target_r": 4, "total_step": 1, "tinit": 0, "tfinal": 0}),
    "miss": ("miss", {"r": 4}),
    "miss bat": ("miss", {"r": 4, "init_weights": "bat"}),
    "miss mini": ("miss", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "oft": ("oft", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft cayley-neumann": ("oft", {"oft_block_size": 8}),
    "boft": ("boft", {"boft_block_size": 8}),
    "hra": ("hra", {"r": 4}),
    "ia3": ("ia3", {"feedforward_modules": ["down_proj"]}),
    "road": ("road", {"group_size": 8}),
    "road 2": ("road", {"group_size": 8, "variant": "road_2"}),
    "vera": ("vera", {"r": 8, "d_initial": 0.1}),
    "randlora": ("randlora", {"r": 4}),
    "tinylora": ("tinylora", {"r": 2, "u": 4}),
    "loha": ("loha", {"r": 4}),
    "lokr": ("lokr", {"r": 4}),
    "hira": ("hira", {"r": 4}),
    "delora": ("delora", {"r": 4}),
    "gralora": ("gralora", {"r": 4, "gralora_k": 2}),
    "glora": ("glora", {"r": 4}),
    "fourierft": ("fourierft", {"n_frequency": 40, "init_weights": True}),
    "waveft": ("waveft", {"n_frequency": 40}),
    "c3a": ("c3a", {"block_size": 8, "init_weights": True}),
    "shira": ("shira", {"r": 4, "random_seed": 1}),
    "supertuning": ("supertuning", {}),
    "psoft": ("psoft", {"r": 4}),
    "deft": ("deft", {"r": 4}),
    "peanut": ("peanut", {"r": 4}),
    "beft": ("beft", {}),
    "ln_tuning": ("ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": [36, 37], "target_modules": ["embed_tokens"]}),
    "vblora": ("vblora", {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2}),
    "unilora": ("unilora", {"r": 4, "theta_d_length": 64}),
}
"""By a name of its own: PEFT's type in lower case, and options for a model of width 32 or a multiple of it. Weights of every linear layer,
where the kind can take them."""


def make_config(
    r: int, alpha: float, targets: Any, dropout: float, extra: Mapping[str, Any], linears: Iterable[str]
) -> LoraConfig:
    """A LoraConfig for a trainable role; ConfigError names an option that peft doesn't know."""
    from peft import LoraConfig

    from marl_core.bank.targets import expand_targets
    from marl_core.errors import ConfigError

    try:
        return LoraConfig(
            **{
                "r": r,
                "lora_alpha": alpha,
                "target_modules": expand_targets(targets, linears),
                "lora_dropout": dropout,
                "task_type": "CAUSAL_LM",
                **extra,
            }
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: peft's LoraConfig doesn't accept {dict(extra)}: {error}.") from error


def small_config(name: str, **changes: Any) -> Any:
    """PEFT's config of one of SMALL_KINDS; `changes` go over its options."""
    import peft

    kind, options = SMALL_KINDS[name]
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind.upper())]
    return config_class(**{"target_modules": list(LINEAR), "task_type": "CAUSAL_LM", **options, **changes})


def move(model: Any, seed: int = 0, by: float = 0.05) -> None:
    """Add noise to everything that learns in `model`: a fresh adapter's update is mostly zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * by)
