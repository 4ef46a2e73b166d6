"""The kinds of adapters that PEFT knows, and what is known of each: told without torch and without PEFT.

Every fact was measured against PEFT 0.21 (tests/upstream/test_kinds.py holds them). What can be seen while an adapter is made or moved is
measured there and then; here stands what can't be seen in time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Start = Literal["base", "rounded", "other"]
"""What a fresh adapter gives: bitwise the base's numbers, the base's to rounding, or others."""
Merge = Literal["weight", "bias", "no"]
"""Whether PEFT can merge it into the base: into weights, into the biases that the layers then must have, or not at all."""

FOUR_BIT, EIGHT_BIT = "bnb-4bit", "bnb-8bit"
BOTH = frozenset({FOUR_BIT, EIGHT_BIT})


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of one kind of adapter. `Kind.refused` is empty where a base that all roles share can hold it."""

    title: str
    """How people write it."""
    parts: str
    """How the names of its tensors begin, behind the layer's name."""
    refused: str = ""
    """Why the shared base can't hold it, and what to do: a sentence."""
    start: Start = "base"
    packed: frozenset[str] = frozenset()
    """Quantized bases on which its gradients were compared with those on the dequantized one, and agreed."""
    any_quantized: bool = False
    """Whether PEFT itself has layers of it for every quantized base that it knows."""
    merge: Merge = "weight"
    kept: float = 1.0
    """Activations that it keeps for the backward pass; LoRA = 1."""
    initial: str = "init_weights"
    """The option that says how it starts."""
    starts: tuple[Any, ...] = (True,)
    """The values of that option that start as the base."""
    default: Any = True
    """PEFT's default of that option."""
    base_dependent: bool = False
    """Whether a part of it is rebuilt from the base's weights, so that the same file is another adapter on another dtype."""
    follows_base: bool = False
    """Whether PEFT keeps its learning weights in the base's dtype instead of float32."""
    inner: bool = False
    """Whether names go on behind the part's own, e.g. `osf_svd_params.U_low`; else what stands there is an adapter's name."""
    converted: bool = False
    """Whether PEFT converts an adapter of experts one by one, as transformers 4 kept them, to one of a tensor for all."""
    never_learns: tuple[str, ...] = ()
    """Parameters that PEFT may leave learning though its file doesn't hold them."""

    linear: bool = True
    """Whether it stands on linear layers, not on norms or embeddings."""

    @property
    def folded(self) -> bool:
        """Whether a token costs it more than a plain LoRA (benchmarks/NOTES.md), which a merged copy of the weight saves."""
        return self.linear and self.merge == "weight" and self.title != _PLAIN


_PLAIN = "LoRA"
_TOKENS = (
    "adds tokens instead of changing layers: positions and the cache would differ between policy, reference and reward. "
    "Use an adapter of layers."
)
_SECOND = "needs a second pass, task ids or a model of its own beside the base. Use lora."
_REBUILT = (
    "rebuilds a part of itself from the base's weights: saved on one dtype it is another adapter on the next. Use lora."
)


def _adds_tokens(title: str, parts: str) -> Kind:
    return Kind(title, parts, refused=f"{title} {_TOKENS}", merge="no")


def _second(title: str, parts: str) -> Kind:
    return Kind(title, parts, refused=f"{title} {_SECOND}", merge="no")


