"""Sampling responses from the policy, and cutting them at the stop token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.fold import folded
from marl_core.config.run_config import SamplingPart, SpeedPart
from marl_core.errors import ConfigError
from marl_core.ppo.captured import Behavior, Captured
from marl_core.ppo.decode import decode
from marl_core.ppo.stop_strings import Criterion, StopStrings
from marl_core.ppo.types import Prompts, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, sampling: SamplingPart, model_eos: int | Sequence[int] | None
) -> list[int]:
    """All tokens that end a response: the tokenizer's EOS, the model's own list, and `sampling.stop`."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    ids |= (
        set(model_eos) if isinstance(model_eos, list | tuple) else set() if model_eos is None else {int(str(model_eos))}
    )
    for text in sampling.stop:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ConfigError(
                f"sampling.stop: {text!r} is {len(tokens)} tokens for this tokenizer, a stop must be a single token. "
                "Text of several tokens goes into sampling.stop_strings."
            )
        ids.add(tokens[0])
    if not ids:
        raise ConfigError("sampling: this tokenizer has no EOS token; name one in sampling.stop.")
    return sorted(ids)


def response_mask(ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask [B, T], true up to and including the first stop token, and finished [B]: whether there was one."""
    is_stop = torch.isin(ids, torch.tensor(list(stops), device=ids.device))
    before = is_stop.int().cumsum(dim=1) - is_stop.int()
    return before == 0, is_stop.any(dim=1)


@torch.no_grad()
def generate(
    bank: AdapterBank,
    adapter: str | None,
    prompts: Prompts,
    sampling: SamplingPart,
    stops: Sequence[int],
    seed: int | None = None,
    *,
    limits: Tensor | None = None,
    samples: int = 1,
    speed: SpeedPart | None = None,
    value_head: str | None = None,
    first: int = 0,
    whole: int | None = None,
) -> Rollout:
    """Sample one response to each prompt through `adapter`; with a `seed`, from it alone.

    Prompts come `samples` times in a row each; `limits` [B] are the most tokens of each row. The rollout also carries
    the log-probs (and the values of `value_head`) seen in sampling where they are exact enough for the update. The global
    random state is left as it was when a seed is given. Prompts that are a part of a batch of `whole` rows, from row
    `first` on, draw the numbers that they would draw in it.
    """
    prompts = prompts.to(bank.device).with_texts(bank.tokenizer)
    speed = speed or SpeedPart()
    if speed.decode == "transformers" or not bank.trunk.plain_head or bank.trunk.stateful or bank.trunk.sharded:
        return _by_transformers(bank, adapter, prompts, sampling, stops, None if seed is None else seed + first, limits)
    random = None if seed is None else torch.Generator().manual_seed(seed)
    uniforms = torch.rand(whole or len(prompts), sampling.max_new_tokens, generator=random, dtype=torch.float64)
    uniforms = uniforms[first : first + len(prompts)]
    with ExitStack() as opened:
        opened.enter_context(bank.using(adapter))
        opened.enter_context(bank.trunk.generating())
        if speed.fold:
            opened.enter_context(folded(bank, adapter))
        found = decode(
            bank,
            prompts,
            sampling,
            stops,
            uniforms.to(bank.device),
            limits=limits,
            samples=samples,
            value_head=value_head,
        )
    captured = None
    if speed.capture and bank.base.dtype == torch.float32 and bank.quantization.config is None:  # else not exact enough
        behavior = Behavior.of(bank, adapter, value_head, sampling.temperature)
        captured = Captured(found.logprobs, found.entropy, found.values, behavior)
    return _rollout(bank, prompts, sampling, stops, found.ids, found.mask, found.finished, captured)


def _by_transformers(
    bank: AdapterBank,
    adapter: str | None,
    prompts: Prompts,
    sampling: SamplingPart,
    stops: Sequence[int],
    seed: int | None,
    limits: Tensor | None,
) -> Rollout:
    """The plain path: transformers' own `generate`."""
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        eos_token_id=list(stops),
        pad_token_id=_pad(bank, stops),
        bos_token_id=bank.tokenizer.bos_token_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[bank.device] if bank.device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
        criterion = None if strings is None else Criterion(strings, prompts.ids.shape[1])
        with bank.using(adapter), bank.trunk.generating() as model:
            sample: Any = model.generate
            whole: Tensor = sample(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([criterion] if criterion is not None else []),
                synced_gpus=bank.trunk.sharded,  # a pass through sharded layers needs every rank, finished or not
            )
    ids = whole[:, prompts.ids.shape[1] :]
    mask, finished = response_mask(ids, stops)
    places = torch.arange(ids.shape[1], device=ids.device)
    if criterion is not None and criterion.lengths is not None:
        met = (criterion.lengths > 0) & (criterion.lengths <= mask.sum(dim=1))
        mask, finished = mask & (~met[:, None] | (places < criterion.lengths[:, None])), finished | met
    if limits is not None:
        finished &= mask.sum(dim=1) <= limits.to(ids.device)
        mask = mask & (places < limits[:, None].to(ids.device))
    width = int(mask.any(dim=0).sum())
    return _rollout(bank, prompts, sampling, stops, ids[:, :width], mask[:, :width], finished, None)


def _rollout(
    bank: AdapterBank,
    prompts: Prompts,
    sampling: SamplingPart,
    stops: Sequence[int],
    ids: Tensor,
    mask: Tensor,
    finished: Tensor,
    captured: Captured | None,
) -> Rollout:
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    texts = bank.tokenizer.batch_decode(rows, skip_special_tokens=True)
    strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
    texts = texts if strings is None else [strings.cut(text) for text in texts]
    ids = ids.masked_fill(~mask, _pad(bank, stops)).contiguous()
    return Rollout(prompts, ids, mask.contiguous(), texts, finished, sampling.min_new_tokens, tuple(stops), captured)


def _pad(bank: AdapterBank, stops: Sequence[int]) -> int:
    pad = bank.tokenizer.pad_token_id
    return int(stops[0] if pad is None else pad)
