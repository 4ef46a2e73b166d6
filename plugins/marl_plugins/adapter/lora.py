"""LoRA and what is made of it by options of PEFT's: rsLoRA, LoRA+, MiCA, ranks by layer, experts; and DoRA, under a name of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from marl_core import near_match
from marl_plugins.adapter.base import SECTION, Layers, PeftKind, Shapes, key_of, section_of
from marl_plugins.adapter.layers import by_pattern, chosen_layers
from marl_plugins.adapter.peft_options import LORA_OPTIONS
from marl_plugins.adapter.sizes import Wrong, misfits

if TYPE_CHECKING:
    from marl_core import Plan

OWN_NAMES: Mapping[str, str] = {
    "r": "r",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "lora_dropout": "dropout",
}
"""PEFT's names of what has a key of marl's own."""
SET_BY_MARL = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path")


class _LoraKind(PeftKind):
    peft_type: ClassVar[str] = "lora"

    r: PositiveInt = Field(default=16, description="Rank.")
    alpha: PositiveFloat = Field(default=32.0, description="The update is scaled by alpha / r.")
    ranks: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="Ranks of single layers, by the end of a layer's name or a regular expression for it: `{q_proj: 64}`.",
    )
    rslora: bool = Field(
        default=False, description="Scale the update by alpha / sqrt(r), so that it doesn't shrink with the rank."
    )
    plus: PositiveFloat | None = Field(
        default=None,
        description="LoRA+: the factor on B's learning rate, e.g. 16 for supervised training, 2 was used with RL.",
    )
    init: Literal["default", "gaussian", "orthogonal", "mica"] = Field(
        default="default",
        description="How A starts; orthogonal: A and B, and the base's output to rounding; mica: B from the base's minor directions, "
        "which stays, and A learns.",
    )
    experts: bool = Field(
        default=False, description="Adapt the weights of all experts, too, which are one tensor in each layer."
    )
    lora: dict[str, Any] = Field(
        default_factory=dict, description="Further options of peft's LoraConfig (lora_bias, layers_to_transform, ...)."
    )

    def flags(self) -> dict[str, Any]:
        """Options of PEFT's that the name of the kind stands for."""
        return {}

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """Own options where they aren't PEFT's defaults, and what stands in `lora`."""
        options: dict[str, Any] = {"r": self.r, "lora_alpha": self.alpha, **self.flags()}
        options |= {"use_rslora": True} if self.rslora else {}
        options |= {"init_lora_weights": self.init} if self.init != "default" else {}
        options |= {"rank_pattern": dict(self.ranks)} if self.ranks else {}
        options |= {"target_parameters": sorted(_experts(shapes))} if self.experts and _experts(shapes) else {}
        return options | self.lora

    def own_names(self) -> Mapping[str, str]:
        """What stands in `lora` is told there."""
        names = {"init_lora_weights": "init", "rank_pattern": "ranks", "target_parameters": "experts"}
        return {**OWN_NAMES, **names, **{name: f"lora.{name}" for name in self.lora}}

    def wrong(self, plan: Plan) -> Iterator[str]:
        """Options that are given twice or are marl's, those that PEFT can't serve here, and what experts don't go with."""
        given = {"init_lora_weights": self.init != "default", "use_rslora": self.rslora, "rank_pattern": self.ranks}
        given |= {"target_parameters": self.experts, **dict.fromkeys(self.flags(), True)}
        names = {"init_lora_weights": "init", "use_rslora": "rslora", "rank_pattern": "ranks", "use_dora": "dora"}
        for name, value in self.lora.items():
            if name in OWN_NAMES:
                yield f"{SECTION}.lora.{name}: write {key_of(plan, self)}.{OWN_NAMES[name]} instead; it would be given twice."
            elif given.get(name):
                yield f"{SECTION}.lora.{name}: {names.get(name, 'experts')} says the same, so it would be given twice. Remove one."
            elif name in SET_BY_MARL:
                yield f"{SECTION}.lora.{name}: marl sets this itself. Remove it."
            elif isinstance(value, float) and not isfinite(value):
                yield f"{SECTION}.lora.{name}: {value} is not a finite number."
            elif name not in LORA_OPTIONS and (near := near_match(name, LORA_OPTIONS)):
                yield f"{SECTION}.lora.{name}: peft's config of lora has no such option. Did you mean {near!r}?"
        for pattern in self.ranks:
            if not _is_expression(pattern):
                yield f"{SECTION}.ranks: {pattern!r} is neither the end of a layer's name nor a regular expression."
        yield from self._start()
        yield from super().wrong(plan)
        yield from self._weights_directly(plan)

    def _start(self) -> Iterator[str]:
        """What the starts of some kinds don't go with."""
        options = self.peft_options({}, {})
        start, key = options.get("init_lora_weights"), self.own_names().get("init_lora_weights", "")
        if start == "mica" and self.plus is not None:
            yield (
                f"{SECTION}.plus: {self.plus:g} is a factor on B's learning rate, and with {key}: mica B stays as it starts. Remove plus, "
                f"or use another {key}."
            )
        if start == "mica" and options.get("use_dora"):
            yield f"{SECTION}.{key}: peft has no MiCA with DoRA. Use lora without dora, or another {key}."
        odd = [rank for rank in (self.r, *self.ranks.values()) if rank % 2]
        if start == "orthogonal" and odd:
            yield f"{SECTION}.{'r' if self.r % 2 else 'ranks'}: {odd[0]} is odd, and {key}: orthogonal needs even ranks."

    def misfits(self, layers: Layers, shapes: Shapes) -> Iterator[Wrong]:
        """Patterns may name experts' weights, too."""
        options = self.peft_options(layers, shapes)
        yield from misfits(self.peft_type, options, layers, _weights(options.get("target_parameters") or (), shapes))

    def _weights_directly(self, plan: Plan) -> Iterator[str]:
        """What adapters on single weights don't go with."""
        if not (self.experts or self.lora.get("target_parameters")):
            return
        key, section = "experts" if self.experts else "lora.target_parameters", section_of(plan, self)
        if plan.config.model.shard != "none":
            yield (
                f"{SECTION}.{key} with model.shard: nobody has measured that sharded experts with a LoRA give the plain ones' numbers. "
                "Set model.shard: none, or adapt layers (targets) only."
            )
        if section.dropout > 0:
            yield (
                f"{key_of(plan, self)}.dropout: {section.dropout}, but peft has no dropout for target_parameters. Set it to 0."
            )

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """r (in + out) of each layer; DoRA adds its norms, MiCA keeps B, experts have a pair of factors each."""
        options = self.peft_options(layers, shapes)
        patterns: Mapping[str, int] = options.get("rank_pattern") or {}
        frozen_b = options.get("init_lora_weights") == "mica"
        beside = sum(bool(options.get(name)) for name in ("use_dora", "lora_bias"))
        count = 0
        for name, (rows, columns) in chosen_layers(layers, options).items():
            count += by_pattern(patterns, name, self.r) * (columns + (0 if frozen_b else rows)) + beside * rows
        return count + sum(
            by_pattern(patterns, name, self.r) * _factors(shapes[name])
            for name in _weights(options.get("target_parameters") or (), shapes)
        )

    def held(self, layers: Layers, shapes: Shapes) -> int:
        """MiCA's B, float32."""
        if self.peft_options(layers, shapes).get("init_lora_weights") != "mica":
            return 0
        return sum(4 * by_pattern(self.ranks, name, self.r) * rows for name, (rows, _) in layers.items())

    def rates(self) -> Mapping[str, float]:
        """LoRA+: B learns faster (arXiv 2402.12354)."""
        return {} if self.plus is None else {"lora_B": self.plus}

    def said(self, layers: Layers) -> str:
        """Rank, alpha, and what isn't the default."""
        words = [f"r={self.r}", f"alpha={self.alpha:g}"]
        words += [f"ranks of {', '.join(self.ranks)}"] if self.ranks else []
        words += ["rsLoRA"] if self.rslora else []
        words += [f"LoRA+ {self.plus:g}"] if self.plus is not None else []
        words += [f"init {self.init}"] if self.init != "default" else []
        words += ["experts"] if self.experts else []
        return ", ".join([*words, *self.lora])


class Lora(_LoraKind):
    """LoRA: the product of two thin matrices beside each layer."""

    dora: bool = Field(default=False, description="DoRA: the weight's size and its direction learn apart.")

    def flags(self) -> dict[str, Any]:
        """DoRA, where it is asked for."""
        return {"use_dora": True} if self.dora else {}


class Dora(_LoraKind):
    """DoRA: a LoRA in which the weight's size and its direction learn apart."""

    def flags(self) -> dict[str, Any]:
        """It is a LoRA to PEFT."""
        return {"use_dora": True}


def _experts(shapes: Shapes) -> list[str]:
    """The weights of experts that are one tensor for all: [experts, rows, columns]."""
    return [name for name, shape in shapes.items() if ".experts." in name and len(shape) == 3]


def _weights(targets: Any, shapes: Shapes) -> list[str]:
    """The model's weights that `target_parameters` name, by their ends."""
    return [name for name in shapes if any(name == target or name.endswith(f".{target}") for target in targets)]


def _factors(shape: tuple[int, ...]) -> int:
    """Numbers of a rank-1 LoRA on a weight: of a tensor for all experts one for each."""
    count = shape[0] if len(shape) == 3 else 1
    return count * (shape[-1] + shape[-2])


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
