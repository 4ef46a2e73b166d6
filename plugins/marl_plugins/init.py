"""`marl init`: five questions, and a commented config that `marl check` accepts."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from marl_core import ConfigError, Plan, RunConfig
from marl_plugins.writing import MODELINE, render, write

Memory = Literal["full", "8bit", "4bit"]
QUANTIZATION = {"full": None, "8bit": "bnb-8bit", "4bit": "bnb-4bit"}
FUNCTION_PATTERN = re.compile(r".+:[A-Za-z_]\w*")
EXAMPLES = {"base": "HuggingFaceTB/SmolLM2-135M-Instruct", "reward": "rewards.py:score", "data": "prompts.jsonl"}
QUESTIONS = {
    "base": "1 of 5. Base model (folder or hub name)",
    "sft": "2 of 5. SFT adapter on it, to start from (folder; empty: none)",
    "reward": "3 of 5. Reward: a reward adapter's folder, a reward model, or file.py:function",
    "memory": "4 of 5. Hold the base as it is (full), or quantized (8bit, 4bit)",
    "data": "5 of 5. Prompts: a json, jsonl, csv or parquet file, or a datasets name",
}


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Config to write.")] = Path("run.yaml"),
    base: Annotated[str | None, typer.Option("--base", help="Base model: folder or hub name.")] = None,
    sft: Annotated[
        str | None, typer.Option("--sft", help="SFT adapter that the policy starts from; '' for none.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Reward adapter's folder, reward model, or file.py:function.")
    ] = None,
    memory: Annotated[Memory | None, typer.Option("--memory", help="How the base is held.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Prompts: a file, or a datasets name.")] = None,
    field: Annotated[str, typer.Option("--field", help="Column of the prompts.")] = "prompt",
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Ask five questions and write a commented config. Options answer them beforehand; without a terminal nothing is asked."""
    if file.exists() and not force:
        raise ConfigError(f"{file}: there is such a file already. Give another name, or --force to overwrite it.")
    answers = _answers({"base": base, "sft": sft, "reward": reward, "memory": memory, "data": data})
    if not field.strip():
        raise ConfigError("--field: an answer is needed, e.g. prompt.")
    write(compose(answers, field), file, force=True)
    typer.echo(f"{file}: written. Next: marl check {file}, then marl run {file}")


def _answers(options: dict[str, str | None]) -> dict[str, str]:
    """The options, then what is asked for the rest: on a terminal only."""
    missing = [name for name in ("base", "reward", "data") if options[name] is None]
    is_interactive = sys.stdin is not None and sys.stdin.isatty()
    if missing and not is_interactive:
        raise ConfigError(
            f"marl init: no terminal to ask on, and no answer for {', '.join('--' + name for name in missing)}. "
            "Give them as options, e.g. marl init run.yaml --base my-model --reward rewards.py:score --data prompts.jsonl."
        )
    defaults = {"sft": "", "memory": "full"}
    answers = {}
    for name, question in QUESTIONS.items():
        value = options[name]
        if value is None:
            answers[name] = _ask(name, question, defaults.get(name, "")) if is_interactive else defaults[name]
            continue
        answers[name] = value.strip()
        problem = _problem(name, answers[name])
        if problem:
            raise ConfigError(f"--{name}: {problem}.")
    return answers


def _ask(name: str, question: str, default: str) -> str:
    """Ask until the answer can stand in a config; an empty one is the usual one, where there is one."""
    while True:
        answer = str(typer.prompt(question, default=default, show_default=name == "memory")).strip() or default
        problem = _problem(name, answer)
        if problem is None:
            return answer
        typer.echo(f"  {problem}.")


def _problem(name: str, answer: str) -> str | None:
    """Why an answer can't stand in a config; whether files are there is for `marl check`."""
    if name == "memory":
        return None if answer in QUANTIZATION else f"{answer!r} is none of {', '.join(QUANTIZATION)}"
    if not answer:
        return None if name == "sft" else f"an answer is needed, e.g. {EXAMPLES[name]}"
    if name == "reward" and ":" in answer and not os.path.isdir(answer) and not FUNCTION_PATTERN.fullmatch(answer):
        return f"{answer!r} names no function; write {EXAMPLES[name]}"
    return None


