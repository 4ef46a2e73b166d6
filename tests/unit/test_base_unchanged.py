"""The base is the base: whatever makes or loads an adapter, its bytes are what they were, or nothing goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from marl_core import AdapterBank, ConfigError, DataError, Quantization
from marl_core.bank import adapters, peft_adapters
from marl_core.bank import guard as guard_module
from marl_core.bank.identity.digest import digest
from marl_core.testing import tiny_bank
from marl_core.testing.kinds import make_config

Write = Callable[..., str]
IDS = torch.tensor([[1, 70, 80, 90, 100, 2]])


def bits(bank: AdapterBank) -> dict[str, Tensor]:
    """A copy of every tensor of the bare base, buffers too."""
    tensors = {**dict(bank.base.named_parameters()), **dict(bank.base.named_buffers())}
    return {n.replace(".base_layer", ""): t.detach().clone() for n, t in tensors.items() if "lora_" not in n}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def bare_logits(bank: AdapterBank) -> Tensor:
    with bank.bare() as base:
        found: Tensor = base(input_ids=IDS).logits
    return found


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", **options})


REWRITING: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": peft.KasaConfig()},
}
NEEDING_MORE: dict[str, dict[str, Any]] = {
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "layers twice": {"layer_replication": [(0, 2), (1, 2)]},
    "tokens": {"trainable_token_indices": [5]},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias of its own": {"lora_bias": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "one rank": {"r": 1},
    "everything": {"target_modules": "all-linear"},
}


@pytest.fixture(params=["first", "second"])
def bank(request: pytest.FixtureRequest) -> AdapterBank:
    """A bank with no adapter, and one with a policy."""
    return tiny_bank(policy="policy" if request.param == "second" else None)


def asked(options: dict[str, Any]) -> peft.LoraConfig:
    """A config with these options, whether or not what they need is installed."""
    made = config()
    for name, value in options.items():
        setattr(made, name, value)
    return made


class TestByName:
    """Known options are refused before anything is computed."""

    @pytest.mark.parametrize("name", [*REWRITING, *NEEDING_MORE])
    def test_made(self, bank: AdapterBank, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peft_adapters, "make", lambda *_: pytest.fail("it was made"))
        options = {**REWRITING, **NEEDING_MORE}[name]
        before, adapters = bits(bank), bank.adapters
        with pytest.raises(
            ConfigError,
            match=r"adapter 'x': .*(which all roles share|replicates the base's layers|changes modules of the base)",
        ) as error:
            bank.add("x", asked(options))
        assert any(option in str(error.value) for option in options)
        assert same(bits(bank), before)
        assert bank.adapters == adapters

    @pytest.mark.parametrize("name", ["pissa", "kasa"])
    def test_loaded(self, tiny_folder: str, tmp_path: Path, name: str) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
        peft.get_peft_model(model, config(**REWRITING[name])).save_pretrained(str(tmp_path))
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        before = bits(bank)
        with pytest.raises(DataError, match=r"rewrites the base's weights when it is (loaded|made)"):
            bank.load("x", tmp_path)
        assert same(bits(bank), before)


class TestMeasured:
    """An option that nobody named: here the known ones, with the list of names taken away."""

    @pytest.fixture(autouse=True)
    def no_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(adapters, "config_refusal", lambda *_, **__: ())
        monkeypatch.setattr(peft_adapters, "refusals", lambda *_: [])

    @pytest.mark.parametrize("name", ["pissa", "pissa, fast", "kasa"])
    def test_made(self, name: str) -> None:
        """What PEFT replaced is put back."""
        bank = tiny_bank()
        before, logits = bits(bank), bare_logits(bank)
        with pytest.raises(
            ConfigError,
            match=r"adapter 'x': peft rewrote the base's weights \(q_proj, o_proj of layers 0-1\).*put back",
        ) as error:
            bank.add("x", config(**REWRITING[name]))
        assert next(iter(REWRITING[name])) in str(error.value)
        assert bank.adapters == []
        assert same(bits(bank), before)
        assert torch.equal(bare_logits(bank), logits)
        bank.add("x", config(), seed=0)  # the bank goes on
        assert same(bits(bank), before)

    @pytest.mark.parametrize("name", ["pissa", "olora"])
    def test_made_beside_a_policy(self, tiny_folder: str, name: str) -> None:
        """OLoRA writes a float32 base in place: it is read again."""
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        bank.add("policy", config(), seed=0)
        before, logits = bits(bank), bare_logits(bank)
        with pytest.raises(ConfigError, match=r"peft rewrote the base's weights .* it has been put back"):
            bank.add("x", config(**REWRITING[name]))
        assert bank.adapters == ["policy"]
        assert same(bits(bank), before)
        assert torch.equal(bare_logits(bank), logits)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["pissa", "kasa"])
    def test_loaded(self, tiny_folder: str, tmp_path: Path, name: str, dtype: str) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
        peft.get_peft_model(model, config(**REWRITING[name])).save_pretrained(str(tmp_path))
        bank = AdapterBank.from_pretrained(tiny_folder, dtype=dtype, device="cpu")
        before, logits = bits(bank), bare_logits(bank)
        with pytest.raises(DataError, match=r"peft rewrote the base's weights .*put back, and the adapter isn't added"):
            bank.load("x", tmp_path)
        assert bank.adapters == []
        assert same(bits(bank), before)
        assert torch.equal(bare_logits(bank), logits)

    def test_a_reward_adapter(self, tiny_folder: str, reward_adapter: str, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(reward_adapter, tmp_path / "rm"))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "olora"}))
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        before = bits(bank)
        with pytest.raises(DataError, match="peft rewrote the base's weights"):
            bank.load_reward(folder)
        assert (bank.adapters, bank.heads, bank.reward_views) == ([], {}, {})
        assert same(bits(bank), before)

    def test_a_failure_halfway(self, bank: AdapterBank) -> None:
        """KaSA truncates q_proj of layer 0 and then fails on the smaller k_proj: the base and the bank are as they were."""
        narrow = tiny_bank(num_key_value_heads=1, policy="policy" if bank.adapters else None)
        before, logits, adapters = bits(narrow), bare_logits(narrow), narrow.adapters
        with pytest.raises(ConfigError, match="peft can't add it"):
            narrow.add("x", config(r=8, target_modules=["q_proj", "k_proj"], kasa_config=peft.KasaConfig()))
        assert narrow.adapters == adapters
        assert same(bits(narrow), before)
        assert torch.equal(bare_logits(narrow), logits)
        narrow.add("x", config(), seed=0)
        with narrow.using("x") as model, torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, logits)

    def test_four_bit(self, wide_folder: str) -> None:
        """A packed base counts by its packed bytes."""
        packed = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        bank = AdapterBank.from_pretrained(wide_folder, device="cpu", quantization=Quantization(packed))
        before = bits(bank)
        with pytest.raises(ConfigError, match="peft rewrote the base's weights"):
            bank.add("x", config(init_lora_weights="olora"))
        assert same(bits(bank), before)
        bank.add("x", config(), seed=0)


class TestWrittenInPlace:
    """What was there is lost: the bank says so, then and later."""

    @pytest.mark.parametrize("what", ["parameter", "buffer"])
    def test_it_is_refused_for_good(self, bank: AdapterBank, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        make = peft_adapters.make

        def spoiling(*arguments: Any) -> Any:
            found = make(*arguments)
            tensors = bank.base.named_parameters() if what == "parameter" else bank.base.named_buffers()
            next(t for name, t in tensors if "lora_" not in name).data.view(-1)[3:4].add_(1.0)
            return found

        monkeypatch.setattr(peft_adapters, "make", spoiling)
        with pytest.raises(ConfigError, match="can't be put back, so this bank can't be used any more"):
            bank.add("x", config())
        for use in (lambda: bank.activate(None), lambda: bank.add("y", config()), lambda: bare_logits(bank)):
            with pytest.raises(
                ConfigError, match="This bank can't be used: making the adapter 'x' changed the base's weights"
            ):
                use()

    def test_while_weights_are_loaded(
        self, tiny_folder: str, sft_adapter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        before, fill = bits(bank), peft_adapters.load_weights

        def replacing(*arguments: Any) -> None:
            fill(*arguments)
            layer = bank.base.model.layers[1].mlp.down_proj
            layer = getattr(layer, "base_layer", layer)
            layer.weight = torch.nn.Parameter(layer.weight + 1.0)

        monkeypatch.setattr(peft_adapters, "load_weights", replacing)
        with pytest.raises(
            DataError, match=r"rewrote the base's weights \(down_proj of layer 1\).*it has been put back"
        ):
            bank.load("x", sft_adapter)
        assert same(bits(bank), before)


class TestNoFalseAlarm:
    @pytest.mark.parametrize("name", HARMLESS)
    @pytest.mark.parametrize("policy", [None, "policy"])
    def test_harmless_options(self, policy: str | None, name: str) -> None:
        bank = tiny_bank(policy=policy, attention_bias=True, tie_word_embeddings=False)
        before = bits(bank)
        bank.add("x", config(**HARMLESS[name]), seed=0)
        after = bits(bank)
        assert all(
            torch.equal(after.get(name, after.get(_saved(name), tensor)), tensor) for name, tensor in before.items()
        )

    def test_someone_else_wrote_between_two_adapters(self) -> None:
        """The second adapter isn't blamed for it."""
        bank = tiny_bank(policy="policy")
        with torch.no_grad():
            bank.base.model.norm.weight.add_(0.5)
        bank.base.model.embed_tokens.weight.data = bank.base.model.embed_tokens.weight.data * 2
        bank.add("x", config(), seed=0)
        assert bank.adapters == ["policy", "x"]

    def test_the_base_is_read_once_an_adapter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []

        def counted(tensor: Tensor) -> Tensor:
            read.append(tensor.numel())
            return digest(tensor)

        monkeypatch.setattr(guard_module, "digest", counted)
        bank = tiny_bank()
        once = sum(t.numel() for t in {id(t): t for t in [*bank.base.parameters(), *bank.base.buffers()]}.values())
        bank.add("one", make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
        assert sum(read) == 2 * once
        bank.add("two", make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
        assert sum(read) == 3 * once

    def test_removing_leaves_the_base(self) -> None:
        bank = tiny_bank()
        before = bits(bank)
        bank.add("one", config(), seed=0)
        bank.add("two", config(target_modules=["down_proj"]), seed=0)
        bank.remove("one")
        bank.remove("two")
        assert same(bits(bank), before)


def _saved(name: str) -> str:
    """Where PEFT keeps the original of a module that it saves with an adapter."""
    module, _, attribute = name.rpartition(".")
    return f"{module}.original_module.{attribute}"
