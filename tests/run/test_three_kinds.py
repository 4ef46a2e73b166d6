"""Policy of one kind, reference of another, reward of a third, on one base: every number as three peft models of their own give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from marl_core import Runner

MakeConfig = Callable[..., Any]
LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Callable[..., Any]] = {
    "lora": lambda **more: LoraConfig(r=4, target_modules=LINEAR, **more),
    "dora": lambda **more: LoraConfig(r=4, target_modules=LINEAR, use_dora=True, **more),
    "oft": lambda **more: OFTConfig(oft_block_size=8, target_modules=LINEAR, **more),
    "hra": lambda **more: HRAConfig(r=4, target_modules=LINEAR, **more),
    "miss": lambda **more: MissConfig(r=4, target_modules=LINEAR, **more),
    "ia3": lambda **more: IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], **more),
    "road": lambda **more: RoadConfig(target_modules=LINEAR, group_size=16, **more),
    "vera": lambda **more: VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **more),
}
TRIOS = [("oft", "hra", "lora"), ("hra", "lora", "miss"), ("vera", "ia3", "dora"), ("lora", "road", "oft")]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:RuntimeWarning:peft")
ROUNDING = 2e-5
"""Nats and units of score. marl's packed attention and its products of other shapes round otherwise: measured 2e-6 at most here."""


def save(model: Any, folder: Path, seed: int) -> str:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    model.save_pretrained(str(folder))
    return str(folder)


def adapter(base: str, folder: Path, kind: str, seed: int) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return save(get_peft_model(model, KINDS[kind](task_type="CAUSAL_LM")), folder, seed)


def reward(base: str, folder: Path, kind: str, seed: int) -> str:
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return save(get_peft_model(model, KINDS[kind](task_type="SEQ_CLS", modules_to_save=["score"])), folder, seed)


@torch.no_grad()
def logprobs(base: str, folder: str, rollout: Any) -> list[Tensor]:
    """By plain peft, one row at a time, without padding."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(plain, folder).eval()
    found = []
    for ids, mask, kept in zip(rollout.sequence_ids, rollout.sequence_mask, rollout.mask, strict=True):
        row, count = ids[mask.bool()], int(kept.sum())
        logits = model(input_ids=row[None]).logits[0, -count - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, row[-count:, None])[:, 0])
    return found


@torch.no_grad()
def scores(base: str, folder: str, rollout: Any) -> Tensor:
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    model: Any = PeftModel.from_pretrained(plain, folder).eval()
    rows = [ids[mask.bool()] for ids, mask in zip(rollout.sequence_ids, rollout.sequence_mask, strict=True)]
    return torch.cat([model(input_ids=row[None]).logits[:, 0] for row in rows])


@pytest.mark.parametrize("trio", TRIOS, ids="-".join)
def test_each_role_is_its_own_peft_model(
    make_config: MakeConfig, tiny_folder: str, tmp_path: Path, trio: tuple[str, str, str]
) -> None:
    mine, theirs, judge = trio
    policy = adapter(tiny_folder, tmp_path / "policy", mine, 1)
    reference = adapter(tiny_folder, tmp_path / "reference", theirs, 2)
    scorer = reward(tiny_folder, tmp_path / "reward", judge, 3)
    runner = Runner(
        make_config(
            policy={"start": "continue", "from": policy},
            reference={"use": "peft-adapter", "adapter": reference, "allow_mismatch": True},
            reward={"use": "adapter", "path": scorer},
        )
    )
    rollout = runner.generate(runner.encode(["A good", "It was", "Bad"]))
    scored = runner.score(rollout)
    for folder, found in ((policy, scored.logprobs), (reference, scored.ref_logprobs)):
        assert found is not None
        for row, kept, wanted in zip(found, rollout.mask, logprobs(tiny_folder, folder, rollout), strict=True):
            torch.testing.assert_close(row[kept.bool()], wanted, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(scored.scores, scores(tiny_folder, scorer, rollout), rtol=0, atol=ROUNDING)
    before = {name: p.detach().clone() for name, p in runner.bank.base_parameters().items()}
    frozen = {name: runner.bank.checksum(name) for name in runner.bank.adapters if name != "policy"}
    moved = runner.bank.checksum("policy")
    runner.update(scored)
    assert runner.bank.checksum("policy") != moved
    assert {name: runner.bank.checksum(name) for name in frozen} == frozen
    assert all(torch.equal(tensor, before[name]) for name, tensor in runner.bank.base_parameters().items())
