"""What is asked of every model in the zoo; each check compares marl with the judge and says how far it is off."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import zoo_judge as judge
from torch import Tensor
from zoo_models import VOCABULARY, Entry, small_config

from marl_core import AdapterBank, MarlError, Prompts, Rollout, RunConfig, Runner, merge_adapter, response_logprobs
from marl_core.bank.trunk import PassOptions
from marl_core.ppo.scoring import forward
from marl_core.testing import tiny_tokenizer

EOS = 2
LOGPROB = 3e-5
"""Most that log-probs may differ, in nats; ten times the noise of float32 where that is more."""
GRADIENT = 1e-4
"""Most that a gradient may differ, relative to its norm, or to a thousandth of the whole gradient's."""

WIDE = {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 128,
    "n_inner": 128,
    "moe_intermediate_size": 64,
    "head_dim": 16,
}
"""Sizes that 4-bit layers take: divisible by 64."""


class Wrong(AssertionError):
    """marl gives another number than the judge."""


class NotAsked(Exception):
    """The check means nothing for this model; the reason."""


@dataclass
class Subject:
    """A model folder in the zoo, what the judge says of it, and marl's bank on it."""

    entry: Entry
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The model folder."""
        return str(self.folder / "base")

    @cached_property
    def rows(self) -> list[judge.Row]:
        """The rows that are scored."""
        return judge.rows(VOCABULARY)

    @cached_property
    def plain(self) -> Any:
        """The judge's model."""
        return judge.causal(self.base)

    @cached_property
    def allowed(self) -> float:
        """Most that log-probs may differ."""
        return max(LOGPROB, 10 * judge.noise(judge.causal(self.base), self.rows))

    @cached_property
    def bank(self) -> AdapterBank:
        """marl's bank, with a policy of weights far from zero on marl's default targets."""
        bank = AdapterBank.from_pretrained(self.base, device="cpu")
        self.facts |= {"class": type(bank.base).__name__}
        return bank

    @cached_property
    def config(self) -> RunConfig:
        """A run of one step."""
        (self.folder / "rewards.py").write_text(
            "def odd(completion_ids, **columns):\n    return [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids]\n"
        )
        texts = ["A good", "It was a film", "I", "Bad", "What a", "The cast was"]
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return self.changed()

    def changed(self, **changes: Any) -> RunConfig:
        """The run with other sections."""
        sections: dict[str, Any] = {
            "model": {"path": self.base, "dtype": "float32"},
            "policy": {"r": 2, "alpha": 4.0},
            "reference": "disabled-adapter",
            "reward": {"use": "function", "target": f"{self.folder}/rewards.py:odd"},
            "value": "policy",
            "data": {"prompts": f"{self.folder}/prompts.jsonl"},
            "sampling": {"max_new_tokens": 7, "min_new_tokens": 3},
            "ppo": {"steps": 1, "batch": 4, "minibatch": 2, "epochs": 1, "learning_rate": 1e-2},
            "run": {"device": "cpu", "seed": 0},
        }
        for name, change in changes.items():
            sections[name] = {**sections[name], **change} if name in sections else change
        return RunConfig(**sections)

    @cached_property
    def runner(self) -> Runner:
        """A run with marl's own sampling; its policy is far from the base."""
        with torch.enable_grad():
            runner = Runner(self.config)
            self.facts["idle"] = scatter(runner.bank, rollout_of(self.rows, runner.bank))
        return runner

    @cached_property
    def adapter(self) -> str:
        """The policy as marl saves it."""
        self.runner.bank.save("policy", self.folder / "policy")
        return str(self.folder / "policy")

    @cached_property
    def adapted(self) -> Any:
        """The judge's model with the policy, as peft alone loads it."""
        return judge.adapted(self.base, self.adapter)

    @cached_property
    def rollout(self) -> Rollout:
        """The rows as marl takes them."""
        return rollout_of(self.rows, self.runner.bank)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """marl's gradient of the mean log-prob with respect to the policy."""
        return gradients(self.runner.bank, self.rollout)


