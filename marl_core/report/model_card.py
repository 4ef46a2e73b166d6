"""The model card of a published adapter: its base, reference and rewards, what was measured, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from marl_core.artifacts.adapter_files import CONFIG_FILE
from marl_core.artifacts.hub import is_repo_name
from marl_core.artifacts.kind_table import kind_name, known_kind
from marl_core.config.redact import redacted
from marl_core.config.yaml_text import dump_yaml
from marl_core.report.run_data import RunData

SHOWN_SECTIONS = ("reference", "reward", "sampling")
"""Sections of the config that the card shows as they are."""
KL_LABEL = "KL to the reference, nats per response"


def model_card(run: RunData, hub: str | None = None) -> str:
    """Markdown with the hub's metadata on top; `hub` is the name to load the adapter by, else the folder it lies in."""
    from huggingface_hub import ModelCard, ModelCardData

    adapter = _adapter_config(run)
    model, quantization = run.config["model"], run.config.get("quantization")
    data = ModelCardData(
        base_model=str(model["path"]) if on_a_hub(str(model["path"])) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["marl", "ppo", *filter(None, [kind_name(adapter.get("peft_type"))]), "rlhf"],
    )
    card = ModelCard.from_template(
        data,
        template_str=files("marl_core.report").joinpath("model_card.md.jinja").read_text(encoding="utf-8"),
        run=run,
        kind=known_kind(adapter.get("peft_type"), adapter).title,
        hub=hub,
        model=model,
        base=run.provenance.get("base", {}),
        quantization=quantization.get("use") if isinstance(quantization, Mapping) else quantization or "none",
        lines=_load(run, hub),
        means=[*_means(run, "objective/scores", "mean reward of a step"), *_means(run, "objective/kl", KL_LABEL)],
        choices=dump_yaml(redacted({name: run.config[name] for name in SHOWN_SECTIONS if name in run.config})),
        shown=[*run.evaluations[:1], *run.evaluations[1:][-1:]],
        code=code,
        fenced=fenced,
        spread=_spread,
    )
    return f"{str(card).strip()}\n"


def _adapter_config(run: RunData) -> dict[str, Any]:
    """PEFT's config of the adapter that the run ended with; empty where there is none."""
    try:
        config = json.loads((run.folder / "final" / "policy" / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def code(value: Any) -> str:
    """A text of somebody else's as one line of code: no markup, no HTML, no end of a table cell comes out of it."""
    text = re.sub(r"\s+", " ", str(value)).replace("`", "'").replace("|", r"\|").strip()
    return f"`{text or ' '}`"


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def on_a_hub(base: str) -> bool:
    """Whether a base is named as others can load it: OWNER/NAME, and no folder of this machine."""
    return not os.path.exists(base) and is_repo_name(base)


def _load(run: RunData, hub: str | None) -> str:
    """Five lines of Python that load the adapter."""
    model = run.config["model"]
    base, tokenizer = model["path"], model.get("tokenizer") or model["path"]
    revision = f", revision={_literal(model['revision'])}" if model.get("revision") else ""
    prepared = "  # then prepare it as above" if run.provenance.get("base", {}).get("prepared_by") else ""
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"base = AutoModelForCausalLM.from_pretrained({_literal(base)}{revision}){prepared}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(tokenizer)}{'' if model.get('tokenizer') else revision})\n"
        f"model = PeftModel.from_pretrained(base, {_literal(hub or '.')}){'' if hub else '  # this folder'}"
    )


def _literal(text: Any) -> str:
    return repr(str(text)).replace("`", r"\x60")


def _means(run: RunData, metric: str, title: str) -> Iterator[str]:
    """A metric at the start and at the end, where it was written."""
    first, last = run.ends(metric)
    if first is None or last is None:
        return
    count = run.tenth(metric)
    if len(run.curve(metric)) == 1:
        yield f"{title}: {first:.4g} (one step)"
    elif count == 1:
        yield f"{title}: {first:.4g} in the first step, {last:.4g} in the last"
    else:
        yield f"{title}: {first:.4g} in the first {count} steps, {last:.4g} in the last {count}"


def _spread(mean: float | None, std: float | None, digits: int = 4) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}g} ± {std:.2g}" if std else f"{mean:.{digits}g}"
