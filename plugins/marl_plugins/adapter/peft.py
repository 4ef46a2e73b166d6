"""Any other kind of PEFT's that a base with several roles can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from marl_core import base_refusal, config_refusal, known_kind, near_match
from marl_plugins.adapter import counts
from marl_plugins.adapter.base import SECTION, Layers, PeftKind, Shapes, key_of, section_of
from marl_plugins.adapter.ia3 import scaled_at_inputs
from marl_plugins.adapter.peft_options import OPTIONS, type_problem
from marl_plugins.adapter.sizes import Wrong, lost_ends

if TYPE_CHECKING:
    from marl_core import Plan

OF_ITS_OWN = "lora"
"""The kind whose strategy takes further options of PEFT's by itself."""
STARTS_AS_THE_BASE: Mapping[str, Mapping[str, Any]] = {
    "fourierft": {"init_weights": True},
    "c3a": {"init_weights": True},
}
"""Options of kinds that PEFT starts elsewhere by default."""
ADALORA_RANK = 12
"""PEFT's rank of an AdaLoRA at the start."""
ELSEWHERE = ("ln_tuning", "trainable_tokens")
"""Kinds that stand on other modules than linear layers."""


class Peft(PeftKind):
    """Any other kind of PEFT's: `{use: peft, kind: boft, boft_block_size: 8}`, with PEFT's own options beside its name."""

    kind: str = Field(
        description="PEFT's name of the kind in small letters: " + ", ".join(OPTIONS) + "; e.g. boft",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of PEFT's config of that kind, by PEFT's names. They may also stand beside `kind`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, written: Any) -> Any:
        """Options beside the kind are PEFT's."""
        if not isinstance(written, Mapping):
            return written
        own = {name: written[name] for name in written if name in cls.model_fields}
        beside = {name: written[name] for name in written if name not in own}
        given = own.get("options", {})
        return {**own, "options": {**given, **beside}} if isinstance(given, Mapping) else written

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind == OF_ITS_OWN:
            raise ValueError(f"{kind} has a strategy of its own, which takes PEFT's options too: write `use: {kind}`")
        if kind not in OPTIONS:
            refused = next(config_refusal(kind, {}, SECTION), "").removeprefix(f"{SECTION}: ")
            near = near_match(kind, OPTIONS)
            way_out = f"Did you mean {near!r}?" if near else f"Known: {', '.join(OPTIONS)}."
            raise ValueError(refused or f"peft has no kind {kind!r} that was tried here. {way_out}")
        return kind

    @field_validator("options")
    @classmethod
    def _as_peft_has_them(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Each problem is told at the option."""
        kind = info.data.get("kind")  # absent where it is wrong itself
        problems = list(_problems(kind, options)) if kind is not None else []
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return options

    def peft_kind(self) -> str:
        """The one that is named."""
        return self.kind

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """As they are given; a start as the base where PEFT has another, and modules of kinds that don't stand on linear layers."""
        elsewhere: dict[str, Any] = {}
        if self.kind in ELSEWHERE and shapes:
            elsewhere = {"target_modules": _modules(self.kind, shapes)}
        if self.kind == "ia3":  # PEFT wants both lists, and the second as a part of the first
            scaled = scaled_at_inputs(layers, self.options.get("feedforward_modules"))
            return {**self.options, "target_modules": sorted(layers), "feedforward_modules": scaled}
        if self.kind == "adalora":
            return _at_one_rank(self.options)
        return {**STARTS_AS_THE_BASE.get(self.kind, {}), **elsewhere, **self.options}

    def wrong(self, plan: Plan) -> Iterator[str]:
        """Options that have a key of their own, and what doesn't go with the base."""
        key, section = key_of(plan, self), section_of(plan, self)
        for name in self.options:
            if name == "target_modules" and self.kind not in ELSEWHERE:
                yield f"{SECTION}.options.{name}: write {key}.targets instead; it would be given twice."
            elif name.endswith("dropout"):
                yield f"{SECTION}.options.{name}: write {key}.dropout instead; it would be given twice."
        if section.dropout > 0 and not any(name.endswith("dropout") for name in OPTIONS[self.kind]):
            yield f"{key}.dropout: {section.dropout}, and adapters of the kind {known_kind(self.kind).title} have none. Set it to 0."
        if self.kind in ELSEWHERE and section.targets != "all-linear":
            yield f"{key}.targets: {self.kind} doesn't stand on linear layers. Remove it, or give {SECTION}.options.target_modules."
        if self.options.get("boft_n_butterfly_factor", 1) != 1:
            yield (
                f"{SECTION}.options.boft_n_butterfly_factor: peft doesn't pass it on to its layers, where it is always 1. Remove it."
            )
        if self.kind == "hira" and self.options.get("rank_pattern"):
            yield f"{SECTION}.options.rank_pattern: peft doesn't pass it on to HiRA's layers, which all have r. Remove it."
        yield from self._moved_ranks()
        yield from self._parts()
        yield from super().wrong(plan)
        yield from base_refusal(self.kind, self.options, key, dtype=plan.config.model.dtype)

    def _moved_ranks(self) -> Iterator[str]:
        """AdaLoRA's ranks stay."""
        ranks = {name: self.options[name] for name in ("r", "init_r", "target_r") if name in self.options}
        if self.kind == "adalora" and len(set(ranks.values())) > 1:
            yield (
                f"{SECTION}.options.{next(reversed(ranks))}: {', '.join(f'{name} {rank}' for name, rank in ranks.items())}: marl doesn't "
                "move ranks between layers (peft's update_and_allocate isn't called), so the rank stays at init_r. Give r alone."
            )
        if self.kind == "adalora" and self.options.get("rank_pattern"):
            yield f"{SECTION}.options.rank_pattern: AdaLoRA's is of ranks that were moved, and marl doesn't move them. Remove it."

    def _parts(self) -> Iterator[str]:
        """How many blocks there are, or how large they are, and a rank that is cut into equal parts."""
        rank, parts = self.options.get("r", 32), self.options.get("gralora_k", 2)
        if self.kind == "gralora" and rank % parts:
            yield f"{SECTION}.options.r: {rank} must be a multiple of gralora_k, which is {parts}."
        size, blocks = self.options.get("boft_block_size", 4), self.options.get("boft_block_num", 0)
        if self.kind == "boft" and bool(size) == bool(blocks):
            yield (
                f"{SECTION}.options.boft_block_num: {blocks} beside boft_block_size {size}: give one of the two, and 0 for the other."
            )
        if self.kind == "road" and self.options.get("group_size", 64) % 2:
            yield f"{SECTION}.options.group_size: {self.options['group_size']} is odd, and outputs are turned in pairs. Give an even one."

    def misfits(self, layers: Layers, shapes: Shapes) -> Iterator[Wrong]:
        """Names of layers in IA3's second list, too."""
        yield from super().misfits(layers, shapes)
        ends = self.options.get("feedforward_modules") or ()
        if layers:
            yield from lost_ends("feedforward_modules", [ends] if isinstance(ends, str) else ends, layers)

    def own_names(self) -> Mapping[str, str]:
        """PEFT's names are told where they stand."""
        return {name: f"options.{name}" for name in OPTIONS[self.kind]}

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """By PEFT's layers of the kind."""
        return counts.learned(self.kind, self.peft_options(layers, shapes), layers, shapes)

    def held(self, layers: Layers, shapes: Shapes) -> int:
        """By PEFT's layers of the kind."""
        return counts.held(self.kind, self.peft_options(layers, shapes), layers, shapes)

    def said(self, layers: Layers) -> str:
        """The options that were given."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        blocks = counts.oft_blocks(self.options, layers) if self.kind == "oft" else []
        return f"{options}{', ' if options else ''}blocks of {', '.join(map(str, blocks))}" if blocks else options


def _problems(kind: str, options: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Options that PEFT's config of the kind doesn't have, and values of another type than it has."""
    for name, value in options.items():
        problem: str | PydanticCustomError | None = type_problem(kind, name, value)
        context = {"gt": 0} if problem == "greater_than" else {"ge": 0} if problem == "greater_than_equal" else {}
        if name not in OPTIONS[kind]:
            near = near_match(name, OPTIONS[kind])
            way_out = f"Did you mean {near!r}?" if near else f"It has: {', '.join(OPTIONS[kind])}."
            said = f"peft's config of {kind} has no option {name!r}. {way_out}"
            problem = PydanticCustomError("value_error", "{said}", {"said": said})
        if problem is not None:
            yield InitErrorDetails(type=problem, loc=(name,), input=value, ctx=context)


def _at_one_rank(options: Mapping[str, Any]) -> dict[str, Any]:
    """AdaLoRA's options with one rank at the start and at the end, and a schedule that PEFT accepts: marl doesn't move ranks."""
    rank = next((options[name] for name in ("init_r", "target_r", "r") if name in options), ADALORA_RANK)
    steps = options.get("tinit", 0) + options.get("tfinal", 0) + 1
    others = {name: value for name, value in options.items() if name != "r"}
    return {"init_r": rank, "target_r": rank, "total_step": steps, **others}


def _modules(kind: str, shapes: Shapes) -> list[str]:
    """The modules that the kind stands on: norms of layers, or the embedding of tokens."""
    if kind == "trainable_tokens":
        return [
            next((_module(name) for name, shape in shapes.items() if len(shape) == 2 and _is_token_table(name)), "")
        ]
    return sorted({_module(name) for name, shape in shapes.items() if len(shape) == 1 and _is_norm(_module(name))})


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _is_norm(module: str) -> bool:
    leaf = module.rpartition(".")[2]
    return "norm" in leaf or leaf.startswith("ln_")


def _is_token_table(weight: str) -> bool:
    return any(part in weight.split(".") for part in ("embed_tokens", "wte", "embed_in", "word_embeddings"))