def rollout_of(rows: Sequence[judge.Row], bank: AdapterBank) -> Rollout:
    """Rows as marl takes them."""
    prompts = Prompts.of([prompt for prompt, _ in rows], 0)
    return Rollout.from_responses(prompts, [response for _, response in rows], bank.tokenizer, [])


def scatter(bank: AdapterBank, rollout: Rollout) -> int:
    """Weights far from zero wherever the policy learns; how many of its tensors never do, and stay at their start."""
    parameters = bank.parameters("policy")
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    idle = [name for name, gradient in _gradients(bank, rollout).items() if gradient is None]
    with torch.no_grad():
        for name in idle:
            parameters[name].copy_(start[name])
    return len(idle)


def _gradients(bank: AdapterBank, rollout: Rollout) -> dict[str, Tensor | None]:
    """Gradient of the mean log-prob of the rollout's tokens with respect to the policy."""
    parameters = bank.parameters("policy")
    with bank.using("policy", train=True):
        loss = forward(bank, rollout, 1.0).logprobs[rollout.mask].mean()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def gradients(bank: AdapterBank, rollout: Rollout) -> dict[str, Tensor]:
    """The same by the names that peft gives the tensors, zeros where there is none."""
    parameters = bank.parameters("policy")
    found = _gradients(bank, rollout)
    return {plain_name(name, "policy"): zeros(gradient, parameters[name]) for name, gradient in found.items()}


def plain_name(name: str, adapter: str) -> str:
    """A parameter's name without peft's wrapper and the adapter's name."""
    return name.removeprefix("base_model.model.").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")


def zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient that is none as zeros."""
    return torch.zeros_like(parameter) if gradient is None else gradient


def close(found: Tensor, wanted: Tensor, allowed: float, what: str) -> float:
    """The largest difference; Wrong when it is above `allowed` or not a number."""
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {list(found.shape)} instead of {list(wanted.shape)}")
    gap = float((found - wanted).abs().max())
    if not gap <= allowed:
        raise Wrong(f"{what} differ by {gap:.2g}, allowed {allowed:.1g}")
    return gap


def close_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float, what: str) -> float:
    """The largest relative difference of one tensor."""
    if set(found) != set(wanted):
        raise Wrong(f"{what}: other tensors: {sorted(set(found) ^ set(wanted))[:3]}")
    whole = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    if not whole > 0:
        raise Wrong(f"{what}: the judge's gradient is {whole}")
    worst = 0.0
    for name, gradient in wanted.items():
        gap = float((found[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * whole)
        if not gap <= allowed:
            raise Wrong(f"{what}: {name} differs by {gap:.2g} of its norm, allowed {allowed:g}")
        worst = max(worst, gap)
    return worst


# -- the checks ---------------------------------------------------------------------------------------------------


def opened(subject: Subject) -> float:
    """marl loads the folder."""
    return 0.0 * subject.bank.trunk.hidden_size


def ready(subject: Subject) -> float:
    """marl builds a run with a new policy on its default targets."""
    return 0.0 * subject.runner.done


@torch.no_grad()
def causality(subject: Subject) -> float:
    """What comes later changes nothing before it, in the judge itself: without that no model can be sampled."""
    worst = 0.0
    for prompt, response in subject.rows:
        row = prompt + response
        whole = subject.plain(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        for length in (2, len(row) // 2, len(row) - 1):
            part = subject.plain(input_ids=torch.tensor([row[:length]]), use_cache=False).logits[0].log_softmax(-1)
            worst = max(worst, float((part - whole[:length]).abs().max()))
    subject.facts["causal"] = worst <= subject.allowed
    if not subject.facts["causal"]:
        raise NotAsked(f"the model itself sees later tokens: log-probs move by {worst:.2g}")
    return worst


def padded(subject: Subject) -> float:
    """Log-probs of padded rows on the bare base."""
    return _scored(subject, subject.rows, pack=False)


def packed(subject: Subject) -> float:
    """The same with packing on."""
    fault = subject.bank.trunk.packing_fault
    short = [(prompt[:5], response[:4]) for prompt, response in subject.rows]  # within every window
    worst = max(_scored(subject, subject.rows, pack=True), _scored(subject, short, pack=True))
    if fault is not None:
        raise NotAsked(fault)
    return worst


@torch.no_grad()
def _scored(subject: Subject, rows: Sequence[judge.Row], pack: bool) -> float:
    bank = subject.bank
    with bank.trunk.passing(PassOptions(pack=pack)):
        found = response_logprobs(bank, rollout_of(rows, bank))
    worst = 0.0
    for index, row in enumerate(rows):
        wanted = judge.logprobs(subject.plain, row)
        worst = max(worst, close(found[index][: len(row[1])], wanted, subject.allowed, f"log-probs of row {index + 1}"))
    return worst


def bare(subject: Subject) -> float:
    """The base seen without the policy is still the model that the folder holds: the reference is what it says."""
    found = response_logprobs(subject.runner.bank, subject.rollout)
    worst = 0.0
    for index, row in enumerate(subject.rows):
        wanted = judge.logprobs(subject.plain, row).detach()
        gap = close(found[index][: len(row[1])], wanted, subject.allowed, f"log-probs of row {index + 1}, adapters off")
        worst = max(worst, gap)
    return worst


def saved(subject: Subject) -> float:
    """The policy saved by marl and loaded by peft alone gives the same log-probs, and every tensor has its place."""
    found = response_logprobs(subject.runner.bank, subject.rollout, adapter="policy")
    worst = 0.0
    for index, row in enumerate(subject.rows):
        wanted = judge.logprobs(subject.adapted, row).detach()
        gap = close(
            found[index][: len(row[1])], wanted, subject.allowed, f"log-probs of row {index + 1} through the policy"
        )
        worst = max(worst, gap)
    return worst


def quantized(subject: Subject) -> float:
    """A wider twin in 4 bits: log-probs against transformers' own 4-bit model, and a step that leaves the base as it is."""
    if not subject.entry.four_bit:
        raise NotAsked("not tried")
    _ = subject.config
    base = subject.folder / "wide"
    judge.write_model(small_config(subject.entry, WIDE), base)
    tiny_tokenizer().save_pretrained(base)
    packed = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with torch.no_grad():
        model = judge.causal(base, quantization_config=packed)
        for module in model.modules():  # a kernel of some CPUs that rounds to bfloat16
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        wanted = [judge.logprobs(model, row) for row in subject.rows]
    changes = {"model": {"path": str(base)}, "quantization": {"use": "bnb-4bit"}}
    runner = Runner(subject.changed(**changes))
    found = response_logprobs(runner.bank, rollout_of(subject.rows, runner.bank))
    worst = 0.0
    for index, row in enumerate(subject.rows):
        gap = close(
            found[index][: len(row[1])], wanted[index], 3 * subject.allowed, f"log-probs of row {index + 1} in 4 bits"
        )
        worst = max(worst, gap)
    one_step(runner, 10 * subject.allowed)
    return worst


def gradient(subject: Subject) -> float:
    """The policy's gradient against peft's, row by row, without padding."""
    model = judge.adapted(subject.base, subject.adapter, trainable=True)
    tokens = sum(len(response) for _, response in subject.rows)
    for row in subject.rows:
        (judge.logprobs(model, row).sum() / tokens).backward()
    wanted = {plain_name(n, "default"): zeros(p.grad, p) for n, p in model.named_parameters() if p.requires_grad}
    return close_gradients(subject.gradients, wanted, GRADIENT, "gradient")


def sampled(subject: Subject) -> float:
    """As a run samples by default: captured log-probs are the judge's, and the likeliest tokens are the judge's likeliest."""
    worst = _sampled(subject, "marl")
    subject.facts["sampler"] = subject.runner.bank.trunk.sampler("marl")
    return worst


def sampled_by_transformers(subject: Subject) -> float:
    """The same by transformers' own generate."""
    return _sampled(subject, "transformers")


