"""Talking to a trained policy beside the model that it started from: one base in memory, seen through one adapter or another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.room import position_limit, vocabulary_of
from marl_core.config.choice import ReferenceChoice, choice_of
from marl_core.config.prompt_template import columns_of, fill
from marl_core.config.run_config import DataSection, ModelSection, PolicySection, SamplingSection, SpeedSection
from marl_core.config.yaml_text import parse_yaml
from marl_core.data.encoding import Encoder
from marl_core.data.rendering import SYSTEM_ROLES, Rendered
from marl_core.errors import ConfigError, DataError, MarlError
from marl_core.plan.plan import Plan
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.rewards import score_all
from marl_core.ppo.roles import RewardSource
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.sampling.stop_tokens import stop_ids
from marl_core.ppo.types import Prompts, Rollout
from marl_core.registry.catalog import Catalog
from marl_core.registry.families import FAMILIES
from marl_core.registry.hooks import Hooks
from marl_core.registry.strategy import Quantization
from marl_core.run.roles import load_bank, reward_sources
from marl_core.store import checkpoint
from marl_core.store.before_weights import require_run
from marl_core.store.files import read_lines
from marl_core.store.provenance import recorded_base, require_base

Message = Mapping[str, Any]
Messages = list[Message]
POLICY, START = "policy", "start"


@dataclass(frozen=True, slots=True)
class Voice:
    """One of those that answer: the base seen through `adapter` (None: bare), and what it is in words."""

    name: str
    adapter: str | None
    about: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a voice said; `finished`: it ended by itself, before the most tokens. `score`: the run's reward, where it was asked for.

    `no_score`: why there is none although it was asked for; else empty.
    """

    text: str
    tokens: int
    finished: bool
    score: float | None = None
    no_score: str = ""


