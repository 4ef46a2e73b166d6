"""The model card of a published adapter: what it rests on, what pulled at it, what was measured, how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from marl_core.artifacts.hub import is_repo_name
from marl_core.config.redact import redacted
from marl_core.report.run_data import RunData


def model_card(run: RunData, hub: str | None = None) -> str:
    """Markdown with the hub's metadata on top; `hub` is the name to load the adapter by, else the folder it lies in."""
    sections = (
        ("Base", _base(run)),
        ("Load it", _load(run, hub)),
        ("Training", _training(run)),
        ("Results", _results(run)),
        ("Versions", _versions(run)),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    title = code(hub or run.name)
    return f"---\n{_metadata(run)}\n---\n\n# {title}\n\nA LoRA adapter trained with PPO by marl.\n\n{body}\n"


def code(value: Any) -> str:
    """A text of somebody else's as one line of code: no markup, no HTML, no end of a table cell comes out of it."""
    text = re.sub(r"\s+", " ", str(value)).replace("`", "'").replace("|", r"\|").strip()
    return f"`{text or ' '}`"


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _metadata(run: RunData) -> str:
    from huggingface_hub import ModelCardData

    base = str(run.config["model"]["path"])
    data = ModelCardData(
        base_model=base if on_a_hub(base) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["marl", "ppo", "lora", "rlhf"],
    )
    return str(data.to_yaml()).strip()


def on_a_hub(base: str) -> bool:
    """Whether a base is named as others can load it: OWNER/NAME, and no folder of this machine."""
    return not os.path.exists(base) and is_repo_name(base)


def _base(run: RunData) -> str:
    model, known = run.config["model"], run.provenance.get("base", {})
    lines = [
        f"- base: {code(model['path'])}" + (f", revision {code(model['revision'])}" if model.get("revision") else ""),
        f"- fingerprint of its weights: {code(known.get('fingerprint'))}",
        f"- held in training as {code(model.get('dtype', 'bfloat16'))}, quantization {code(_named(run.config.get('quantization')))}",
    ]
    if known.get("prepared_by"):
        lines.append(
            f"- **prepared before training by** {code(known['prepared_by'])}: the adapter belongs to the prepared base. On the base as "
            "it was downloaded it gives other numbers, so prepare that in the same way first."
        )
    return "\n".join(lines)


def _load(run: RunData, hub: str | None) -> str:
    model = run.config["model"]
    base, words = model["path"], model.get("tokenizer") or model["path"]
    revision = f", revision={_literal(model['revision'])}" if model.get("revision") else ""
    prepared = run.provenance.get("base", {}).get("prepared_by")
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"base = AutoModelForCausalLM.from_pretrained({_literal(base)}{revision})"
        + ("  # then prepare it as above" if prepared else ""),
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(words)}{'' if model.get('tokenizer') else revision})",
        f"model = PeftModel.from_pretrained(base, {_literal(hub or '.')})" + ("" if hub else "  # this folder"),
    ]
    return fenced("\n".join(lines), "python")


def _literal(text: Any) -> str:
    return repr(str(text)).replace("`", r"\x60")


def _training(run: RunData) -> str:
    ppo = run.config.get("ppo", {})
    chosen = {name: run.config[name] for name in ("reference", "reward", "sampling") if name in run.config}
    text = yaml.safe_dump(redacted(chosen), sort_keys=False, allow_unicode=True)
    lines = [
        f"- steps: {run.steps[-1]['step'] if run.steps else 'not recorded'}, responses a step: {code(ppo.get('batch', '?'))}, "
        f"seed {code(run.provenance.get('seed', '?'))}",
        *_curve(run, "objective/scores", "mean reward of a step"),
        *_curve(run, "objective/kl", "KL to the reference, nats per response"),
    ]
    return "\n".join(lines) + "\n\n" + fenced(text, "yaml")


def _curve(run: RunData, metric: str, title: str) -> Iterator[str]:
    first, last = run.ends(metric)
    if first is None or last is None:
        return
    few = run.tenth(metric)
    if len(run.curve(metric)) == 1:
        yield f"- {title}: {first:.4g} (one step)"
    elif few == 1:
        yield f"- {title}: {first:.4g} in the first step, {last:.4g} in the last"
    else:
        yield f"- {title}: {first:.4g} in the first {few} steps, {last:.4g} in the last {few}"


def _results(run: RunData) -> str:
    if not run.evaluations:
        return "No held-out prompts were evaluated (`eval.prompts`)."
    shown = run.evaluations[:1] if len(run.evaluations) == 1 else [run.evaluations[0], run.evaluations[-1]]
    head = ["held-out prompts", *(f"step {line['step']}" for line in shown)]
    rows = [
        ["reward", *(_spread(line["reward"], line["reward_std"]) for line in shown)],
        ["KL to the reference, nats per response", *(_spread(line["kl"], line["kl_std"]) for line in shown)],
        ["length, tokens", *(_spread(line["length"], line["length_std"]) for line in shown)],
        ["share that ended by itself", *(f"{line['finished']:.3g}" for line in shown)],
        *([f"judge {code(name)}", *(_judge(line, name) for line in shown)] for name in shown[-1]["judges"]),
    ]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
    return (
        table + "\n\nMeans; after ± the standard deviation over sampling seeds. A judge is measured, never trained on."
    )


def _judge(line: Mapping[str, Any], name: str) -> str:
    found = line["judges"].get(name)
    return "-" if found is None or found["mean"] is None else _spread(found["mean"], found["std"])


def _spread(mean: float, std: float) -> str:
    return f"{mean:.4g} ± {std:.2g}" if std else f"{mean:.4g}"


def _versions(run: RunData) -> str:
    packages = run.provenance.get("packages", {})
    lines = [f"- {name} {version}" for name, version in packages.items()] or ["Not recorded."]
    return "\n".join(lines)


def _named(choice: Any) -> str:
    return str(choice.get("use", "none") if isinstance(choice, Mapping) else choice or "none")
