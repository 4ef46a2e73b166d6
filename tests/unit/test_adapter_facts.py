"""What the kinds of adapters say of themselves by shapes alone, against what PEFT makes on real modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from marl_core import Adapter, ConfigError, Strategy
from marl_core.artifacts.architecture import adaptable_layers, as_held
from marl_core.bank.targets import expand_targets, linear_names
from marl_core.run.trained_adapters import _linear
from marl_plugins import Dora, Ia3, Lora, Miss, Oft, Peft, Tinylora
from marl_plugins.adapter.peft_options import EMPTY, LORA_OPTIONS, NUMBERS, OPTIONS, RANK_MAY_BE_NONE, SWITCHES, WHOLE

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def grouped() -> Any:
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, intermediate_size=48, vocab_size=64))


def with_biases() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**WIDTHS, intermediate_size=48, vocab_size=64))


def conv1d() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def experts() -> Any:
    special: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDTHS, **special, intermediate_size=48, vocab_size=64))


MODELS: dict[str, Callable[[], Any]] = {
    "grouped": grouped,
    "with-biases": with_biases,
    "conv1d": conv1d,
    "experts": experts,
}
STRATEGIES: list[Strategy] = [
    Lora(r=4),
    Lora(r=4, init="mica"),
    Lora(r=4, ranks={r"(layers|h)\.1\.\w+\.(q_proj|c_attn)": 3, "q_proj|c_attn": 8, "o_proj|c_proj": 2}),
    Lora(r=2, lora={"lora_bias": True}),
    Lora(r=4, lora={"layers_to_transform": [1]}),
    Lora(r=4, lora={"exclude_modules": ["q_proj"]}),
    Lora(r=4, lora={"exclude_modules": r".*\.1\..*"}),
    Lora(r=2, experts=True),
    Dora(r=4),
    Miss(r=4),
    Miss(r=8, form="bat"),
    Miss(r=8, form="mini", mini=4),
    Oft(block=8),
    Oft(block=5),
    Oft(block=64, exact=True),
    Ia3(),
    Ia3(feedforward=["q_proj"]),
    Tinylora(u=7),
    Tinylora(u=7, tie=0.6),
    Tinylora(tie=1.0),
]
OF_PEFT: Mapping[str, list[dict[str, Any]]] = {
    "adalora": [{"init_r": 6, "total_step": 10}, {"r": 6}, {"target_r": 5, "tinit": 3}, {}],
    "boft": [{}, {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}],
    "hra": [{}, {"r": 4}],
    "road": [{"group_size": 16}, {"variant": "road_2", "group_size": 16}, {"variant": "road_4", "group_size": 16}],
    "vera": [{"r": 5}],
    "randlora": [{"r": 5}],
    "loha": [{"r": 4}, {"r": 4, "rank_pattern": {"q_proj": 8}}],
    "lokr": [
        {"r": 2},
        {"r": 1, "rank_pattern": {"q_proj": 2}},
        {},
        {"r": 1, "decompose_both": True},
        {"decompose_factor": 4, "r": 3},
    ],
    "hira": [{"r": 4}, {"r": 4, "rank_pattern": {"q_proj": 2}}],
    "delora": [{"r": 4}, {"r": 4, "rank_pattern": {"q_proj": 2}}],
    "gralora": [{"r": 8}, {"r": 8, "hybrid_r": 4}, {"r": 8, "gralora_k": 4}],
    "glora": [
        {},
        {"r": 4, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        {"config_A_B": "none"},
        {"config_C": "none", "config_D_E": "none"},
    ],
    "fourierft": [{"n_frequency": 50}],
    "waveft": [{"n_frequency": 50}],
    "c3a": [{"block_size": 8}],
    "shira": [{"r": 4}],
    "supertuning": [{}, {"sparsity": 0.9}, {"r": 4, "lora_alpha": 8}],
    "psoft": [{"r": 8}, {"r": 8, "psoft_orth": False}, {"r": 8, "psoft_mag_a": False}],
    "deft": [{"r": 4}, {"r": 4, "para": True}],
    "peanut": [{"r": 4}, {"r": 4, "depth": 2}],
    "trainable_tokens": [{"token_indices": [1, 2, 3]}],
    "beft": [{}],
    "ia3": [{}, {"feedforward_modules": ["q_proj"]}],
    "miss": [{"r": 4}, {"r": 8, "init_weights": "mini", "mini_r": 2}],
    "oft": [{"oft_block_size": 8}, {"r": 4, "oft_block_size": 0}, {"r": 5, "oft_block_size": 0}, {"block_share": True}],
    "tinylora": [{"u": 5, "weight_tying": 0.5}],
    "ln_tuning": [{}],
}
KEPT_ELSEWHERE = ("fourierft", "waveft", "shira")
"""Kinds whose places are no buffers, so that they can't be counted by asking the modules."""
CASES = [*STRATEGIES, *(Peft(kind=kind, options=options) for kind, many in OF_PEFT.items() for options in many)]


