"""Process rewards: a score for each token, or for each step of a response."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from marl_core import FunctionTarget, PluginError, Strategy, callable_name, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from marl_core import Plan, RewardFunction, Rollout


class ProcessReward(Strategy):
    """A Python function that scores each step of a response, or each token: fn(prompts, completions, steps, **columns).

    It is called as a `function` reward is, and gives for each response a list of numbers, one for each step or token, or
    None to abstain. A step's score lands on its last token. Uesato et al. 2022 (arXiv:2211.14275).
    """

    target: FunctionTarget = Field(
        description="`package.module:function` or `file.py:function`; in Python also the function itself."
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments for the function.")
    per: Literal["step", "token"] = Field(default="step", description="What gets a score each.")
    separator: str = Field(
        default="\n", min_length=1, description="Text that ends a step; the function gets `steps`, cut there."
    )

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The function must exist, and the data have what it requires; a file is parsed, not run."""
        from marl_plugins.function_signature import missing_columns
        from marl_plugins.function_target import problems

        yield from problems(self.target)
        yield from missing_columns(self, self.target, self.arguments, plan, ["steps"] if self.per == "step" else [])

    @hookimpl
    def marl_describe(self, plan: Plan) -> str:
        """For `marl check`."""
        what = f"{callable_name(self.target)}: a score for each {self.per}"
        if plan.estimator.uses_token_rewards:
            return what
        return f"{what}; advantage {plan.config.ppo.advantage.label} uses their sum only"

    @hookimpl
    def marl_reward(self, tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
        """Import the function and wrap it."""
        from marl_plugins.reward_function import wrap

        if self.per == "token":
            return wrap(self.target, self.arguments)
        judge = wrap(self.target, self.arguments, lambda rollout: {"steps": self._steps(rollout)})

        @functools.wraps(judge)
        def score(rollout: Rollout) -> Any:
            return self._to_token_scores(judge(rollout), rollout, tokenizer)

        return score

    def _steps(self, rollout: Rollout) -> list[list[str]]:
        return [split(text, self.separator) for text in rollout.texts]

    def _to_token_scores(
        self, step_scores: Any, rollout: Rollout, tokenizer: PreTrainedTokenizerBase
    ) -> list[list[float] | None]:
        """Scores of steps as scores of tokens."""
        from marl_core import ResponseDecoder

        name = callable_name(self.target)
        steps, decoders = self._steps(rollout), ResponseDecoder.of(tokenizer, rollout.prompts)
        if not isinstance(step_scores, Sequence) or len(step_scores) != len(rollout):
            what = (
                f"{len(step_scores)}" if isinstance(step_scores, Sequence) else f"a {type(step_scores).__name__}, not"
            )
            raise PluginError(f"reward.target: {name} gave {what} lists of scores for {len(rollout)} responses.")
        token_scores: list[list[float] | None] = []
        for i, scores in enumerate(step_scores):
            if scores is None:
                token_scores.append(None)
                continue
            if not isinstance(scores, Sequence) or len(scores) != len(steps[i]):
                what = f"{len(scores)} numbers" if isinstance(scores, Sequence) else repr(scores)[:80]
                raise PluginError(
                    f"reward.target: {name}: response {i + 1} has {len(steps[i])} steps and got {what}; give one for each, or None."
                )
            ids = rollout.ids[i][rollout.mask[i]].tolist()
            row = [0.0] * len(ids)
            for end, score in zip(step_ends(ids, steps[i], decoders[i].text), scores, strict=True):
                row[end] += score
            token_scores.append(row)
        return token_scores


def split(text: str, separator: str) -> list[str]:
    """The steps of a text, each with the separator that ends it; at least one, though it be empty."""
    pieces = text.split(separator)
    steps = [piece + separator for piece in pieces[:-1]] + pieces[-1:]
    return [piece for piece in steps if piece] or [""]


def step_ends(ids: Sequence[int], steps: Sequence[str], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Index of each step's last token: the first whose text, with all before it, reaches the step's end.

    `decode` gives the text of the response's first tokens. The last step ends with the response, its stop token included.
    """
    ends: list[int] = []
    characters = 0
    for step in steps[:-1]:
        characters += len(step)
        low, high = ends[-1] if ends else 0, len(ids) - 1
        while low < high:
            middle = (low + high) // 2
            if len(decode(ids[: middle + 1])) >= characters:
                high = middle
            else:
                low = middle + 1
        ends.append(low)
    return [*ends, len(ids) - 1]
