"""`marl init`: a few questions, and a commented config that `marl check` accepts and `marl run` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from marl_core import ConfigError, Plan
from marl_plugins import init_answers as answers
from marl_plugins.init_answers import EXAMPLES, QUANTIZATION
from marl_plugins.init_data import PromptsFile
from marl_plugins.init_dialog import Dialog, RefusedError
from marl_plugins.writing import MODELINE, render, run_command, usual_config, usual_lora, write_all, write_schema

Memory = Literal["full", "8bit", "4bit"]
RUN_FOLDER = "runs/first"


def init(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Config to write.")] = Path("run.yaml"),
    base: Annotated[str | None, typer.Option("--base", help="Base model: folder or hub name.")] = None,
    sft: Annotated[
        str | None, typer.Option("--sft", help="SFT adapter that the policy starts from; '' for none.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Reward adapter's folder, reward model, or file.py:function.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="Label of a reward model that has several: the one to reward.")
    ] = None,
    memory: Annotated[Memory | None, typer.Option("--memory", help="How the base is held.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Prompts: a file, or a datasets name.")] = None,
    field: Annotated[
        str | None,
        typer.Option(
            "--field", help="Column of the prompts, or a template of columns: 'Question: {question}\\nAnswer:'."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Send each prompt as a user's message, by the chat template."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt of chats; '' for none.")] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            help="Held-out prompts: a file, a number of rows to split off the prompts (0: none), or a split.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE, and files of split prompts.")] = False,
) -> None:
    """Ask a few questions, write a commented config, and check it. Options answer beforehand; without a terminal nothing is asked."""
    if file.exists() and not force:
        raise ConfigError(f"{file}: there is such a file already. Give another name, or --force to overwrite it.")
    options = {
        "base": base, "sft": sft, "reward": reward, "label": label, "memory": memory, "data": data, "field": field,
        "system": system, "held-out": held_out,
    }  # fmt: skip
    dialog = Dialog(options)
    missing = [name for name in EXAMPLES if options[name] is None]
    if missing and not dialog.is_interactive:
        unanswered = (
            f"marl init: no terminal to ask on, and no answer for {', '.join('--' + name for name in missing)}. "
            "Give them as options, e.g. marl init run.yaml --base my-model --reward rewards.py:score --data prompts.jsonl."
        )
        dialog.wrong.append((None, unanswered))
    config, about, files = _asked(dialog, chat, missing)
    text = render(
        config, about, [MODELINE.removeprefix("# "), "Written by marl init. docs/config.md explains every key."]
    )
    write_all({**files, file: text}, force)
    for other in files:
        typer.echo(f"{other}: written")
    write_schema(context, file.parent)
    typer.echo(f"{file}: written. `marl check {file}` says:")
    run_command(context, "check", str(file))
    typer.echo(f"Next: marl run {file}")


def _asked(
    dialog: Dialog, chat: bool | None, missing: list[str]
) -> tuple[dict[str, Any], dict[str, str], dict[Path, str]]:
    """What `ask` gives. Without a terminal one ConfigError tells all options that are wrong, and those that are missing."""
    if missing and not dialog.is_interactive:
        base = "-" if "base" in missing else dialog.answer("base", "", answers.base_problem)
        if "reward" not in missing:
            dialog.answer("reward", "", answers.reward_problem(base))
        if "data" not in missing:
            dialog.answer("data", "", answers.data_problem)
        dialog.refuse()
    try:
        asked = ask(dialog, chat)
    except RefusedError:
        raise
    except ConfigError as error:
        dialog.wrong.append((None, str(error)))
    dialog.refuse()
    return asked


def ask(dialog: Dialog, chat: bool | None) -> tuple[dict[str, Any], dict[str, str], dict[Path, str]]:
    """All questions: the config's sections, a comment for each, and files to write beside it."""
    base = dialog.place("base", "Base model (folder or hub name)", answers.base_problem)
    sft = dialog.place("sft", "SFT adapter on it, to start from (folder; empty: none)", answers.sft_problem(base), "")
    reward = _ask_reward(dialog, base)
    memory = dialog.answer(
        "memory", "Hold the base as it is (full), or quantized (8bit, 4bit)", _one_of(tuple(QUANTIZATION)), "full"
    )
    data, held_out, files = _ask_data(dialog, base, chat)
    return _compose(base, sft, reward, QUANTIZATION[memory], data, held_out), _about(bool(sft), held_out), files


