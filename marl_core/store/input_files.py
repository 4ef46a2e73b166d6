"""The files a run reads by path, each by its content: prompts, reward functions, models, adapters, templates."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, TypeAlias

from marl_core.artifacts.adapter_files import CONFIG_FILE
from marl_core.bank.identity.certificate import FILE as CERTIFICATE
from marl_core.config.redact import redact
from marl_core.plan.plan import Plan
from marl_core.registry.callables import (
    MAIN,
    TARGET_PATTERN,
    callable_name,
    callable_source,
    is_function,
    running_function,
)
from marl_core.store.files import sha256

Rows: TypeAlias = Sequence[Mapping[str, Any]]
MAX_WHOLE_FILE_BYTES = 2**28
"""Bytes up to which a file is hashed whole. Of a larger one, which holds weights, some blocks: retrained weights differ everywhere."""
BLOCK_BYTES, BLOCK_COUNT = 2**20, 64
"""Size and number of the blocks that are hashed of a larger file."""
TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
IGNORED_FILES = (
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    CERTIFICATE,
)
"""Files beside a model or adapter that say nothing of what it computes."""


def data_inputs(name: str, rows: Rows | None) -> dict[str, str]:
    """The hash of the prompts, by their name: of a file's bytes, or of the rows that a data set gave."""
    if os.path.isfile(file := os.path.expanduser(name)):
        return {redact(name): sha256(Path(file))}
    return {redact(name): _rows(rows)} if rows is not None else {}


def training_inputs(plan: Plan) -> dict[str, str]:
    """The hashes of all other inputs of a step, by name: files of reference, rewards, quantization, tokenizer, policy's start."""
    model = plan.config.model
    digests = named([plan.config.policy.source])
    for strategy in (plan.reference, plan.quantization_strategy, *(one for _, one in plan.rewards)):
        digests |= named(strategy.model_dump())
    for folder in filter(None, (model.path, model.tokenizer)):
        if os.path.isdir(path := os.path.expanduser(folder)):  # the weights have a fingerprint
            digests[f"{redact(folder)} (tokenizer and settings)"] = _folder(Path(path), TEXT_SUFFIXES)
    return digests


def judging_inputs(plan: Plan, eval_rows: Rows | None) -> dict[str, str]:
    """The hashes of what evaluations read, by name: held-out prompts and the judges' files."""
    prompts = plan.config.eval.prompts
    digests = data_inputs(prompts, eval_rows) if prompts else {}
    for _, strategy in plan.judges.values():
        digests |= named(strategy.model_dump())
    return digests


def named(value: Any) -> dict[str, str]:
    """Each file, module, model folder or adapter folder that a value names, at any depth, with the hash of its content; and each
    function in it, with the hash of its source.
    """
    digests = {redact(text): _content(text) for text in _texts(value)}
    digests |= {redact(callable_name(function)): _source_content(function) for function in _functions(value)}
    return {name: digest for name, digest in digests.items() if digest is not None}


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    yield from (part for part in _leaves(value) if is_function(part))


def _texts(value: Any) -> Iterator[str]:
    yield from (os.fspath(part) for part in _leaves(value) if isinstance(part, str | os.PathLike))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    else:
        yield value


def _content(text: str) -> str | None:
    """The hash of what this text names; None when it names nothing on this machine."""
    path = Path(os.path.expanduser(text))
    if os.path.isfile(path):
        return sha256(path)
    if os.path.isdir(path):
        model = any((path / name).is_file() for name in ("config.json", CONFIG_FILE))
        return _folder(path, (*TEXT_SUFFIXES, *WEIGHT_SUFFIXES)) if model else None
    location, _, name = text.rpartition(":")
    if not re.fullmatch(TARGET_PATTERN, text, re.DOTALL):
        return None
    if location == MAIN:
        function = running_function(name)
        return None if function is None else _source_content(function)
    file = _source(location)
    return sha256(file) if file is not None else None


def _source_content(function: Callable[..., Any]) -> str | None:
    """The hash of a function's source; None where that isn't known."""
    source = callable_source(function)
    if isinstance(source, str):
        return f"lines-{hashlib.sha256(source.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return None if source is None else sha256(source)


def _source(target: str) -> Path | None:
    """The file of `file.py:function` or `package.module:function`; nothing is imported."""
    if target.endswith(".py"):
        file = Path(os.path.expanduser(target))
    elif all(part.isidentifier() for part in target.split(".")):
        spec = _spec(target.split("."))
        file = Path(spec.origin) if spec is not None and spec.origin is not None else Path()
    else:
        return None
    return file if os.path.isfile(file) else None


def _spec(parts: Sequence[str]) -> ModuleSpec | None:
    """Where a module is; `find_spec` of a dotted name would import its packages."""
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return None
    for end in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:end]), spec.submodule_search_locations)
    return spec


def _folder(folder: Path, suffixes: Iterable[str]) -> str:
    """One hash of the files directly in a folder that have these suffixes, with their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if (
            file.suffix in suffixes
            and file.name not in IGNORED_FILES
            and not file.name.startswith(".")
            and file.is_file()
        ):
            digest.update(f"{file.name} {_file(file)}\n".encode())
    return digest.hexdigest()


def _file(file: Path) -> str:
    size = file.stat().st_size
    if size <= MAX_WHOLE_FILE_BYTES:
        return sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for block in range(BLOCK_COUNT):
            stream.seek((size - BLOCK_BYTES) * block // (BLOCK_COUNT - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return f"parts-{digest.hexdigest()}"


def _rows(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
        digest.update(text.encode("utf-8", "backslashreplace"))
    return f"rows-{digest.hexdigest()}"
