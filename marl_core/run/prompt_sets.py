"""The prompts of a run: read before its base is loaded, so that a row that can't be used is told before minutes of loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from marl_core.artifacts.model_files import require_pinned_code
from marl_core.artifacts.tokenizer import load_tokenizer
from marl_core.config.run_config import DataSection, RunConfig
from marl_core.data.check import prompt_sections, room_by_files, stop_findings
from marl_core.data.prompts import PromptData
from marl_core.data.reading import UNBOUNDED_ROOM, read_prompts
from marl_core.errors import DataError, MarlError, together
from marl_core.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptSets:
    """Training and held-out prompts by the key of the config that names them, and what they were read for."""

    by_key: Mapping[str, PromptData]
    room: int
    """Positions that were left for a prompt."""

    @property
    def training(self) -> PromptData | None:
        """The prompts of the steps; None when the config names none."""
        return self.by_key.get("data.prompts")

    @property
    def heldout(self) -> PromptData | None:
        """The prompts of the evaluations; None when the config names none."""
        return self.by_key.get("eval.prompts")

    @classmethod
    def before_weights(cls, plan: Plan) -> Self:
        """Read for the model as its files describe it. Raises everything together that speaks against prompts and stop tokens."""
        config, model = plan.config, plan.config.model
        if not prompt_sections(config) and not config.sampling.stop:
            return cls({}, UNBOUNDED_ROOM)
        if model.trust_remote_code:
            require_pinned_code(model.path, model.revision, model.tokenizer)
        path, revision = (model.tokenizer, None) if model.tokenizer else (model.path, model.revision)
        tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code, revision=revision)
        room, vocabulary = room_by_files(plan)
        return cls.read(config, tokenizer, room, vocabulary)

    @classmethod
    def read(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, room: int, vocabulary: int | None) -> Self:
        """Read with this tokenizer, for a model with this room and vocabulary; errors as `before_weights` raises them."""
        problems: list[MarlError] = []
        readings = {}
        for key, section in prompt_sections(config).items():
            try:
                readings[key] = read_prompts(section, tokenizer, room, vocabulary, asked_by=key)
                problems += readings[key].problems
            except DataError as error:
                problems.append(error)
        problems += stop_findings(config, tokenizer, vocabulary)
        if problems:
            raise problems[0] if len(problems) == 1 else together(problems, "this run can't work:")
        return cls({key: PromptData.of(reading, tokenizer) for key, reading in readings.items()}, room)

    def fit(self, config: RunConfig, room: int, vocabulary: int) -> bool:
        """Whether they would be the same, read for a model with this room and vocabulary."""
        return all(
            _limit(section, room) == _limit(section, self.room)
            and all(max(tokens) < vocabulary for tokens in self.by_key[key].tokens)
            for key, section in prompt_sections(config).items()
        )


def _limit(section: DataSection, room: int) -> int:
    return min(section.max_prompt_tokens or room, room)
