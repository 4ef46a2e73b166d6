"""One base, many adapters: who is seen, who is trained, what is refused, and that the base stays what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core import AdapterBank, ConfigError, DataError, MarlDeprecationWarning, View
from marl_core.bank.trunk import PassOptions
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.scoring import forward, view_output
from marl_core.testing import fake_rollout, tiny_bank, tiny_model, write_tiny_model
from marl_core.testing.kinds import make_config

Write = Callable[..., str]
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])


def config(
    bank: AdapterBank, r: int = 4, dropout: float = 0.0, targets: Any = "all-linear", **extra: Any
) -> LoraConfig:
    return make_config(r, 8, targets, dropout, extra, bank.linears)


def add(bank: AdapterBank, name: str, seed: int = 0, **options: Any) -> None:
    """A new adapter whose weights are all random, so that it does something."""
    trainable = options.pop("trainable", True)
    bank.add(name, config(bank, **options), trainable=trainable, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters(name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)


def cast_model(dtype: torch.dtype) -> Any:
    """The tiny model in another dtype."""
    model: Any = tiny_model()
    return model.to(dtype)


@torch.no_grad()
def logits(bank: AdapterBank, adapter: str | None) -> Tensor:
    with bank.using(adapter) as model:
        found: Tensor = model(IDS).logits
        return found


def flags(bank: AdapterBank) -> tuple[Any, ...]:
    """Everything that looking through an adapter must leave as it was."""
    gradients = {name: parameter.requires_grad for name, parameter in bank.base.named_parameters()}
    modes = {name: module.training for name, module in bank.base.named_modules()}
    return (
        bank.active,
        bank.trainable,
        bank.adapters,
        list(bank.heads),
        gradients,
        modes,
        torch.get_rng_state().tolist(),
    )


@pytest.fixture
def bank() -> AdapterBank:
    bank = tiny_bank()
    add(bank, "one", seed=1, dropout=0.1)
    add(bank, "two", seed=2, trainable=False)
    return bank


class TestSwitch:
    """Adapters that stand in the tree in turns against models that only PEFT ever touched, bitwise."""

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
    def test_each_is_what_it_is_alone_in_peft(self, options: dict[str, Any]) -> None:
        bank = tiny_bank()
        for seed, name in enumerate(["one", "two"]):
            add(bank, name, seed=seed, **options)
        mine = {name: logits(bank, name) for name in ("one", "two", None)}
        for name in ("one", "two"):
            plain = PeftModel(tiny_model(), config(bank, **options)).eval()
            set_peft_model_state_dict(plain, bank.tensors(name))
            with torch.no_grad():
                assert torch.equal(plain(IDS).logits, mine[name])
                with plain.disable_adapter():
                    assert torch.equal(plain(IDS).logits, mine[None])
        assert not torch.equal(mine["one"], mine["two"])
        assert not torch.equal(mine["one"], mine[None])

    def test_against_one_peft_model_with_both(self) -> None:
        bank = tiny_bank()
        add(bank, "one", seed=1)
        add(bank, "two", seed=2)
        plain = PeftModel(tiny_model(), config(bank), adapter_name="one").eval()
        plain.add_adapter("two", config(bank))
        for adapter in ("one", "two"):
            set_peft_model_state_dict(plain, bank.tensors(adapter), adapter)
        with torch.no_grad():
            for adapter in ("one", "two"):
                plain.set_adapter(adapter)
                assert torch.equal(plain(IDS).logits, logits(bank, adapter))
            with plain.disable_adapter():
                assert torch.equal(plain(IDS).logits, logits(bank, None))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bare_is_the_base_as_it_was_before_any_adapter(self, dtype: torch.dtype) -> None:
        model = cast_model(dtype)
        with torch.no_grad():
            fresh = model(IDS).logits
        bank = AdapterBank(model, tiny_bank().tokenizer)
        add(bank, "one")
        assert torch.equal(logits(bank, None), fresh)
        assert not torch.equal(logits(bank, "one"), fresh)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
    def test_a_new_adapter_is_bitwise_the_base(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        bank = AdapterBank(cast_model(dtype), tiny_bank().tokenizer)
        bank.add("new", config(bank, **options), seed=0)
        assert torch.equal(logits(bank, "new"), logits(bank, None))

    def test_a_new_dora_is_the_base_up_to_rounding(self) -> None:
        bank = tiny_bank()
        bank.add("new", config(bank, use_dora=True), seed=0)
        torch.testing.assert_close(logits(bank, "new"), logits(bank, None), rtol=0, atol=1e-5)


class TestUsing:
    def test_i15_nests_and_restores(self, bank: AdapterBank) -> None:
        one, two, bare = logits(bank, "one"), logits(bank, "two"), logits(bank, None)
        before = flags(bank)
        with torch.no_grad(), bank.using("one") as model:
            assert torch.equal(model(IDS).logits, one)
            with bank.bare() as inner:
                assert torch.equal(inner(IDS).logits, bare)
                with bank.view(View("two")) as innermost:
                    assert torch.equal(innermost(IDS).logits, two)
                assert torch.equal(inner(IDS).logits, bare)
            assert bank.active == "one"
            assert torch.equal(model(IDS).logits, one)
        assert flags(bank) == before

    @pytest.mark.parametrize("adapter", ["one", "two", None])
    @pytest.mark.parametrize("train", [False, True])
    def test_i15_restores_after_an_exception(self, bank: AdapterBank, adapter: str | None, train: bool) -> None:
        before = flags(bank)
        with pytest.raises(ZeroDivisionError), bank.using("one"), bank.using(adapter, train=train):
            raise ZeroDivisionError
        assert flags(bank) == before

    def test_dropout_is_on_only_where_it_is_asked_for(self, bank: AdapterBank) -> None:
        def passes(train: bool) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), bank.using("one", train=train) as model:
                return model(IDS).logits, model(IDS).logits

        assert torch.equal(*passes(False))
        assert not torch.equal(*passes(True))
        assert torch.equal(*passes(False))

    def test_an_outer_training_block_keeps_its_dropout(self, bank: AdapterBank) -> None:
        with torch.no_grad(), bank.using("one", train=True) as model:
            with bank.using("one"):
                assert torch.equal(model(IDS).logits, model(IDS).logits)
            assert not torch.equal(model(IDS).logits, model(IDS).logits)

    def test_an_unknown_adapter_is_named_with_those_there_are(self, bank: AdapterBank) -> None:
        before = flags(bank)
        with pytest.raises(ConfigError, match=r"no adapter 'three'; it has: one, two\."), bank.using("three"):
            pass
        assert flags(bank) == before

    def test_a_frozen_adapter_gets_no_gradient(self, bank: AdapterBank) -> None:
        with bank.using("two") as model:
            assert not model(IDS).logits.requires_grad
        with bank.using("one") as model:
            model(IDS).logits.sum().backward()
        assert all(
            (p.grad is not None) == ("lora" in name and ".one." in name) for name, p in bank.all_parameters().items()
        )


class TestWhoIsTrained:
    def learning(self, bank: AdapterBank) -> set[str]:
        """Adapters of which every tensor, and the names of the others of which any, asks for a gradient."""
        asking = {name for name, parameter in bank.all_parameters().items() if parameter.requires_grad}
        owners = {name for name in bank.adapters if set(bank.parameters(name)) <= asking}
        assert asking == {key for name in owners for key in bank.parameters(name)}
        return owners

    def test_stays_through_every_peft_call(self, bank: AdapterBank, tmp_path: Path) -> None:
        assert self.learning(bank) == {"one"}
        add(bank, "three", seed=3)
        assert self.learning(bank) == {"one", "three"}
        bank.save("two", tmp_path / "two")
        assert self.learning(bank) == {"one", "three"}
        bank.load("four", tmp_path / "two")
        bank.load("five", tmp_path / "two", trainable=True)
        assert self.learning(bank) == {"one", "three", "five"}
        bank.frozen(tmp_path / "two", "reference")
        assert self.learning(bank) == {"one", "three", "five"}
        for name in ("three", "four", "two"):
            bank.remove(name)
        assert self.learning(bank) == {"one", "five"} == set(bank.trainable)
        for name in ("one", "five"):
            logits(bank, name)
        assert self.learning(bank) == {"one", "five"}

    def test_adding_and_loading_leave_the_active_adapter(self, bank: AdapterBank, tmp_path: Path) -> None:
        bank.activate("one")
        before = logits(bank, "one")
        add(bank, "three", seed=3)
        bank.save("three", tmp_path / "three")
        bank.load("four", tmp_path / "three")
        bank.remove("three")
        assert bank.active == "one"
        with torch.no_grad():
            assert torch.equal(bank.base(IDS).logits, before)

    def test_removing_the_active_adapter_leaves_the_bare_base(self, bank: AdapterBank) -> None:
        bare = logits(bank, None)
        bank.activate("two")
        bank.remove("two")
        assert bank.active is None
        with torch.no_grad():
            assert torch.equal(bank.base(IDS).logits, bare)

    def test_removing_all_gives_the_plain_base_back(self, bank: AdapterBank) -> None:
        bare = logits(bank, None)
        for name in ("two", "one"):
            bank.remove(name)
        assert bank.adapters == []
        assert set(dict(bank.base.named_parameters())) == set(dict(tiny_model().named_parameters()))
        assert torch.equal(logits(bank, None), bare)
        add(bank, "again")
        assert bank.adapters == ["again"]

    def test_adapters_and_heads_are_float32_on_a_bfloat16_base(self) -> None:
        bank = AdapterBank(cast_model(torch.bfloat16), tiny_bank().tokenizer)
        add(bank, "one")
        add(bank, "two")
        bank.add_value_head("head")
        kinds = {p.dtype for name in ("one", "two", "head") for p in bank.parameters(name).values()}
        assert kinds == {torch.float32}
        assert bank.base.dtype == torch.bfloat16

    def test_policies_on_one_bank_do_not_touch_each_other(self) -> None:
        bank = tiny_bank()
        add(bank, "policy", seed=0)
        add(bank, "policy-2", seed=1)
        bare, second = logits(bank, None), logits(bank, "policy-2")
        optimizer = torch.optim.AdamW(bank.parameters("policy").values(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            with bank.using("policy", train=True) as model:
                model(IDS).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(logits(bank, "policy-2"), second)
        assert torch.equal(logits(bank, None), bare)

    def test_the_initial_weights_depend_on_the_seed_alone(self) -> None:
        banks = [tiny_bank(), tiny_bank(), tiny_bank()]
        before = torch.get_rng_state()
        banks[0].add("alpha", config(banks[0]), seed=3)
        torch.rand(5)
        add(banks[1], "other", seed=9)
        banks[1].add("alpha", config(banks[1]), seed=3)
        banks[2].add("alpha", config(banks[2]), seed=4)
        torch.set_rng_state(before)
        banks[2].add("beta", config(banks[2]), seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        weights = [bank.tensors("alpha") for bank in banks]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


class TestNames:
    @pytest.mark.parametrize("name", ["", "a.b", "a/b", "x" * 65, "naïve", "a b", "../a"])
    def test_illegal(self, bank: AdapterBank, name: str) -> None:
        before = flags(bank)
        with pytest.raises(ConfigError, match="can't name an adapter"):
            bank.add(name, config(bank))
        assert flags(bank) == before

    def test_taken(self, bank: AdapterBank, tmp_path: Path) -> None:
        bank.add_value_head("head")
        bank.save("two", tmp_path / "two")
        before = flags(bank)
        for name in ("one", "head"):
            with pytest.raises(ConfigError, match="already has an adapter or head"):
                bank.add(name, config(bank))
            with pytest.raises(ConfigError, match="already has an adapter or head"):
                bank.load(name, tmp_path / "two")
            with pytest.raises(ConfigError, match="already has an adapter or head"):
                bank.add_value_head(name)
        assert flags(bank) == before

    def test_one_that_begins_like_another_is_another(self) -> None:
        bank = tiny_bank()
        add(bank, "policy", seed=0)
        add(bank, "policy-value", seed=1)
        assert not set(bank.parameters("policy")) & set(bank.parameters("policy-value"))

    def test_unknown(self, bank: AdapterBank) -> None:
        with pytest.raises(ConfigError, match=r"no adapter or head 'pi'; it has: one, two\."):
            bank.parameters("pi")
        with pytest.raises(ConfigError, match="no adapter 'pi'; it has: one, two"):
            bank.config("pi")

    def test_peft_is_deprecated(self, bank: AdapterBank) -> None:
        with pytest.warns(MarlDeprecationWarning, match=r"bank.peft is deprecated .*use bank.config"):
            assert bank.peft.peft_config["one"].r == 4


class TestTargets:
    def test_all_linear_of_a_second_adapter_is_that_of_the_first(self) -> None:
        """PEFT's own all-linear would find the first adapter's matrices and adapt those too."""
        bank = tiny_bank()
        add(bank, "one")
        add(bank, "two")
        shapes = [
            {key.replace(f".{name}.", ".X."): p.shape for key, p in bank.parameters(name).items()}
            for name in ("one", "two")
        ]
        assert shapes[0] == shapes[1]
        assert len(shapes[0]) == 2 * 7 * 2  # A and B of seven linear layers in two blocks

    @pytest.mark.parametrize(
        ("targets", "tensors"),
        [
            (["q_proj"], 4),
            (["q_proj", "v_proj"], 8),
            ("q_proj", 4),
            (r".*layers\.0\..*_proj", 14),
            (["model.layers.1.mlp.up_proj"], 2),
        ],
    )
    def test_names_and_patterns(self, targets: Any, tensors: int) -> None:
        bank = tiny_bank()
        add(bank, "first")
        add(bank, "one", targets=targets)
        assert len(bank.parameters("one")) == tensors

    @pytest.mark.parametrize("targets", [["q_prj"], "nothing", ["q_proj", "lm_head"]])
    def test_unknown_ones_are_refused(self, targets: Any) -> None:
        with pytest.raises(ConfigError, match=r"LoRA targets .*(no linear layer)"):
            config(tiny_bank(), targets=targets)

    def test_an_unknown_option_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"LoraConfig doesn't accept \{'use_lora': True\}"):
            config(tiny_bank(), use_lora=True)

    def test_pefts_own_words_end_and_targets_are_named_where_they_are_meant(self, bank: AdapterBank) -> None:
        with pytest.raises(ConfigError, match=r"in_features \(\d+\)\. Change the adapter's options\.$"):
            bank.add("three", MissConfig(target_modules=["q_proj"], r=9999))
        with pytest.raises(ConfigError, match=r"\. It can adapt these layers: .* Name those among them that you mean"):
            bank.add("three", LoraConfig(target_modules=["nowhere"]))

    def test_a_config_that_peft_refuses_leaves_the_bank_as_it_was(self, bank: AdapterBank) -> None:
        before = flags(bank)
        with pytest.raises(ConfigError, match=r"adapter 'three': peft can't add it to this base: .*nowhere"):
            bank.add("three", LoraConfig(target_modules=["nowhere"]))
        assert flags(bank) == before
        logits(bank, "one")


class TestFiles:
    def test_round_trip_is_bitwise(self, bank: AdapterBank, tmp_path: Path) -> None:
        bank.save("one", tmp_path / "one")
        bank.load("again", tmp_path / "one")
        assert torch.equal(logits(bank, "again"), logits(bank, "one"))
        assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in (tmp_path / "one").iterdir())

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
    def test_plain_peft_and_transformers_give_the_same(
        self, tiny_folder: str, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        from transformers import AutoModelForCausalLM

        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        add(bank, "policy", **options)
        bank.save("policy", tmp_path / "policy")
        base = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
        plain = PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
        with torch.no_grad():
            assert torch.equal(plain(IDS).logits, logits(bank, "policy"))
        if "use_dora" not in options:  # transformers 5.23 drops DoRA's magnitudes, those written by peft too
            by_name = AutoModelForCausalLM.from_pretrained(str(tmp_path / "policy")).eval()  # it reads the base's name
            with torch.no_grad():
                assert torch.equal(by_name(IDS).logits, logits(bank, "policy"))
        saved = json.loads((tmp_path / "policy" / "adapter_config.json").read_text(encoding="utf-8"))
        assert saved["base_model_name_or_path"] == tiny_folder
        assert saved["inference_mode"] is True
        assert bank.config("policy").inference_mode is False

    def test_an_adapter_from_peft_is_loaded(self, tiny_folder: str, sft_adapter: str) -> None:
        from transformers import AutoModelForCausalLM

        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        bank.load("sft", sft_adapter)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), sft_adapter).eval()
        with torch.no_grad():
            assert torch.equal(plain(IDS).logits, logits(bank, "sft"))

    def test_frozen_loads_a_folder_once(self, bank: AdapterBank, tmp_path: Path) -> None:
        bank.save("one", tmp_path / "one")
        bank.save("two", tmp_path / "two")
        first = bank.frozen(tmp_path / "one", "reference")
        assert bank.frozen(str(tmp_path / "two" / ".." / "one"), "judge") == first == "reference"
        assert bank.frozen(tmp_path / "two", "reference") == "reference-2"

    def test_a_trainable_copy_is_not_taken_for_the_frozen_one(self, bank: AdapterBank, tmp_path: Path) -> None:
        bank.save("one", tmp_path / "one")
        bank.load("policy", tmp_path / "one", trainable=True)
        assert bank.frozen(tmp_path / "one", "reference") == "reference"
        assert bank.trainable == {"one", "policy"}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def drop_layer(folder: Path) -> None:
    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if "layers.1." not in k})


def add_layer(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: (
            tensors | {k.replace("layers.1.", "layers.7."): t.clone() for k, t in tensors.items() if "layers.1." in k}
        ),
    )


def widen(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: {
            k: torch.zeros(*t.shape[:-1], t.shape[-1] + 1) if k.endswith("lora_A.weight") else t
            for k, t in tensors.items()
        },
    )


def poison(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: {k: torch.full_like(t, float("nan")) if "layers.1" in k else t for k, t in tensors.items()},
    )


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing layer": (drop_layer, r"doesn't fit this base: 14 tensors are missing"),
    "keys too many": (add_layer, r"14 have no place in this base"),
    "another width": (widen, r"is \(4, 33\), this base needs \(4, 32\)"),
    "NaN weights": (poison, "holds NaN or infinite weights"),
    "a truncated file": (truncate, "not a whole safetensors file"),
    "a pickle": (pickled, "is a pickle, which can run code"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has a config but no adapter_model.safetensors",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "a config that isn't JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "no folder": (shutil.rmtree, "there is no adapter folder"),
    "targets of another model": (
        lambda folder: edit_config(folder, target_modules=["c_attn"]),
        "of which this model has none",
    ),
    "another kind of adapter": (
        lambda folder: edit_config(folder, peft_type="IA3"),
        "says that it is a IA3 adapter, and its file holds tensors of another kind",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("others", [True, False])
def test_what_can_not_be_loaded_leaves_the_bank_as_it_was(
    bank: AdapterBank, tmp_path: Path, what: str, others: bool
) -> None:
    bank.save("one", tmp_path / "bad")
    spoil, message = BROKEN[what]
    spoil(tmp_path / "bad")
    bank = bank if others else tiny_bank()
    if others:
        bank.activate("one")
    before, seen = flags(bank), logits(bank, "one" if others else None)
    with pytest.raises(DataError, match=message) as caught:
        bank.load("new", tmp_path / "bad", asked_by="policy.from")
    assert "policy.from" in str(caught.value)
    assert flags(bank) == before
    assert torch.equal(logits(bank, "one" if others else None), seen)
    assert "lora" not in str(bank.base).lower() or others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "this base needs"),
        ({"num_hidden_layers": 3}, "tensors are missing"),
        ({"num_hidden_layers": 1}, "have no place"),
    ],
)
def test_an_adapter_of_another_base(
    tiny_folder: str, write_sft_adapter: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter = write_sft_adapter(tiny_folder, tmp_path / "sft", target_modules=["q_proj", "v_proj"])
    other = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "other", **changes), device="cpu")
    edit_config(tmp_path / "sft", base_model_name_or_path="/gone")  # only the shapes can tell
    with pytest.raises(DataError, match=message):
        other.load("sft", adapter)
    assert other.adapters == []


def test_an_adapter_of_another_base_of_the_same_shapes(tiny_folder: str, sft_adapter: str, tmp_path: Path) -> None:
    """PEFT can't tell; the folder that the adapter names can."""
    other = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "other", seed=5), device="cpu")
    with pytest.raises(DataError, match="whose weights are not this base's"):
        other.load("sft", sft_adapter)
    assert other.adapters == []
    copy = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "copy"), dtype="bfloat16", device="cpu")
    copy.load("sft", sft_adapter)  # the same weights elsewhere, cast
    assert copy.adapters == ["sft"]


