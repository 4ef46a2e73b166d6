"""What backward keeps: less than the plain modules do, for bitwise the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from marl_core import AdapterBank
from marl_core.bank.speed import packing
from marl_core.bank.speed.merged_copies import merged_copies
from marl_core.bank.speed.recompute import patch_for_recompute, recomputed
from marl_core.bank.trunk import PassOptions
from marl_core.testing import kinds, tiny_model, tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
MODELS = {"Llama": SHAPE, "Qwen2": SHAPE, "Gemma2": SHAPE, "GPT2": GPT2}
IDS = torch.arange(5, 29).reshape(2, 12)


def random_model(name: str) -> Any:
    """A tiny random model of one of the families."""
    import transformers

    family: Any = transformers
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(family, kind)(getattr(family, f"{name}Config")(**MODELS[name]))


def bank_of(model: Any, targets: Any = "all-linear", dtype: torch.dtype = torch.float32) -> AdapterBank:
    """A bank whose policy isn't the base, so that both of its matrices have a gradient."""
    bank = AdapterBank(model.eval().to(dtype), tiny_tokenizer())
    bank.add(
        "policy",
        kinds.make_config(4, 8, targets, 0.0, {"fan_in_fan_out": "GPT2" in type(model).__name__}, bank.linears),
        seed=0,
    )
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters("policy").values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return bank


def train(bank: AdapterBank, mask: Tensor) -> tuple[dict[str, Tensor], int]:
    """The policy's gradients, and the bytes that the forward kept for them beside weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in bank.all_parameters().values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    direction = torch.randn(bank.trunk.hidden_size, generator=torch.Generator().manual_seed(2))
    with bank.using("policy", train=True):
        bank.trunk.packs  # noqa: B018  # measured once, and not here
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = bank.trunk.hidden(IDS, mask)
        (states.float() @ direction)[mask].sum().backward()
    found = {name: parameter.grad for name, parameter in bank.parameters("policy").items()}
    for parameter in bank.all_parameters().values():
        parameter.grad = None
    assert all(gradient is not None and bool(gradient.any()) for gradient in found.values())
    return found, sum(kept.values())  # type: ignore[return-value]  # none is None


def make_plain(bank: AdapterBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every lean forward away."""
    for module in bank.all_modules():
        vars(module).pop("forward", None)
    monkeypatch.setattr(packing, "recomputed", lambda function, *inputs: function(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bitwise_those_of_the_plain_modules(
    name: str, ragged: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, mask = bank_of(random_model(name), dtype=dtype), torch.ones_like(IDS, dtype=torch.bool)
    mask[1, 7:] = not ragged
    lean, kept = train(bank, mask)
    make_plain(bank, monkeypatch)
    plain, before = train(bank, mask)
    assert all(torch.equal(lean[key], plain[key]) for key in plain)
    assert kept < 0.95 * before


def test_a_llama_keeps_what_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters on q and v, float32; values per token and layer, h 32, f 64, k = v = 16 wide, 4 heads, 12 tokens seen.

    Lean: two inputs of norms, the adapters' input, queries, keys, values: 4 h + 2 * 16, gate and up: 2 f, what the two A
    give: 2 * 4, the norms' two factors. Plain: act(gate) and its product with up as well, and the weights of attention.
    """
    bank, mask = bank_of(tiny_model(), ["q_proj", "v_proj"]), torch.ones_like(IDS, dtype=torch.bool)
    _, lean = train(bank, mask)
    make_plain(bank, monkeypatch)
    _, plain = train(bank, mask)
    token = 4 * 2 * IDS.numel()  # bytes of a value for each token in both layers
    rest = 4 * (32 + 1 + 8 * 2) * IDS.numel()  # the last norm's input and factor, cos and sin
    assert lean == pytest.approx(token * (4 * 32 + 2 * 16 + 2 * 64 + 2 * 4 + 2), rel=0.1, abs=rest)
    assert (
        plain - lean >= token * (64 + 4 * 12) - rest
    )  # in the first layer keys need no gradient: plainly they aren't kept


def test_half_precision_keeps_no_copy_of_an_adapters_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """All linear layers: 4 inputs a layer for 7 adapters, each of which would keep a float32 copy."""
    bank, mask = bank_of(tiny_model(), dtype=torch.bfloat16), torch.ones_like(IDS, dtype=torch.bool)
    _, lean = train(bank, mask)
    make_plain(bank, monkeypatch)
    _, plain = train(bank, mask)
    assert plain - lean > 2 * IDS.numel() * 4 * (6 * 32 + 64)


def test_another_form_of_mlp_stays_as_it_is() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)

    class Looks(Other):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * 2

    class Same(Other):
        def forward(self, x: Tensor) -> Any:
            hidden = self.act_fn(self.gate_proj(x))
            return self.down_proj(hidden * self.up_proj(x))

    assert [patch_for_recompute(model()) for model in (Other, Looks, Same)] == [0, 0, 1]


def test_it_is_done_once_and_folding_leaves_it() -> None:
    bank = bank_of(tiny_model())
    lean = [module for module in bank.all_modules() if "forward" in vars(module)]
    assert len(lean) == 2 + 2 * 7  # the gated products, and each adapted layer
    assert patch_for_recompute(bank.base) == 0
    forwards = [module.forward for module in lean]
    with bank.using("policy"), merged_copies(bank, "policy"):
        pass
    assert [module.forward for module in lean] == forwards


def lean_modules(bank: AdapterBank) -> int:
    return sum("forward" in vars(module) for module in bank.all_modules())


def test_a_run_can_have_it_off_and_what_comes_meanwhile_is_plain_too() -> None:
    bank, mask = bank_of(tiny_model()), torch.ones_like(IDS, dtype=torch.bool)
    lean, kept = train(bank, mask)
    with bank.trunk.passing(PassOptions(recompute_cheap=False)):
        assert lean_modules(bank) == 0
        bank.add("other", kinds.make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
        assert lean_modules(bank) == 0
        plain, more = train(bank, mask)
    assert all(torch.equal(lean[key], plain[key]) for key in plain)
    assert kept < more
    assert lean_modules(bank) == 2 + 2 * 2 * 7  # each of the two adapters has layers of its own


def test_gradients_of_some_inputs_only() -> None:
    one, two = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0])
    recomputed(lambda a, b: a * a * b, one, two).sum().backward()
    assert one.grad is not None
    assert one.grad.tolist() == [6.0, 20.0]
    with torch.no_grad():
        assert not recomputed(torch.mul, one, two).requires_grad
