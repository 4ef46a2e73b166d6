"""A model's tokenizer, loaded without the model, and the single tokens that texts name. transformers is imported on the first call."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_core.artifacts.hub import cached_file, hub_read, is_repo_name
from marl_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    asked_by: str = "model.path",
    **options: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer, left-padding, with a pad token (its EOS if it has none: masks never come from the pad id).

    `asked_by`: the config key that names it. `options` are further ones of `from_pretrained`, such as `local_files_only`.
    """
    from transformers import AutoTokenizer

    path = os.path.expanduser(path)
    try:
        with nullcontext() if options.get("local_files_only") else hub_read(path, asked_by, revision):
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, revision=revision, **options
            )
    except (OSError, ValueError, ImportError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"model: no tokenizer could be loaded from {path!r}: {reason}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def in_cache(name: str, revision: str | None) -> bool:
    """Whether this machine's cache has a tokenizer of the hub's; told without loading transformers."""
    if not is_repo_name(name, owner=False):
        return False
    return any(cached_file(name, file, revision) is not None for file in ("tokenizer.json", "tokenizer_config.json"))


def may_hold_tokenizer(folder: str) -> bool:
    """Whether a folder has one of the files by which transformers finds out which tokenizer it is."""
    path = os.path.expanduser(folder)
    return any(
        os.path.isfile(os.path.join(path, file)) for file in ("tokenizer_config.json", "tokenizer.json", "config.json")
    )


def custom_tokenizer(folder: str) -> bool:
    """Whether a folder's tokenizer is code that lies beside it."""
    try:
        text = Path(os.path.expanduser(folder), "tokenizer_config.json").read_text(encoding="utf-8")
        return bool(json.loads(text).get("auto_map"))
    except (OSError, ValueError, AttributeError):
        return False


def stop_token(tokenizer: PreTrainedTokenizerBase, text: str, vocabulary: int | None = None) -> int:
    """The one token that an entry of `sampling.stop` is; ConfigError when it is none that the model can sample."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ConfigError(
            f"sampling.stop: {text!r} is {len(tokens)} tokens for this tokenizer, a stop must be a single token. "
            "Text of several tokens goes into sampling.stop_strings."
        )
    if tokens[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise ConfigError(
            f"sampling.stop: this tokenizer doesn't know {text!r}. Name a token that it has, or use sampling.stop_strings."
        )
    if not in_vocabulary(tokens[0], vocabulary):
        raise ConfigError(
            f"sampling.stop: {text!r} is token {tokens[0]}, and the model has {vocabulary} tokens only, so it can never be sampled. "
            "Name a token that the model has, or use sampling.stop_strings."
        )
    return int(tokens[0])


def in_vocabulary(token: int, vocabulary: int | None) -> bool:
    """Whether a model of so many tokens (None: of any number) knows this one."""
    return token >= 0 and (vocabulary is None or token < vocabulary)
