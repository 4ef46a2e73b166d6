"""`sampling.rows`: how many responses are sampled together bounds memory, and changes no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, Prompts, Rollout, RunConfig, Runner
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.ppo.sampling import sampler as sampling
from marl_core.ppo.sampling.decode import decode
from marl_core.ppo.sampling.sampler import PolicySampler, Shard
from marl_core.testing import tiny_bank
from marl_core.testing.kinds import make_config as lora_config

MakeConfig = Callable[..., Any]
TEXTS = ("A good", "Bad", "I", "The longest of them all", "b", "cd")
STOPS = [2, 101, 102, 103, 104, 105, 106, 107, 108]
"""Common enough in a random model that responses end at many lengths."""


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    bank = tiny_bank()
    bank.add("policy", lora_config(4, 8.0, "all-linear", 0.0, {}, bank.linears), seed=0)
    with torch.no_grad():
        for tensor in bank.parameters("policy").values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    bank.add_value_head("value")
    return bank


def sample(bank: AdapterBank, samples: int = 1, speed: SpeedSection | None = None, **options: Any) -> Rollout:
    prompts = Prompts.of([bank.tokenizer(text).input_ids for text in TEXTS], 0)
    part = SamplingSection(max_new_tokens=12, temperature=1.3, **options)
    limits = torch.arange(len(prompts) * samples) % 5 + 8
    return PolicySampler(bank, "policy", part, tuple(STOPS), speed or SpeedSection(), value_head="value")(
        prompts, 3, samples=samples, limits=limits
    )


def same(one: Rollout, other: Rollout) -> None:
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.finished, other.finished)
    assert list(one.texts) == list(other.texts)
    assert torch.equal(one.prompts.ids, other.prompts.ids)
    assert list(one.prompts.texts) == list(other.prompts.texts)


@pytest.mark.parametrize(
    "options", [{}, {"stop_strings": ["a", "x"]}, {"min_new_tokens": 3}, {"top_p": 0.8, "top_k": 20}]
)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 100])
def test_tokens_are_the_same(bank: AdapterBank, rows: int, samples: int, options: dict[str, Any]) -> None:
    whole, parts = sample(bank, samples, **options), sample(bank, samples, rows=rows, **options)
    assert len(set(whole.lengths.tolist())) > 2, "responses of several lengths, or this shows little"
    same(whole, parts)
    assert whole.behavior is not None
    assert parts.behavior is not None
    for name in ("logprobs", "entropy", "values"):  # products of other numbers of rows round otherwise: a few 1e-7
        assert torch.allclose(getattr(whole.behavior, name), getattr(parts.behavior, name), atol=3e-6)


def test_a_part_of_a_batch_is_cut_further(bank: AdapterBank) -> None:
    """A rank's rows, sampled two at a time, are those of the whole batch."""
    prompts = Prompts.of([bank.tokenizer(text).input_ids for text in TEXTS], 0)
    part = SamplingSection(max_new_tokens=6)
    whole = PolicySampler(bank, "policy", part, tuple(STOPS))(prompts, 3)
    mine = replace(prompts, ids=prompts.ids[2:], mask=prompts.mask[2:], rows=prompts.rows[2:], texts=())
    found = PolicySampler(bank, "policy", part.model_copy(update={"rows": 2}), tuple(STOPS))(mine, 3, shard=Shard(2, 6))
    assert list(found.texts) == list(whole.texts[2:])


@pytest.mark.parametrize(
    ("rows", "samples", "calls"), [(2, 1, [2, 2, 2]), (4, 1, [4, 2]), (1, 3, [3] * 6), (7, 3, [6, 6, 6])]
)
def test_so_many_at_once(
    bank: AdapterBank, rows: int, samples: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one prompt stay together: they share its prefill."""
    assert recorded(monkeypatch, lambda: sample(bank, samples, rows=rows)) == calls


def recorded(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[int]:
    """Rows of each call that samples."""
    sizes: list[int] = []
    plain = decode

    def counted(bank: AdapterBank, prompts: Prompts, section: Any, stops: Any, uniforms: Tensor, **options: Any) -> Any:
        sizes.append(len(uniforms))
        return plain(bank, prompts, section, stops, uniforms, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "decode", counted)
        work()
    return sizes


def test_transformers_own_loop_keeps_to_it_too(bank: AdapterBank) -> None:
    """Its numbers are drawn for all rows of a call together; each call's are those of these rows alone."""
    speed = SpeedSection(decode="transformers")
    found = sample(bank, speed=speed, rows=4)
    prompts = Prompts.of([bank.tokenizer(text).input_ids for text in TEXTS], 0)
    part = SamplingSection(max_new_tokens=12, temperature=1.3)
    for start, end in ((0, 4), (4, 6)):
        mine = replace(
            prompts, ids=prompts.ids[start:end], mask=prompts.mask[start:end], rows=prompts.rows[start:end], texts=()
        )
        limits = (torch.arange(6) % 5 + 8)[start:end]
        alone = PolicySampler(bank, "policy", part, tuple(STOPS), speed)(mine, 3, limits=limits, shard=Shard(start))
        assert list(alone.texts) == list(found.texts[start:end])
        assert torch.equal(alone.mask, found.mask[start:end, : alone.mask.shape[1]])


def test_step_evaluation_and_pre_flight_keep_to_it(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config: RunConfig = make_config(sampling={"rows": 2}, ppo={"steps": 1, "batch": 4, "minibatch": 4, "epochs": 1})
    assert config.data is not None
    evaluated = config.model_copy(
        update={"eval": config.eval.model_copy(update={"prompts": config.data.prompts, "limit": 3})}
    )
    sizes = recorded(monkeypatch, lambda: Runner(evaluated).train())
    assert max(sizes) == 2
    assert len(sizes) >= 2 + 2 + 2 + 2, "pre-flight, a step, two evaluations"


def test_a_run_samples_the_same(make_config: MakeConfig) -> None:
    def texts(rows: int | None) -> list[str]:
        runner = Runner(make_config(sampling={"rows": rows}))
        assert runner.data is not None
        return list(runner.generate(runner.data.batch(0, 4, 0)).texts)

    assert texts(None) == texts(1) == texts(3)
