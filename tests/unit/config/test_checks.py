"""What the core can say without weights: each finding and each warning, with the key and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, dump_config
from marl_core.config.load import parse_config
from marl_core.config.yaml_text import parse_yaml
from marl_core.plan.plan import Plan


def findings(config: dict[str, Any], catalog: Catalog) -> list[str]:
    return Plan.of(parse_config(config, "f", catalog), catalog).check()


def warned(config: dict[str, Any], catalog: Catalog) -> list[str]:
    return Plan.of(parse_config(config, "f", catalog), catalog).warnings()


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def test_a_model_that_is_not_there(
    written: dict[str, Any], catalog: Catalog, tmp_path: Path, adapter_folder: Path
) -> None:
    for path, sentence in [
        (tmp_path / "missing", "model.path: there is no folder"),
        (tmp_path, "holds no config.json"),
        (adapter_folder, "It is an adapter: give the base"),
    ]:
        assert sentence in only(findings({**written, "model": {"path": str(path)}}, catalog))
    assert findings({**written, "model": {"path": "gpt2"}}, catalog) == []


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        ({"auto_map": {"x": "y"}}, {}, "brings its own code"),
        ({"is_encoder_decoder": True}, {}, "encoder-decoder"),
        ({}, {"sampling": {"max_new_tokens": 65}}, "65 tokens leave no room for a prompt in the 64 positions"),
        (
            {"max_position_embeddings": None, "n_positions": 8},
            {},
            "48 tokens leave no room for a prompt in the 8 positions",
        ),
    ],
)
def test_what_config_json_says(
    written: dict[str, Any],
    catalog: Catalog,
    model_folder: Path,
    change: dict[str, Any],
    config: dict[str, Any],
    sentence: str,
) -> None:
    file = model_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert sentence in only(findings({**written, "model": {"path": str(model_folder)}, **config}, catalog))


def test_damaged_model_files(written: dict[str, Any], catalog: Catalog, model_folder: Path) -> None:
    config = {**written, "model": {"path": str(model_folder)}}
    assert findings(config, catalog) == []
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated or damaged" in only(findings(config, catalog))
    weights.unlink()
    assert "has no safetensors weights" in only(findings(config, catalog))
    (model_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    assert "lacks part.safetensors" in only(findings(config, catalog))
    (model_folder / "model.safetensors.index.json").write_text("[]")
    assert "can't be read" in only(findings(config, catalog))
    (model_folder / "config.json").write_text("{")
    assert "is not valid JSON" in only(findings(config, catalog))
    (model_folder / "config.json").write_text("[]")
    assert "holds a list" in only(findings(config, catalog))


def test_remote_code_needs_a_revision(written: dict[str, Any], catalog: Catalog, model_folder: Path) -> None:
    model = {"path": "owner/name", "trust_remote_code": True}
    assert "Set model.revision" in only(findings({**written, "model": model}, catalog))
    assert "Set model.revision" in only(findings({**written, "model": {**model, "revision": "main"}}, catalog))
    assert (
        findings({**written, "model": {**model, "revision": "0123456789abcdef0123456789abcdef01234567"}}, catalog) == []
    )
    assert findings({**written, "model": {**model, "path": str(model_folder)}}, catalog) == []


def test_the_adapter_that_the_policy_continues(
    written: dict[str, Any], catalog: Catalog, adapter_folder: Path, tmp_path: Path
) -> None:
    def policy(path: str) -> list[str]:
        reference = {"use": "frozen", "adapter": path}
        return findings({**written, "policy": {"start": "continue", "from": path}, "reference": reference}, catalog)

    assert policy(str(adapter_folder)) == []
    assert policy("owner/on-the-hub") == []
    assert "policy.from: there is no adapter folder" in only(policy(str(tmp_path / "nowhere" / "x")))
    assert f"Did you mean {adapter_folder}?" in only(policy(str(tmp_path)))
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    assert "is a pickle" in only(policy(str(adapter_folder)))


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"lora": {"init_lora_weights": "pissa_niter_16"}}, "'pissa_niter_16' rewrites the base's weights"),
        ({"lora": {"init_lora_weights": "olora"}}, "rewrites the base's weights"),
        ({"lora": {"kasa_config": {}}}, "policy.lora.kasa_config: such a LoRA rewrites the base's weights"),
        ({"lora": {"kasa_config": {"beta": 0.1}}}, "Remove it."),
        ({"lora": {"init_lora_weights": "eva"}}, "needs a pass over data"),
        ({"lora": {"init_lora_weights": False}}, "starts away from the base"),
        ({"lora": {"bias": "all"}}, "policy.lora.bias: 'all' trains biases of the base"),
        ({"lora": {"modules_to_save": ["score"]}}, "policy.lora.modules_to_save: changes modules of the base"),
        ({"lora": {"layer_replication": [[0, 1]]}}, "changes modules of the base"),
        ({"lora": {"trainable_token_indices": [1]}}, "changes modules of the base"),
        ({"lora": {"r": 4}}, "policy.lora.r: write policy.r instead"),
        ({"lora": {"target_modules": "x"}}, "write policy.targets instead"),
        ({"lora": {"task_type": "SEQ_CLS"}}, "marl sets this itself"),
        ({"lora": {"x": float("inf")}}, "inf is not a finite number"),
        ({"targets": ["q_proj", "lm_head"]}, "policy.targets: 'lm_head' is the embedding or the output layer"),
        ({"targets": "model.embed_tokens"}, "'model.embed_tokens' is the embedding"),
        ({"targets": []}, "the list is empty"),
    ],
)
def test_lora_options_that_cannot_be_shared(
    written: dict[str, Any], catalog: Catalog, policy: dict[str, Any], sentence: str
) -> None:
    assert sentence in only(findings({**written, "policy": policy}, catalog))
    value = {**policy, "on": "own"}
    assert sentence.replace("policy", "value") in only(findings({**written, "value": value}, catalog))


def test_lora_options_that_can(written: dict[str, Any], catalog: Catalog) -> None:
    lora = {"init_lora_weights": "gaussian", "bias": "none", "use_rslora": True, "modules_to_save": None}
    assert findings({**written, "policy": {"lora": lora}}, catalog) == []


def test_the_run_folder(
    written: dict[str, Any], catalog: Catalog, tmp_path: Path, model_folder: Path, adapter_folder: Path
) -> None:
    def folder(path: Path | str, **more: Any) -> list[str]:
        return findings({**written, "run": {"folder": str(path)}, **more}, catalog)

    assert folder(tmp_path / "new" / "deep") == []
    (tmp_path / "file").write_text("x")
    assert "there is a file of that name" in only(folder(tmp_path / "file"))
    assert "/file is a file" in only(folder(tmp_path / "file" / "below"))
    assert "is also model.path" in only(folder(model_folder, model={"path": str(model_folder)}))
    assert "is also path of short of fake-marl" in only(
        folder(adapter_folder, reward={"use": "short", "path": str(adapter_folder)})
    )
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "no permission to write" in only(folder(tmp_path / "closed" / "run"))


def test_evaluation_needs_prompts(written: dict[str, Any], catalog: Catalog, prompts_file: Path) -> None:
    assert "Set eval.prompts" in only(findings({**written, "eval": {"every": 3}}, catalog))
    assert "Set eval.prompts" in only(findings({**written, "eval": {"judges": {"j": "short"}}}, catalog))
    assert findings({**written, "eval": {"every": 3, "prompts": str(prompts_file)}}, catalog) == []
    assert "eval.prompts: there is no file" in only(findings({**written, "eval": {"prompts": "no.jsonl"}}, catalog))


def test_a_config_that_was_written_out_is_not_warned_of_its_defaults(written: dict[str, Any], catalog: Catalog) -> None:
    full = parse_yaml(dump_config(parse_config(written, "f", catalog)), "f")
    assert warned(full, catalog) == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"sampling": {"top_p": 0.9}}, "sampling.top_p: 0.9 cuts the distribution"),
        ({"sampling": {"top_k": 50}}, "sampling.top_k: 50 cuts the distribution"),
        ({"policy": {"dropout": 0.1}}, "the ratio starts away from 1"),
        ({"policy": {"lora": {"use_dora": True}}}, "step-0 KL is not quite 0"),
        ({"ppo": {"warmup_steps": 50}}, "all of the run is warm-up"),
        ({"run": {"checkpoint_every": 51}}, "run.checkpoint_every: 51 is more than the 50 steps"),
        ({"ppo": {"kl": {"horizon": 5.0}}}, "no effect without ppo.kl.target"),
        ({"reward": {"use": "short", "weight": 0.0}}, "measured and never trained on"),
    ],
)
def test_warnings(written: dict[str, Any], catalog: Catalog, config: dict[str, Any], sentence: str) -> None:
    assert sentence in only(warned({**written, **config}, catalog))
    assert findings({**written, **config}, catalog) == []
