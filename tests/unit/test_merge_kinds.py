"""Merging adapters of every kind: the merged base computes what plain peft computes with the adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from marl_core import DataError, merge_into
from marl_core.artifacts.kind_table import known_kind
from marl_core.bank.base import load_base
from marl_core.bank.merge import merge_adapter
from marl_core.testing import tiny_model, write_tiny_model
from marl_core.testing.kinds import SMALL_KINDS, move, small_config

IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
ROUNDING = 5e-5  # logits here reach 30: float32 sums in another order
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:RuntimeWarning")
INTO_WEIGHTS = [name for name, (kind, options) in SMALL_KINDS.items() if known_kind(kind, options).merge == "weight"]
INTO_BIASES = sorted(set(SMALL_KINDS) - set(INTO_WEIGHTS))


def write(base: str, folder: Path, name: str, **changes: Any) -> str:
    """An adapter of this kind with random numbers, as peft alone writes it."""
    torch.manual_seed(0)
    model: Any = PeftModel(AutoModelForCausalLM.from_pretrained(base), small_config(name, **changes))
    move(model)
    model.save_pretrained(str(folder))
    return str(folder)


def plain(base: str, folder: str) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", INTO_WEIGHTS)
def test_as_plain_peft_merges(tiny_folder: str, tmp_path: Path, name: str) -> None:
    folder = write(tiny_folder, tmp_path / "it", name)
    wanted = plain(tiny_folder, folder)
    seen, bare = logits(wanted), logits(load_base(tiny_folder))
    merged = merge_into(load_base(tiny_folder), folder)
    assert float((seen - bare).abs().max()) > 100 * ROUNDING
    torch.testing.assert_close(logits(merged), seen, rtol=0, atol=ROUNDING)
    by_peft = wanted.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert set(ours) == set(by_peft)
    assert all(torch.equal(ours[key], by_peft[key]) for key in ours)


def weight_and_parts(base: str, folder: str, layer: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One layer's bare weight, and the adapter's tensors for it by their own names."""
    from safetensors.torch import load_file

    model: Any = load_base(base)
    parts = load_file(f"{folder}/adapter_model.safetensors")
    mine = {key.split(f"{layer}.")[1]: tensor for key, tensor in parts.items() if f"{layer}." in key}
    weight: Tensor = model.get_submodule(layer).weight.detach()
    return weight, mine


class TestByHand:
    """The merged weight of one layer, by the formula of each kind's paper."""

    LAYER = "model.layers.0.self_attn.v_proj"

    def merged(self, base: str, folder: str) -> Tensor:
        model: Any = merge_into(load_base(base), folder)
        found: Tensor = model.get_submodule(self.LAYER).weight.detach()
        return found

    def test_dora(self, tiny_folder: str, tmp_path: Path) -> None:
        """m (W + s B A) / |W + s B A|, the norm of each row."""
        folder = write(tiny_folder, tmp_path / "it", "dora", lora_alpha=8)
        weight, parts = weight_and_parts(tiny_folder, folder, self.LAYER)
        moved = weight + 8 / 4 * parts["lora_B.weight"] @ parts["lora_A.weight"]
        by_hand = parts["lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(self.merged(tiny_folder, folder), by_hand)

    def test_ia3(self, tiny_folder: str, tmp_path: Path) -> None:
        """Each output times its number."""
        folder = write(tiny_folder, tmp_path / "it", "ia3")
        weight, parts = weight_and_parts(tiny_folder, folder, self.LAYER)
        torch.testing.assert_close(self.merged(tiny_folder, folder), weight * parts["ia3_l"])

    def test_oft(self, tiny_folder: str, tmp_path: Path) -> None:
        """W R with R block-diagonal, each block the Cayley transform (I + Q)(I - Q)^-1 of a skew matrix."""
        folder = write(tiny_folder, tmp_path / "it", "oft")
        weight, parts = weight_and_parts(tiny_folder, folder, self.LAYER)
        blocks = []
        for row in parts["oft_R.weight"]:
            upper = torch.zeros(8, 8)
            upper[tuple(torch.triu_indices(8, 8, 1))] = row
            skew, one = upper - upper.T, torch.eye(8)
            blocks.append((one + skew) @ torch.linalg.inv(one - skew))
        rotation = torch.block_diag(*blocks)
        torch.testing.assert_close(self.merged(tiny_folder, folder), weight @ rotation, rtol=1e-4, atol=1e-5)

    def test_hra(self, tiny_folder: str, tmp_path: Path) -> None:
        """W times r reflections I - 2 u u^T / |u|^2."""
        folder = write(tiny_folder, tmp_path / "it", "hra")
        weight, parts = weight_and_parts(tiny_folder, folder, self.LAYER)
        for u in parts["hra_u"].T:
            unit = u / u.norm()
            weight = weight - 2 * (weight @ unit)[:, None] * unit[None]
        torch.testing.assert_close(self.merged(tiny_folder, folder), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INTO_BIASES)
def test_into_biases_that_are_not_there(tiny_folder: str, tmp_path: Path, name: str) -> None:
    """PEFT would stop half-way with an error of its own."""
    folder, base = write(tiny_folder, tmp_path / "it", name), load_base(tiny_folder)
    with pytest.raises(
        DataError, match=r"reference\.adapter: .*: it adds to biases, and 14 layers .*Keep the adapter beside"
    ):
        merge_into(base, folder, "reference.adapter")


@pytest.mark.parametrize("name", INTO_BIASES)
def test_into_biases(tmp_path: Path, name: str) -> None:
    base = write_tiny_model(tmp_path / "base", attention_bias=True)
    folder = write(base, tmp_path / "it", name, target_modules=["q_proj", "v_proj"])
    wanted = logits(plain(base, folder))
    torch.testing.assert_close(logits(merge_into(load_base(base), folder)), wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["oft", "tinylora"])
def test_marl_merge_writes_a_model(tiny_folder: str, tmp_path: Path, name: str) -> None:
    folder = write(tiny_folder, tmp_path / "it", name)
    report = merge_adapter(tiny_folder, folder, tmp_path / "new")
    assert report.max_logit_difference < ROUNDING
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(logits(merged), logits(plain(tiny_folder, folder)), rtol=0, atol=ROUNDING)


def test_a_weight_of_two_layers(tmp_path: Path) -> None:
    """Both rotations would be applied to the one weight."""
    model: Any = tiny_model()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.load_state_dict(first.state_dict())
    model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    folder = write(base, tmp_path / "it", "oft", target_modules=["q_proj", "o_proj"])
    tied: Any = load_base(base)
    tied.model.layers[1].self_attn.q_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(DataError, match="share one weight in this model"):
        merge_into(tied, folder)


def test_kinds_that_peft_cannot_merge(tiny_folder: str, tmp_path: Path) -> None:
    folder = Path(write(tiny_folder, tmp_path / "it", "lora"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "peft_type": "LILY"}), encoding="utf-8")
    with pytest.raises(DataError, match="is a LILY adapter, which PEFT can't merge"):
        merge_into(load_base(tiny_folder), folder)
