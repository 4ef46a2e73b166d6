"""Prompts as a TRL script makes them of its data: a script that writes them into files, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from marl_plugins.migrate.trl_script import PromptRecipe
from marl_plugins.writing import one_line

PROMPTS_FILE = "prompts.jsonl"
HELD_OUT_FILE = "heldout.jsonl"
SCRIPT_FILE = "make_prompts.py"

OWN_RECIPES = {
    "ppo_multi_adapter.py": (PromptRecipe("chosen", tokens=(6, 12)), []),
    "ppo.py": (PromptRecipe("text", tokens=(2, 8)), ["len(row['text']) > 200"]),
}
"""How TRL's own scripts make their prompts, and which rows they keep."""

TEXT = """# {about}

import json
{imports}import sys

from datasets import load_dataset
{tokenizer}
data = {data!r}
for name, split in {splits!r}.items():
    try:
        rows = load_dataset(data, {subset!r}, split=split)
    except Exception as error:
        sys.exit(f"The data set {{data}} can't be read: {{error}}\\nWithout a network, name a local copy in this script.")
    with open(name, "w", encoding="utf-8") as file:
        for row in rows:
{conditions}{prompt}
            file.write(json.dumps({{"prompt": prompt}}, ensure_ascii=False) + "\\n")
"""
TOKENIZER = """from transformers import AutoTokenizer

model = {model!r}
try:
    tokenizer = AutoTokenizer.from_pretrained(model)
except Exception as error:
    sys.exit(f"The tokenizer of {{model}} can't be read: {{error}}\\nWithout a network, name a local copy in this script.")
draw = random.Random(0)
"""
INDENT = "            "


def described(recipe: PromptRecipe) -> str:
    """In words, after "makes its prompts"."""
    if recipe.tokens is not None:
        low, high = recipe.tokens
        return f"of the first {low} to {high - 1} tokens of each {recipe.column!r}"
    count = "message" if recipe.messages == 1 else f"{recipe.messages} messages"
    return f"of the first {count} of each row's {recipe.column!r}"


def prompts_script(
    name: str,
    recipe: PromptRecipe,
    conditions: Iterable[str],
    data: str,
    subset: str | None,
    splits: Mapping[str, str],
    model: str,
) -> str:
    """The script's text: a file of prompts for each of `splits`, by file. It needs datasets, and transformers where it counts tokens.

    `name` is the script they are made as in, `conditions` its conditions on `row`.
    """
    if recipe.tokens is not None:
        low, high = recipe.tokens
        prompt = (
            f"{INDENT}ids = tokenizer(row[{recipe.column!r}]).input_ids[: draw.randrange({low}, {high})]\n"
            f"{INDENT}prompt = tokenizer.decode(ids, skip_special_tokens=True)"
        )
    else:
        prompt = f"{INDENT}prompt = row[{recipe.column!r}][:{recipe.messages}]"
    return TEXT.format(
        about=one_line(f"Write {' and '.join(splits)}: prompts made of {data} as {name} made them."),
        data=data,
        subset=subset,
        splits=dict(splits),
        imports="import random\n" if recipe.tokens else "",
        tokenizer=TOKENIZER.format(model=model) if recipe.tokens else "",
        conditions="".join(f"{INDENT}if not ({condition}):\n{INDENT}    continue\n" for condition in conditions),
        prompt=prompt,
    )
