"""Section policy of what another trainer trained: a kind of PEFT's adapters with PEFT's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marl_core import config_refusal
from marl_plugins.migrate.foreign_config import Note, without_none
from marl_plugins.writing import usual_lora

CLASSES = (
    "AdaLoraConfig", "AdamssConfig", "AdaptionPromptConfig", "BOFTConfig", "BeftConfig", "BoneConfig", "C3AConfig", "CPTConfig",
    "CartridgeConfig", "DeftConfig", "DeloraConfig", "FourierFTConfig", "FrodConfig", "GloraConfig", "GraloraConfig", "HRAConfig",
    "HiraConfig", "IA3Config", "LNTuningConfig", "LilyConfig", "LoHaConfig", "LoKrConfig", "LoraConfig", "MissConfig",
    "MultitaskPromptTuningConfig", "OFTConfig", "OSFConfig", "PeanutConfig", "PolyConfig", "PrefixTuningConfig",
    "PromptEncoderConfig", "PromptTuningConfig", "PsoftConfig", "PveraConfig", "RandLoraConfig", "RoadConfig", "ShadowConfig",
    "ShiraConfig", "SupertuningConfig", "TinyLoraConfig", "TrainableTokensConfig", "UniLoraConfig", "VBLoRAConfig", "VeraConfig",
    "WaveFTConfig", "XLoraConfig",
)  # fmt: skip
"""PEFT's configs, all releases together."""
UNDERSCORED = {
    "AdaptionPromptConfig": "adaption_prompt",
    "LNTuningConfig": "ln_tuning",
    "MultitaskPromptTuningConfig": "multitask_prompt_tuning",
    "PrefixTuningConfig": "prefix_tuning",
    "PromptEncoderConfig": "p_tuning",
    "PromptTuningConfig": "prompt_tuning",
    "TrainableTokensConfig": "trainable_tokens",
}
OWN_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "lora": {
        "r": "r",
        "lora_alpha": "alpha",
        "use_rslora": "rslora",
        "use_dora": "dora",
        "init_lora_weights": "init",
        "rank_pattern": "ranks",
    },
    "oft": {"oft_block_size": "block"},
    "miss": {"r": "r", "mini_r": "mini"},
    "tinylora": {"u": "u", "r": "r", "weight_tying": "tie"},
    "ia3": {"feedforward_modules": "feedforward"},
}
"""The kinds that have a strategy of their own, with PEFT's options that it has too, under its own names. Others are `use: peft`."""
SET_BY_MARL = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
)  # fmt: skip
OTHER_TARGETS = ("ln_tuning", "trainable_tokens")
"""Kinds that adapt no linear layers."""


@dataclass(frozen=True, slots=True)
class Computed:
    """An option whose value a script computes."""

    why: str
    """What is said of it, where it isn't refused whatever it is."""


@dataclass
class Section:
    """Section policy, and what is said of options that it doesn't have."""

    policy: dict[str, Any]
    notes: list[Note] = field(default_factory=list)


def kind_of(class_name: str) -> str:
    """PEFT's type of a config class, in lower case."""
    return UNDERSCORED.get(class_name, class_name.removesuffix("Config").lower())


def policy_section(
    kind: str, options: Mapping[str, Any], named: str, keys: Mapping[str, str], plus: float | None = None
) -> Section:
    """A new adapter of this kind with PEFT's options.

    `named`: what the options stand in, for notes; `keys`: what the other trainer calls single options. `plus`: LoRA+'s ratio of rates.
    """
    given = {name: value for name, value in options.items() if name not in SET_BY_MARL and value is not None}
    refused = list(config_refusal(kind, {}, named))
    whole = next((sentence for sentence in refused if sentence.startswith(f"{named}: ")), None)
    if whole is not None:
        why = f"{whole.removeprefix(f'{named}: ')} Here it is a LoRA with marl's defaults"
        return Section(usual_lora(), [(named, why)])
    notes: list[Note] = []
    if refused and not given.get("init_weights"):  # FourierFT and C3A, by PEFT's default
        given.pop("init_weights", None)
        notes.append((f"{named}.init_weights", "PEFT's default starts away from the base; here it starts as the base"))
    kept: dict[str, Any] = {}
    for name, value in given.items():
        key = keys.get(name, f"{named}.{name}")
        reason = _refusal(kind, name, value, named, refused) or (value.why if isinstance(value, Computed) else None)
        if reason is None:
            kept[name] = value
        else:
            notes.append((key, reason))
    return Section({"start": "new", **_options(kind, kept), **({"plus": plus} if plus else {})}, notes)


def _refusal(kind: str, name: str, value: Any, named: str, anyway: list[str]) -> str | None:
    """Why marl refuses this one option; None where it doesn't, and of what is computed where only its value could tell."""
    if isinstance(value, Computed):
        if name.startswith("init") or name in ("bias", "target_modules"):
            return None
        value = {}
    sentences = [sentence for sentence in config_refusal(kind, {name: value}, named) if sentence not in anyway]
    return " ".join(sentence.partition(": ")[2] for sentence in sentences) or None


def _options(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's options as a strategy's own, with the section's keys `targets` and `dropout`."""
    rest = dict(given)
    rest.pop("bias", None)  # "none": another was refused
    dropout = next((rest.pop(name) for name in list(rest) if _is_dropout(kind, name)), None)
    section = {"targets": _targets(kind, rest.pop("target_modules", None)), "dropout": dropout or None}
    own: dict[str, Any] = {}
    for name, ours in OWN_OPTIONS.get(kind, {}).items():
        if name in rest:
            own[ours] = rest.pop(name)
    if kind == "lora":
        own |= {"init": None} if own.get("init") is True else {}
        own |= {name: own.get(name) or None for name in ("rslora", "dora")}
        return without_none({**own, **section, "lora": rest or None})
    if kind == "oft" and isinstance(rest.get("use_cayley_neumann"), bool):
        own["exact"] = True if not rest.pop("use_cayley_neumann") else None
    if kind == "miss" and (form := rest.pop("init_weights", None)) not in (None, True):
        own["form"] = form
    if kind in OWN_OPTIONS and not rest:
        return without_none({"use": kind, **own, **section})
    raw = {
        name: value
        for name, value in given.items()
        if name not in ("target_modules", "bias") and not _is_dropout(kind, name)
    }
    return without_none({"use": "peft", "kind": kind, "options": raw or None, **section})


def _is_dropout(kind: str, name: str) -> bool:
    """Whether the section's own key `dropout` says it."""
    return name.endswith("_dropout") and name != "rank_dropout" and (name != "module_dropout" or kind == "oft")


def _targets(kind: str, written: Any) -> Any:
    """Modules by name; all linear layers where none are named, or nothing of what adapts others."""
    if written is None or written == []:
        return None if kind in OTHER_TARGETS else "all-linear"
    return [written] if isinstance(written, str) and written != "all-linear" else written
