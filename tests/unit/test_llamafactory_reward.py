"""A reward adapter as LLaMA-Factory writes it: a causal LoRA, and its head beside it in value_head.safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from marl_core import AdapterBank, DataError, Plan, Runner, write_certificate
from marl_core.ppo.types import pad_rows
from marl_core.testing import tiny_tokenizer

Write = Callable[..., str]
TEXTS = ["A good film.", "Bad", "The cast is worse than the plot!", "I"]


@pytest.fixture(scope="module")
def head() -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(5)
    return {
        "v_head.summary.weight": torch.randn(1, 32, generator=noise) * 0.3,
        "v_head.summary.bias": torch.tensor([0.4]),
    }


@pytest.fixture(scope="module")
def folder(sft_adapter: str, head: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter, head and tokenizer in one folder. Its pad token is its EOS, which must not matter."""
    made = tmp_path_factory.mktemp("llamafactory") / "reward"
    shutil.copytree(sft_adapter, made)
    save_file(head, made / "value_head.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(pad_is_eos=True).save_pretrained(made)
    return made


def expected(base: str, adapter: Path, head: dict[str, torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
    """What LLaMA-Factory computes: the value head on the last hidden state of each sequence's last token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    scores = []
    for row in rows:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
        scores.append(hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"][0])
    return torch.stack(scores)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_scored_even_if_it_is_the_pad_token(
    tiny_folder: str, folder: Path, head: dict[str, torch.Tensor], side: str
) -> None:
    words = tiny_tokenizer()
    rows = [[*words(text).input_ids, words.eos_token_id] for text in TEXTS]
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    view = bank.load_reward(folder)
    assert view.position == "last-attended"
    ids, mask = pad_rows(rows, words.eos_token_id, side)
    wanted = expected(tiny_folder, folder, head, rows)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(bank.compute_reward_score(ids, mask), wanted, rtol=0, atol=1e-5)


def test_a_run_with_it(make_config: Callable[..., Any], folder: Path) -> None:
    config = make_config(reward={"use": "adapter", "path": str(folder)}, ppo={"steps": 1})
    assert not Plan.of(config).check()
    (stats,) = Runner(config).steps()
    assert stats["reward/adapter"] == pytest.approx(stats.reward_mean)


def test_a_trained_policy_with_its_value_head_can_be_continued(tiny_folder: str, folder: Path) -> None:
    """LLaMA-Factory's PPO saves a value head beside the policy too: that makes it no reward adapter."""
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    bank.load("policy", folder, trainable=True)
    assert "policy" in bank.trainable


def test_a_pickled_head_is_never_opened(sft_adapter: str, tiny_folder: str, tmp_path: Path) -> None:
    made = tmp_path / "reward"
    shutil.copytree(sft_adapter, made)
    (made / "value_head.bin").write_bytes(b"not even a pickle")
    with pytest.raises(DataError, match=r"never opens: save it again as value_head\.safetensors"):
        AdapterBank.from_pretrained(tiny_folder, device="cpu").load_reward(made)


def test_a_head_for_another_width(sft_adapter: str, tiny_folder: str, tmp_path: Path) -> None:
    made = tmp_path / "reward"
    shutil.copytree(sft_adapter, made)
    save_file({"v_head.summary.weight": torch.zeros(1, 16)}, made / "value_head.safetensors")
    with pytest.raises(DataError, match=r"value_head.safetensors is .*\[1, 16\].*needs one of shape \[1, 32\]"):
        AdapterBank.from_pretrained(tiny_folder, device="cpu").load_reward(made)


def test_no_certificate_by_a_random_head(folder: Path, tiny_folder: str) -> None:
    with pytest.raises(DataError, match="random one"):
        write_certificate(folder, tiny_folder, texts=["A"])
