"""What can be said of prompts and stop tokens before any weight is read: by `marl check`, and by a run before it loads its base."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from marl_core.artifacts.architecture import Architecture, token_rows
from marl_core.artifacts.model_files import ModelFiles, read_model
from marl_core.artifacts.rows import is_data_set, is_read_whole, look_at_prompts
from marl_core.artifacts.tokenizer import custom_tokenizer, in_cache, load_tokenizer, may_hold_tokenizer, stop_token
from marl_core.config.prompt_template import columns_of
from marl_core.config.run_config import DataSection, RunConfig
from marl_core.data.reading import UNBOUNDED_ROOM, Reading, heldout_section, read_prompts
from marl_core.errors import ConfigError, DataError, MarlError, counted
from marl_core.plan.chosen import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_CHECKED = 1000
"""Rows of a source that `marl check` reads unless it is asked for all: a second or two of tokenizing."""


@dataclass(slots=True)
class InputCheck:
    """What was found in the prompts of a run, those of each key of the config that names some."""

    tokenizer: PreTrainedTokenizerBase | None = None
    readings: dict[str, Reading] = field(default_factory=dict)
    findings: list[MarlError] = field(default_factory=list)
    """Why the run can't work, beside what the plan's own check says."""
    remarks: list[str] = field(default_factory=list)
    """What will be done with the prompts and may not be what was meant."""
    unseen: list[str] = field(default_factory=list)
    """What was not looked at, and why."""


def check_inputs(plan: Chosen, told: Sequence[MarlError] = (), most_rows: int | None = ROWS_CHECKED) -> InputCheck:
    """Read the prompts as the run will, `most_rows` of each source, with the tokenizer if it is on this machine. No network, no torch.

    `told`: what the plan's own check has found, which is not said twice.
    """
    check = InputCheck()
    _load_tokenizer(check, plan.config, told)
    room, vocabulary = room_by_files(plan)
    for key, section in prompt_sections(plan.config).items():
        if next(_wrong_at_a_glance(key, section), None) is None:
            _read(check, key, section, room, vocabulary, most_rows)
    if check.tokenizer is not None:
        check.findings += stop_findings(plan.config, check.tokenizer, vocabulary, told)
    return check


def prompt_sections(config: RunConfig) -> dict[str, DataSection]:
    """How training and held-out prompts are read, by the key that names them."""
    sections = {"data.prompts": config.data, "eval.prompts": heldout_section(config)}
    return {key: section for key, section in sections.items() if section is not None}


def room_by_files(plan: Chosen) -> tuple[int, int | None]:
    """Tokens that a prompt may have beside a response, and how many tokens the model knows, as far as its files say.

    Never less than the loaded model has: what is refused by these numbers would be refused by the model's own. None: not known.
    """
    config = plan.config
    files = _model_files(config)
    positions = Architecture.of(files.config).positions if files else None
    room = UNBOUNDED_ROOM if positions is None else positions - config.sampling.max_new_tokens
    room = room if room > 0 else UNBOUNDED_ROOM  # the plan says that no prompt has room; then prompts aren't at fault
    prepares = plan.hooks.implements(plan.reference, "marl_prepare_base")  # a merged adapter may bring tokens
    return room, None if files is None or prepares else max(_token_rows(files).values(), default=None)


def stop_findings(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, told: Sequence[MarlError] = ()
) -> Iterator[MarlError]:
    """Entries of `sampling.stop` that are no single token."""
    for stop in config.sampling.stop:
        if any(str(finding).startswith(f"sampling.stop: {stop!r}") for finding in told):
            continue
        try:
            stop_token(tokenizer, stop, vocabulary)
        except ConfigError as error:
            yield error


def _load_tokenizer(check: InputCheck, config: RunConfig, told: Sequence[MarlError]) -> None:
    """The tokenizer where it is on this machine; else why prompts are not counted in tokens."""
    model = config.model
    path, revision = model.tokenizer or model.path, None if model.tokenizer else model.revision
    is_folder = os.path.isdir(os.path.expanduser(path))
    key = "model.tokenizer" if model.tokenizer else "model.path"
    if is_folder and not may_hold_tokenizer(path):
        if not any(str(finding).startswith(f"{key}:") for finding in told):
            check.findings.append(
                DataError(f"{key}: {path!r} holds no tokenizer. Give the folder of one as model.tokenizer.")
            )
        return
    if is_folder and model.trust_remote_code and custom_tokenizer(path):
        check.unseen.append(
            f"the tokenizer of {path!r} brings its own code, which `marl check` doesn't run: prompts were not tokenized."
        )
        return
    if not is_folder and not in_cache(path, revision):
        check.unseen.append(
            f"the tokenizer of {path!r} isn't on this machine: how many tokens prompts have, chat templates, control tokens and "
            "sampling.stop were not checked."
        )
        return
    try:
        check.tokenizer = load_tokenizer(path, revision=revision, local_files_only=True)
    except DataError as error:
        if not any(str(finding).startswith(("model.path:", "model.tokenizer:")) for finding in told):
            check.findings.append(error)


def _read(
    check: InputCheck, key: str, section: DataSection, room: int, vocabulary: int | None, most_rows: int | None
) -> None:
    if is_data_set(section.prompts):
        check.unseen.append(
            f"{key}: {section.prompts!r} is a data set, which is loaded when the run starts: its rows were not read."
        )
        return
    if most_rows is not None and is_read_whole(section.prompts):
        check.unseen.append(
            f"{key}: {section.prompts} is one large JSON list, which was not read; --all-rows reads it."
        )
        return
    try:
        reading = read_prompts(section, check.tokenizer, room, vocabulary, asked_by=key, most_rows=most_rows)
    except DataError as error:
        check.findings.append(error)
        return
    if reading.more:
        check.unseen.append(
            f"{key}: the first {counted(reading.looked_at, 'row')} of {section.prompts} were checked; --all-rows checks all of them."
        )
    check.readings[key] = reading
    check.findings += reading.problems
    check.remarks += reading.remarks


def _wrong_at_a_glance(key: str, section: DataSection) -> Iterator[DataError]:
    """What the plan's own check says of a source already: it isn't there, it lacks a column."""
    template = section.prompt_template
    for column in [section.field] if template is None else columns_of(template):
        error = look_at_prompts(section.prompts, column, key, limit=section.limit)
        if error is not None:
            yield error


def _model_files(config: RunConfig) -> ModelFiles | None:
    try:
        return read_model(config.model.path, config.model.revision)
    except DataError:
        return None  # told by the plan


def _token_rows(files: ModelFiles) -> Mapping[str, int]:
    try:
        return token_rows(files.shapes())
    except DataError:
        return {}
