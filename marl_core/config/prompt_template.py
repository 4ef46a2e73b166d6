"""Prompt templates: a text with column names in braces. Nothing but names: no attributes, conversions or formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

HOW_TO_WRITE = (
    "write column names in braces, e.g. 'Question: {question}\\nAnswer:', and a literal brace doubled, {{ or }}"
)

NOT_A_TEMPLATES = frozenset(
    (
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)
"""Arguments of transformers' `apply_chat_template` that say how it is called, and no options of a template."""


def pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Literal texts, each with the column that follows it (None at the end). ValueError for what is no template."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt_template {template!r} is no template ({error}); {HOW_TO_WRITE}") from error
    for literal, name, format_spec, conversion in parsed:
        if name is not None and (not name or format_spec or conversion):
            raise ValueError(
                f"prompt_template {template!r} holds {{{_shown(name, format_spec, conversion)}}}, not a column; {HOW_TO_WRITE}"
            )
        yield literal, name


def columns_of(template: str) -> list[str]:
    """The columns a template names. ValueError when there is none, or when it is no template."""
    names = [name for _, name in pieces(template) if name is not None]
    if not names:
        raise ValueError(
            f"prompt_template {template!r} names no column, so all prompts would be the same; {HOW_TO_WRITE}"
        )
    return names


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with a row's values in place; columns must be there."""
    return "".join(literal + ("" if name is None else str(row[name])) for literal, name in pieces(template))


def _shown(name: str, format_spec: str | None, conversion: str | None) -> str:
    return name + (f"!{conversion}" if conversion else "") + (f":{format_spec}" if format_spec else "")
