"""The same PPO with four separate models in memory, written plainly: the yardstick of question 1.

Policy, reference, reward and value each load their own copy of the weights; transformers generates, peft trains the
adapters, and the algorithm is spelled out below. Nothing of marl takes part but the reading of the config, so that the
two implementations can't share a mistake.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judging import distinct, log_likelihood
from peft import LoraConfig, get_peft_model
from quickstart_parts import vader, vader_positive
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from marl_core import load_config

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Batch:
    """Prompt ids[B, P] (left-padded) and response ids[B, T] with the numbers of the sampling policy, [B, T] and [B]."""

    prompts: list[str]
    ids: Tensor
    mask: Tensor  # [B, P + T]
    width: int  # T
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    entropy: float

    @property
    def responses(self) -> Tensor:
        """Response ids[B, T]."""
        return self.ids[:, -self.width :]


class FourModels:
    """Policy and value with LoRA on a copy of the base each, reference and reward frozen."""

    def __init__(self, base: str, reward: str, config: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.config = config
        policy, value = config.policy, config.value
        self.policy: Any = get_peft_model(load(AutoModelForCausalLM, base), lora(policy, "CAUSAL_LM"))
        self.reference: Any = load(AutoModelForCausalLM, base)
        self.reward: Any = load(AutoModelForSequenceClassification, reward, num_labels=1)
        self.reward.config.pad_token_id = self.tokenizer.pad_token_id
        self.value: Any = get_peft_model(load(AutoModel, base), lora(value, "FEATURE_EXTRACTION"))
        self.head = nn.Linear(self.value.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.roles = [trainable(self.policy), [*trainable(self.value), *self.head.parameters()]]
        rates = config.ppo.learning_rate, config.value.learning_rate or config.ppo.learning_rate
        groups = [{"params": role, "lr": rate} for role, rate in zip(self.roles, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, eps=config.ppo.adam_eps, weight_decay=config.ppo.weight_decay)

    @torch.no_grad()
    def sample(self, prompts: list[str]) -> Batch:
        """One response to each prompt, and what the four models say about it."""
        width = self.config.sampling.max_new_tokens
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = self.policy.generate(
            **encoded, do_sample=True, top_k=0, top_p=1.0, min_new_tokens=width, max_new_tokens=width,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        mask = torch.cat([encoded["attention_mask"], torch.ones(len(prompts), width, dtype=torch.int64)], dim=1)
        logprobs, entropy = self.logprobs(self.policy, ids, mask, width)
        reference, _ = self.logprobs(self.reference, ids, mask, width)
        rows = [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]
        right = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        seen = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        scores = self.reward(input_ids=right, attention_mask=seen).logits.float().squeeze(-1)
        values = self.values(ids, mask, width)
        return Batch(prompts, ids, mask, width, logprobs, reference, values, scores, float(entropy.mean()))

    def logprobs(self, model: Any, ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] of the last `width` tokens; EOS can't be sampled, so it is left out."""
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[:, -width - 1 : -1]
        logits = logits.float()
        logits[..., self.tokenizer.eos_token_id] = -1e9
        everything = logits.log_softmax(dim=-1)
        entropy = -(everything.exp() * everything).sum(dim=-1)
        return everything.gather(-1, ids[:, -width:, None]).squeeze(-1), entropy.detach()

    def values(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """Values [B, T]: of each state before its token is chosen."""
        hidden = self.value(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        found: Tensor = self.head(hidden[:, -width - 1 : -1].float()).squeeze(-1)
        return found

    def step(self, batch: Batch) -> dict[str, float]:
        """One PPO update; the numbers that marl reports under the same names."""
        ppo = self.config.ppo
        kl = batch.logprobs - batch.ref_logprobs
        rewards = -ppo.kl.coef * kl
        rewards[:, -1] += batch.scores
        advantages, returns = gae(rewards, batch.values, ppo.gamma, ppo.lam)
        advantages = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
        clipped: list[float] = []
        for _ in range(ppo.epochs):
            for rows in torch.randperm(len(batch.ids)).split(ppo.minibatch):
                ids, mask = batch.ids[rows], batch.mask[rows]
                logprobs, _ = self.logprobs(self.policy, ids, mask, batch.width)
                ratio = (logprobs - batch.logprobs[rows]).exp()
                bounded = ratio.clamp(1 - ppo.clip.low, 1 + ppo.clip.high)
                one, two = -ratio * advantages[rows], -bounded * advantages[rows]
                old, values = batch.values[rows], self.values(ids, mask, batch.width)
                near = old + (values - old).clamp(-ppo.value_clip, ppo.value_clip)
                worst = torch.maximum((values - returns[rows]).square(), (near - returns[rows]).square())
                (torch.maximum(one, two).mean() + worst.mean() / 2).backward()
                for role in self.roles:
                    nn.utils.clip_grad_norm_(role, ppo.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                clipped.append(float((two > one).float().mean()))
        return {
            "objective/scores": float(batch.scores.mean()),
            "objective/kl": float(kl.sum(dim=1).mean()),
            "objective/entropy": batch.entropy,
            "policy/clipfrac": sum(clipped) / len(clipped),
            "val/explained_var": float(1 - (returns - batch.values).var() / returns.var()),
        }

    def evaluate(self, step: int, prompts: Sequence[str], models: Mapping[str, str]) -> dict[str, Any]:
        """One response to each held-out prompt, judged as marl's runs are."""
        rows: dict[str, list[float]] = {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for start in range(0, len(prompts), self.config.ppo.batch):
                batch = self.sample(list(prompts[start : start + self.config.ppo.batch]))
                ids = batch.responses.tolist()
                texts = self.tokenizer.batch_decode(batch.responses)
                found = {
                    "reward": batch.scores.tolist(),
                    "kl": (batch.logprobs - batch.ref_logprobs).sum(dim=1).tolist(),
                    "vader": vader(batch.prompts, texts),
                    "vader_positive": vader_positive(batch.prompts, texts),
                    "distinct": distinct(ids),
                    **{name: log_likelihood(batch.prompts, ids, model) for name, model in models.items()},
                }
                for name, values in found.items():
                    rows.setdefault(name, []).extend(values)
        mean = {name: sum(values) / len(values) for name, values in rows.items()}
        judges = {name: {"mean": value} for name, value in mean.items() if name not in ("reward", "kl")}
        return {"step": step, "reward": mean["reward"], "kl": mean["kl"], "judges": judges, "samples": []}


def load(kind: Any, path: str, **options: Any) -> Any:
    """A frozen model of its own."""
    return kind.from_pretrained(path, dtype=DTYPE, **options).eval().requires_grad_(False)


def lora(part: Any, task: str) -> LoraConfig:
    """The adapter that the config asks of marl."""
    return LoraConfig(r=part.r, lora_alpha=part.alpha, target_modules=part.targets, task_type=task)


def trainable(model: Any) -> list[nn.Parameter]:
    """What the optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def positions(mask: Tensor) -> Tensor:
    """Positions that count from each row's first token."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) and the returns; every response is T tokens long."""
    advantages, following, later = torch.zeros_like(values), torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        later = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * later
        advantages[:, t], following = later, values[:, t]
    return advantages, advantages + values


def batches(prompts: list[str], size: int, seed: int) -> Iterator[list[str]]:
    """Endless batches, newly shuffled each time round."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(prompts, len(prompts))
        yield from (shuffled[start : start + size] for start in range(0, len(shuffled) - size + 1, size))


def read_prompts(path: str) -> list[str]:
    """The texts of a prompts file."""
    return [json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main(config_file: str, base: str, reward: str) -> None:
    """Train as the config says and write steps.jsonl and evals.jsonl as marl does."""
    config = load_config(Path(config_file))
    folder = Path(str(config.run.folder))
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.run.seed)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    models = FourModels(base, reward, config)
    assert config.data is not None
    judged = {name: one.options["arguments"]["model"] for name, one in config.eval.judges.items() if "logp" in name}
    heldout = read_prompts(config.eval.prompts)[: config.eval.limit] if config.eval.prompts else []
    prompts = batches(read_prompts(config.data.prompts), config.ppo.batch, config.run.seed)
    with open(folder / "steps.jsonl", "w") as steps, open(folder / "evals.jsonl", "w") as evals:
        for done in range(config.ppo.steps + 1):
            due = done == config.ppo.steps or done % (config.eval.every or config.ppo.steps) == 0
            if heldout and due:
                print(json.dumps(models.evaluate(done, heldout, judged)), file=evals, flush=True)
            if done < config.ppo.steps:
                start = time.monotonic()
                numbers = models.step(models.sample(next(prompts)))
                seconds = {"perf/seconds": time.monotonic() - start}
                print(json.dumps({"step": done + 1, **numbers, **seconds}), file=steps, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
