"""Built-in references: which weights the KL penalty pulls towards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from marl_core import PathText, Strategy, cached_adapter, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from marl_core import AdapterBank, Plan, View


class DisabledAdapter(Strategy):
    """The bare base: every adapter switched off. Right for a new adapter on the base."""

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """Refuse the classic trap without reading a weight."""
        if plan.config.policy.start == "continue" and not plan.config.reference.allow_mismatch:
            yield (
                f"reference: disabled-adapter, but the policy starts as a copy of {plan.config.policy.source}: with adapters off the "
                "reference never saw that adapter's training, so the KL pulls the policy away from where it starts. Write "
                f"reference: {{use: peft-adapter, adapter: {plan.config.policy.source}}}, or merge the adapter and start: new "
                "(reference: merged-base), or, if you mean it, add allow_mismatch: true"
            )

    @hookimpl
    def marl_reference(self) -> View:
        """The base with nothing on it."""
        from marl_core import View

        return View(None)


class MergedBase(Strategy):
    """The bare base after an SFT adapter was merged into it, in full precision, before any quantization."""

    adapter: PathText = Field(
        min_length=1, description="The SFT adapter to merge into the base at load: a folder or a hub name."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Hub revision (branch, tag or commit) of the adapter."
    )
    subfolder: str | None = Field(default=None, min_length=1, description="Folder inside `adapter` that holds it.")

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The adapter must not be applied twice, and must be there."""
        if plan.config.policy.start == "continue" and not plan.config.reference.allow_mismatch:
            yield (
                f"reference: merged-base folds {self.adapter} into the base, and the policy continues {plan.config.policy.source} on top "
                "of it, so policy and reference differ from the start. Write policy: {start: new} to train a new adapter on the merged base"
            )
        cached_adapter(self.adapter, "reference.adapter", self.revision, self.subfolder)

    @hookimpl
    def marl_prepare_base(self, base: PreTrainedModel) -> PreTrainedModel:
        """Merge while the base is still float32: merging into a quantized base is lossy."""
        from marl_core import merge_into

        return merge_into(base, self.adapter, "reference.adapter", revision=self.revision, subfolder=self.subfolder)

    @hookimpl
    def marl_reference(self) -> View:
        """The merged base with nothing on it."""
        from marl_core import View

        return View(None)


class PeftAdapter(Strategy):
    """An explicit, frozen PEFT adapter on the base. Right when the policy is a trainable copy of that adapter."""

    adapter: PathText = Field(
        min_length=1, description="The frozen adapter that is the reference: a folder or a hub name."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Hub revision (branch, tag or commit) of the adapter."
    )
    subfolder: str | None = Field(default=None, min_length=1, description="Folder inside `adapter` that holds it.")

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The adapter must be what the policy starts from, and be there."""
        if plan.config.policy.start == "new" and not plan.config.reference.allow_mismatch:
            yield (
                f"reference: peft-adapter {self.adapter}, but the policy starts as a new adapter on the bare base, which is another model. "
                f"Write policy: {{start: continue, from: {self.adapter}}}, or reference: {{use: merged-base, adapter: {self.adapter}}}"
            )
        cached_adapter(self.adapter, "reference.adapter", self.revision, self.subfolder)

    @hookimpl
    def marl_reference(self, bank: AdapterBank) -> View:
        """Load it frozen, or use it if the bank already has it."""
        from marl_core import View

        name = bank.frozen(
            self.adapter, "reference", "reference.adapter", revision=self.revision, subfolder=self.subfolder
        )
        return View(name)


class NoReference(Strategy):
    """No reference: nothing holds the policy near its start. Needs ppo.kl.coef 0."""

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """A penalty needs something to pull towards."""
        if plan.config.ppo.kl.coef > 0:
            yield (
                f"reference: none, but ppo.kl.coef is {plan.config.ppo.kl.coef:g}, and a KL penalty needs a reference. "
                "Set ppo.kl.coef: 0, or choose a reference (disabled-adapter for a new adapter on the base)"
            )

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        return "none: nothing holds the policy near its start"

    @hookimpl
    def marl_reference(self) -> View:
        """Never looked through: with coefficient 0 no reference is evaluated."""
        from marl_core import View

        return View(None)
