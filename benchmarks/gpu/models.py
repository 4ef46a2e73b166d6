"""Random models made where they are measured: no file is written, no weight crosses the bus."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from workloads import Work, config_of, shape_config  # this folder is no package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from marl_core import AdapterBank, Runner


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors without a dtype of their own are of this one inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_base(shape: str, dtype: str, device: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random Llama of a shape of workloads.SHAPES, made on the device in its dtype; `changes` go into its config.

    On another device the same seed gives other weights. Its name, which configs give as `model.path`, is `random-<shape>`.
    """
    from transformers import LlamaForCausalLM

    config = shape_config(shape, **changes)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed)
        with default_dtype(getattr(torch, dtype)), torch.device(device):
            model: PreTrainedModel = LlamaForCausalLM(config)
    model.name_or_path = f"random-{shape}"
    return model.eval()


def random_bank(
    shape: str,
    dtype: str,
    device: str,
    *,
    policy: str | None = None,
    targets: str | list[str] = "all-linear",
    r: int = 16,
    alpha: int = 32,
    seed: int = 0,
    **changes: Any,
) -> AdapterBank:
    """A bank on `random_base` with a byte tokenizer; with a trainable LoRA of rank `r` when `policy` names one.

    A Runner adds a policy of its own (`runner_on`), so it needs none here.
    """
    from marl_core import AdapterBank
    from marl_core.testing import kinds, tiny_tokenizer

    base = random_base(shape, dtype, device, seed, **changes)
    bank = AdapterBank(base, tiny_tokenizer(), source=base.name_or_path)
    if policy is not None:
        bank.add(policy, kinds.make_config(r, alpha, targets, 0.0, {}, bank.linears), seed=seed)
    return bank


def runner_on(
    bank: AdapterBank, work: Work, changes: dict[str, Any] | None = None, *, policy: str = "policy"
) -> Runner:
    """A Runner of this work on a bank in memory, with a reward that costs nothing unless `changes` say another.

    `changes` are dotted keys, e.g. {"speed.pack": False}. The policy is added under the name `policy`; `runner.built.discard()` takes
    it out of the bank again.
    """
    from marl_core import RunConfig, Runner

    free = {"reward": {"use": "function", "target": f"{Path(__file__).parents[1] / 'workloads.py'}:nothing"}}
    dtype = str(bank.base.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    config = config_of(work, bank.source, "", dtype, bank.device.type, threads, {**free, **(changes or {})})
    return Runner(RunConfig.model_validate(config), bank=bank, policy=policy)


def random_rows(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """`count` rows of `length` random tokens, none of them the first four, which stand for padding and ends."""
    random = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(4, vocabulary, (count, length), generator=random).tolist()
    return found


def alone(name: str, **sizes: Any) -> Work:
    """A work with the policy alone: grpo, no reference, no value, a reward that costs nothing."""
    return replace(Work(name, alone=True), **sizes)
