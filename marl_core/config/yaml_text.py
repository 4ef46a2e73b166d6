"""YAML as a config needs it: the safe YAML 1.2 core. `1e-4` is a number, `on` is a word, a key is given once.

The one reader and writer of YAML in the core.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from marl_core.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 50

_PATTERNS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _kind, _pattern, _first in _PATTERNS:
    for _letter in _first:
        _RESOLVERS.setdefault("" if _letter == "\0" else _letter, []).append(
            (f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"))
        )


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    # quotes every text that our loader, or one of YAML 1.1, would read as something else
    yaml_implicit_resolvers = {  # noqa: RUF012  # the name and its type are the library's
        letter: _RESOLVERS.get(letter, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(letter, [])
        for letter in {*_RESOLVERS, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """In double quotes, with escapes, where line ends and other marks would be folded away."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


@dataclass(frozen=True, slots=True)
class Document:
    """The value that a text means, and the line of each part of it."""

    value: Any
    node: yaml.Node | None

    def line(self, path: Iterable[str | int]) -> int | None:
        """The line, from 1, of the key or list entry at `path`, or of the nearest one around it; None outside of the text."""
        node, line = self.node, None
        for part in path:
            children = (
                {key.value: (key, value) for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
            )
            if isinstance(node, yaml.SequenceNode):
                children = {index: (entry, entry) for index, entry in enumerate(node.value)}
            if part not in children:
                break
            key, node = children[part]
            line = key.start_mark.line + 1
        return line


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` means; ConfigError naming `source` (a file, an option) when it isn't plain YAML within the limits above."""
    return parse_document(text, source).value


def parse_document(text: str, source: str) -> Document:
    """As `parse_yaml`, with the lines of the text."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None, None)
            _expanded_size(node, {}, 0)
            return Document(loader.construct_document(node), node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}: not a valid config{position}: {error.problem or error.context}.") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply; a config has a few levels.") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{source}: not a valid config: {' '.join(str(error).split())[:200]}.") from error


def dump_yaml(value: Any) -> str:
    """`value` (plain dicts, lists, texts, numbers) as YAML that `parse_yaml` reads back as the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _expanded_size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Nodes once all aliases are written out: a bomb of a few lines has billions. A loop is infinitely deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels deep, or an anchor inside itself")
    if id(node) not in sizes:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes, depth + 1) for child in children)
    if sizes[id(node)] > MAX_NODES:
        raise ValueError(f"its anchors expand to more than {MAX_NODES:,} values")
    return sizes[id(node)]
