"""Adapters of other trainers' runs as section policy: each kind of PEFT's, its options, and what is refused with its reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog
from marl_core.config.load import parse_config
from marl_core.config.yaml_text import parse_yaml
from marl_core.registry.families import FAMILIES
from marl_plugins.migrate import llamafactory, trl
from marl_plugins.migrate.adapter_section import CLASSES, kind_of
from marl_plugins.migrate.foreign_config import Carried

BASE = {"model_name_or_path": "owner/base", "reward_model": "saves/reward", "stage": "ppo"}
SCRIPT = """
from trl import PPOConfig, PPOTrainer
import peft
from peft import *

targets = ["q_proj", "v_proj"]
config = {config}
trainer = PPOTrainer(args=PPOConfig(learning_rate=1e-4), model=model, reward_model="rm", value_model=value, peft_config=config)
model = AutoModelForCausalLM.from_pretrained("owner/base")
"""
WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig(r=4, lora_alpha=8, use_dora=True)", {"r": 4, "alpha": 8.0, "dora": True, "targets": "all-linear", "dropout": 0.05}),
    (
        "LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=True, init_lora_weights='gaussian', target_modules=targets)",
        {"r": 4, "alpha": 8.0, "rslora": True, "init": "gaussian", "targets": ["q_proj", "v_proj"]},
    ),
    (
        "LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules='all-linear', rank_pattern={'q_proj': 8}, bias='none', "
        "task_type=peft.TaskType.CAUSAL_LM, init_lora_weights=True)",
        {"r": 4, "alpha": 8.0, "targets": "all-linear", "ranks": {"q_proj": 8}},
    ),
    (
        "peft.OFTConfig(oft_block_size=16, module_dropout=0.1, target_modules=targets)",
        {"use": "oft", "block": 16, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
    ),
    ("OFTConfig(use_cayley_neumann=False)", {"use": "oft", "exact": True, "targets": "all-linear"}),
    ("OFTConfig(r=8, oft_block_size=0)", {"use": "peft", "kind": "oft", "options": {"r": 8, "oft_block_size": 0}, "targets": "all-linear"}),
    (
        "IA3Config(target_modules={'k_proj', 'down_proj'}, feedforward_modules=['down_proj'])",
        {"use": "ia3", "feedforward": ["down_proj"], "targets": ["k_proj", "down_proj"]},
    ),
    ("MissConfig(r=32, init_weights='bat')", {"use": "miss", "r": 32, "form": "bat", "targets": "all-linear"}),
    ("MissConfig(r=32, init_weights='mini', mini_r=4)", {"use": "miss", "r": 32, "form": "mini", "mini": 4, "targets": "all-linear"}),
    ("TinyLoraConfig(u=13, weight_tying=1.0)", {"use": "tinylora", "u": 13, "tie": 1.0, "targets": "all-linear"}),
    (
        "TinyLoraConfig(u=13, init_v_bound=0.1)",
        {"use": "peft", "kind": "tinylora", "options": {"u": 13, "init_v_bound": 0.1}, "targets": "all-linear"},
    ),
    (
        "VeraConfig(r=128, vera_dropout=0.1, projection_prng_key=3)",
        {"use": "peft", "kind": "vera", "options": {"r": 128, "projection_prng_key": 3}, "targets": "all-linear", "dropout": 0.1},
    ),
    (
        "FourierFTConfig(n_frequency=100, init_weights=True)",
        {
            "use": "peft",
            "kind": "fourierft",
            "options": {"n_frequency": 100, "init_weights": True},
            "targets": "all-linear",
        },
    ),
    ("LNTuningConfig()", {"use": "peft", "kind": "ln_tuning"}),
]  # fmt: skip
OF_LLAMAFACTORY: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"use_dora": True, "use_rslora": True}, {"r": 8, "alpha": 16.0, "dora": True, "rslora": True, "targets": "all-linear"}),
    ({"loraplus_lr_ratio": 16.0, "lora_dropout": 0.1}, {"r": 8, "alpha": 16.0, "targets": "all-linear", "dropout": 0.1, "plus": 16.0}),
    ({"finetuning_type": "oft"}, {"use": "oft", "block": 32, "targets": "all-linear"}),
    (
        {"finetuning_type": "oft", "oft_block_size": 64, "oft_target": "q_proj,v_proj", "module_dropout": 0.1},
        {"use": "oft", "block": 64, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
    ),
    (
        {"finetuning_type": "oft", "oft_rank": 4, "oft_block_size": 0},
        {"use": "peft", "kind": "oft", "options": {"r": 4, "oft_block_size": 0}, "targets": "all-linear"},
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(config: str, arguments: str = "", more: str = "") -> Carried:
    Path("script.py").write_text(SCRIPT.replace("{config}", config) + more, encoding="utf-8")
    return trl.migrate(trl.read_arguments(arguments.split()), Path("script.py"))


@pytest.mark.parametrize(("config", "policy"), WRITTEN)
def test_a_config_of_peft_in_a_script(config: str, policy: dict[str, Any]) -> None:
    found = script(config)
    assert found.config["policy"] == {"start": "new", **policy}
    assert not [
        key
        for key, _ in found.refused
        if key.startswith(("LoraConfig", "OFTConfig", "lora_", config.partition("(")[0]))
    ]


@pytest.mark.parametrize(("given", "policy"), OF_LLAMAFACTORY)
def test_an_adapter_of_llamafactory(given: dict[str, Any], policy: dict[str, Any]) -> None:
    found = llamafactory.migrate({**BASE, **given})
    assert found.config["policy"] == {"start": "new", **policy}
    assert not set(given) & {key for key, _ in found.refused}


@pytest.mark.skipif("adapter" not in FAMILIES, reason="kinds of adapters beside LoRA are not in this checkout")
def test_what_is_written_is_a_config() -> None:
    """And `marl check` has nothing against the policy."""
    from marl_core import Plan

    policies = [script(config).config for config, _ in WRITTEN]
    policies += [llamafactory.migrate({**BASE, **given}).config for given, _ in OF_LLAMAFACTORY]
    page = (Path(__file__).parents[3] / "docs" / "from-trl.md").read_text(encoding="utf-8")
    told = [parse_yaml(cell, "docs/from-trl.md") for cell in re.findall(r"`(policy: [^`]+)`", page)]
    assert len(told) == 3
    policies += [{**policies[0], **section} for section in told]
    for config in policies:
        reward = {"use": "function", "target": "os:getcwd"}
        model = {**config["model"], "dtype": "float32"}  # LN-tuning wants it
        parsed = parse_config({**config, "model": model, "reward": reward}, "carried", Catalog.installed())
        assert not [finding for finding in Plan.of(parsed).check() if finding.startswith("policy")], config["policy"]


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ("LoraConfig(r=4, init_lora_weights='pissa')", "LoraConfig.init_lora_weights", "rewrites the base's weights"),
        (
            "LoraConfig(r=4, init_lora_weights='pissa_niter_4')",
            "LoraConfig.init_lora_weights",
            "rewrites the base's weights",
        ),
        ("LoraConfig(r=4, kasa_config={})", "LoraConfig.kasa_config", "rewrites the base's weights"),
        ("LoraConfig(r=4, velora_config=VeloraConfig())", "LoraConfig.velora_config", "plain LoRA"),
        ("LoraConfig(r=4, alora_invocation_tokens=[1, 2])", "LoraConfig.alora_invocation_tokens", "never act"),
        ("LoraConfig(r=4, modules_to_save=['lm_head'])", "lora_modules_to_save", "changes modules of the base"),
        ("LoraConfig(r=4, bias='all')", "LoraConfig.bias", "trains biases of the base"),
        ("LoraConfig(r=4, rank_pattern=patterns())", "LoraConfig.rank_pattern", "computes it (`patterns()`)"),
        ("OFTConfig(**options)", "OFTConfig", "passes `**options` on"),
        ("LilyConfig(r=4)", "LilyConfig", "whole sequence"),
        ("PromptTuningConfig(num_virtual_tokens=4)", "PromptTuningConfig", "adds tokens"),
        ("PrefixTuningConfig(num_virtual_tokens=4)", "PrefixTuningConfig", "adds tokens"),
        ("FourierFTConfig(n_frequency=100)", "FourierFTConfig.init_weights", "it starts as the base"),
    ],
)
def test_what_is_refused_is_said_with_its_reason(config: str, key: str, said: str) -> None:
    found = script(config)
    assert said in dict(found.refused)[key]
    policy = found.config["policy"]
    assert policy["start"] == "new"
    assert not {"init", "lora"} & set(policy)
    if "Tuning" in config or "Lily" in config:
        assert "use" not in policy
        assert "a LoRA with marl's defaults" in dict(found.refused)[key]


def test_arguments_of_a_script_win_over_what_stands_in_it() -> None:
    words = "--model_name_or_path m --reward_model_path rm --use_peft --lora_r 4 --lora_alpha 8 --use_dora --use_rslora"
    found = trl.migrate(
        trl.read_arguments(f"{words} --lora_task_type CAUSAL_LM --lora_target_parameters mlp.experts.down_proj".split())
    )
    policy = {"r": 4, "alpha": 8.0, "rslora": True, "dora": True, "targets": "all-linear", "dropout": 0.05}
    assert found.config["policy"] == {
        "start": "new",
        **policy,
        "lora": {"target_parameters": ["mlp.experts.down_proj"]},
    }
    assert dict(found.refused)["lora_task_type"] == "marl sets this itself"
    found = trl.migrate(trl.read_arguments(f"{words} --lora_modules_to_save lm_head".split()))
    assert "changes modules of the base" in dict(found.refused)["lora_modules_to_save"]
    found = script("OFTConfig()", "--lora_r 4")
    assert found.config["policy"] == {"start": "new", "use": "oft", "targets": "all-linear"}
    assert "OFTConfig, which has no such option" in dict(found.refused)["lora_r"]


def test_lora_plus_of_a_script() -> None:
    more = "optimizer = create_loraplus_optimizer(model=model, optimizer_cls=AdamW, lr=2e-4, loraplus_lr_ratio=16)\n"
    found = script("LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)", more=more)
    assert found.config["policy"]["plus"] == 16


def test_a_small_rate_is_small_for_a_lora_alone() -> None:
    """How far a step goes differs a hundredfold between kinds."""
    rate = {"learning_rate": 1e-6}
    assert "learning_rate" in dict(llamafactory.migrate({**BASE, **rate}).refused)
    found = llamafactory.migrate({**BASE, **rate, "finetuning_type": "oft"})
    assert "learning_rate" not in dict(found.refused)
    assert found.config["ppo"]["learning_rate"] == 1e-6


def test_keys_of_the_other_kind_and_of_no_adapter() -> None:
    found = llamafactory.migrate({**BASE, "finetuning_type": "oft", "lora_rank": 8, "use_dora": True})
    refused = dict(found.refused)
    assert (
        refused["lora_rank"]
        == refused["use_dora"]
        == "not needed: LLaMA-Factory reads it with finetuning_type: lora alone"
    )
    assert "oft alone" in dict(llamafactory.migrate({**BASE, "oft_block_size": 8}).refused)["oft_block_size"]
    both = llamafactory.migrate({**BASE, "finetuning_type": "oft", "oft_rank": 8, "oft_block_size": 16})
    assert both.config["policy"]["options"] == {"r": 8, "oft_block_size": 0}
    assert "PEFT refuses it beside a block size" in dict(both.refused)["oft_rank"]
    frozen = {"finetuning_type": "freeze", "freeze_trainable_layers": 2, "freeze_trainable_modules": "all"}
    refused = dict(llamafactory.migrate({**BASE, **frozen}).refused)
    assert "another experiment" in refused["finetuning_type"]
    assert "never trained" in refused["freeze_trainable_layers"]
    refused = dict(llamafactory.migrate({**BASE, "pissa_init": True, "pissa_iter": 4, "pissa_convert": True}).refused)
    assert all("PiSSA rewrites the base" in refused[key] for key in ("pissa_init", "pissa_iter", "pissa_convert"))
    assert not {key for key, _ in llamafactory.migrate({**BASE, "pissa_init": False, "pissa_iter": 4}).refused} & {
        "pissa_init",
        "pissa_iter",
    }
    plus = {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6}
    found = llamafactory.migrate({**BASE, **plus, "adapter_name_or_path": "sft"})
    assert found.config["policy"] == {"start": "continue", "from": "sft"}
    assert "of one that is continued" in dict(found.refused)["loraplus_lr_ratio"]
    assert "LoRAs on embeddings" in dict(found.refused)["loraplus_lr_embedding"]


def test_peft_has_no_class_that_the_table_lacks() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    theirs = {
        config.__name__: str(getattr(kind, "value", kind)).lower()
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    assert set(theirs) <= set(CLASSES)
    assert {name: kind_of(name) for name in theirs} == theirs