def said_and_made(strategy: Any, model: Any) -> tuple[Adapter, int, int]:
    """What it says, how many numbers learn in what PEFT makes, and how many bytes that holds beside them."""
    names = linear_names(model, model.get_output_embeddings())
    modules = dict(model.named_modules())
    layers = {name: _linear(modules[name]) for name in names}
    adapter: Adapter = strategy.marl_adapter(layers, {n: tuple(p.shape) for n, p in model.named_parameters()}, "policy")
    config = adapter.config()
    config.task_type = "CAUSAL_LM"
    if config.target_modules is None:
        config.target_modules = set(expand_targets("all-linear", names))
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    made = PeftModel(model, config)
    own = {id(tensor): tensor for tensor in (*made.parameters(), *made.buffers()) if id(tensor) not in base}.values()
    learned = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    held = sum(tensor.numel() * tensor.element_size() for tensor in own if not tensor.requires_grad)
    return adapter, learned, held


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", CASES, ids=repr)
def test_numbers_that_learn_and_bytes_that_are_held(strategy: Strategy, model: str) -> None:
    torch.manual_seed(0)
    try:
        adapter, learned, held = said_and_made(strategy, MODELS[model]())
    except (TypeError, ValueError, NotImplementedError, ConfigError) as error:
        if model != "conv1d":
            raise
        pytest.skip(
            str(error)
        )  # many kinds have no layer for transformers' Conv1D, and patterns may name none of its layers
    assert adapter.learned == learned
    if getattr(strategy, "kind", "") not in KEPT_ELSEWHERE:
        assert adapter.held == held


def test_the_options_are_pefts() -> None:
    common = {field.name for field in fields(PeftConfig)}
    for kind, names in OPTIONS.items():
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
        assert set(names) == {field.name for field in fields(config)} - common, kind


def test_the_options_of_a_lora_are_pefts() -> None:
    assert set(LORA_OPTIONS) == {field.name for field in fields(LoraConfig)} - {
        field.name for field in fields(PeftConfig)
    }


def test_types_of_options_are_pefts() -> None:
    """Numbers, whole numbers and switches are annotated as such, and no option so annotated is forgotten."""
    plain: dict[str, tuple[Any, ...]] = {"bool": (SWITCHES,), "int": (WHOLE, NUMBERS), "float": (NUMBERS,)}
    for kind, names in OPTIONS.items():
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
        hints = get_type_hints(config)
        for name in set(names) - {"init_weights"}:
            united = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
            members, may_be_none = [hint for hint in united if hint is not type(None)], type(None) in united
            word = members[0].__name__ if len(members) == 1 and members[0] in (bool, int, float) else ""
            assert any(name in names for names in plain.get(word, ())) or not word, (kind, name)
            assert word or name not in SWITCHES | WHOLE | NUMBERS, (kind, name)
            if may_be_none and word:
                assert name in EMPTY or (name == "r" and kind in RANK_MAY_BE_NONE), (kind, name)