def _say(sentence: str | None) -> None:
    if sentence:
        typer.echo(f"  {sentence}")


def _one_of(allowed: tuple[str, ...]) -> answers.Problem:
    return lambda answer: None if answer in allowed else f"{answer!r} is none of {', '.join(allowed)}."


def _ask_reward(dialog: Dialog, base: str) -> dict[str, Any]:
    question = "Reward: file.py:function, a reward adapter's folder, or a reward model (folder or hub name)"
    answer = dialog.place("reward", question, answers.reward_problem(base))
    section = answers.reward_section(answer)
    if dialog.is_wrong("reward"):
        return section  # nothing to ask about it
    labels: list[str] = []
    if section["use"] == "model":
        if answers.is_at_hub(answer):
            _say("A whole reward model is meant; an adapter on the base is reward: {use: adapter, path: ...}.")
        labels = answers.reward_labels(answer)
    if labels:
        asked = f"It has several labels. Which to reward ({', '.join(labels)})"
        section["label"] = dialog.answer("label", asked, _one_of(tuple(labels)))
    elif dialog.is_given("label"):
        dialog.complain(
            "label", f"{answer!r} has no labels to choose from, as far as this machine knows. Leave it out."
        )
    return section


def _ask_data(
    dialog: Dialog, base: str, chat: bool | None
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[Path, str]]:
    """Section data, section eval, and the two files where rows are split off."""
    name = dialog.place("data", "Prompts: a json, jsonl, csv or parquet file, or a datasets name", answers.data_problem)
    if dialog.is_wrong("data"):
        dialog.refuse()  # all that follows is about these rows
    prompts = PromptsFile.read(name)
    _say(prompts.described() if prompts else None)
    column = _ask_column(dialog, name, prompts)
    section: dict[str, Any] = {"prompts": name, **answers.prompt_keys(column)}
    section |= _ask_chat(dialog, base, chat, column, prompts)
    held_out, files = _ask_held_out(dialog, section, prompts)
    if files:
        train, rest = files
        section["prompts"] = str(train)
        typer.echo(f"  {train} will hold the rows to train on, {rest} those that are held out; {name} stays as it is.")
    return section, held_out, files


def _ask_column(dialog: Dialog, name: str, prompts: PromptsFile | None) -> str:
    columns = ", ".join(prompts.columns) if prompts else "of that data set"
    default = prompts.likely_column if prompts else "prompt"
    if default is None and not dialog.is_interactive and not dialog.is_given("field"):
        raise ConfigError(
            f"--field: which column of {name} is the prompt? It has {columns}. "
            "A template of columns does too: --field 'Question: {question}\\nAnswer:'."
        )
    question = (
        f"Column with the prompt ({columns}), or a template of columns such as 'Question: {{question}}\\nAnswer:'"
    )
    return dialog.answer("field", question, answers.column_problem(name, prompts), default)


def _ask_chat(dialog: Dialog, base: str, chat: bool | None, column: str, prompts: PromptsFile | None) -> dict[str, Any]:
    """`chat` and `system_prompt`, where the base's tokenizer has a chat template; rows that hold messages are chats anyway."""
    has_template, is_template = answers.has_chat_template(base), "prompt_template" in answers.prompt_keys(column)
    can_not = not has_template and not answers.is_at_hub(base)
    holds_messages = prompts is not None and not is_template and prompts.is_chat(column)
    if can_not and (chat or holds_messages):
        what = "--chat" if chat else f"--field: {column!r} holds chats"
        raise ConfigError(f"{what}: the tokenizer of {base!r} has no chat template. Use texts, or another base.")
    wanted = False
    if not holds_messages and (has_template or chat):
        question = "The base has a chat template. Send each prompt as a user's message"
        wanted = dialog.agreed(chat, question, not is_template)
        if chat is None and not dialog.is_interactive and wanted:
            _say("The base has a chat template: each prompt is a user's message (--no-chat for plain texts).")
    if not wanted and not holds_messages:
        if dialog.is_given("system"):
            dialog.complain("system", "only chats have a system prompt. Add --chat, or leave it out.")
        return {}
    system = dialog.answer("system", "System prompt (empty: none)", lambda answer: None, "")
    return {**({"chat": True} if wanted else {}), **({"system_prompt": system} if system else {})}