@dataclass
class Talk:
    """The voices of one base, and how they are asked: sampling, the run's way to write a prompt, whether prompts are chats."""

    bank: AdapterBank
    voices: tuple[Voice, ...]
    sampling: SamplingSection
    data: DataSection | None = None
    """How the run wrote its prompts; None for an adapter of which nothing is known."""
    chats: bool | None = None
    """Whether the run's prompts were chats; None where that isn't known."""
    sources: Sequence[RewardSource] = field(default_factory=tuple)
    """What scores answers; nothing unless `score_by` was called."""

    @classmethod
    def of_run(
        cls, folder: Path, step: int | None = None, device: str | None = None, catalog: Catalog | None = None
    ) -> Talk:
        """The policy of a run, as its newest whole checkpoint has it or that of `step`, beside what it started from.

        `device`: where the base lives; as in the run when absent, or anywhere when the run's device isn't the CPU.
        ConfigError for a config that names what isn't installed, DataError for a folder without a run or weights, and for a base
        that isn't the run's any more.
        """
        written = _written(folder)
        model, part = ModelSection.model_validate(written["model"]), PolicySection.model_validate(written["policy"])
        weights, about = _weights(folder, step)
        recorded = recorded_base(folder, "chat")
        prepared, catalog = str(recorded["prepared_by"]), catalog or Catalog.installed()
        device = device or ("cpu" if (written.get("run") or {}).get("device") == "cpu" else "auto")
        bank = _bank(written, model.model_copy(update={"shard": "none"}), device, prepared, catalog)
        require_base(recorded, bank.fingerprint, "chat")
        start = None
        if part.start == "continue":
            start = START
            bank.load(
                START, part.source or "", asked_by="policy.from", revision=part.revision, subfolder=part.subfolder
            )
        checkpoint.load_policy(weights, bank, POLICY)
        data = DataSection.model_validate(written["data"]) if written.get("data") else None
        merged = f", prepared by {prepared.partition(' ')[0]}" if prepared else ""
        before = Voice("base", None, f"{model.path}{merged}, before training")
        if start is not None:
            before = Voice("start", start, f"the adapter {part.source}, before training")
        voices = (before, Voice("policy", POLICY, about))
        sampling = SamplingSection.model_validate(written.get("sampling") or {})
        return cls(bank, voices, sampling, data, _asked_in_chats(folder, data))

    @classmethod
    def of_adapter(
        cls, adapter: str, model: str, *, dtype: str = "float32", revision: str | None = None, device: str = "auto"
    ) -> Talk:
        """An adapter beside its base, on nothing but their files. DataError when the adapter was trained on another base."""
        bank = AdapterBank.from_pretrained(model, dtype=dtype, revision=revision, device=device)
        bank.load(POLICY, adapter, asked_by="chat")
        voices = (Voice("base", None, model), Voice("policy", POLICY, f"the adapter {adapter}"))
        return cls(bank, voices, SamplingSection(max_new_tokens=128))

    def score_by(self, plan: Plan) -> None:
        """Score answers by the rewards of this plan. Raises as the rewards do when they are loaded."""
        self.sources = reward_sources(plan, self.bank, plan.rewards)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer can write a chat."""
        return getattr(self.bank.tokenizer, "chat_template", None) is not None

    def prompt(self, text: str) -> str:
        """A typed text as the run's own prompts are written: in its template, where that has one column."""
        template = None if self.data is None else self.data.prompt_template
        columns = [] if template is None else sorted(set(columns_of(template)))
        return text if template is None or len(columns) != 1 else fill(template, {columns[0]: text})

    def opened(self, system: str | None = None) -> Messages:
        """The beginning of a chat: the system message given, else the run's own, else none."""
        content = system if system is not None or self.data is None else self.data.system_prompt
        return [{"role": SYSTEM_ROLES[0], "content": content}] if content else []

    def answer(self, voice: Voice, prompt: str | Messages, seed: int) -> Answer:
        """What `voice` says to a text or chat. The same seed draws the same random numbers for each voice.

        DataError when the prompt is empty, leaves no room for an answer or can't be written by the chat template. What a reward can't
        score is answered all the same, and `no_score` says why.
        """
        bank = self.bank
        texts = (prompt,) if isinstance(prompt, str) else tuple(str(message["content"]) for message in prompt)
        options = {} if self.data is None or isinstance(prompt, str) else self.data.chat_template_kwargs
        ids = Encoder(bank.tokenizer).tokens(Rendered(prompt, texts, options=options), False, "this chat")
        if not ids:
            raise DataError("chat: the prompt is empty. Write something.")
        room = position_limit(bank.base)
        if room is not None and len(ids) + self.sampling.max_new_tokens > room:
            raise DataError(
                f"chat: {len(ids)} tokens and an answer of {self.sampling.max_new_tokens} don't fit into the model's {room} positions. "
                "Begin anew (/reset), or ask for a shorter answer (--max-tokens)."
            )
        stops = stop_ids(
            bank.tokenizer, self.sampling, bank.base.generation_config.eos_token_id, vocabulary_of(bank.base)
        )
        sampler = PolicySampler(bank, voice.adapter, self.sampling, tuple(stops), SpeedSection(capture=False))
        rollout = sampler(Prompts.of([ids], bank.tokenizer.pad_token_id, [{}], [prompt]), seed)
        score, no_score = self._scored(rollout)
        return Answer(rollout.texts[0], int(rollout.lengths[0]), bool(rollout.finished[0]), score, no_score)

    def _scored(self, rollout: Rollout) -> tuple[float | None, str]:
        """The rewards' sum for one response, where it was asked for; or why there is none."""
        if not self.sources:
            return None, ""
        try:
            return float(score_all(self.bank, self.sources, rollout, PassLimits(1)).total[0]), ""
        except MarlError as error:
            columns = _missing_columns(error)
            if not columns:
                hint = " A chat has no columns of the data." if isinstance(error.__cause__, KeyError) else ""
                return None, f"{error}{hint}"
            who = next((source.who for source in self.sources if source.who in str(error)), "the reward")
            names = f"column{'s' if len(columns) > 1 else ''} {', '.join(map(repr, columns))}"
            return None, f"{who} needs the {names}, which a chat doesn't have"

    def with_sampling(self, **changes: Any) -> Talk:
        """The same with other sampling; None leaves a setting as it is, temperature 0 takes the likeliest token. ConfigError otherwise."""
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("temperature") == 0:
            given |= {"temperature": 1.0, "top_k": 1}
        written = {**self.sampling.model_dump(), **given}
        written["min_new_tokens"] = min(written["min_new_tokens"], written["max_new_tokens"])
        try:
            return replace(self, sampling=SamplingSection.model_validate(written))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"chat: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def _missing_columns(error: MarlError) -> list[str]:
    """The columns of the data that a reward's function takes as arguments and wasn't given."""
    cause = error.__cause__
    missing = re.search(r"missing \d+ required [a-z-]+ arguments?: (.*)$", str(cause), re.MULTILINE)
    return re.findall(r"'(\w+)'", missing[1]) if isinstance(cause, TypeError) and missing is not None else []


