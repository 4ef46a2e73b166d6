"""How many processes a command starts: of accelerate, torchrun and deepspeed, read from the words before the script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

PYTHON = re.compile(r"python[\d.]*(\.exe)?")
TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")


def processes_of(words: Sequence[str]) -> int | None:
    """Processes of all machines together; None where the words don't tell, as where a launcher takes every GPU it finds."""
    names = [Path(word).name for word in words]
    options = _options(words)
    if any(name in TORCHRUN for name in names):
        return _product(options, "nproc_per_node", "nnodes", without=1)
    if "deepspeed" in names:
        return _product(options, "num_gpus", "num_nodes", without=None)
    if any(name.startswith("accelerate") for name in names):
        return _count(options.get("num_processes")) or _of_config(options.get("config_file"))
    return 1 if any(PYTHON.fullmatch(name) for name in names) and "-m" not in names else None


def _options(words: Sequence[str]) -> dict[str, str]:
    """`--name value` and `--name=value`; names with underscores."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


def _product(options: dict[str, str], on_each: str, machines: str, without: int | None) -> int | None:
    """Processes of one machine times machines; `without`: what the launcher takes where the former isn't given."""
    each = _count(options[on_each]) if on_each in options else without
    many = _count(options.get(machines, "1"))
    return each * many if each and many else None


def _count(text: object) -> int | None:
    """A count; None for `gpu`, `auto`, `1:4` and whatever else is none."""
    return int(str(text)) if str(text).isdecimal() and int(str(text)) > 0 else None


def _of_config(file: str | None) -> int | None:
    """What accelerate's config file says, where it is here."""
    try:
        written = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _count(written.get("num_processes")) if isinstance(written, dict) else None
