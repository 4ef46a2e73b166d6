"""Folding: a layer's merged weight is plain peft's, for every kind that can be merged, and the base is never touched."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.hra.layer import HRALinear
from torch import Tensor

from marl_core import Prompts
from marl_core.artifacts.kind_table import known_kind
from marl_core.bank.speed import merged_copies as copies
from marl_core.bank.speed.folding import agrees, fold, foldable_layers, is_plain_lora
from marl_core.bank.speed.merged_copies import merged_copies
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.testing import tiny_bank, tiny_model
from marl_core.testing.kinds import SMALL_KINDS, move, small_config

IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
ROUNDING = 5e-5  # logits here reach 30: float32 sums in another order
FOLDABLE = [
    name
    for name, (kind, options) in SMALL_KINDS.items()
    if (found := known_kind(kind, options)).linear and found.merge == "weight"
]
LAYER = "base_model.model.model.layers.1.self_attn.v_proj"
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def adapted(name: str, moved: bool = True, **changes: Any) -> Any:
    """The tiny model with an adapter of this kind, as peft alone puts it there."""
    torch.manual_seed(0)
    model = PeftModel(tiny_model(tie_word_embeddings=False), small_config(name, **changes)).eval()
    if moved:
        move(model)
    return model


def bits(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_weight_is_peft_s_own_merge(name: str) -> None:
    model = adapted(name)
    before = bits(model)
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    layers = {path: layer for path, layer in model.named_modules() if layer in foldable_layers(model)}
    assert layers
    for path, layer in layers.items():
        folded = fold(layer)
        assert folded is not None
        own = path.removeprefix("base_model.model.")
        assert torch.equal(folded[0], wanted[f"{own}.weight"])
        assert not torch.equal(folded[0], layer.base_layer.weight)
        assert agrees(layer, folded)
        assert not layer.merged
    after = bits(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as large as the base."""
    monkeypatch.setattr(copies, "MERGED_COPIES_SHARE", 1.0)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_model_computes_what_the_adapter_does(name: str) -> None:
    model = adapted(name)
    plain, before = logits(model), bits(model)
    with merged_copies(SimpleNamespace(base=model), "default") as done:  # type: ignore[arg-type]
        assert done
        fast = logits(model)
    torch.testing.assert_close(fast, plain, rtol=0, atol=ROUNDING)
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(model).items())


@pytest.mark.parametrize("name", ["beft", "lora bias"])
def test_what_peft_cannot_merge_stays_unfolded(name: str) -> None:
    model = adapted(name)
    assert [fold(layer) for layer in foldable_layers(model)] == [None] * 14


class TestLeftOut:
    def test_half_precision(self) -> None:
        torch.manual_seed(0)
        model: Any = tiny_model()
        assert foldable_layers(PeftModel(model.to(torch.bfloat16), small_config("oft"))) == []

    def test_an_adapter_that_is_off(self) -> None:
        model = adapted("oft")
        with model.disable_adapter():
            assert foldable_layers(model) == []

    def test_layers_of_another_adapter(self) -> None:
        model = adapted("lora", target_modules=["q_proj"])
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter("other")
        assert {type(layer.base_layer.weight) for layer in foldable_layers(model)} == {torch.nn.Parameter}
        assert [tuple(layer.base_layer.weight.shape) for layer in foldable_layers(model)] == [(16, 32)] * 2

    def test_single_weights(self) -> None:
        """Their merge goes through to the layer itself."""
        model = adapted("lora", target_modules=[], target_parameters=["q_proj.weight"])
        assert foldable_layers(model) == []

    def test_norms_and_embeddings(self) -> None:
        for name in ("ln_tuning", "trainable_tokens"):
            assert foldable_layers(adapted(name)) == []