def compose(answers: dict[str, str], field: str = "prompt") -> str:
    """The config's text."""
    quantization = QUANTIZATION[answers["memory"]]
    defaults = _defaults()
    config: dict[str, Any] = {
        "model": {"path": answers["base"], **_values(defaults.model, "dtype")},
        **({"quantization": quantization} if quantization else {}),
        "policy": _values(defaults.policy, "start", "r", "alpha", "targets"),
        "reference": {"use": "merged-base", "adapter": answers["sft"]} if answers["sft"] else "disabled-adapter",
        "reward": _reward(answers["reward"]),
        "value": {"on": Plan.of(defaults).value_on},
        "data": {"prompts": answers["data"], "field": field},
        "sampling": _values(defaults.sampling, "max_new_tokens", "temperature"),
        "ppo": {
            **_values(defaults.ppo, "steps", "batch", "minibatch", "epochs", "learning_rate"),
            "kl": _values(defaults.ppo.kl, "coef"),
            "clip": _values(defaults.ppo.clip, "low", "high"),
        },
        "observers": ["console", "json-lines"],
        "run": {"folder": "runs/first", **_values(defaults.run, "seed"), "checkpoint_every": 10},
    }
    return render(
        config,
        _about(answers),
        [MODELINE.removeprefix("# "), "Written by marl init. docs/config.md explains every key."],
    )


def _defaults() -> RunConfig:
    """A config with nothing but what every run must name: its values are marl's defaults, and stand nowhere twice."""
    reward = {"use": "function", "target": EXAMPLES["reward"]}
    return RunConfig.model_validate({"model": {"path": "-"}, "reference": "disabled-adapter", "reward": reward})


def _values(section: Any, *names: str) -> dict[str, Any]:
    """Some of a section's values: those worth seeing in a first config."""
    return {name: getattr(section, name) for name in names}


def _reward(answer: str) -> dict[str, Any]:
    """A function by its colon, an adapter by its files, else a model."""
    if ":" in answer and not os.path.isdir(answer):
        return {"use": "function", "target": answer}
    is_adapter = os.path.isfile(os.path.join(os.path.expanduser(answer), "adapter_config.json"))
    return {"use": "adapter" if is_adapter else "model", "path": answer}


def _about(answers: dict[str, str]) -> dict[str, str]:
    reference = (
        "Which weights the KL penalty pulls towards: the base with the SFT adapter merged in at load.\n"
        "The policy is a new LoRA on that, so it starts as the SFT model and the KL starts at 0."
        if answers["sft"]
        else "Which weights the KL penalty pulls towards: the base with every adapter off, where a new LoRA starts."
    )
    return {
        "model": "The one base that policy, reference, reward and value share. It is never trained.",
        "quantization": "The base's weights in fewer bits; adapters and heads stay float32. Needs: pip install 'marl-core[bitsandbytes]'.",
        "policy": "The trained adapter: a new LoRA. To go on with an adapter instead: {start: continue, from: its folder}.",
        "reference": reference,
        "reward": "What scores a response. Or a list of several, each with a weight.",
        "value": "The value function: a head on the policy's trunk. own: an adapter of its own; none: with ppo.advantage rloo or grpo.",
        "data": "One prompt a row: a text, or a list of chat messages. Further columns reach reward functions.",
        "sampling": "Without top_p and top_k, so that what is sampled is what is scored.",
        "ppo": "A step: `batch` responses, then `epochs` passes over them, `minibatch` responses an optimizer step.\n"
        "Less memory: ppo.microbatch: 2, or model.gradient_checkpointing: true.",
        "observers": "Who watches. Experiment trackers: {use: trackers, to: [tensorboard]}.",
        "run": "Where everything is written. marl run --resume goes on from the last checkpoint; marl report shows it.",
    }
