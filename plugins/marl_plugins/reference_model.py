"""A reference that is a model of its own, held beside the shared base."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from marl_core import DataError, PathText, Strategy, hookimpl, is_repo_name

if TYPE_CHECKING:
    from marl_core import AdapterBank, Plan, ReferenceFunction


class ModelReference(Strategy):
    """A separate causal language model with the base's tokenizer, e.g. another checkpoint or the unquantized base."""

    path: PathText = Field(min_length=1, description="Folder or hub name of a causal language model.")
    revision: str | None = Field(default=None, description="Hub revision.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="Dtype of its weights.")
    batch: PositiveInt = Field(default=8, description="Responses per forward pass.")

    @hookimpl
    def marl_check(self) -> Iterable[str]:
        """A folder must hold a model."""
        folder = Path(self.path).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            yield f"reference.path: {self.path} holds no config.json, so it isn't a model. Give a folder that save_pretrained wrote"
        elif not folder.is_dir() and not is_repo_name(self.path):
            yield f"reference.path: there is no folder {self.path!r}, and it isn't a hub name (owner/model)"

    @hookimpl
    def marl_describe(self, plan: Plan) -> str:
        """For `marl check`."""
        return (
            f"a model of its own, {self.path} in {self.dtype}, in memory beside {plan.config.model.path}; "
            "the pre-flight check measures whether the policy starts there"
        )

    @hookimpl
    def marl_reference(self, bank: AdapterBank, temperature: float) -> ReferenceFunction:
        """Load it on the base's device, and compare the vocabularies: it gets the policy's tokens."""
        from marl_core import AdapterBank, response_logprobs

        try:
            own_bank = AdapterBank.from_pretrained(
                self.path, dtype=self.dtype, device=str(bank.device), revision=self.revision
            )
        except DataError as error:
            raise DataError(f"reference.path: {self.path!r} can't be the reference: {error}") from error
        if own_bank.tokenizer.get_vocab() != bank.tokenizer.get_vocab():
            raise DataError(
                f"reference.path: the tokenizer of {self.path!r} isn't the base's, and log-probs of the same tokens are compared. "
                "Use a reference with the base's tokenizer."
            )
        return lambda rollout: response_logprobs(own_bank, rollout, temperature, self.batch)
