"""The options of PEFT's configs by kind, so that a misspelt one is told without importing PEFT; a test compares them with PEFT's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "adalora": (
        "alora_invocation_tokens alpha_pattern arrow_config beta1 beta2 bias corda_config deltaT ensure_weight_tying eva_config "
        "exclude_modules fan_in_fan_out init_lora_weights init_r kasa_config layer_replication layers_pattern "
        "layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core "
        "modules_to_save monteclora_config orth_reg_weight qalora_group_size r rank_pattern runtime_config target_modules "
        "target_parameters target_r tfinal tinit total_step trainable_token_indices use_bdlora use_dora use_qalora use_rslora "
        "velora_config"
    ),
    "beft": "init_weights modules_to_save target_modules",
    "boft": (
        "bias boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor exclude_modules fan_in_fan_out init_weights "
        "layers_pattern layers_to_transform modules_to_save target_modules"
    ),
    "c3a": (
        "bias block_size block_size_pattern init_weights layers_pattern layers_to_transform modules_to_save target_modules"
    ),
    "deft": (
        "alpha bias decomposition_method deft_dropout exclude_modules fan_in_fan_out init_scale init_weights layers_pattern "
        "layers_to_transform modules_to_save para r target_modules"
    ),
    "delora": (
        "bias delora_lambda exclude_modules init_weights lambda_pattern layers_pattern layers_to_transform module_dropout "
        "modules_to_save r rank_pattern target_modules"
    ),
    "fourierft": (
        "bias exclude_modules fan_in_fan_out init_weights layers_pattern layers_to_transform modules_to_save n_frequency "
        "n_frequency_pattern random_loc_seed scaling target_modules"
    ),
    "glora": "bias config_A_B config_C config_D_E init_weights modules_to_save r target_modules",
    "gralora": (
        "alpha bias fan_in_fan_out gralora_dropout gralora_k hybrid_r init_weights layers_pattern layers_to_transform "
        "modules_to_save r target_modules"
    ),
    "hira": (
        "exclude_modules fan_in_fan_out hira_dropout init_weights layers_pattern layers_to_transform modules_to_save r "
        "rank_pattern target_modules"
    ),
    "hra": (
        "apply_GS bias exclude_modules init_weights layers_pattern layers_to_transform modules_to_save r target_modules"
    ),
    "ia3": "exclude_modules fan_in_fan_out feedforward_modules init_ia3_weights modules_to_save target_modules",
    "ln_tuning": "exclude_modules modules_to_save target_modules",
    "loha": (
        "alpha alpha_pattern exclude_modules init_weights layers_pattern layers_to_transform module_dropout modules_to_save r "
        "rank_dropout rank_pattern target_modules use_effective_conv2d"
    ),
    "lokr": (
        "alpha alpha_pattern decompose_both decompose_factor exclude_modules init_weights layers_pattern layers_to_transform "
        "module_dropout modules_to_save r rank_dropout rank_dropout_scale rank_pattern target_modules use_effective_conv2d"
    ),
    "miss": (
        "bias exclude_modules init_weights layers_pattern layers_to_transform mini_r miss_dropout modules_to_save r "
        "target_modules"
    ),
    "oft": (
        "bias block_share coft eps exclude_modules fan_in_fan_out init_weights layers_pattern layers_to_transform "
        "module_dropout modules_to_save num_cayley_neumann_terms oft_block_size r target_modules use_cayley_neumann"
    ),
    "peanut": (
        "act_fn depth exclude_modules init_weights layers_pattern layers_to_transform modules_to_save r scaling target_modules"
    ),
    "psoft": (
        "ab_svd_init cayley_neumann_eps exclude_modules fan_in_fan_out init_weights layers_pattern layers_to_transform "
        "modules_to_save num_cayley_neumann_terms psoft_alpha psoft_dropout psoft_mag_a psoft_mag_b psoft_orth psoft_svd "
        "psoft_svd_lowrank_niter r random_seed target_modules use_cayley_neumann"
    ),
    "randlora": (
        "bias fan_in_fan_out init_weights layers_pattern layers_to_transform modules_to_save projection_prng_key r "
        "randlora_alpha randlora_dropout save_projection sparse target_modules very_sparse"
    ),
    "road": "group_size init_weights modules_to_save target_modules variant",
    "shira": "fan_in_fan_out init_weights mask_type modules_to_save r random_seed target_modules",
    "supertuning": (
        "init_weights lora_alpha lora_dropout modules_to_save r save_precomputed_indices select_top sparsity target_modules"
    ),
    "tinylora": (
        "bias fan_in_fan_out init_v_bound init_weights layers_pattern layers_to_transform modules_to_save projection_seed r "
        "save_projection target_modules tinylora_dropout u weight_tying"
    ),
    "trainable_tokens": "init_weights target_modules token_indices",
    "vera": (
        "bias d_initial fan_in_fan_out init_weights layers_pattern layers_to_transform modules_to_save projection_prng_key r "
        "save_projection target_modules vera_dropout"
    ),
    "waveft": (
        "bias exclude_modules fan_in_fan_out init_weights layers_pattern layers_to_transform modules_to_save n_frequency "
        "n_frequency_pattern proportional_parameters random_loc_seed scaling target_modules use_idwt wavelet_family"
    ),
}
OPTIONS: Mapping[str, tuple[str, ...]] = {kind: tuple(names.split()) for kind, names in _NAMES.items()}
"""Those of PEFT 0.21, without what every kind has."""
_LORA = (
    "alora_invocation_tokens alpha_pattern arrow_config bias corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout "
    "lora_ga_config megatron_config megatron_core modules_to_save monteclora_config qalora_group_size r rank_pattern runtime_config "
    "target_modules target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config"
)
LORA_OPTIONS = tuple(_LORA.split())
"""Those of LoraConfig, of which a newer PEFT may have more."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


