"""The type of an option that is a path, or a name on the hub, and holds a text."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator


def _text_of(value: Any) -> Any:
    """A `pathlib.Path`, or another path object, as its text; anything else as it is."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return text if isinstance(text, str) else value


TAKES_PATHS = BeforeValidator(_text_of, json_schema_input_type=str)
"""What makes a text option take path objects."""
PathText: TypeAlias = Annotated[str, TAKES_PATHS]
"""Type of an option that names a file, a folder or a hub repository: a text, and in Python also a `pathlib.Path`, which becomes one."""
