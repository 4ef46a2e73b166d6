"""What is said of each kind of adapter: of files by their names and configs, of configs that are asked for, of bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from marl_core.artifacts.adapter_files import AdapterFiles, read_adapter
from marl_core.artifacts.adapter_kinds import brings_tokens, config_refusal, refusals, saved_modules
from marl_core.artifacts.kind_options import base_refusal
from marl_core.artifacts.kind_table import KINDS, known_kind, tried_on
from marl_core.testing import tiny_model
from marl_core.testing.kinds import SMALL_KINDS, small_config

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def write(folder: Path, name: str, **changes: Any) -> AdapterFiles:
    """An adapter of this kind as peft alone writes it."""
    torch.manual_seed(0)
    PeftModel(tiny_model(tie_word_embeddings=False), small_config(name, **changes)).save_pretrained(str(folder))
    return read_adapter(folder, "it")


def edited(files: AdapterFiles, **changes: Any) -> AdapterFiles:
    file = files.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return read_adapter(files.folder, "it")


class TestFiles:
    @pytest.mark.parametrize("name", SMALL_KINDS)
    def test_what_peft_writes_is_taken(self, tmp_path: Path, name: str) -> None:
        """Every tensor is known as the adapter's own, and nothing else is seen in the file."""
        files = write(tmp_path / "it", name)
        assert refusals(files, "shared") == []
        assert refusals(files, "merged") == []
        assert saved_modules(files) == {}
        assert files.score_keys == []
        assert all(files.part(tensor) for tensor in files.shapes)
        layers = {files.adapted_layer(tensor) for tensor in files.shapes} - {None}
        targets = small_config(name).target_modules
        assert all(layer and layer.rsplit(".", 1)[-1] in targets for layer in layers)
        assert layers or name == "unilora"  # one vector for all layers
        assert brings_tokens(files) == (name == "trainable_tokens")

    @pytest.mark.parametrize("name", ["oft", "loha", "vera", "tinylora", "lora"])
    def test_a_score_head_is_told_from_the_adapter(self, tmp_path: Path, name: str) -> None:
        files = write(tmp_path / "it", name)
        head = {"base_model.model.score.weight": torch.zeros(1, 32)}
        save_file({**load_file(files.weights), **head}, files.weights)
        files = read_adapter(files.folder, "it")
        assert files.score_keys == ["base_model.model.score.weight"]
        assert saved_modules(files) == {}
        assert refusals(files, "shared") == []
        (sentence,) = refusals(files, "merged")
        assert "is a reward adapter (it has a score head)" in sentence

    @pytest.mark.parametrize("name", ["oft", "vera", "ia3"])
    def test_whole_weights_beside_it(self, tmp_path: Path, name: str) -> None:
        files = write(tmp_path / "it", name)
        whole = {"base_model.model.model.norm.weight": torch.zeros(32)}
        save_file({**load_file(files.weights), **whole}, files.weights)
        (sentence,) = refusals(read_adapter(files.folder, "it"), "shared")
        assert "brings whole weights of model.norm (modules_to_save) beside its own" in sentence

    @pytest.mark.parametrize("name", ["oft", "lora", "hra"])
    def test_the_output_layer(self, tmp_path: Path, name: str) -> None:
        files = write(tmp_path / "it", name, target_modules=["q_proj", "lm_head"])
        assert any("adapts the output layer (lm_head)" in line for line in refusals(files, "shared"))

    @pytest.mark.parametrize("name", ["boft", "loha", "ia3"])
    def test_names_that_peft_does_not_read(self, tmp_path: Path, name: str) -> None:
        files = write(tmp_path / "it", name)
        compiled = {
            key.replace("model.model.", "model._orig_mod.model."): t for key, t in load_file(files.weights).items()
        }
        save_file(compiled, files.weights)
        (sentence,) = refusals(read_adapter(files.folder, "it"), "shared")
        assert "in a way that peft doesn't read" in sentence
        named = {f"{key.replace('._orig_mod', '')}.policy": tensor for key, tensor in compiled.items()}
        save_file(named, files.weights)
        (sentence,) = refusals(read_adapter(files.folder, "it"), "shared")
        assert "an adapter's name in its tensors' names ('policy')" in sentence

    def test_another_adapter_s_config(self, tmp_path: Path) -> None:
        files = edited(write(tmp_path / "it", "oft"), peft_type="HRA")
        assert "is a HRA adapter, and its file holds tensors of another kind (OFT)" in refusals(files, "shared")[0]

    def test_no_kind_at_all(self, tmp_path: Path) -> None:
        (sentence,) = refusals(edited(write(tmp_path / "it", "oft"), peft_type=None), "merged")
        assert "doesn't say what kind of adapter it is" in sentence

    def test_ranks_that_were_moved(self, tmp_path: Path) -> None:
        files = edited(
            write(tmp_path / "it", "adalora"), rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True, False]}
        )
        (sentence,) = refusals(files, "shared")
        assert "the bank holds AdaLoRA at one rank" in sentence

    def test_biases_of_the_base(self, tmp_path: Path) -> None:
        (sentence,) = refusals(edited(write(tmp_path / "it", "oft"), bias="oft_only"), "shared")
        assert "was trained with bias: 'oft_only'" in sentence

    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.refused])
    def test_kinds_that_the_base_cannot_hold(self, tmp_path: Path, name: str) -> None:
        files = edited(write(tmp_path / "it", "lora"), peft_type=name.upper())
        (sentence,) = refusals(files, "shared")
        assert sentence == f"{files.folder} is a {name.upper()} adapter. {KINDS[name].refused}"

    def test_a_kind_of_a_stranger_is_left_to_who_loads_it(self, tmp_path: Path) -> None:
        files = edited(write(tmp_path / "it", "lora"), peft_type="LEARNED_BIAS")
        save_file({"base_model.model.model.layers.0.mlp.up_proj.learned_bias_b": torch.zeros(64)}, files.weights)
        assert refusals(read_adapter(files.folder, "it"), "shared") == []


