"""Judges of the study: how likely the SFT model and the raw base find a text, and how much texts repeat each other.

They follow TRL's reward-function convention. A policy's KL to another model than its own reference is what its log-probs
and that model's differ by on average: KL(policy || M) = E[log policy - log M], with E[log policy] = KL(policy || reference)
+ E[log reference].
"""

from collections import Counter
from functools import cache
from typing import Any

import torch

Gram = tuple[int, ...]


@torch.no_grad()
def log_likelihood(prompts: list[str], completion_ids: list[list[int]], model: str, **columns: Any) -> list[float]:
    """Log-probability in nats of each whole completion after its prompt, under `model` in bfloat16.

    End-of-sequence can't be sampled in this study (exactly as many tokens as allowed), so its mass is left out here as well;
    where a pre-flight check shows one, it counts nothing.
    """
    network, tokenizer = _load(model)
    starts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    rows = [torch.tensor([*start, *ids]) for start, ids in zip(starts, completion_ids, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.zeros_like(ids)
    for row, tokens in zip(mask, rows, strict=True):
        row[: len(tokens)] = 1
    logits = network(input_ids=ids, attention_mask=mask).logits.float()
    stops = torch.tensor(_stops(network, tokenizer))
    logits[..., stops] = -torch.inf
    found = logits.log_softmax(dim=-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    found = found.masked_fill(torch.isin(ids[:, 1:], stops), 0.0)
    return [
        float(row[len(start) - 1 : len(tokens) - 1].sum())
        for row, start, tokens in zip(found, starts, rows, strict=True)
    ]


def distinct(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Share of each completion's runs of three tokens that no other completion of the batch contains."""
    grams = [{tuple(ids[i : i + 3]) for i in range(len(ids) - 2)} for ids in completion_ids]
    counts: Counter[Gram] = Counter(gram for one in grams for gram in one)
    return [sum(counts[gram] == 1 for gram in one) / max(1, len(one)) for one in grams]


@cache
def _load(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(path)


def _stops(network: Any, tokenizer: Any) -> list[int]:
    listed = network.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None})