def _sampled(subject: Subject, how: str) -> float:
    runner, worst = subject.runner, 0.0
    step, config = runner.algorithm, runner.config
    assert runner.data is not None
    for top_k in (1, 0):
        sampler: Any = step.sampler
        changed = replace(
            sampler,
            sampling=config.sampling.model_copy(update={"top_k": top_k}),
            speed=config.speed.model_copy(update={"decode": how}),
        )
        runner.algorithm = replace(step, sampler=changed)
        try:
            rollout = runner.generate(runner.data.take([0, 1, 2, 3, 4, 5]))
        finally:
            runner.algorithm = step
        worst = max(worst, _judged(subject, rollout, likeliest=top_k == 1))
    return worst


@torch.no_grad()
def _judged(subject: Subject, rollout: Rollout, likeliest: bool) -> float:
    worst = 0.0
    for index in range(len(rollout)):
        response = rollout.ids[index][rollout.mask[index]].tolist()
        prompt = rollout.prompts.ids[index][rollout.prompts.mask[index]].tolist()
        if EOS in response[:-1] or (len(response) < 7) != bool(rollout.finished[index] and len(response) < 7):
            raise Wrong(f"row {index + 1}: the mask is wrong: {response}, finished {bool(rollout.finished[index])}")
        if EOS in response[: rollout.min_tokens]:
            raise Wrong(f"row {index + 1} stops before {rollout.min_tokens} tokens")
        table = judge.alone(subject.adapted, (prompt, response), rollout.stops, rollout.min_tokens)
        wanted = table.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        if likeliest:
            gap = float((table.amax(-1) - wanted).max())
            if not gap <= subject.allowed:
                raise Wrong(
                    f"row {index + 1}: a token that was taken as the likeliest is {gap:.2g} nats below the judge's"
                )
        if rollout.behavior is not None:
            seen = rollout.behavior.logprobs[index][rollout.mask[index]]
            worst = max(worst, close(seen, wanted, subject.allowed, f"log-probs seen in sampling row {index + 1}"))
    return worst


def reward(subject: Subject) -> float:
    """A SEQ_CLS adapter that peft wrote, padded on either side with a tokenizer's own mask, against each row alone."""
    kinds: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(transformers.AutoConfig.from_pretrained(subject.base)) not in kinds:
        raise NotAsked("transformers has no classifier of this model")
    model = classifier(subject)
    bank = subject.bank
    view = bank.load_reward(subject.folder / "reward")
    rows = [prompt + response for prompt, response in subject.rows]
    with torch.no_grad():
        wanted = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    worst = 0.0
    for pack in (False, True):
        for side in ("left", "right"):
            bank.tokenizer.padding_side = side
            ready: Any = bank.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            mask = ready["attention_mask"]
            bank.tokenizer.padding_side = "left"
            with bank.trunk.passing(PassOptions(pack=pack)):
                found = bank.compute_reward_score(input_ids=ready["input_ids"], attention_mask=mask, reward=view)
            worst = max(worst, close(found, wanted, 3 * subject.allowed, f"rewards, padded {side}, pack {pack}"))
    return worst


