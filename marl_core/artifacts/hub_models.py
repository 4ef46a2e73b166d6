"""Whether a model can be had at all, told before anything heavy is imported."""

from __future__ import annotations

from marl_core.artifacts.hub import require_hub
from marl_core.artifacts.model_files import read_model


def require_model(path: str, asked_by: str, revision: str | None = None) -> None:
    """DataError naming `asked_by` for a folder that holds no model, and for a hub name that isn't here while the hub can't be reached."""
    if read_model(path, revision, asked_by) is None:
        require_hub(path, asked_by, revision)
