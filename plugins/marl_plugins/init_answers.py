"""The answers to `marl init`: asked for or given, and looked at by the same checks as `marl check`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import ValidationError

from marl_core import (
    MarlError,
    Plan,
    RunConfig,
    cached_adapter,
    cached_model_config,
    is_repo_name,
    near_match,
)
from marl_plugins.function_target import problems
from marl_plugins.init_data import PromptsFile
from marl_plugins.reward_labels import labels_of

Problem = Callable[[str], str | None]
"""Why an answer can't stand in a config; None when it can."""

EXAMPLES = {"base": "HuggingFaceTB/SmolLM2-135M-Instruct", "reward": "rewards.py:score", "data": "prompts.jsonl"}
OTHER_SUFFIXES = (".py", ".yaml", ".yml", ".txt", ".md")
"""How files end that hold neither prompts nor a model."""
FILE_SUFFIXES = (*OTHER_SUFFIXES, ".json", ".jsonl", ".csv", ".parquet")
"""How files end: no base is called so."""
QUANTIZATION = {"full": None, "8bit": "bnb-8bit", "4bit": "bnb-4bit"}


def base_problem(answer: str) -> str | None:
    """The base must be a causal model, as far as this machine can tell."""
    if Path(answer).suffix.lower() in FILE_SUFFIXES and not os.path.isdir(os.path.expanduser(answer)):
        return f"{answer!r} is the name of a file. A base is a folder with a model, or a name on the hub."
    return _needed("base", answer) or _checked({"model": {"path": answer}}, "model")


def sft_problem(base: str) -> Problem:
    """An SFT adapter must be one, and fit the base."""

    def problem(answer: str) -> str | None:
        reference = {"use": "merged-base", "adapter": answer}
        return _checked({"model": {"path": base}, "reference": reference}, "reference") if answer else None

    return problem


def reward_problem(base: str) -> Problem:
    """A reward must be what it is taken for: a function in a file, an adapter on the base, a classifier."""

    def problem(answer: str) -> str | None:
        if answer.endswith(".py"):
            found = next(iter(problems(f"{answer}:score")), None)
            return f"{answer!r} names no function. {_plain(found) if found else f'Write {answer}:score.'}"
        if _is_function(answer) and not answer.rpartition(":")[2].isidentifier():
            return f"{answer!r} names no function. Write it as {EXAMPLES['reward']}."
        reward = reward_section(answer)
        if reward["use"] == "model" and reward_labels(answer):
            reward["label"] = 0  # asked for next
        return _needed("reward", answer) or _checked({"model": {"path": base}, "reward": reward}, "reward")

    return problem


def data_problem(answer: str) -> str | None:
    """A prompts file must be there and hold rows; which column is asked for next."""
    columns = "has no column"
    if answer and not os.path.exists(os.path.expanduser(answer)) and _is_no_data_set(answer):
        return (
            f"{answer!r} is no file with prompts and no name of a data set. Give a json, jsonl, csv or parquet file, or a name "
            "such as owner/data."
        )
    reason = _needed("data", answer) or _checked({"data": {"prompts": answer}}, "data")
    return None if reason is None or columns in reason else reason


def column_problem(data: str, prompts: PromptsFile | None) -> Problem:
    """A column must be there; so must each that a template names. `prompts`: the file, where `data` is one."""

    def problem(answer: str) -> str | None:
        if not answer:
            return "An answer is needed: a column, or a template with columns in braces."
        keys = prompt_keys(answer)
        return (prompts and _column_missing(keys, prompts)) or _checked({"data": {"prompts": data, **keys}}, "data")

    return problem


def _column_missing(keys: Mapping[str, str], prompts: PromptsFile) -> str | None:
    """Which column the file's first row hasn't, of a template or by itself; None where it has all, and of what is no template."""
    names = [keys["field"]] if "field" in keys else _names_in(keys["prompt_template"])
    missing = next((name for name in names if name not in prompts.rows[0]), None)
    if missing is None:
        return None
    *others, last = prompts.columns or [str(name) for name in prompts.rows[0]]
    near = near_match(missing, [*others, last])
    meant = f" Did you mean {near!r}?" if near else ""
    offered = f"{', '.join(others)}{' or ' if others else ''}{last}"
    way = f"Give {offered}." if "field" in keys else f"Name in braces {offered}."
    return f"row 1 of {prompts.name!r} has no column {missing!r}. {way}{meant}"


def _names_in(template: str) -> list[str]:
    """The columns that a template names; none of what is no template, which the check tells."""
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name]
    except ValueError:
        return []