def classifier(subject: Subject) -> Any:
    """A reward model as TRL would train it: written as an adapter, and itself."""
    try:
        kind: Any = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(subject.base, num_labels=1, dtype=torch.float32)
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = 0
        options = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_modules="all-linear")
        wrapped: Any = peft.get_peft_model(model, options).eval()
        with torch.no_grad():
            wrapped(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception as error:
        raise NotAsked(f"peft alone can't make one: {said(error)}") from error
    wrapped.save_pretrained(subject.folder / "reward")
    tiny_tokenizer().save_pretrained(subject.folder / "reward")
    return wrapped


@torch.no_grad()
def merged(subject: Subject) -> float:
    """The policy merged into the base, written, and loaded by transformers alone."""
    out = subject.folder / "merged"
    merge_adapter(subject.base, subject.adapter, out)
    model, worst = judge.causal(out), 0.0
    for index, row in enumerate(subject.rows):
        wanted = judge.logprobs(subject.adapted, row)
        allowed = 3 * subject.allowed  # other roundings: base and adapter are one matrix now
        worst = max(worst, close(judge.logprobs(model, row), wanted, allowed, f"log-probs of row {index + 1} merged"))
    return worst


def checkpointed(subject: Subject) -> float:
    """Gradient checkpointing changes no gradient, and train mode draws no noise."""
    _ = subject.config
    runner = Runner(subject.changed(model={"gradient_checkpointing": True}))
    scatter(runner.bank, subject.rollout)
    with runner.bank.trunk.passing(PassOptions(recompute=True)):
        with torch.no_grad(), runner.bank.using("policy", train=True):
            first, second = (forward(runner.bank, subject.rollout, 1.0).logprobs for _ in range(2))
        close(first, second, 0.0, "two passes in train mode")
        found = gradients(runner.bank, subject.rollout)
    return close_gradients(found, subject.gradients, GRADIENT, "with checkpointing, gradient")


def stepped(subject: Subject) -> float:
    """One step of PPO with everything on: finite, reference and policy one at the start, the base unchanged."""
    _ = subject.config
    return one_step(Runner(subject.config), 10 * subject.allowed)


def one_step(runner: Runner, allowed: float) -> float:
    """The error of the first minibatch's ratio."""
    before = {name: tensor.clone() for name, tensor in runner.bank.base.state_dict().items() if ".lora_" not in name}
    (stats,) = list(runner.steps())
    wrong = [name for name, value in stats.metrics.items() if not math.isfinite(value)]
    if wrong:
        raise Wrong(f"metrics that aren't finite: {wrong[:3]}")
    start = {check.name: check for check in runner.prepare().checks}["reference"].numbers["max_difference"]
    if start != 0.0:
        raise Wrong(f"policy and reference differ by {start:.2g} nats before the first update, not by 0")
    after = runner.bank.base.state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    if moved:
        raise Wrong(f"the base moved: {moved[:3]}")
    error = next(value for name, value in stats.metrics.items() if "first" in name and "ratio" in name)
    if not error <= allowed:
        raise Wrong(f"the first minibatch's ratio is off by {error:.2g}")
    return error


ON_THE_BANK: dict[str, Callable[[Subject], float]] = {
    "causal": causality,
    "padded": padded,
    "packed": packed,
    "reward adapter": reward,
}
"""What needs no run."""
IN_A_RUN: dict[str, Callable[[Subject], float]] = {
    "bare": bare,
    "saved": saved,
    "gradient": gradient,
    "sampling": sampled,
    "sampling by transformers": sampled_by_transformers,
    "merge": merged,
    "checkpointing": checkpointed,
    "step": stepped,
    "4 bits": quantized,
}
"""What needs a policy on marl's default targets."""


def said(error: BaseException) -> str:
    """An error's first words in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def measure(entry: Entry, folder: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Every check of one model: its facts, and by check a verdict (right, refused, wrong, none) with what was said."""
    subject = Subject(entry, folder)
    with judge.quiet():
        subject.facts["class"] = judge.write_model(small_config(entry), folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        found: dict[str, Any] = {"load": _try(opened, subject)}
        if found["load"]["verdict"] == "right":
            found |= {
                name: _try(check, subject) for name, check in ON_THE_BANK.items() if name in (only or ON_THE_BANK)
            }
            found["run"] = _try(ready, subject)
        if found.get("run", {}).get("verdict") == "right":
            found |= {name: _try(check, subject) for name, check in IN_A_RUN.items() if name in (only or IN_A_RUN)}
    for one in found.values():
        one["said"] = one.get("said", "").replace(str(folder), "FOLDER")
    return {"type": entry.model_type, **subject.facts, "checks": found}


def _try(check: Callable[[Subject], float], subject: Subject) -> dict[str, Any]:
    try:
        return {"verdict": "right", "off": float(f"{check(subject):.0e}")}
    except NotAsked as error:
        return {"verdict": "none", "said": str(error)}
    except MarlError as error:
        return {"verdict": "refused", "said": said(error)}
    except Wrong as error:
        return {"verdict": "wrong", "said": str(error)}
    except Exception as error:
        return {"verdict": "wrong", "said": said(error), "where": where(error)}


def where(error: BaseException) -> str:
    """The last line of marl's own that was running."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "marl_core" in f.filename or "peft" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name}"