def _written(folder: Path) -> Mapping[str, Any]:
    file = require_run(folder, "chat")
    written = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(written, Mapping) or not isinstance(written.get("model"), Mapping):
        raise DataError(f"chat: {file} is damaged. Restore it.")
    return {**written, "policy": written.get("policy") or {}}


def _weights(folder: Path, step: int | None) -> tuple[Path, str]:
    """The folder of the policy's adapter, and what it is in words. DataError when there is none."""
    checkpoints = folder / "checkpoints"
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(checkpoints)]
    if step is not None and step not in steps:
        there = f"the checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
        raise DataError(
            f"chat: {folder} has no checkpoint of step {step}; it has {there}. Leave --step out for the newest."
        )
    final = folder / "final" / "policy"
    if step is None and not steps:
        if not final.is_dir():
            raise DataError(
                f"chat: {folder} has no checkpoint and no final adapter yet. Wait for the first, or let the run end."
            )
        return final, "the policy as the run left it"
    if step is None:
        newest, _ = checkpoint.newest(checkpoints)
        return newest / "policy", f"the policy after step {checkpoint.step_of(newest)}"
    asked = checkpoints / checkpoint.name_of(step)
    damage = checkpoint.damage(asked)
    if damage is not None:
        raise DataError(f"chat: {asked} is damaged ({damage}). Take another one: {', '.join(map(str, steps))}.")
    return asked / "policy", f"the policy after step {step}"


def _bank(written: Mapping[str, Any], model: ModelSection, device: str, prepared: str, catalog: Catalog) -> AdapterBank:
    """The run's base: its quantization, and what its reference did to the base before anything else was built on it."""
    quantization = Quantization()
    if written.get("quantization"):
        choice = choice_of(FAMILIES["quantization"]).model_validate(
            _named(written["quantization"], "quantization", catalog)
        )
        strategy = choice.resolve(catalog)
        quantization = Hooks([(strategy, choice.origin)]).quantization(strategy, model.dtype)
    if not prepared:
        return load_bank(model, device, quantization, None, "")
    reference = ReferenceChoice.model_validate(_named(written["reference"], "reference", catalog))
    preparing = reference.resolve(catalog)
    hooks = Hooks([(preparing, reference.origin)])
    return load_bank(model, device, quantization, lambda base: hooks.prepare_base(preparing, base), prepared)


def _named(written: Any, family: str, catalog: Catalog) -> Any:
    """A choice as a file may name it: an object of a Python program by the name that its class is installed under."""
    use = written.get("use") if isinstance(written, Mapping) else None
    if not isinstance(use, str) or ":" not in use:
        return written
    listing = next((listing for listing in catalog.listings(FAMILIES[family].name) if listing.target == use), None)
    if listing is None:
        raise ConfigError(
            f"chat: this run's {family} was an object of a Python program ({use}), which isn't installed under a name, so its base "
            f"can't be made again here. Merge it (`marl merge`), or talk to the adapter alone: marl chat ADAPTER --model BASE."
        )
    return {**written, "use": listing.qualified_name}


def _asked_in_chats(folder: Path, data: DataSection | None) -> bool | None:
    """Whether the run's prompts were chats, by its config or else by what it sampled."""
    if data is None:
        return None
    if data.chat or data.system_prompt is not None:
        return True
    line = next(read_lines(folder / "samples.jsonl"), None)
    return None if line is None else isinstance(line.get("prompt"), list)
