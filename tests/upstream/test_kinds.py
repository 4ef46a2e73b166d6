"""PEFT's kinds of adapters: the facts of marl's table, and the faults of single kinds that marl keeps away from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor

from marl_core.artifacts.kind_table import KINDS, known_kind
from marl_core.testing import tiny_model
from marl_core.testing.kinds import SMALL_KINDS, move, small_config

Still = Callable[[bool, str], None]
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
TABLE = "marl_core/artifacts/kind_table.py"
pytestmark = pytest.mark.filterwarnings("ignore")


def made(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    base: Any = tiny_model(tie_word_embeddings=False)
    torch.manual_seed(seed)
    return PeftModel(base.to(dtype), small_config(name, **changes)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits.float()
    return found


def bare(dtype: torch.dtype = torch.float32) -> Tensor:
    model: Any = tiny_model(tie_word_embeddings=False)
    return logits(model.to(dtype))


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


class TestTable:
    def test_every_kind_that_peft_knows_stands_in_it(self) -> None:
        assert {kind.value.lower() for kind in peft.PeftType} == set(KINDS) - {"bone"}  # bone: of older versions

    def test_every_kind_that_is_held_has_a_small_config(self) -> None:
        held = {name for name, kind in KINDS.items() if not kind.refused}
        assert {kind for kind, _ in SMALL_KINDS.values()} == held

    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.refused])
    def test_parts_begin_as_peft_s_own_prefix_does(self, name: str) -> None:
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        assert PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType(name.upper())].startswith(KINDS[name].parts)

    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.initial])
    def test_the_option_that_says_how_it_starts(self, name: str) -> None:
        if name in ("lily", "osf", "frod", "adamss", "pvera", "bone") or KINDS[name].merge == "no":
            return
        fields = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())].__dataclass_fields__
        option = fields.get(KINDS[name].initial)
        assert option is None or option.default == KINDS[name].default
        assert option is not None or name == "ln_tuning"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("name", SMALL_KINDS)
    def test_how_it_starts(self, name: str, dtype: torch.dtype) -> None:
        kind, options = SMALL_KINDS[name]
        start, apart = known_kind(kind, options).start, off(logits(made(name, dtype)), bare(dtype))
        if start == "base":
            assert apart == 0
        elif start == "rounded":
            assert apart < (1e-4 if dtype == torch.float32 else 1.0)
        else:
            assert dtype == torch.bfloat16 or apart > 1e-4

    @pytest.mark.parametrize("name", SMALL_KINDS)
    def test_the_base_stays_as_it_is(self, name: str) -> None:
        model = made(name)
        own = model.get_base_model().state_dict()
        plain = tiny_model(tie_word_embeddings=False).state_dict()
        found = {key.replace(".base_layer", ""): tensor for key, tensor in own.items()}
        assert all(torch.equal(found[key], plain[key]) for key in plain)

    @pytest.mark.parametrize("name", SMALL_KINDS)
    def test_who_is_held_in_the_base_s_dtype(self, name: str) -> None:
        kind = KINDS[SMALL_KINDS[name][0]]
        dtypes = {parameter.dtype for parameter in made(name, torch.bfloat16).parameters() if parameter.requires_grad}
        assert dtypes == {torch.bfloat16 if kind.follows_base else torch.float32}

    @pytest.mark.parametrize("name", SMALL_KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_what_learns_is_in_the_file(self, name: str, dtype: torch.dtype) -> None:
        """But for what the table says that mustn't learn."""
        model, kind = made(name, dtype), KINDS[SMALL_KINDS[name][0]]
        saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
        lost = [n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
        assert all(any(part in name.split(".") for part in kind.never_learns) for name in lost)

    @pytest.mark.parametrize("name", [name for name in SMALL_KINDS if KINDS[SMALL_KINDS[name][0]].merge == "weight"])
    def test_merged_it_is_what_it_was(self, name: str) -> None:
        if known_kind(*SMALL_KINDS[name]).merge != "weight":
            return
        model = made(name)
        move(model)
        assert off(logits(copy.deepcopy(model).merge_and_unload()), logits(model)) < 1e-4


def test_adalora_learns_a_number_that_its_file_lacks(still: Still) -> None:
    """Half precision: PEFT wraps `ranknum` anew when it casts, and a new parameter learns."""
    model = made("adalora", torch.bfloat16)
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "ranknum" in name]
    saved = [name for name in get_peft_model_state_dict(model) if "ranknum" in name]
    still(len(learns) == 14 and saved == [], f"{TABLE} (never_learns)")
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    move(model)
    again = made("adalora", torch.bfloat16, seed=5)
    peft.set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert torch.equal(logits(again), logits(model))  # kept as it is, its file is whole


