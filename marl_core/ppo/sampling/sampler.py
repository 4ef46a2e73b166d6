"""Sampling responses from the policy, and cutting them at the stop token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.speed.merged_copies import merged_copies
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.config.speed_config import is_on
from marl_core.errors import ConfigError, warn
from marl_core.ppo.captured import Behavior, Captured
from marl_core.ppo.sampling.decode import Decoded, decode, stacked
from marl_core.ppo.sampling.stop_strings import Criterion, StopStrings
from marl_core.ppo.texts import ResponseDecoder, response_texts
from marl_core.ppo.types import Prompts, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, sampling: SamplingSection, model_eos: Any, vocabulary: int | None = None
) -> list[int]:
    """All tokens that end a response: the tokenizer's EOS, the model's own (an id, or several in whatever holds them), and
    `sampling.stop`.

    Ids that the model can't sample, beyond its `vocabulary`, are left out with a MarlWarning; ConfigError where one is asked for,
    or none is left.
    """
    ids = set(_ids(tokenizer.eos_token_id)) | set(_ids(model_eos))
    foreign = sorted(token for token in ids if not _known(token, vocabulary))
    if foreign:
        warn(
            f"sampling: the end tokens {', '.join(map(str, foreign))} of this tokenizer or its generation_config are outside the model's "
            f"vocabulary of {vocabulary} tokens, so they can't be sampled; they are left out."
        )
    ids -= set(foreign)
    for text in sampling.stop:
        ids.add(_stop(tokenizer, text, vocabulary))
    if not ids:
        raise ConfigError(
            "sampling: this tokenizer has no EOS token" + (" that the model knows" if foreign else "") + "; "
            "name one in sampling.stop."
        )
    return sorted(ids)


def _ids(given: Any) -> list[int]:
    """Ids out of None, a number, or any container of numbers, tensors and arrays included."""
    if given is None:
        return []
    given = given.tolist() if hasattr(given, "tolist") else given
    return [int(token) for token in given] if isinstance(given, Iterable) else [int(given)]


def _known(token: int, vocabulary: int | None) -> bool:
    return token >= 0 and (vocabulary is None or token < vocabulary)


def _stop(tokenizer: PreTrainedTokenizerBase, text: str, vocabulary: int | None) -> int:
    """The one token that `text` is."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ConfigError(
            f"sampling.stop: {text!r} is {len(tokens)} tokens for this tokenizer, a stop must be a single token. "
            "Text of several tokens goes into sampling.stop_strings."
        )
    if tokens[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise ConfigError(
            f"sampling.stop: this tokenizer doesn't know {text!r}. Name a token that it has, or use sampling.stop_strings."
        )
    if not _known(tokens[0], vocabulary):
        raise ConfigError(
            f"sampling.stop: {text!r} is token {tokens[0]}, and the model has {vocabulary} tokens only, so it can never be sampled. "
            "Name a token that the model has, or use sampling.stop_strings."
        )
    return int(tokens[0])


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
    sampling: SamplingSection,
    stops: Sequence[int],
    seed: int | None = None,
    *,
    limits: Tensor | None = None,
    samples: int = 1,
    speed: SpeedSection | None = None,
    value_head: str | None = None,
    first: int = 0,
    whole: int | None = None,
) -> Rollout:
    """Sample one response to each prompt through `adapter`; with a `seed`, from it alone.

    Prompts come `samples` times in a row each; `limits` [B] are the most tokens of each row. The rollout also carries
    the log-probs (and the values of `value_head`) seen in sampling where they are exact enough for the update. The global
    random state is left as it was when a seed is given. Prompts that are a part of a batch of `whole` rows, from row
    `first` on, draw the numbers that they would draw in it.

    `sampling.rows` rows are sampled at once. Each draws numbers of its own, so how many doesn't matter; only transformers'
    `generate` draws for all its rows together.
    """
    prompts = prompts.to(bank.device).with_texts(bank.tokenizer)
    _say_added_ends(bank.tokenizer, prompts)
    speed = speed or SpeedSection()
    if bank.trunk.sampler(speed.decode) == "transformers":
        parts = [
            _by_transformers(
                bank,
                adapter,
                _part(prompts, piece),
                sampling,
                stops,
                None if seed is None else seed + first + piece.start,
                None if limits is None else limits[piece],
            )
            for piece in _pieces(len(prompts), sampling, samples)
        ]
        return _joined(prompts, parts, _pad(bank, stops))
    random = None if seed is None else torch.Generator().manual_seed(seed)
    uniforms = torch.rand(whole or len(prompts), sampling.max_new_tokens, generator=random, dtype=torch.float64)
    uniforms = uniforms[first : first + len(prompts)]
    with ExitStack() as opened:
        opened.enter_context(bank.using(adapter))
        opened.enter_context(bank.trunk.generating())
        if speed.merge_for_sampling:
            opened.enter_context(merged_copies(bank, adapter))
        found = Decoded.joined(
            [
                decode(
                    bank,
                    _part(prompts, piece),
                    sampling,
                    stops,
                    uniforms[piece].to(bank.device),
                    limits=None if limits is None else limits[piece],
                    samples=samples,
                    value_head=value_head,
                )
                for piece in _pieces(len(prompts), sampling, samples)
            ]
        )
    rollout = _rollout(bank, prompts, sampling, stops, found.ids, found.mask, found.finished)
    exact = bank.quantization.config is None and bank.trunk.precision == "float32"
    lengths = [*prompts.mask.sum(dim=1).tolist(), *rollout.sequence_mask.sum(dim=1).tolist()]
    if is_on(speed.capture, bank.device.type) and exact and bank.trunk.stretched.alike(lengths):
        behavior = Behavior.of(bank, adapter, value_head, sampling.temperature)
        seen = Captured(found.logprobs, found.entropy, found.values, behavior, rollout.digests())
        return replace(rollout, captured=seen)
    return rollout


