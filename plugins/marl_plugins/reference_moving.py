"""A reference that follows the policy: a frozen copy of its adapter, moved every few steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from marl_core import Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core import AdapterBank, Plan, View


class EmaAdapter(Strategy):
    """A copy of the policy's adapter that follows it: a moving average, or a fresh copy every n steps.

    Every `every` steps: reference = decay * reference + (1 - decay) * policy, parameter by parameter of what learns.
    Gorbatovski et al. 2024 (arXiv:2404.09656): decay 0 is their hard update, above 0 the soft one. The KL is then to
    where the policy was a while ago, so it bounds the speed of the policy, not how far it goes.
    """

    decay: float = Field(
        default=0.99, ge=0.0, lt=1.0, description="Share of the old reference that stays; 0: a fresh copy."
    )
    every: PositiveInt = Field(default=1, description="Move after every this many steps.")

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """A reference that never moves is another strategy; one that is always the policy is none."""
        if self.decay == 0 and self.every == 1:
            yield (
                "reference: decay 0 with every 1 makes the reference the policy itself at each step, so the KL would always be 0. "
                "Use every: 2 or more, or decay above 0 (or reference: none with ppo.kl.coef: 0)"
            )
        if self.every > plan.config.ppo.steps:
            yield (
                f"reference.every: {self.every} is more than the {plan.config.ppo.steps} steps of the run, so the reference would never "
                "move. Lower it, or use disabled-adapter or peft-adapter"
            )

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        how = "a fresh copy" if self.decay == 0 else f"a moving average, decay {self.decay:g},"
        when = "after every step" if self.every == 1 else f"after every {self.every} steps"
        return f"a frozen copy of the policy's adapter, where the policy starts: step-0 KL is 0; {how} {when}"

    @hookimpl
    def marl_reference(self, bank: AdapterBank, policy: str) -> View:
        """Copy the policy's adapter."""
        from marl_core import View

        bank.copy(policy, _name(policy))
        return View(_name(policy))

    @hookimpl
    def marl_update_end(self, step: int, bank: AdapterBank, policy: str) -> None:
        """Follow the policy."""
        if step % self.every == 0:
            self._move(bank, policy, self.decay)

    @hookimpl
    def marl_state(self, bank: AdapterBank, policy: str) -> Mapping[str, Tensor]:
        """The reference can't be had from the policy's weights alone."""
        return bank.tensors(_name(policy))

    @hookimpl
    def marl_restore(self, state: Mapping[str, Tensor], bank: AdapterBank, policy: str) -> None:
        """Put the reference where it was."""
        bank.fill(_name(policy), state)

    def _move(self, bank: AdapterBank, policy: str, decay: float) -> None:
        """Average the numbers that learn; what a kind never trains is the same in both, and may be no numbers to average."""
        import torch

        source, mine = bank.parameters(policy).values(), bank.parameters(_name(policy)).values()
        with torch.no_grad():
            for tensor, other in zip(mine, source, strict=True):
                tensor.mul_(decay).add_(other, alpha=1.0 - decay) if decay else tensor.copy_(other)


def _name(policy: str) -> str:
    return f"{policy}-reference"
