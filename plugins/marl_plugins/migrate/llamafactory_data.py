"""LLaMA-Factory's data sets: the file, how a prompt is made of its columns, and whether it is a chat."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marl_plugins.migrate.foreign_config import ForeignConfig, names_in
from marl_plugins.migrate.foreign_files import local_rows, rows_of

Part = dict[str, Any]


def data_section(foreign: ForeignConfig) -> tuple[Part, int | None]:
    """Section data, and the rows of its file where they can be counted."""
    names = names_in(foreign.take("dataset"))
    folder = Path(str(foreign.take("dataset_dir", default="data")))
    if not names:
        foreign.note("dataset", "is missing: name a file of prompts")
        names = ["prompts.jsonl"]
    if len(names) > 1:
        foreign.note(
            "dataset", f"marl reads one file of prompts: {names[0]} is taken, join {', '.join(names[1:])} to it"
        )
    entry = _entry(folder, names[0])
    if entry is None and names != ["prompts.jsonl"]:
        foreign.note(
            "dataset",
            f"{names[0]!r} stands in no {folder / 'dataset_info.json'} here: set data.prompts to its file, data.field to its column",
        )
    part = _prompts(foreign, folder, entry) if entry else {"prompts": names[0], "field": "prompt"}
    rows = rows_of(part["prompts"])
    limit = foreign.count("max_samples")
    if limit:
        part, rows = {**part, "limit": limit}, None if rows is None else min(rows, limit)
    if "cutoff_len" in foreign.remaining:
        foreign.note(
            "cutoff_len",
            "LLaMA-Factory cuts the end off a longer prompt. marl refuses such a prompt; to leave it out set data.on_long: drop, to cut "
            "its beginning set data.on_long: truncate-left",
        )
    return {**part, **_chat(foreign), "max_prompt_tokens": foreign.number("cutoff_len")}, rows


def _chat(foreign: ForeignConfig) -> Part:
    """LLaMA-Factory renders every prompt through its template; marl through the tokenizer's own."""
    template = foreign.take("template")
    if template in (None, "empty"):
        return {}
    if template == "default":
        foreign.note(
            "template",
            "'default' is LLaMA-Factory's own text around a prompt: write it as data.prompt_template",
            lost=True,
        )
        return {}
    foreign.note(
        "template",
        f"data.chat: true uses the tokenizer's own chat template in place of {template!r}. Compare the two: marl check --show 1 prints a "
        "prompt as the model gets it, with the system prompt that the template adds itself. For the plain text set data.chat: false",
    )
    return {"chat": True}


def _entry(folder: Path, name: str) -> Mapping[str, Any] | None:
    """The data set's entry in dataset_info.json."""
    try:
        entry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    named = isinstance(entry, dict) and (entry.get("hf_hub_url") or entry.get("file_name"))
    return entry if named and isinstance(entry.get("columns", {}), dict) else None


def _prompts(foreign: ForeignConfig, folder: Path, entry: Mapping[str, Any]) -> Part:
    """File (or hub name) and the prompt's column or template."""
    columns = entry.get("columns", {})
    source = str(entry.get("hf_hub_url") or os.path.join(folder, str(entry.get("file_name"))))
    if entry.get("formatting") == "sharegpt":
        column = str(columns.get("messages", "conversations"))
        foreign.note(
            "dataset",
            f"{source}: sharegpt chats have to be converted before the run: each {column!r} to a list of {{role, content}} (human is user, "
            "gpt is assistant), the last answer cut off",
        )
        return {"prompts": source, "field": column}
    first, second = str(columns.get("prompt", "instruction")), str(columns.get("query", "input"))
    template = f"{{{first}}}\n{{{second}}}"
    filled, rows = _filled(source, second)
    if rows is None:
        foreign.note(
            "dataset",
            f"{source} can't be read here: LLaMA-Factory joins {first!r} and {second!r} with a newline; where rows have both, set "
            f"data.prompt_template: {json.dumps(template)}",
        )
    if not filled:
        return {"prompts": source, "field": first}
    if rows is not None and filled < rows:
        foreign.note(
            "dataset",
            f"{filled} of {rows} rows have text in {second!r}; in the others data.prompt_template leaves a newline at the prompt's end, "
            "which LLaMA-Factory doesn't: make one column of the two to be exact",
        )
    return {"prompts": source, "prompt_template": template}


def _filled(source: str, column: str) -> tuple[int, int | None]:
    """Rows whose column isn't empty, and all rows (None: no file that can be read here)."""
    rows = local_rows(source)
    return (0, None) if rows is None else (sum(1 for row in rows if row.get(column)), len(rows))