SAID: dict[str, tuple[str, dict[str, Any], str]] = {
    "pissa": (
        "lora",
        {"init_lora_weights": "pissa_niter_4"},
        "policy.options.init_lora_weights: 'pissa_niter_4' rewrites the base",
    ),
    "kasa": (
        "LORA",
        {"kasa_config": {}},
        "policy.options.kasa_config: such a LoRA rewrites the base's weights when it is made",
    ),
    "eva": ("lora", {"init_lora_weights": "eva"}, "'eva' needs a pass over data"),
    "random": (
        "lora",
        {"init_lora_weights": False},
        "policy.options.init_lora_weights: false starts away from the base",
    ),
    "random oft": ("oft", {"init_weights": False}, "false starts away from the base: step-0 KL isn't 0. Use true."),
    "random ia3": ("ia3", {"init_ia3_weights": False}, "policy.options.init_ia3_weights: false starts away"),
    "fourierft by default": ("fourierft", {}, "policy.options.init_weights: false starts away from the base"),
    "c3a by default": ("c3a", {}, "policy.options.init_weights: 'xavier_uniform' starts away from the base"),
    "vb-lora": ("vblora", {}, "policy.options: VB-LoRA doesn't start as the base, so step-0 KL isn't 0"),
    "para": ("deft", {"para": True}, "policy.options: PaRa doesn't start as the base"),
    "velora": (
        "lora",
        {"velora_config": {}},
        "runs in train mode only, which marl doesn't use: it would be a plain LoRA",
    ),
    "monteclora": ("lora", {"monteclora_config": {}}, "the ratio of old and new log-probs would be noise"),
    "alora": ("lora", {"alora_invocation_tokens": [1]}, "through marl's it would never act, and nothing would learn"),
    "qalora": ("lora", {"use_qalora": True}, "works on GPTQ bases only"),
    "modules": ("oft", {"modules_to_save": ["norm"]}, "policy.options.modules_to_save: changes modules of the base"),
    "bias": ("boft", {"bias": "boft_only"}, "policy.options.bias: 'boft_only' trains biases of the base"),
    "the head": (
        "oft",
        {"target_modules": ["q_proj", "lm_head"]},
        "'lm_head' is the output layer, which marl applies itself",
    ),
    "lily": ("LILY", {}, "policy.options: Lily's router averages over the whole sequence"),
    "pvera": ("pvera", {}, "PVeRA draws its weights at random in training"),
    "prefix": ("prefix_tuning", {}, "Prefix tuning adds tokens instead of changing layers"),
    "poly": ("poly", {}, "Poly needs a second pass, task ids or a model of its own beside the base"),
    "frod": ("frod", {}, "FRoD rebuilds a part of itself from the base's weights"),
}