@pytest.mark.parametrize("name", ["hra", "miss bat"])
def test_kinds_that_pass_by_the_adapter_below(still: Still, name: str) -> None:
    below = get_peft_model(tiny_model(), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    wanted = logits(below.eval())
    over = PeftModel(below.get_base_model(), small_config(name, target_modules=["q_proj"])).eval()
    still(off(logits(over), wanted) > 0.01, "marl_core/bank/mount.py")


def test_kasa_does_nothing_to_packed_weights_and_rewrites_plain_ones(still: Still) -> None:
    base = tiny_model()
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    options: Any = {"kasa_config": peft.KasaConfig()}
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))
    after = base.model.layers[0].self_attn.q_proj.base_layer.weight
    still(not torch.equal(after, before), "marl_core/artifacts/kind_options.py (REWRITING_OPTIONS)")


def test_olora_rewrites_in_place(still: Still) -> None:
    base = tiny_model()
    weight = base.model.layers[0].self_attn.q_proj.weight
    pointer, version, before = weight.data_ptr(), weight._version, weight.detach().clone()
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora"))
    after = base.model.layers[0].self_attn.q_proj.base_layer.weight
    unseen = after.data_ptr() == pointer and after._version == version
    still(unseen and not torch.equal(after, before), "marl_core/bank/guard.py: neither address nor counter tells")


def test_fast_pissa_cannot_be_made_again(still: Still) -> None:
    options: Any = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_2"}
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model: Any = get_peft_model(tiny_model(), LoraConfig(**options))
        found.append(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.detach().clone())
    still(not torch.equal(*found), "marl_core/artifacts/kind_options.py (REWRITING)")


def test_frod_is_another_adapter_on_another_dtype(still: Still) -> None:
    def frod(dtype: torch.dtype) -> Any:
        base: Any = tiny_model()
        torch.manual_seed(0)
        config = peft.FrodConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        return PeftModel(base.to(dtype), config).eval()

    half = frod(torch.bfloat16)
    move(half, by=0.01)
    plain = frod(torch.float32)
    start = logits(plain)
    peft.set_peft_model_state_dict(plain, get_peft_model_state_dict(half))
    merged_effect = off(logits(plain), start)
    half_start = logits(frod(torch.bfloat16))
    own_effect = off(logits(half), half_start)
    still(abs(merged_effect - own_effect) > 0.1 * own_effect, TABLE)


def test_randlora_s_file_is_much_larger_than_what_it_learned(still: Still) -> None:
    """Its projections are listed once for each layer."""
    model = made("randlora")
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    still(held > 3 * learned, "marl_core/bank/peft_adapters.py: what is shared is cloned for the file")


def test_vblora_is_missing_once_for_each_layer(still: Still, tmp_path: Any) -> None:
    made("vblora").save_pretrained(str(tmp_path))
    missing = made("vblora", seed=1).load_adapter(str(tmp_path), "default").missing_keys
    still(len(missing) == 14, "marl_core/bank/merge.py (_missing)")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("packed")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)

    def load(bits: str) -> Any:
        config = BitsAndBytesConfig(**{f"load_in_{bits}": True})
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

    return load


@pytest.mark.parametrize("name", ["hra", "deft"])
def test_bytes_are_taken_for_weights(packed: Callable[[str], Any], still: Still, name: str) -> None:
    base = packed("8bit")
    wanted = logits(base)
    config = small_config(name, target_modules=["q_proj"])
    still(off(logits(PeftModel(base, config).eval()), wanted) > 0.01, f"{TABLE} (packed)")


def test_peanut_learns_from_bytes(packed: Callable[[str], Any], still: Still) -> None:
    """It starts as the base, so nothing shows it: the gradient is of other weights."""
    from transformers.integrations.bitsandbytes import dequantize_and_replace

    gradients = []
    for plain in (False, True):
        base = packed("8bit")
        if plain:
            base = dequantize_and_replace(base, quantization_config=base.config.quantization_config)
        torch.manual_seed(0)
        model = PeftModel(base, small_config("peanut", target_modules=["q_proj"])).eval()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        gradients.append(float(torch.cat(found).norm()))
    still(gradients[0] > 10 * gradients[1], f"{TABLE} (packed)")


def test_dora_on_8_bit(packed: Callable[[str], Any], still: Still) -> None:
    model = PeftModel(packed("8bit"), small_config("dora", target_modules=["q_proj"])).eval()
    try:
        model(input_ids=IDS, labels=IDS).loss.backward()
        logits(model)
    except AttributeError:
        return
    still(False, f"{TABLE} (packed)")
