"""Several processes as one run: joining, communicating and ending together.

`accelerate launch` and `torchrun` start the processes and say in the environment who they are; the process group is
torch's own. Gradients are summed by one flat all-reduce, not by DDP: with one base, several adapters and several
backward passes DDP has no setting that is always right, and forgets an adapter that became trainable later.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from marl_core.config.run_config import RunConfig
from marl_core.errors import RESUME, ConfigError, RankError, Stopped, in_words
from marl_core.ppo.ranks import ONE_PROCESS, Ranks, checksum

FAILURE_KEY, CALLS_KEY = "marl/failed", "marl/at"
FAILURE_WAIT_SECONDS = 1.0
"""Seconds to wait for the message of a rank that broke the connection."""


def join(config: RunConfig) -> Ranks:
    """The run's processes: ONE_PROCESS unless a launcher started several. ConfigError when the batch can't be shared out.

    RankError when the processes don't find each other within `run.timeout_seconds`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        if config.model.shard != "none":
            raise ConfigError(
                f"model.shard: {config.model.shard} shares the base out over several processes, and this is one. "
                "Start the run by torchrun or accelerate launch, or set model.shard: none."
            )
        return ONE_PROCESS
    _require_equal_shares(config, size)
    if not dist.is_initialized():
        on_cuda = config.run.device != "cpu" and torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", size, config.run.timeout_seconds)
    return Group(config.run.timeout_seconds)


def _init_process_group(backend: str, size: int, seconds: float) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"the {size} processes of this run did not find each other within {seconds:.0f} s (run.timeout_seconds): "
            f"{str(error).splitlines()[0][:200]}. Start them by torchrun or accelerate launch; MASTER_ADDR and MASTER_PORT must be "
            "the same on all machines."
        ) from error
    atexit.register(leave)  # these two only here, in a run of several processes that marl has brought together itself
    sys.excepthook = _reporting(sys.excepthook)


