"""Built-in reward sources: an adapter on the shared base, a separate model, a function."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from marl_core import DataError, FunctionTarget, PathText, Strategy, cached_adapter, callable_name, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from marl_core import AdapterBank, Plan, RewardFunction, ScoreView


class AdapterReward(Strategy):
    """A reward adapter with its score head on the shared base, as TRL's RewardTrainer or LLaMA-Factory writes it."""

    path: PathText = Field(min_length=1, description="Folder or hub name of the reward adapter, score head included.")
    revision: str | None = Field(
        default=None, min_length=1, description="Hub revision (branch, tag or commit) of the adapter."
    )
    subfolder: str | None = Field(default=None, min_length=1, description="Folder inside `path` that holds it.")
    position: Literal["auto", "last-attended", "last-non-pad"] = Field(
        default="auto",
        description="Token that is scored; auto: as recorded with the adapter, which is how transformers' classifier reads it.",
    )
    pad_token_id: int | None = Field(
        default=None, description="Pad id for last-non-pad, when it isn't recorded with the adapter."
    )

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The files must hold an adapter with a head, and not be the policy itself."""
        files = cached_adapter(self.path, "reward.path", self.revision, self.subfolder)
        if files is None:
            return  # on the hub: looked at when it is there
        if not any(key.endswith("weight") for key in files.reward_head[1]):
            yield (
                f"reward.path: {files.weights} holds no score weights; train the adapter with LoraConfig(task_type='SEQ_CLS'), "
                f"or modules_to_save=['score'], and save it again.{files.pickled_head}"
            )
        policy, policy_files = plan.config.policy, None
        with suppress(DataError):  # told where it is named
            policy_files = cached_adapter(policy.source or "", "policy.from", policy.revision, policy.subfolder)
        if policy_files is not None and policy_files.folder.resolve() == files.folder.resolve():
            yield f"reward.path: {self.path} is also the adapter that the policy continues; a policy can't be its own judge"

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        return f"the adapter {self.path} with its score head, on the base"

    @hookimpl
    def marl_reward(self, bank: AdapterBank) -> ScoreView:
        """Load adapter and head, check base and golden scores."""
        position = None if self.position == "auto" else self.position
        return bank.load_reward(
            self.path,
            position=position,
            pad_id=self.pad_token_id,
            revision=self.revision,
            subfolder=self.subfolder,
        )


class ModelReward(Strategy):
    """A separate sequence-classification model with its own tokenizer and chat template."""

    path: PathText = Field(min_length=1, description="Folder or hub name of a sequence-classification model.")
    revision: str | None = Field(default=None, description="Hub revision.")
    label: int | str | None = Field(
        default=None,
        description="Of a model with several labels the one whose logit is the score: its number, or its name in the model's "
        "config.json. A reward model has one label, and needs none here.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Dtype of the reward model."
    )
    template: Literal["auto", "chat", "plain"] = Field(
        default="auto",
        description="chat: the model's chat template; plain: prompt and response joined; auto: chat if the prompts are messages.",
    )
    append_eos: bool = Field(
        default=True,
        description="End plain texts with the model's EOS, as TRL's RewardTrainer trains them; never twice.",
    )
    batch: PositiveInt = Field(default=16, description="Texts per forward pass.")
    max_tokens: PositiveInt = Field(
        default=2048,
        description="Longer texts are cut to this many tokens, or to what model and tokenizer have room for: on the side that the "
        "tokenizer's config names, else on the left to max_tokens, and as its tokenizer cuts to the model's room.",
    )

    @hookimpl
    def marl_check(self) -> Iterable[str]:
        """What is on this machine must be a classifier, with the label that is asked for."""
        from marl_plugins.reward_labels import problem_of

        problem = problem_of(self.path, self.revision, self.label)
        if problem:
            yield problem

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        label = "" if self.label is None else f", its label {self.label}"
        return f"a model of its own, {self.path} in {self.dtype}{label}"

    @hookimpl
    def marl_reward(self, bank: AdapterBank) -> RewardFunction:
        """Load it beside the base; decode, template, encode."""
        from marl_plugins.reward_model import RewardModel

        return RewardModel(self, str(bank.device))


class FunctionReward(Strategy):
    """A Python function in TRL's convention: fn(prompts, completions, **columns) -> list[float | None], sync or async."""

    target: FunctionTarget = Field(
        description="`package.module:function` or `file.py:function`; in Python also the function itself."
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments for the function.")
    timeout_seconds: PositiveFloat | None = Field(
        default=None,
        description="Give up on a call that takes longer, and stop the run; without one a call may take for ever.",
    )

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The function must exist, and the data have what it requires; a file is parsed, not run."""
        from marl_plugins.function_signature import missing_columns
        from marl_plugins.function_target import problems

        yield from problems(self.target)
        yield from missing_columns(self, self.target, self.arguments, plan)

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        return f"the function {callable_name(self.target)}"

    @hookimpl
    def marl_reward(self, tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
        """Import the function and wrap it."""
        from marl_plugins.reward_function import wrap
        from marl_plugins.time_limit import limited

        return limited(wrap(self.target, self.arguments), self.timeout_seconds, callable_name(self.target))