SMALL = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.0.mlp.down_proj": (64, 96)}


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (Lora(ranks={"q_prj": 8}), "policy.ranks: 'q_prj' matches none of the adapted layers. Did you mean 'q_proj'?"),
        (Lora(lora={"alpha_pattern": {"no": 8}}), "policy.lora.alpha_pattern: 'no' matches none"),
        (Lora(r=80, init="mica"), "policy.r: 80 is more than 64, the layer's smaller side"),
        (Lora(ranks={"q_proj": 80}, init="mica"), "policy.ranks: 80 is more than 64"),
        (Ia3(feedforward=["nonesuch"]), "policy.feedforward: 'nonesuch' matches none"),
        (
            Miss(r=80),
            "policy.r: 80 is more than 64, the layer's inputs. Layer model.layers.0.self_attn.q_proj has",
        ),
        (Miss(r=48, form="bat"), "policy.r: 48 doesn't divide the sides of all layers: 1, 2, 4, 8, 16, 32 would do."),
        (Miss(r=8, form="mini", mini=7), "policy.mini: 7 doesn't divide"),
        (Peft(kind="ia3", options={"feedforward_modules": ["x"]}), "options.feedforward_modules: 'x' matches none"),
        (Peft(kind="loha", options={"rank_pattern": {"x": 2}}), "policy.options.rank_pattern: 'x' matches none"),
        (Peft(kind="loha", options={"alpha_pattern": {"(": 2}}), "'(' is neither the end of a layer's name nor"),
        (Peft(kind="waveft", options={"n_frequency_pattern": {"x": 2}}), "options.n_frequency_pattern: 'x' matches"),
        (Peft(kind="c3a"), "policy.options.block_size: 256 doesn't divide"),
        (
            Peft(kind="c3a", options={"block_size": 64}),
            "64 doesn't divide the sides of all layers: 1, 2, 4, 8, 16, 32 would do. Layer model.layers.0.mlp",
        ),
        (Peft(kind="boft", options={"boft_block_size": 5}), "policy.options.boft_block_size: 5 doesn't divide"),
        (Peft(kind="gralora", options={"r": 6, "gralora_k": 6}), "policy.options.gralora_k: 6 doesn't divide"),
        (Peft(kind="road", options={"group_size": 48}), "policy.options.group_size: 48 doesn't divide"),
        (Peft(kind="hra", options={"r": 9999}), "policy.options.r: 9999 is more than 64"),
        (Peft(kind="psoft", options={"r": 65}), "policy.options.r: 65 is more than 64"),
        (Peft(kind="shira", options={"r": 33}), "policy.options.r: 33 is more than 32"),
        (Peft(kind="fourierft", options={"n_frequency": 5000}), "policy.options.n_frequency: 5000 is more than 4096"),
    ],
)
def test_what_does_not_fit_the_layers_is_told(strategy: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        strategy.marl_adapter(SMALL, {f"{name}.weight": shape for name, shape in SMALL.items()}, "policy")
    assert sentence in str(caught.value)
    strategy.marl_adapter({}, {}, "policy")  # of an unknown model nothing is said


def test_blocks_that_are_made_are_said() -> None:
    assert Oft(block=33).said({}) == "block 33"
    assert Oft(block=32).said(SMALL) == "block 32"
    assert Oft(block=33).said(SMALL) == "block 33 (made: 32)"
    assert Peft(kind="oft", options={"oft_block_size": 44}).said(SMALL) == "oft_block_size 44, blocks of 32, 48"


@pytest.mark.parametrize("model", MODELS)
def test_files_headers_tell_the_same_layers(model: str, tmp_path: Any) -> None:
    """Shapes as a folder stores them, experts one by one, lead to the layers and weights of the loaded model."""
    from safetensors import safe_open

    made = MODELS[model]()
    made.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shapes = as_held(stored, made.config.model_type)
    modules = dict(made.named_modules())
    expected = {name: _linear(modules[name]) for name in linear_names(made, made.get_output_embeddings())}
    assert adaptable_layers(shapes, made.config.model_type) == expected
    tied = {"lm_head.weight"}
    assert {n: s for n, s in shapes.items() if n not in tied} == {
        name: tuple(parameter.shape) for name, parameter in made.named_parameters() if name not in tied
    }
