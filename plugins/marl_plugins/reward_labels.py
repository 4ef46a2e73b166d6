"""Which output of a sequence-classification model is the score, by its config.json: for `marl check` and for the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from marl_core import DataError, cached_model_config, near_match

CLASSIFIER = "ForSequenceClassification"
"""How transformers names a model with a head that gives scores for a whole text."""


def problem_of(path: str, revision: str | None, label: int | str | None) -> str | None:
    """Why the model at `path` can't be a reward, without its weights; None where nothing speaks against it, or it isn't here."""
    if os.path.isfile(os.path.join(os.path.expanduser(path), "adapter_config.json")):
        return f"reward.path: {path!r} is an adapter, not a whole model: write {{use: adapter, path: {path}}}."
    try:
        config = cached_model_config(path, "reward.path", revision)
    except DataError as error:
        task, colon, name = path.partition(":")
        hint = f" {task!r} is the task of a pipeline: write the model's name alone, {name!r}." if colon and name else ""
        return f"{error}{hint}"
    if config is None:
        return None
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if kinds and not any(CLASSIFIER in kind for kind in kinds):
        return (
            f"reward.path: {path!r} is a {kinds[0]}, which gives no scores for texts. Give a model that was trained as a sequence "
            "classifier (a reward model)."
        )
    try:
        label_index(labels_of(config), label, path)
    except DataError as error:
        return str(error)
    return None


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """Names of a classifier's labels in their order, from its config.json; transformers has two where none is named."""
    names = config.get("id2label")
    if isinstance(names, Mapping):
        return [str(names[key]) for key in sorted(names, key=int)]
    count = config.get("num_labels")
    return [f"LABEL_{index}" for index in range(count if isinstance(count, int) else 2)]


def label_index(labels: list[str], label: int | str | None, path: str) -> int:
    """The output that is read. DataError where several could be meant, or the one asked for isn't there."""
    listing = ", ".join(f"{index} ({name})" for index, name in enumerate(labels))
    if label is None:
        if len(labels) == 1:
            return 0
        raise DataError(
            f"reward.path: {path!r} has {len(labels)} labels; a reward model has one. Set reward.label to the one whose logit is the "
            f"score: {listing}."
        )
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    near = near_match(str(label), labels)
    raise DataError(
        f"reward.label: {path!r} has no label {label!r}; it has {listing}.{f' Did you mean {near!r}?' if near else ''}"
    )