def held_out_problem(rows: int | None, section: Mapping[str, Any]) -> Problem:
    """A number of rows, a file, or a split of the same data set."""

    def problem(answer: str) -> str | None:
        places = [os.path.expanduser(place) for place in (answer, section["prompts"])]
        if all(map(os.path.exists, places)) and os.path.samefile(*places):
            return f"{answer!r} holds the prompts to train on. Give a number to split rows off, or another file."
        if not answer.isdecimal():
            return _no_prompts(answer, rows) or (
                None if is_split(answer, rows) else _checked({"eval": {"prompts": answer}, "data": section}, "eval")
            )
        if rows is None:
            return f"The rows of {section['prompts']!r} can't be split off here. Give a file, or a split's name."
        return None if int(answer) < rows else f"{answer} of {rows} rows leave none to train on. Hold out fewer."

    return problem


def _no_prompts(answer: str, rows: int | None) -> str | None:
    """Why an answer names no held-out prompts: it is no file, no data set and, of a data set, no split."""
    if os.path.exists(os.path.expanduser(answer)) or is_split(answer, rows):
        return None
    if not _is_no_data_set(answer) and (is_path(answer) or "/" in answer):
        return None  # looked for next
    other = "a number of rows to split off (0: none)" if rows is not None else "a split of the data set (0: none)"
    return f"{answer!r} is no file with prompts. Give a json, jsonl, csv or parquet file, or {other}."


def is_split(answer: str, rows: int | None) -> bool:
    """Whether an answer is a split's name, as `test` or `train[:10%]`: only a data set has some, a file (`rows` known) has none."""
    is_here = os.path.exists(os.path.expanduser(answer))
    return rows is None and not is_here and re.fullmatch(r"\w[\w-]*(\[[\d%:]*\])?", answer) is not None


def _is_no_data_set(answer: str) -> bool:
    """Whether no data set has this name: it reads as a function, a script or a sentence."""
    return Path(answer).suffix.lower() in OTHER_SUFFIXES or any(sign in answer for sign in ": \t")


def prompt_keys(answer: str) -> dict[str, str]:
    """A column's name, or a template: a text with names in braces, where `\\n` is a new line."""
    is_template = "{" in answer or "}" in answer
    return {"prompt_template": answer.replace("\\n", "\n")} if is_template else {"field": answer}


def reward_section(answer: str) -> dict[str, Any]:
    """A function by its colon, an adapter by its files, else a model."""
    if _is_function(answer):
        return {"use": "function", "target": answer}
    try:
        is_adapter = cached_adapter(answer, "reward.path") is not None
    except MarlError:  # a damaged one is an adapter all the same
        is_adapter = os.path.isfile(os.path.join(os.path.expanduser(answer), "adapter_config.json"))
    return {"use": "adapter" if is_adapter else "model", "path": answer}


def reward_labels(answer: str) -> list[str]:
    """The labels of a classifier that has several; empty where there is nothing to choose, or the model isn't here."""
    try:
        config = cached_model_config(answer, "reward.path")
    except MarlError:
        return []
    labels = labels_of(config) if config is not None else []
    return labels if len(labels) > 1 else []


def is_at_hub(answer: str) -> bool:
    """Whether an answer can only be had from the hub: nothing of that name is here, and it may be a name there."""
    is_here = os.path.exists(os.path.expanduser(answer))
    return not is_here and is_repo_name(answer, owner=False) and not _is_cached(answer)


def _is_cached(name: str) -> bool:
    """Whether the hub's cache on this machine holds a model or an adapter of this name."""
    with suppress(MarlError):
        return cached_model_config(name, "model.path") is not None or cached_adapter(name, "reward.path") is not None
    return False


def is_path(answer: str) -> bool:
    """Whether an answer can only be a file, and no name."""
    return bool(Path(answer).suffix) or answer.startswith((".", "/", "~"))


def has_chat_template(base: str) -> bool:
    """Whether the base's tokenizer has a chat template, by its files: a folder, or what the hub's cache holds."""
    folder = Path(os.path.expanduser(base))
    if not folder.is_dir():
        if not is_repo_name(base, owner=False):
            return False
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, "tokenizer_config.json")
        if not isinstance(cached, str):
            return False
        folder = Path(cached).parent
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _checked(changes: Mapping[str, Any], start: str) -> str | None:
    """The first thing that `marl check` says of these sections; of the others nothing is known yet."""
    known = {
        "model": {"path": "-"},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": "os:getcwd"},
    }
    try:
        found = Plan.of(RunConfig.model_validate({**known, **changes})).check()
    except ValidationError as error:
        found = [
            ".".join(map(str, entry["loc"])) + f": {entry['msg'].removeprefix('Value error, ')}"
            for entry in error.errors()
        ]
    except MarlError as error:
        found = str(error).splitlines()
    return next((_plain(line) for line in found if line.strip().startswith(start)), None)


def _plain(finding: str) -> str:
    """A finding without its key and without the plugin that says it: the question tells both."""
    text = finding.strip().partition(" (says ")[0]
    return (text.partition(": ")[2] if ": " in text else text).removeprefix("prompt_template ")


def _needed(name: str, answer: str) -> str | None:
    return None if answer else f"An answer is needed, e.g. {EXAMPLES[name]}."


def _is_function(answer: str) -> bool:
    return ":" in answer and not os.path.isdir(os.path.expanduser(answer))