class TestConfigs:
    @pytest.mark.parametrize("what", SAID)
    def test_said(self, what: str) -> None:
        kind, options, sentence = SAID[what]
        (found,) = config_refusal(kind, options, "policy.options")
        assert sentence in found

    @pytest.mark.parametrize("name", SMALL_KINDS)
    def test_whole_configs_of_peft_are_taken(self, name: str) -> None:
        config = small_config(name)
        said = list(config_refusal(config.peft_type, vars(config), "adapter 'x'"))
        wanted = ["doesn't start as the base"] if name in ("vblora", "unilora") else []
        assert len(said) == len(wanted)
        assert all(what in line for what, line in zip(wanted, said, strict=True))
        assert list(config_refusal(config.peft_type, vars(config), "adapter 'x'", fresh=False)) == []

    def test_where_it_starts_matters_only_where_it_is_fresh(self) -> None:
        asked: list[tuple[str, dict[str, Any]]]
        asked = [("lora", {"init_lora_weights": False}), ("c3a", {}), ("vblora", {})]
        for kind, options in asked:
            assert list(config_refusal(kind, options, "x", fresh=False)) == []
        assert list(config_refusal("lora", {"init_lora_weights": "olora"}, "x", fresh=False)) != []

    def test_words_and_names_of_the_caller(self) -> None:
        (words,) = config_refusal("lora", {"init_lora_weights": "olora"}, "adapter 'x'")
        assert words.startswith("adapter 'x': init_lora_weights: 'olora' rewrites")
        (own,) = config_refusal("lora", {"init_lora_weights": "olora"}, "policy", names={"init_lora_weights": "init"})
        assert own.startswith("policy.init: 'olora' rewrites")
        assert own.endswith("Use true, gaussian, orthogonal or mica.")

    def test_switched_off_they_are_nothing(self) -> None:
        options: dict[str, Any] = {
            "kasa_config": None,
            "use_qalora": False,
            "bias": "none",
            "modules_to_save": [],
            "target_modules": "all-linear",
        }
        assert list(config_refusal("LORA", options, "x")) == []


class TestBases:
    @pytest.mark.parametrize(
        ("kind", "options", "tried"),
        [
            ("lora", {}, {"bnb-4bit", "bnb-8bit", "another"}),
            ("lora", {"use_dora": True}, {"bnb-4bit"}),
            ("lora", {"init_lora_weights": "mica"}, set()),
            ("lora", {"init_lora_weights": "orthogonal"}, set()),
            ("oft", {}, {"bnb-4bit", "bnb-8bit"}),
            ("loha", {}, {"bnb-8bit"}),
            ("c3a", {}, {"bnb-4bit"}),
            ("peanut", {}, set()),
            ("a_stranger's", {}, set()),
        ],
    )
    def test_quantized(self, kind: str, options: dict[str, Any], tried: set[str]) -> None:
        for quantization in ("bnb-4bit", "bnb-8bit", "another"):
            said = list(base_refusal(kind, options, "policy", quantization=quantization))
            assert (said == []) == (quantization in tried)
            assert all(f"policy: quantization {quantization}: " in line for line in said)
        assert list(base_refusal(kind, options, "policy")) == []

    def test_those_that_were_tried_are_named(self) -> None:
        (said,) = base_refusal("peanut", {}, "policy", quantization="bnb-8bit")
        assert f"Kinds that were: {', '.join(tried_on('bnb-8bit'))}." in said
        assert "oft" in tried_on("bnb-8bit")
        assert "gralora" not in tried_on("bnb-8bit")
        (none,) = base_refusal("oft", {}, "policy", quantization="mine")
        assert none.endswith("Kinds that were: lora.")

    def test_half_precision(self) -> None:
        (said,) = base_refusal("ln_tuning", {}, "policy", dtype="bfloat16")
        assert "PEFT keeps it in bfloat16, in which small steps round away; use model.dtype: float32" in said
        assert list(base_refusal("ln_tuning", {}, "policy", dtype="bfloat16", learns=False)) == []
        assert list(base_refusal("ln_tuning", {}, "policy")) == []
        assert list(base_refusal("oft", {}, "policy", dtype="bfloat16")) == []


def test_options_make_another_kind() -> None:
    assert known_kind("LORA", vars(LoraConfig(use_dora=True))).start == "rounded"
    assert known_kind("LORA", vars(LoraConfig())).start == "base"
    assert known_kind("LORA", {"init_lora_weights": "orthogonal"}).start == "rounded"
    assert known_kind("LORA", {"lora_bias": True}).merge == "bias"
    assert known_kind(LoraConfig().peft_type).title == "LoRA"


def test_a_config_of_pefts_is_no_section() -> None:
    from peft import OFTConfig

    from marl_core import ConfigError
    from marl_core.config.run_config import RunConfig

    with pytest.raises(ConfigError, match=r"a OFTConfig object can't be kept in a run folder; give the kind by name"):
        RunConfig(model={"path": "m"}, policy=OFTConfig(oft_block_size=8), reference="none", reward=len)  # type: ignore[arg-type]


def test_a_reward_adapter_is_no_policy(reward_adapter: str) -> None:
    from marl_core.artifacts.adapter_kinds import not_a_policy

    assert "is a reward adapter (it has a score head), not a policy to continue" in str(
        not_a_policy(read_adapter(reward_adapter, "it"))
    )