KINDS: Mapping[str, Kind] = {
    "lora": Kind(
        "LoRA",
        "lora_",
        packed=BOTH,
        any_quantized=True,
        converted=True,
        initial="init_lora_weights",
        starts=(True, "gaussian", "orthogonal", "mica"),
    ),
    "adalora": Kind(
        "AdaLoRA",
        "lora_",
        packed=BOTH,
        kept=1.01,
        initial="init_lora_weights",
        starts=(True,),
        never_learns=("ranknum",),
    ),
    "miss": Kind("MiSS", "miss_", packed=BOTH, kept=0.77, starts=(True, "bat", "mini")),
    "oft": Kind("OFT", "oft_", packed=BOTH, kept=1.09),
    "boft": Kind("BOFT", "boft_", packed=BOTH, kept=2.21),
    "hra": Kind("HRA", "hra_", start="rounded", kept=7.44),
    "ia3": Kind("IA3", "ia3_", packed=BOTH, kept=0.92, initial="init_ia3_weights"),
    "road": Kind("RoAd", "road_", packed=BOTH, kept=1.74),
    "vera": Kind("VeRA", "vera_", packed=BOTH, kept=1.6),
    "randlora": Kind("RandLoRA", "randlora_", packed=BOTH, kept=1.07),
    "tinylora": Kind("TinyLoRA", "tinylora_", kept=0.73, inner=True),
    "loha": Kind("LoHa", "hada_", packed=frozenset({EIGHT_BIT}), kept=1.26),
    "lokr": Kind("LoKr", "lokr_", packed=frozenset({EIGHT_BIT}), kept=1.26, starts=(True, "lycoris")),
    "hira": Kind("HiRA", "hira_", packed=BOTH, kept=1.26, starts=(True, "gaussian")),
    "delora": Kind("DeLoRA", "delora_", kept=1.24),
    "gralora": Kind("GraLoRA", "gralora_", packed=frozenset({FOUR_BIT}), kept=1.02),
    "glora": Kind("GLoRA", "glora_", kept=1.26, inner=True),
    "fourierft": Kind("FourierFT", "fourierft_", packed=BOTH, kept=1.29, default=False),
    "waveft": Kind("WaveFT", "waveft_", packed=BOTH, kept=1.59),
    "c3a": Kind("C3A", "c3a_", packed=frozenset({FOUR_BIT}), kept=0.98, default="xavier_uniform"),
    "shira": Kind("SHiRA", "shira_", packed=frozenset({FOUR_BIT}), kept=1.35),
    "supertuning": Kind("Super", "supertuning_", kept=1.29),
    "psoft": Kind("PSOFT", "psoft_", kept=0.87, base_dependent=True, inner=True),
    "deft": Kind("DEFT", "deft_", start="rounded", kept=1.56),
    "peanut": Kind("PEANuT", "peanut_", kept=1.28, inner=True),
    "beft": Kind("BEFT", "beft_", packed=BOTH, merge="bias", kept=0.72),
    "ln_tuning": Kind("LN-tuning", "ln_tuning_", packed=BOTH, kept=0.84, follows_base=True, linear=False),
    "trainable_tokens": Kind("trainable tokens", "trainable_tokens_", kept=0.0, linear=False),
    "vblora": Kind("VB-LoRA", "vblora_", start="other", kept=1.01, initial="", inner=True),
    "unilora": Kind("UniLoRA", "unilora_", start="other", kept=0.99, initial="", inner=True),
    "frod": Kind("FRoD", "frod_", f"FRoD {_REBUILT}", "rounded", kept=1.21, base_dependent=True, inner=True),
    "adamss": Kind("AdaMSS", "adamss_", f"AdaMSS {_REBUILT}", kept=1.0, base_dependent=True, inner=True),
    "osf": Kind("OSF", "osf_", f"OSF {_REBUILT}", "rounded", kept=1.73, base_dependent=True, inner=True),
    "pvera": Kind(
        "PVeRA",
        "pvera_",
        "PVeRA draws its weights at random in training, so the ratio of old and new log-probs is noise. Use vera.",
    ),
    "lily": Kind(
        "Lily",
        "lily_",
        "Lily's router averages over the whole sequence, so a token's log-prob depends on those after it and on padding: not a policy. "
        "Use lora.",
        merge="no",
        kept=1.06,
    ),
    "adaption_prompt": Kind(
        "adaption prompt",
        "adaption_",
        "An adaption prompt replaces attention and can't be switched off by layer. Use lora.",
        merge="no",
    ),
    "bone": Kind(
        "Bone",
        "bone_",
        "Bone is no longer read by PEFT; MiSS took its place (PEFT's scripts/convert-bone-to-miss.py). Convert it.",
        merge="no",
    ),
    "prompt_tuning": _adds_tokens("Prompt tuning", "prompt_"),
    "multitask_prompt_tuning": _adds_tokens("Multitask prompt tuning", "prompt_"),
    "p_tuning": _adds_tokens("P-tuning", "prompt_"),
    "prefix_tuning": _adds_tokens("Prefix tuning", "prompt_"),
    "cpt": _adds_tokens("CPT", "prompt_"),
    "cartridge": _adds_tokens("A cartridge", "prompt_"),
    "xlora": _second("X-LoRA", "xlora_"),
    "poly": _second("Poly", "poly_"),
    "shadow": _second("Shadow", "shadow_"),
}
"""By PEFT's type in lower case."""


def kind_name(peft_type: Any) -> str:
    """A kind's name, of a `peft_type` as a config file or PEFT's own enum has it; empty where it is none."""
    value = getattr(peft_type, "value", peft_type)
    return value.lower() if isinstance(value, str) else ""


def known_kind(peft_type: Any, options: Mapping[str, Any] | None = None) -> Kind:
    """What is known of an adapter of this type with these options of PEFT's: DoRA is a LoRA that starts to rounding.

    A type that isn't in the table, one that a stranger has registered with PEFT, was tried on no quantized base; its tensors begin as
    PEFT has it by default, with the type's name.
    """
    name, options = kind_name(peft_type), options or {}
    kind = KINDS.get(name)
    if kind is None:
        return Kind(
            name, f"{name or 'lora'}_", inner=True
        )  # a config without a type is refused; its names are a LoRA's
    form = _FORMS.get(name)
    return kind if form is None else form(kind, options)


def _lora(kind: Kind, options: Mapping[str, Any]) -> Kind:
    initial = options.get("init_lora_weights", True)
    untried: dict[str, Any] = {"packed": frozenset(), "any_quantized": False}
    if options.get("lora_bias"):
        kind = replace(kind, title="LoRA with bias", merge="bias")
    if options.get("use_dora"):
        kind = replace(kind, **untried | {"packed": frozenset({FOUR_BIT})}, title="DoRA", start="rounded", kept=2.39)
    if options.get("use_bdlora"):
        kind = replace(kind, **untried, title="BD-LoRA")
    if initial == "mica":
        kind = replace(kind, **untried, title="MiCA", kept=0.98)
    if initial == "orthogonal":
        kind = replace(kind, **untried, title="LoRA with an orthogonal start", start="rounded")
    if options.get("alora_invocation_tokens"):
        kind = replace(kind, **untried, title="aLoRA", merge="no")
    return kind


def _miss(kind: Kind, options: Mapping[str, Any]) -> Kind:
    is_bat = options.get("init_weights") == "bat"
    return replace(kind, title="MiSS-bat", start="rounded", packed=frozenset({FOUR_BIT}), kept=1.56) if is_bat else kind


def _deft(kind: Kind, options: Mapping[str, Any]) -> Kind:
    return replace(kind, title="PaRa", start="other") if options.get("para") else kind


_FORMS: Mapping[str, Callable[[Kind, Mapping[str, Any]], Kind]] = {"lora": _lora, "miss": _miss, "deft": _deft}
"""The kinds of which an option makes another form, with other facts."""


def tried_on(quantization: str) -> list[str]:
    """The kinds that were tried on a quantized base of this name (`bnb-4bit`, `bnb-8bit`)."""
    tried = (name for name, kind in KINDS.items() if kind.any_quantized or quantization in kind.packed)
    return sorted(tried)