def _pieces(count: int, sampling: SamplingSection, samples: int) -> list[slice]:
    """The rows sampled together; those of one prompt share its prefill."""
    size = max(sampling.at_once(count, samples), 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _part(prompts: Prompts, piece: slice) -> Prompts:
    """Some of the prompts, padded as all of them are."""
    return replace(
        prompts,
        ids=prompts.ids[piece],
        mask=prompts.mask[piece],
        rows=prompts.rows[piece],
        texts=prompts.texts[piece],
    )


def _joined(prompts: Prompts, parts: Sequence[Rollout], pad: int) -> Rollout:
    """One rollout of all prompts, from those of its pieces."""
    if len(parts) == 1:
        return parts[0]
    mask = stacked([part.mask for part in parts])
    return replace(
        parts[0],
        prompts=prompts,
        ids=stacked([part.ids for part in parts]).masked_fill(~mask, pad),
        mask=mask,
        texts=[text for part in parts for text in part.texts],
        finished=torch.cat([part.finished for part in parts]),
    )


def _say_added_ends(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
    """A MarlWarning where all prompts were made by calling a tokenizer that appends EOS."""
    eos = tokenizer.eos_token_id
    if eos is None or not bool((prompts.ids[:, -1] == eos).all()) or list(tokenizer("a").input_ids)[-1] != eos:
        return
    warn(
        "generate: every prompt ends in the EOS that this tokenizer appends to a text, so all responses are written after the end. "
        "Take it off (ids[:-1]); prompts that marl reads from `data` have none."
    )


def _by_transformers(
    bank: AdapterBank,
    adapter: str | None,
    prompts: Prompts,
    sampling: SamplingSection,
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
        criterion = None
        if strings is not None:
            criterion = Criterion(strings, prompts.ids.shape[1], ResponseDecoder.of(bank.tokenizer, prompts))
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
    return _rollout(bank, prompts, sampling, stops, ids[:, :width], mask[:, :width], finished)


def _rollout(
    bank: AdapterBank,
    prompts: Prompts,
    sampling: SamplingSection,
    stops: Sequence[int],
    ids: Tensor,
    mask: Tensor,
    finished: Tensor,
) -> Rollout:
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    texts = response_texts(bank.tokenizer, prompts, rows)
    strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
    texts = texts if strings is None else [strings.cut(text) for text in texts]
    ids = ids.masked_fill(~mask, _pad(bank, stops)).contiguous()
    return Rollout(prompts, ids, mask.contiguous(), texts, finished, sampling.min_new_tokens, tuple(stops))


def _pad(bank: AdapterBank, stops: Sequence[int]) -> int:
    pad = bank.tokenizer.pad_token_id
    return int(stops[0] if pad is None else pad)