def _reporting(hook: Callable[..., object]) -> Callable[..., None]:
    """An excepthook that lets the other ranks know why a script of one's own ends."""

    def tell(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        ending(error, f"{kind.__name__}: {error}", getattr(error, "exit_code", 1))
        hook(kind, error, traceback)

    return tell


def leave() -> None:
    """Leave the process group at the end of the program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _require_equal_shares(config: RunConfig, size: int) -> None:
    """Every rank must have as many rows of each minibatch as every other: then all make the same number of passes."""
    ppo = config.ppo
    for key, count in (
        ("ppo.minibatch", ppo.minibatch),
        ("ppo.batch / ppo.samples_per_prompt", ppo.batch // ppo.samples_per_prompt),
    ):
        if count % size:
            raise ConfigError(
                f"{key}: {count} can't be shared out over {size} processes (remainder {count % size}). "
                f"Use a multiple of {size}, or another number of processes."
            )
    if ppo.microbatch and ppo.microbatch < ppo.minibatch // size and (ppo.minibatch // size) % ppo.microbatch:
        raise ConfigError(
            f"ppo.microbatch: {ppo.microbatch} does not divide the {ppo.minibatch // size} responses "
            f"that each of {size} processes has of a minibatch of {ppo.minibatch}."
        )


class Group(Ranks):
    """The ranks of a torch process group. Every call is made by all of them, in the same order."""

    def __init__(self, timeout_seconds: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout_seconds
        self._calls = 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        numbers = torch.tensor(list(values), dtype=torch.float64)
        self._collective("numbers", numbers, lambda: dist.all_reduce(numbers, how))
        result: list[float] = numbers.tolist()
        return result

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks: one flat all-reduce."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._collective("gradients", flat, lambda: dist.all_reduce(flat))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' [n, ...] one below the other, [size * n, ...]; a second dimension that differs is filled with 0."""
        if tensor.dim() > 1:
            width = int(self.all_reduce_max([tensor.shape[1]])[0])
            filling = tensor.new_zeros((len(tensor), width - tensor.shape[1], *tensor.shape[2:]))
            tensor = torch.cat([tensor, filling], dim=1)
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        self._collective("rows", sent, lambda: dist.all_gather(parts, sent))
        return torch.cat(parts).to(tensor.dtype)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the ranks; anything that JSON can hold."""
        encoded = torch.tensor([list(json.dumps(value).encode())], dtype=torch.uint8)
        return [json.loads(bytes(row).rstrip(b"\0")) for row in self.gather(encoded).tolist()]

    def assert_equal(self, what: str, tensors: Iterable[Tensor]) -> None:
        """RankError unless these tensors are bit for bit the same on all ranks."""
        parts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        own = torch.tensor([checksum(tensors)])
        self._collective("comparison", own, lambda: dist.all_gather(parts, own))
        others = [rank for rank, part in enumerate(parts) if int(part) != int(parts[0])]
        if others:
            raise RankError(
                f"{what} of rank {', '.join(map(str, others))} differ from rank 0's. Ranks must read the same files, run "
                "the same versions on the same kind of device, and a loop of one's own must give all of them the same."
            )

    def _collective(self, what: str, tensor: Tensor, call: Callable[[], object]) -> None:
        """Make a call that needs every rank. RankError with the first cause when one of them doesn't come.

        NCCL would wait in its own thread; so a gloo all-reduce comes before it, which fails at once when a rank is gone.
        """
        self._calls += 1
        with suppress(RuntimeError):  # a store that is gone says so in the call below
            _store().set(f"{CALLS_KEY}/{self.rank}", str(self._calls))
        start = time.monotonic()
        try:
            if tensor.device.type != "cpu":
                dist.all_reduce(torch.zeros(1))
            call()
        except RuntimeError as error:
            raise self._cause(time.monotonic() - start, what, error) from error

    def _cause(self, waited: float, what: str, error: RuntimeError) -> RankError:
        failure = first_failure(FAILURE_WAIT_SECONDS)
        if failure is not None:
            return RankError(f"rank {failure['rank']}: {failure['message']}", code=int(failure["code"]))
        lagging = self._lagging_ranks()
        who = f"rank {', '.join(map(str, lagging))}" if lagging else "another rank"
        if waited >= self._timeout * 0.95:
            return RankError(
                f"rank {self.rank} waited {waited:.0f} s (run.timeout_seconds) for {who} to bring its {what}; it hangs, or is "
                "much slower than the others. Look at that process; a run that needs more patience sets run.timeout_seconds."
            )
        return RankError(
            f"{who} died without a word while rank {self.rank} exchanged {what}, as after a kill or for lack of memory "
            f"({str(error).splitlines()[0][:120]}). Look at that process's output and the system's log; go on with {in_words(*RESUME)}."
        )

    def _lagging_ranks(self) -> list[int]:
        """Ranks that have made fewer calls than this one."""
        try:
            store = _store()
            keys = [f"{CALLS_KEY}/{rank}" for rank in range(self.size)]
            counts = [int(store.get(key)) if store.check([key]) else 0 for key in keys]
        except RuntimeError:
            return [] if self.first else [0]  # the first rank may have held the store
        return [rank for rank, count in enumerate(counts) if count < self._calls]


def _store() -> Any:
    import torch.distributed.distributed_c10d as c10d

    return c10d._get_default_store()


def first_failure(patience: float = 0.0) -> dict[str, Any] | None:
    """Rank, exit code and message of the rank that failed first; None when none reports within `patience` seconds."""
    end = time.monotonic() + patience
    try:
        store = _store()
        while not store.check([FAILURE_KEY]):
            if time.monotonic() >= end:
                return None
            time.sleep(0.05)
        failure: dict[str, Any] = json.loads(store.get(FAILURE_KEY))
    except (RuntimeError, ValueError):
        return None
    return failure


def ending(error: BaseException | None, message: str, code: int) -> tuple[str | None, int]:
    """How this process ends with an error: what to print (None when another rank has said it), and the exit code.

    The error is reported to the other ranks: all end with the first cause.
    """
    if not dist.is_initialized():
        return _before_joining(message, code)
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):  # a sharded base speaks too
        failure = first_failure(FAILURE_WAIT_SECONDS)
        message = f"marl: a rank died or hangs: {str(error).splitlines()[0][:200]}"
        return (None, int(failure["code"])) if failure else (f"[rank {dist.get_rank()}] {message}", RankError.exit_code)
    own = json.dumps({"rank": dist.get_rank(), "code": code, "message": message.removeprefix("marl: ")})
    try:
        first = json.loads(_store().compare_set(FAILURE_KEY, "", own))
    except (RuntimeError, ValueError):  # the first rank has ended already, and the store with it
        agreed = isinstance(error, Stopped) and dist.get_rank() > 0  # all ranks stop together: the first has said so
        return (None if agreed else message), code
    told = first["rank"] != dist.get_rank()
    return None if told else f"[rank {first['rank']}] {message}", int(first["code"])


def _before_joining(message: str, code: int) -> tuple[str | None, int]:
    """What is wrong with a config is found by every rank: the first says it, and its end ends the others."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(FAILURE_WAIT_SECONDS)
        message = f"[rank {rank}] {message}"
    return message, code
