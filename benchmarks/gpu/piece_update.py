"""One PPO update of a scored rollout: what is computed again, what is packed, what is compiled, and how much goes through at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from floor import matmul_peak, step_flops
from models import alone, random_bank, random_rows, runner_on
from timing import Timed, relative, timed, wait
from torch import Tensor, nn
from workloads import Work

from marl_core import Runner
from marl_core.bank.trunk import PassOptions
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.seeds import generator
from marl_core.ppo.types import Prompts, Rollout
from marl_core.run.optimizer import make_optimizer

WORKS = {
    "full": alone("update", prompts=32, prompt_tokens=64, new_tokens=256, epochs=1, minibatch=32),
    "tiny": alone("update", prompts=8, prompt_tokens=8, new_tokens=24, epochs=1, minibatch=8),
}
MANY = 4
"""Times as many responses where pass budgets are compared: they differ where a minibatch is larger than they are."""
SHAPES = {"full": "1b", "tiny": "tiny"}
BUDGETS = {"full": (2048, 4096, 8192, 16_384, 32_768), "tiny": (128, 512)}
PLAIN = PassOptions(pack=False, recompute_cheap=False)
PACKED = PassOptions(pack=True, recompute_cheap=False)
CHEAP = PassOptions(pack=True, recompute_cheap=True)
TOKENS = {"full": 16_384, "tiny": 512}
"""A pass's tokens where budgets are not what is compared: all responses of a minibatch go through together."""