class TestTried:
    """A merge that isn't what the layer computes is found before anything is sampled through it."""

    def test_a_wrong_merge(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def half(self: Any, *args: Any, **options: Any) -> None:
            self.base_layer.weight.data = self.base_layer.weight.data * 0.5
            self.merged_adapters = ["default"]

        monkeypatch.setattr(HRALinear, "merge", half)
        monkeypatch.setattr(copies, "MERGED_COPIES_SHARE", 1.0)
        monkeypatch.setattr(copies, "_said", set())
        model = adapted("hra")
        plain = logits(model)
        with caplog.at_level(logging.INFO, "marl.run"):
            for _ in range(2):
                with merged_copies(SimpleNamespace(base=model), "default") as done:  # type: ignore[arg-type]
                    assert not done
                    assert torch.equal(logits(model), plain)
        said = [record.message for record in caplog.records]
        assert len(said) == 4  # one for each shape
        assert all("go on unfolded: merged it computes something else" in line for line in said)

    def test_a_merge_that_forgets_the_adapter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a fresh adapter it looks right."""

        def nothing(self: Any, *args: Any, **options: Any) -> None:
            self.merged_adapters = ["default"]

        monkeypatch.setattr(HRALinear, "merge", nothing)
        layer = adapted("hra").get_submodule(LAYER)
        folded = fold(layer)
        assert folded is not None
        assert not agrees(layer, folded)


class TestBudget:
    def chosen(self, model: Any, monkeypatch: pytest.MonkeyPatch, share: float) -> set[str]:
        monkeypatch.setattr(copies, "MERGED_COPIES_SHARE", share)
        monkeypatch.setattr(copies, "DEAR_COPIES_SHARE", share)
        with merged_copies(SimpleNamespace(base=model), "default"):  # type: ignore[arg-type]
            return {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if "forward" in vars(layer)}

    def test_the_smallest_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted("oft")
        total = sum(parameter.nbytes for parameter in model.parameters())
        attention = 2 * 4 * (2 * 32 * 16 + 2 * 32 * 32)
        assert self.chosen(model, monkeypatch, attention / total) == {"k_proj", "v_proj", "q_proj", "o_proj"}
        assert self.chosen(model, monkeypatch, 2 * 4 * 2 * 32 * 16 / total) == {"k_proj", "v_proj"}
        assert self.chosen(model, monkeypatch, 0.0) == set()
        assert len(self.chosen(model, monkeypatch, 1.0)) == 7

    def test_lora_is_folded_whole_or_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted("lora")
        assert self.chosen(model, monkeypatch, 0.2) == set()
        assert len(self.chosen(model, monkeypatch, 1.0)) == 7
        dora = adapted("dora")
        assert not is_plain_lora(dora.get_submodule(LAYER))
        assert self.chosen(dora, monkeypatch, 0.2) == {"k_proj", "v_proj", "q_proj", "o_proj"}

    def test_kinds_that_cost_more_than_a_lora_are_folded_unasked(self) -> None:
        for kind, done in (("lora", False), ("dora", True), ("oft", True)):
            with merged_copies(SimpleNamespace(base=adapted(kind)), "default", dear_only=True) as any_folded:  # type: ignore[arg-type]
                assert any_folded is done


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("name", ["oft", "hra", "ia3", "fourierft"])
def test_a_rollout_through_a_bank_is_the_same_rollout(name: str) -> None:
    bank = tiny_bank()
    bank.add("policy", small_config(name), seed=0)
    with torch.no_grad():
        for parameter in bank.parameters("policy").values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    prompts = Prompts.of([[11, 12, 13], [14], [15, 16]], 0)
    sampling = SamplingSection(max_new_tokens=8)
    plain = PolicySampler(bank, "policy", sampling, (2,))(prompts, 2)
    fast = PolicySampler(bank, "policy", sampling, (2,), SpeedSection(merge_for_sampling=True))(prompts, 2)
    assert torch.equal(fast.ids, plain.ids)
    with bank.using("policy"), merged_copies(bank, "policy") as done:
        assert done
