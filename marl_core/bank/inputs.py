"""The doors: token ids, masks and numbers as a tokenizer, TRL, numpy, pandas or torch give them, as the one form that is computed with.

Whatever a public call takes is converted here, once: ids int64, masks bool, numbers float32. What can't be meant is a DataError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from marl_core.errors import DataError, MarlError


def as_tensor(value: object, who: str, error: type[MarlError] = DataError) -> Tensor:
    """A tensor of what is one already, of a numpy array or scalar, or of nested lists of numbers and 0-d tensors.

    `error` when it holds anything else, or rows of unequal length.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            raise error(f"{who}: this is a tensor without data (device meta); give numbers.")
        return value.detach()
    if isinstance(value, str | bytes | Mapping) or value is None:
        named = " Give what it holds by name: f(**batch)." if isinstance(value, Mapping) else ""
        raise error(f"{who}: expected numbers, got {_kind(value)}.{named}")
    try:
        return torch.as_tensor(plain(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        raise error(
            f"{who}: expected a tensor, an array or nested lists of numbers with rows of equal length, got "
            f"{_kind(value)} ({reason})."
        ) from reason


def plain(value: Any) -> Any:
    """Nested sequences, arrays and 0-d tensors as nested lists of Python numbers; anything else as it is."""
    if isinstance(value, Tensor) and value.is_nested:
        return [plain(row) for row in value.unbind()]
    if hasattr(value, "to_pylist"):  # pyarrow
        return list(value.to_pylist())
    if hasattr(value, "to_numpy") and hasattr(value, "columns"):  # pandas: iterating gives the columns' names
        return value.to_numpy().tolist()
    if isinstance(value, Tensor) or type(value).__module__.partition(".")[0] in ("numpy", "jax", "jaxlib"):
        listed = value.tolist()
        return [plain(item) for item in listed] if str(value.dtype) == "object" else listed
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return value
    return [plain(item) for item in value]


def as_ids(value: object, who: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Token ids of any integer dtype, or whole floats as a table with gaps gives them, as int64 [B, L]; DataError otherwise."""
    ids = as_tensor(value, who)
    if ids.dtype.is_complex or ids.dtype == torch.bool:
        _refuse(who, "token ids", ids)
    if ids.dtype.is_floating_point and not bool((ids.isfinite() & (ids == ids.round())).all()):
        _refuse(who, "token ids", ids, "some are no whole numbers")
    _require_shape(who, "token ids", ids, shape)
    return ids.long()


def as_mask(value: object, who: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A mask of any dtype, in which 1 counts and 0 doesn't, as bool; DataError when it holds anything else.

    `shape`: what it must have.
    """
    mask = as_tensor(value, who)
    _require_shape(who, "a mask of 0 and 1", mask, shape)
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        wrong = mask[(mask != 0) & (mask != 1)].flatten()[0].item()
        _refuse(
            who, "a mask of 0 and 1", mask, f"it holds {wrong:.6g}" if isinstance(wrong, float) else f"it holds {wrong}"
        )
    return mask.bool()


def as_floats(value: object, who: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Numbers of any real dtype as float32; DataError otherwise."""
    floats = as_tensor(value, who)
    if floats.dtype.is_complex:
        _refuse(who, "real numbers", floats)
    _require_shape(who, "numbers", floats, shape)
    return floats.float()


def as_rows(value: object, who: str) -> list[list[int]]:
    """Token lists, one a row, of any length each: lists, tensors or arrays, of Python, numpy or 0-d tensor numbers.

    DataError naming the row, counted from 1, that is no list of whole numbers.
    """
    rows = plain(value)
    if not isinstance(rows, list):
        raise DataError(f"{who}: expected a list of token lists, one for each row, got {_kind(value)}.")
    listed = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list):
            raise DataError(f"{who}: row {number} must be a list of token ids, it is {row!r:.60}.")
        try:
            tokens = [int(token) for token in row if not isinstance(token, str | bool)]
            are_whole = len(tokens) == len(row) and all(token == item for token, item in zip(tokens, row, strict=True))
        except (TypeError, ValueError, OverflowError):
            are_whole = False
        if not are_whole:
            raise DataError(f"{who}: row {number} must be a list of token ids, it is {row!r:.60}.")
        listed.append(tokens)
    return listed


def as_table(value: Any, count: int, who: str) -> list[Mapping[str, Any]]:
    """Data rows, one for each of `count` prompts: a list of rows, or columns by name as a batch of a data set has them."""
    if hasattr(value, "with_format"):  # a data set, whatever its columns are given as
        value = list(value.with_format(None))
    elif hasattr(value, "to_dict") and hasattr(value, "columns"):  # pandas
        value = value.to_dict("records")
    elif hasattr(value, "to_pylist"):  # pyarrow
        value = value.to_pylist()
    if isinstance(value, Mapping):
        columns = {str(name): list(column) for name, column in value.items()}
        lengths = {name: len(column) for name, column in columns.items() if len(column) != count}
        if lengths:
            raise DataError(f"{who}: each column needs an entry for each of {count} prompts; lengths: {lengths}.")
        value = [{name: column[row] for name, column in columns.items()} for row in range(count)]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise DataError(f"{who}: expected a list of rows or columns by name, got {_kind(value)}.")
    rows = list(value)
    wrong = [number for number, row in enumerate(rows, start=1) if not isinstance(row, Mapping)]
    if wrong:
        raise DataError(f"{who}: row {wrong[0]} is {_kind(rows[wrong[0] - 1])}; each must hold columns by name.")
    return rows


def without_garbage(ids: Tensor, mask: Tensor, vocabulary: int, who: str) -> Tensor:
    """Ids [B, L] with 0 under a false mask, whatever stood there (-100, padding of another vocabulary).

    DataError when a token that counts is outside the vocabulary.
    """
    ids = torch.where(mask, ids, torch.zeros_like(ids))
    wrong = (ids < 0) | (ids >= vocabulary)
    if bool(wrong.any()):
        row, column = (int(number) for number in wrong.nonzero()[0])
        raise DataError(
            f"{who}: row {row + 1} holds token {int(ids[row, column])} at place {column + 1}, and this model has {vocabulary} tokens. "
            "Use the tokenizer of this base, or mask what isn't a token."
        )
    return ids


def require_token_ids(rows: Sequence[Sequence[int]], who: str) -> None:
    """DataError naming the row, counted from 1, that holds a number no tokenizer gives: -100 for what is padding, for one."""
    for number, row in enumerate(rows, start=1):
        wrong = next((token for token in row if not 0 <= token < 2**31), None)
        if wrong is not None:
            raise DataError(f"{who}: row {number} holds {wrong}, which is no token. Leave out what is padding.")


def require_room(mask: Tensor, most: int | None, who: str) -> None:
    """DataError when a row [L] of the mask keeps more tokens than a model with learned positions has positions for."""
    lengths = mask.sum(dim=1)
    if most is not None and bool((lengths > most).any()):
        row = int((lengths > most).nonzero()[0])
        raise DataError(
            f"{who}: row {row + 1} has {int(lengths[row])} tokens, and this model has positions for {most}. Cut it."
        )


def require_tokens(mask: Tensor, who: str) -> None:
    """DataError unless each row [L] of the mask keeps a token."""
    if mask.numel() == 0 or not bool(mask.any(dim=1).all()):
        rows = (~mask.any(dim=1)).nonzero().flatten().tolist() if mask.numel() else []
        named = f"; rows without one: {', '.join(str(row + 1) for row in rows[:8])}" if rows else ""
        raise DataError(f"{who}: each row needs a token that counts{named}.")


def _require_shape(who: str, what: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        if tensor.dim() != 2:
            raise DataError(f"{who}: expected {what} of shape [rows, tokens], got {list(tensor.shape)}.")
    elif tuple(tensor.shape) != shape:
        raise DataError(f"{who}: expected {what} of shape {list(shape)}, got {list(tensor.shape)}.")


def _refuse(who: str, wanted: str, tensor: Tensor, why: str = "") -> NoReturn:
    raise DataError(f"{who}: expected {wanted}, got {tensor.dtype} {list(tensor.shape)}{f': {why}' if why else ''}.")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, Sequence) else "")