def measurements(device: str, shape: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name; they share one base, one rollout and the weights that the policy starts from."""
    bench = Bench(device, shape)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "update recompute off": lambda: bench.row(bench.even, PACKED),
        "update recompute on": lambda: bench.row(bench.even, CHEAP),
        "update checkpointing": lambda: bench.row(bench.even, replace(PACKED, recompute=True)),
        "update checkpointing, recompute on": lambda: bench.row(bench.even, replace(CHEAP, recompute=True)),
        "update packing off": lambda: bench.row(bench.ragged, PLAIN),
        "update packing on": lambda: bench.row(bench.ragged, PACKED),
        "update compile": bench.compiled,
    }
    for tokens in BUDGETS[shape]:
        found[f"update budget {tokens}"] = lambda tokens=tokens: bench.row(bench.many, CHEAP, tokens=tokens)  # type: ignore[misc]
    return found


class Case:
    """Responses of one kind, scored by the policy before any update."""

    def __init__(self, bench: Bench, work: Work) -> None:
        self.work = work
        runner = bench.runner
        words = runner.bank.trunk.vocabulary
        samples = runner.config.ppo.samples_per_prompt
        prompts = Prompts.of(random_rows(work.prompts // samples, work.prompt_tokens, words), 0).repeat(samples)
        rows = random_rows(work.prompts, work.new_tokens, words, seed=1)
        responses = [row[:length] for row, length in zip(rows, work.lengths(), strict=True)]
        rollout = Rollout.from_responses(prompts.to(runner.bank.device), responses, runner.bank.tokenizer)
        scores = torch.randn(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
        scored = runner.score(rollout, scores)
        self.ppo = runner.config.ppo.model_copy(update={"batch": work.prompts, "minibatch": work.minibatch})
        self.step = replace(runner.algorithm, ppo=self.ppo)
        self.scored, self.advantages = scored, self.step.advantages(scored, self.ppo.kl.coef)
        self.plain: list[Tensor] | None = None
        """How far the plain path moves the weights; made when it is first wanted."""


class Bench:
    """A base, a policy on all its linear layers, and a Runner whose parts are used."""

    def __init__(self, device: str, shape: str) -> None:
        self.device, self.shape = device, shape
        if device == "cuda":
            _ = self.runner  # made while others load

    @cached_property
    def runner(self) -> Runner:
        """Made when it is first wanted; the policy is moved a little, for a new one has no gradient in its first factor."""
        bank = random_bank(SHAPES[self.shape], "bfloat16", self.device)
        runner = runner_on(bank, WORKS[self.shape], {"policy.targets": "all-linear"})
        random = torch.Generator(device=bank.device).manual_seed(1)
        with torch.no_grad():
            for parameter in self._parameters(runner):
                parameter.add_(torch.randn(parameter.shape, generator=random, device=parameter.device), alpha=0.005)
        return runner

    @cached_property
    def start(self) -> list[Tensor]:
        """The policy's weights before any update."""
        return [parameter.detach().clone() for parameter in self._parameters(self.runner)]

    @cached_property
    def even(self) -> Case:
        """Responses of one length: nothing is padded."""
        return Case(self, WORKS[self.shape])

    @cached_property
    def ragged(self) -> Case:
        """Responses of all lengths up to the longest."""
        return Case(self, replace(WORKS[self.shape], ragged=True))

    @cached_property
    def many(self) -> Case:
        """More responses, all in one minibatch."""
        work = WORKS[self.shape]
        return Case(self, replace(work, prompts=MANY * work.prompts, minibatch=MANY * work.minibatch))

    @cached_property
    def matmul(self) -> float:
        """FLOP/s of large products in bfloat16."""
        return matmul_peak("bfloat16", self.device, seconds=0.1)

    @staticmethod
    def _parameters(runner: Runner) -> list[nn.Parameter]:
        return list(runner.bank.parameters(runner.roles.trained.policy).values())

    def update(self, case: Case, options: PassOptions, tokens: int) -> float:
        """One update from the start; its policy loss."""
        runner = self.runner
        with torch.no_grad():
            for parameter, value in zip(self._parameters(runner), self.start, strict=True):
                parameter.copy_(value)
        optimizer = make_optimizer(runner.roles.trained.parameters(runner.bank), runner.config)
        limits = PassLimits(case.ppo.microbatch or case.ppo.minibatch, tokens, options)
        step = replace(case.step, budget=replace(case.step.budget, train=limits))
        return step.update(case.scored, case.advantages, optimizer, 0.0, generator("minibatches")).policy_loss

    def moved(self) -> list[Tensor]:
        """How far the last update moved each weight."""
        return [now.detach() - was for now, was in zip(self._parameters(self.runner), self.start, strict=True)]

    def row(self, case: Case, options: PassOptions, *, tokens: int | None = None, warm: int = 1) -> dict[str, Any]:
        """Seconds, speed, memory, and how far the update is from the plain path's, as a share of its length."""
        _ = self.start
        tokens = tokens or TOKENS[self.shape]
        options = self.runner.bank.trunk.prepare(options)
        found = timed(lambda: self.update(case, options, tokens), self.device, repeat=3, warm=warm, at_most=2.0)
        moved = self.moved()
        if case.plain is None:
            self.update(case, PLAIN, TOKENS[self.shape])
            case.plain = self.moved()
        return {**self.said(case, found, options, tokens), "from_plain": round(relative(moved, case.plain), 5)}

    def said(self, case: Case, found: Timed, options: PassOptions, tokens: int) -> dict[str, Any]:
        """The row of one way to update."""
        work = case.work
        flops = step_flops(work, self.runner.bank.base.config)["update"]
        memory = {} if found.peak_mib is None else {"peak_mib": round(found.peak_mib, 1)}
        return {
            "seconds": round(found.seconds, 4),
            **memory,
            "tokens_per_second": round(work.tokens / found.seconds, 1),
            "of_matmul_peak": round(flops / found.seconds / self.matmul, 4),
            "microbatch_tokens": tokens,
            "pack": options.pack,
            "checkpointing": options.recompute,
            "recompute_cheap": options.recompute_cheap,
            "compile": options.compiled,
            "responses": work.prompts,
            "sequence_tokens": work.prompts * work.prompt_tokens + work.tokens,
        }

    def compiled(self) -> dict[str, Any]:
        """Compiled layers; they stay marked, so this comes last in its process."""
        plain = self.row(self.even, PACKED)
        options = self.runner.bank.trunk.prepare(replace(PACKED, compiled=True))
        start = time.perf_counter()
        self.update(self.even, options, TOKENS[self.shape])
        wait(self.device)
        first = time.perf_counter() - start
        row = self.row(self.even, options, warm=0)
        return {**row, "first_seconds": round(first, 3), "seconds_uncompiled": plain["seconds"]}