class TestGradientCheckpointing:
    def gradient(self, bank: AdapterBank) -> Tensor:
        with bank.using("one", train=True):
            loss = forward(bank, fake_rollout(), 1.0).logprobs.sum()
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in bank.parameters("one").values() if p.grad is not None])
        for parameter in bank.parameters("one").values():
            parameter.grad = None
        return gradient

    def test_gives_the_same_gradient(self) -> None:
        bank = tiny_bank()
        add(bank, "one", seed=1)
        add(bank, "two", seed=2)
        plain = self.gradient(bank)
        bank.trunk.options = bank.trunk.prepare(PassOptions(recompute=True))
        assert any(
            getattr(module, "gradient_checkpointing", False) for module in bank.base.modules()
        )  # it is really on
        again = self.gradient(bank)
        assert float((again - plain).norm() / plain.norm()) < 1e-6

    def test_other_adapters_may_be_looked_through_in_between(self) -> None:
        bank = tiny_bank()
        add(bank, "one", seed=1)
        add(bank, "two", seed=2)
        bank.trunk.options = bank.trunk.prepare(PassOptions(recompute=True))
        plain = self.gradient(bank)
        with bank.using("one", train=True):
            loss = forward(bank, fake_rollout(), 1.0).logprobs.sum()
            logits(bank, "two")
            logits(bank, None)
            loss.backward()
        found = torch.cat([p.grad.flatten() for p in bank.parameters("one").values() if p.grad is not None])
        assert torch.equal(found, plain)

    def test_scoring_never_drops_anything(self) -> None:
        bank = tiny_bank()
        add(bank, "one", seed=1, dropout=0.5)
        before = view_output(bank, View("one"), fake_rollout(), 1.0, PassLimits(2)).logprobs
        bank.trunk.options = bank.trunk.prepare(PassOptions(recompute=True))
        assert torch.equal(view_output(bank, View("one"), fake_rollout(), 1.0, PassLimits(2)).logprobs, before)


def test_a_value_head_is_zero_and_draws_no_random_number() -> None:
    bank, before = tiny_bank(), torch.get_rng_state()
    head = bank.add_value_head("value")
    assert torch.equal(torch.get_rng_state(), before)
    assert (head.weight.dtype, head.weight.shape) == (torch.float32, (1, 32))
    assert not head.weight.any()
    assert not head.bias.any()
    assert head.weight.requires_grad


def test_the_bases_own_dropout_is_off_for_good() -> None:
    bank = AdapterBank(tiny_model(attention_dropout=0.5), tiny_bank().tokenizer)
    bank.base.train()
    with torch.no_grad():
        assert torch.equal(bank.base(IDS).logits, bank.base(IDS).logits)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere/at/all", "could not be loaded|no tokenizer"), (".", "could not be loaded|no tokenizer")],
)
def test_a_model_that_is_not_there(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        AdapterBank.from_pretrained(str(tmp_path / path))


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "small", vocab_size=200)
    with pytest.raises(DataError, match="knows 260 tokens, the embedding has 200 rows"):
        AdapterBank.from_pretrained(folder)
