"""Is LoRA's rate ten times that of full fine-tuning? marl trains no base, so the first step of all weights is made in plain torch.

The same rollout, the same advantages, the policy's loss of PPO's first minibatch (where the ratio is one), the same AdamW and
clipping; only what learns differs. A step is as large as it changes the log-probs of the rollout's tokens.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trial import read, short

from marl_core import Rollout, Runner
from marl_core.ppo.types import Advantages

RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # of full fine-tuning
TIMES = 10  # what is asked about
RANKS = (1, 16, 64)


def compare(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of first steps: full fine-tuning at some rates, of all weights and of the linear layers; LoRA at ten times each rate."""
    started = time.process_time()
    rows = []
    runner = Runner(read(dict(config) | {"eval": {}}))
    with runner.running():
        scored = runner.score(runner.generate(runner.prompts()))
        advantages = runner.advantages(scored)
    for rate in RATES:
        for way in ("all weights", "linear layers"):
            rows.append({"way": way, "rate": rate, "size": _size(runner, advantages, scored.rollout, way, None, rate)})
        for rank in RANKS:
            size = _size(runner, advantages, scored.rollout, "lora", rank, TIMES * rate)
            rows.append({"way": f"lora-{rank}", "rate": short(TIMES * rate), "size": size})
    return {"steps": rows, "cpu_seconds": round(time.process_time() - started, 1)}


def _size(runner: Runner, advantages: Advantages, rollout: Rollout, way: str, rank: int | None, rate: float) -> float:
    """Mean |change of log-prob| over the rollout's tokens by one step of a new copy of the base."""
    torch.manual_seed(0)
    config, ppo = runner.config, runner.config.ppo
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    if rank is not None:
        lora = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    elif way == "linear layers":
        only_linear(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, eps=ppo.adam_eps, weight_decay=0.0)

    before = logprobs(model, rollout)
    ratio = (before - before.detach()).exp()
    loss = -(ratio * advantages.advantages)[rollout.mask].mean()
    loss.backward()
    if ppo.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(learning, ppo.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        after = logprobs(model, rollout)
    return short(float((after - before).detach()[rollout.mask].abs().mean()))


def only_linear(model: nn.Module) -> None:
    """What a LoRA on every linear layer stands on learns, and nothing else."""
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in layers and "lm_head" not in name)


def logprobs(model: nn.Module, rollout: Rollout) -> Tensor:
    """Log-probs [B, T] float32 of a rollout's responses by the model's own forward pass, as the rollout was sampled."""
    output = model(input_ids=rollout.sequence_ids, attention_mask=rollout.sequence_mask.long())
    logits = output.logits[:, -rollout.ids.shape[1] - 1 : -1].float()
    ends = torch.zeros(logits.shape[-1], dtype=torch.bool)
    ends[list(rollout.stops)] = True
    early = torch.arange(logits.shape[1])[:, None] < rollout.min_tokens  # no end could be drawn here
    told: Tensor = logits.masked_fill(early & ends, -torch.inf).log_softmax(-1)
    return told.gather(-1, rollout.ids[..., None]).squeeze(-1)