POSITIVE = _words(
    "block_size deltaT gralora_k group_size init_r mini_r n_frequency num_cayley_neumann_terms qalora_group_size r "
    "target_r total_step u"
)
NOT_NEGATIVE = _words(
    "boft_block_num boft_block_size boft_n_butterfly_factor depth hybrid_r oft_block_size psoft_svd_lowrank_niter "
    "tfinal tinit"
)
WHOLE = (
    POSITIVE | NOT_NEGATIVE | _words("decompose_factor projection_prng_key projection_seed random_loc_seed random_seed")
)
"""Options that are whole numbers."""
NUMBERS = _words(
    "alpha beta1 beta2 boft_dropout cayley_neumann_eps d_initial deft_dropout delora_lambda eps gralora_dropout "
    "hira_dropout init_scale init_v_bound lora_alpha lora_dropout miss_dropout module_dropout orth_reg_weight "
    "psoft_alpha psoft_dropout randlora_alpha randlora_dropout rank_dropout scaling sparsity tinylora_dropout "
    "vera_dropout weight_tying"
)
"""Options that are numbers, whole or not."""
SWITCHES = _words(
    "apply_GS block_share coft decompose_both ensure_weight_tying fan_in_fan_out init_ia3_weights lora_bias para "
    "proportional_parameters psoft_mag_a psoft_mag_b psoft_orth rank_dropout_scale save_precomputed_indices "
    "save_projection select_top sparse use_cayley_neumann use_dora use_effective_conv2d use_idwt use_qalora "
    "use_rslora very_sparse"
)
"""Options that are true or false."""
EMPTY = _words("alpha cayley_neumann_eps lora_alpha random_loc_seed random_seed total_step")
"""Options that may be null."""
RANK_MAY_BE_NONE = ("oft", "supertuning")
"""Kinds that have an r of 0, or none, where another option stands for it."""


def type_problem(kind: str, name: str, value: Any) -> Any:
    """What pydantic calls it when an option of PEFT's is of another type than PEFT has it, or is out of range; None where it is neither."""
    may_be_none = name == "r" and kind in RANK_MAY_BE_NONE
    if value is None and (name in EMPTY or may_be_none):
        return None
    if name in SWITCHES:
        return None if isinstance(value, bool) else "bool_type"
    if name in NUMBERS:
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "float_type"
    if name not in WHOLE:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        return "int_type"
    if name in POSITIVE and not may_be_none:
        return "greater_than" if value <= 0 else None
    return "greater_than_equal" if value < 0 and (name in NOT_NEGATIVE or may_be_none) else None
