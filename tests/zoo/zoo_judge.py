"""The judge: transformers and peft alone, on each row by itself, without padding and in float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

Row = tuple[list[int], list[int]]
"""Prompt and response."""


def rows(vocabulary: int, seed: int = 7) -> list[Row]:
    """Five rows of unequal length, the longest first, in the middle and last."""
    random = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        return torch.randint(4, vocabulary, (length,), generator=random).tolist()

    return [(some(prompt), some(response)) for prompt, response in ((9, 5), (2, 3), (6, 8), (3, 1), (9, 7))]


def write_model(config: Any, folder: Path, seed: int = 0) -> str:
    """A random model of this config as a folder, nothing in it constant (what starts as zero or one gets noise); its class."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made = type(model).__name__
    if type(model.config) is not type(config):  # a text model's class: what people have is the whole it is part of
        model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    random = torch.Generator().manual_seed(seed)
    persistent = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            spread = tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())
            if name in persistent and tensor.is_floating_point() and not spread:
                tensor += 0.1 * torch.randn(tensor.shape, generator=random)
    model.tie_weights()
    model.save_pretrained(folder)
    return made


def causal(folder: str | Path, **options: Any) -> Any:
    """The model as transformers alone loads it."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, **options).eval()


def adapted(folder: str | Path, adapter: str | Path, trainable: bool = False) -> Any:
    """The model with an adapter as peft alone loads it."""
    return peft.PeftModel.from_pretrained(causal(folder), str(adapter), is_trainable=trainable).eval()


def alone(model: Any, row: Row, stops: Sequence[int] = (), least: int = 0) -> Tensor:
    """Log-probs of a row's response over the vocabulary, [T, V]; stop tokens left out at the first `least` places."""
    prompt, response = row
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    chosen = logits[len(prompt) - 1 : -1].clone()
    if least and stops:
        chosen[: min(least, len(response)), list(stops)] = -torch.inf
    found: Tensor = chosen.log_softmax(-1)
    return found


def logprobs(model: Any, row: Row, stops: Sequence[int] = (), least: int = 0) -> Tensor:
    """Log-probs of a row's response tokens, [T]."""
    return alone(model, row, stops, least).gather(1, torch.tensor(row[1])[:, None]).squeeze(1)


def noise(model: Any, found: Sequence[Row]) -> float:
    """How far float32 alone is off, as float64 sees it; 0 where the model can't compute in float64."""
    with torch.no_grad():
        plain = [logprobs(model, row) for row in found]
        try:
            exact = [logprobs(model.double(), row) for row in found]
        except Exception:  # kernels that know float32 alone
            return 0.0
        finally:
            model.float()
    return max(float((a - b).abs().max()) for a, b in zip(plain, exact, strict=True))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and peft say much of models that are not real."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
