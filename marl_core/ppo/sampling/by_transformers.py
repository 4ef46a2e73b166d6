"""The plain way to sample: transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from marl_core.bank.adapters import AdapterBank
from marl_core.config.run_config import SamplingSection
from marl_core.ppo.progress import advance
from marl_core.ppo.sampling.stop_strings import Criterion, StopStrings
from marl_core.ppo.sampling.stop_tokens import response_mask
from marl_core.ppo.texts import ResponseDecoder
from marl_core.ppo.types import Prompts


def generate(
    bank: AdapterBank,
    prompts: Prompts,
    sampling: SamplingSection,
    stops: Sequence[int],
    seed: int | None,
    *,
    pad: int,
    longest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one response to each prompt through the active adapter: ids [B, T] int64, mask [B, T] bool, finished [B] bool.

    longest [B] int64: most tokens of each row; what `generate` writes beyond it is cut off. The global random state is left as it
    was when a seed is given.
    """
    max_new_tokens = int(longest.max())
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(sampling.min_new_tokens, max_new_tokens) or None,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=list(stops),
        pad_token_id=pad,
        bos_token_id=bank.tokenizer.bos_token_id,
        use_cache=True,
    )
    strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
    criterion = None
    if strings is not None:
        criterion = Criterion(strings, prompts.ids.shape[1], ResponseDecoder.of(bank.tokenizer, prompts))
    tells = _TellsProgress(prompts.ids.shape[1], max_new_tokens)
    with torch.random.fork_rng(devices=[bank.device] if bank.device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        sample: Any = bank.trunk.model.generate
        sequences: Tensor = sample(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([tells, *([criterion] if criterion is not None else [])]),
            synced_gpus=bank.trunk.sharded,  # a pass through sharded layers needs every rank, finished or not
        )
    ids = sequences[:, prompts.ids.shape[1] :]
    mask, finished = response_mask(ids, stops)
    positions = torch.arange(ids.shape[1], device=ids.device)
    if criterion is not None and criterion.lengths is not None:
        met = (criterion.lengths > 0) & (criterion.lengths <= mask.sum(dim=1))
        mask, finished = mask & (~met[:, None] | (positions < criterion.lengths[:, None])), finished | met
    longest = longest.to(ids.device)
    finished &= mask.sum(dim=1) <= longest
    mask = mask & (positions < longest[:, None])
    width = int(mask.any(dim=0).sum())
    advance(max_new_tokens, max_new_tokens)
    return ids[:, :width], mask[:, :width], finished


class _TellsProgress:
    """Stops nothing: `generate` asks it after each token, so it can tell how many there are."""

    def __init__(self, prompt_length: int, most: int) -> None:
        self._prompt_length, self._most = prompt_length, most
        advance(0, most)

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        advance(input_ids.shape[1] - self._prompt_length, self._most)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