def _ask_held_out(
    dialog: Dialog, data: dict[str, Any], prompts: PromptsFile | None
) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """Section eval: a file of its own, a split of the same data set, or rows that are split off into files."""
    rows = len(prompts.rows) if prompts else None
    default = str(prompts.usual_hold_out()) if prompts else "0"
    question = (
        "Held-out prompts, answered before and after training: a file, or how many rows to split off (0: none)"
        if prompts
        else "Held-out prompts, answered before and after training: a file, or a split of the data set (0: none)"
    )

    def is_another_data_set(answer: str) -> bool:
        return not answer.isdecimal() and not answers.is_split(answer, rows) and answers.is_at_hub(answer)

    answer = dialog.place("held-out", question, answers.held_out_problem(rows, data), default, is_another_data_set)
    if answer.isdecimal() and int(answer) == 0:
        typer.echo(
            "  No held-out prompts: the run will have no numbers before and after. Later: eval: {prompts: FILE}."
        )
        return None, {}
    if not answer.isdecimal():
        is_split = answers.is_split(answer, rows)
        return ({"prompts": data["prompts"], "split": answer} if is_split else {"prompts": answer}), {}
    if dialog.wrong:
        return None, {}  # nothing will be written
    assert prompts is not None  # a number was refused without rows
    files = prompts.split(int(answer))
    return {"prompts": str(list(files)[1])}, files


def _compose(
    base: str, sft: str, reward: dict[str, Any], quantization: str | None, data: dict[str, Any], held_out: Any
) -> dict[str, Any]:
    """The config's sections; every value that nobody answered is the config class's own."""
    usual = usual_config()
    return {
        "model": {"path": base, **_values(usual.model, "dtype")},
        **({"quantization": quantization} if quantization else {}),
        "policy": usual_lora(),
        "reference": {"use": "merged-base", "adapter": sft} if sft else "disabled-adapter",
        "reward": reward,
        "value": {"on": Plan.of(usual).value_on},
        "data": data,
        "sampling": _values(usual.sampling, "max_new_tokens", "temperature"),
        "ppo": {
            **_values(usual.ppo, "steps", "batch", "minibatch", "epochs", "learning_rate"),
            "kl": _values(usual.ppo.kl, "coef"),
            "clip": _values(usual.ppo.clip, "low", "high"),
        },
        **({"eval": held_out} if held_out else {}),
        "observers": ["console", "json-lines"],
        "run": {"folder": _new_folder(), **_values(usual.run, "seed"), "checkpoint_every": 10},
    }


def _new_folder() -> str:
    """A run folder that isn't there yet."""
    number, folder = 1, RUN_FOLDER
    while Path(folder).exists():
        number += 1
        folder = f"{RUN_FOLDER}-{number}"
    return folder


def _values(section: Any, *names: str) -> dict[str, Any]:
    """Some of a section's values: those worth seeing in a first config."""
    return {name: getattr(section, name) for name in names}


def _about(has_sft: bool, held_out: Any) -> dict[str, str]:
    reference = (
        "Which weights the KL penalty pulls towards: the base with the SFT adapter merged in at load.\n"
        "The policy is a new LoRA on that, so it starts as the SFT model and the KL starts at 0."
        if has_sft
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
        "eval": "Prompts that are never trained on: answered before and after training. every: 10 adds every tenth step."
        if held_out
        else "",
        "observers": "Who watches. Experiment trackers: {use: trackers, to: [tensorboard]}.",
        "run": "Where everything is written. marl run --resume goes on from the last checkpoint; marl report shows it.",
    }
