"""The device of these tests: a real CUDA device where there is one, the pretended one (pretend.py) elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend import CUDA, pretended_cuda

MakeConfig = Callable[..., Any]
REAL = torch.cuda.is_available()


@pytest.fixture
def device() -> Iterator[torch.device]:
    """`cuda:0`, real or pretended."""
    if REAL:
        yield CUDA
        return
    with pretended_cuda() as found:
        yield found


@pytest.fixture
def on_cuda(device: torch.device, make_config: MakeConfig) -> MakeConfig:
    """`make_config` for runs on that device."""

    def make(**changes: Any) -> Any:
        return make_config(**{**changes, "run": {"device": "cuda", **changes.get("run", {})}})

    return make
