"""What headers tell: targets that exist, adapters of this shape, heads of this width; and the plan in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, Plan
from marl_core.config.load import parse_config
from marl_core.plan.describe import explain

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def plan_of(config: dict[str, Any], catalog: Catalog) -> Plan:
    return Plan.of(parse_config(config, "f", catalog), catalog)


@pytest.fixture
def config(written: dict[str, Any], model_folder: Path) -> dict[str, Any]:
    return {**written, "model": {"path": str(model_folder)}, "sampling": {"max_new_tokens": 8}}


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}), encoding="utf-8"
    )
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))
    return str(folder)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], "q_proj", r".*\.(q|up)_proj", ["layers.0.mlp.up_proj"]])
def test_targets_that_are_there(config: dict[str, Any], catalog: Catalog, targets: Any) -> None:
    assert plan_of({**config, "policy": {"targets": targets}}, catalog).check() == []


@pytest.mark.parametrize("targets", [["q_proj", "c_attn"], "c_attn"])
def test_targets_that_are_not(config: dict[str, Any], catalog: Catalog, targets: Any) -> None:
    (found,) = plan_of({**config, "policy": {"targets": targets}}, catalog).check()
    assert "policy.targets: 'c_attn': no such layer in this model; it has q_proj, up_proj." in found


def test_targets_that_are_no_pattern(config: dict[str, Any], catalog: Catalog) -> None:
    (found,) = plan_of({**config, "policy": {"targets": "*q_proj"}}, catalog).check()
    assert "policy.targets: LoRA targets '*q_proj' is neither a module name nor a regular expression" in found


def test_adapters_of_another_shape(config: dict[str, Any], catalog: Catalog, tmp_path: Path) -> None:
    fits = write_adapter(tmp_path / "fits", {f"{Q}.lora_A.weight": (2, 4), f"{Q}.lora_B.weight": (4, 2)})
    wide = write_adapter(tmp_path / "wide", {f"{Q}.lora_A.weight": (2, 16), f"{Q}.lora_B.weight": (16, 2)})
    assert plan_of({**config, "reference": {"use": "frozen", "adapter": fits}}, catalog).check() == []
    (found,) = plan_of({**config, "reference": {"use": "frozen", "adapter": wide}}, catalog).check()
    assert "is [2, 16], the layer [4, 4]" in found
    assert "trained on 'other'" in found


def test_adapters_of_another_models_layers(config: dict[str, Any], catalog: Catalog, tmp_path: Path) -> None:
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    other = write_adapter(tmp_path / "other", {f"{layer}.lora_A.weight": (2, 4), f"{layer}.lora_B.weight": (4, 2)})
    (found,) = plan_of({**config, "reference": {"use": "frozen", "adapter": other}}, catalog).check()
    assert "adapts layers (c_attn) of which this model has none; it has q_proj, up_proj" in found


def test_a_head_of_another_width(config: dict[str, Any], catalog: Catalog, tmp_path: Path) -> None:
    head = "base_model.model.score.weight"
    for name, shape, problems in (("good", (1, 4), 0), ("labels", (2, 4), 1), ("wide", (1, 8), 1)):
        path = write_adapter(tmp_path / name, {f"{Q}.lora_A.weight": (2, 4), head: shape})
        found = plan_of({**config, "reward": {"use": "short", "path": path}}, catalog).check()
        assert len(found) == problems
        assert all("this model needs [1, 4]" in finding for finding in found)


def test_stop_tokens(config: dict[str, Any], catalog: Catalog, model_folder: Path) -> None:
    tokenizer = {"added_tokens": [{"content": "<|end|>"}], "model": {"vocab": {"a": 0}}}
    (model_folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert plan_of({**config, "sampling": {"max_new_tokens": 8, "stop": ["<|end|>", "a"]}}, catalog).check() == []
    (found,) = plan_of({**config, "sampling": {"max_new_tokens": 8, "stop": ["<|im_end|>"]}}, catalog).check()
    assert "sampling.stop: '<|im_end|>' is no token" in found


def test_a_tokenizer_folder_without_one(config: dict[str, Any], catalog: Catalog, tmp_path: Path) -> None:
    (found,) = plan_of({**config, "model": {**config["model"], "tokenizer": str(tmp_path)}}, catalog).check()
    assert "model.tokenizer" in found
    assert "holds no tokenizer" in found


class TestExplain:
    """Once, twice, and which reference."""

    def test_one_base(self, config: dict[str, Any], catalog: Catalog, adapter_folder: Path) -> None:
        reward = {"use": "short", "path": str(adapter_folder)}
        once, twice, reference = explain(plan_of({**config, "reward": reward}, catalog))
        assert "policy, reference, reward short and value look through it, told apart by adapters" in once
        assert twice == "Nothing is held twice: no role has a model of its own."
        assert "a new adapter, which starts as the base itself" in reference

    def test_a_model_of_its_own(self, config: dict[str, Any], catalog: Catalog, model_folder: Path) -> None:
        reward = {"use": "short", "path": str(model_folder)}
        once, twice, _ = explain(plan_of({**config, "reward": reward}, catalog))
        assert "reward" not in once
        assert twice == f"Beside it, whole models of their own: reward short ({model_folder})."

    def test_merged(self, config: dict[str, Any], catalog: Catalog, adapter_folder: Path) -> None:
        reference = {"use": "merged", "adapter": str(adapter_folder)}
        _, _, moment, why = explain(plan_of({**config, "reference": reference}, catalog))
        assert "there twice for a moment" in moment
        assert f"the base with {adapter_folder} in it" in why

    def test_continued(self, config: dict[str, Any], catalog: Catalog, adapter_folder: Path) -> None:
        path = str(adapter_folder)
        policy = {"start": "continue", "from": path}
        right = explain(plan_of({**config, "policy": policy, "reference": {"use": "frozen", "adapter": path}}, catalog))
        assert "is that adapter, frozen, so step-0 KL is 0" in right[-1]
        wrong = explain(plan_of({**config, "policy": policy}, catalog))
        assert "is not where the policy starts" in wrong[-1]

    def test_no_reference(self, config: dict[str, Any], catalog: Catalog) -> None:
        once, _, reference = explain(plan_of({**config, "ppo": {"kl": {"coef": 0.0}}}, catalog))
        assert "policy and value look through it" in once
        assert "No reference applies" in reference


def test_every_example_in_the_repository_fits_the_schema() -> None:
    import re

    from jsonschema import Draft202012Validator

    from marl_core.config.schema import json_schema
    from marl_core.config.yaml_text import parse_yaml

    root = Path(__file__).parents[3]
    validator = Draft202012Validator(json_schema(Catalog.installed()))
    files = [
        file
        for file in (root / "examples").rglob("*.yaml")
        if file.parent.name != "third_party"  # names a strategy that is installed for its own tests only
        and file.name != "arms.yaml"  # changes, not a config
    ]
    texts = {str(file): file.read_text(encoding="utf-8") for file in files}
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for index, block in enumerate(
            re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        ):
            texts[f"{page.name} {index}"] = block
    checked = 0
    for name, text in texts.items():
        written = parse_yaml(text, name)
        if isinstance(written, dict) and {"model", "reference", "reward"} <= set(written):
            validator.validate(written)
            checked += 1
    assert checked >= 3


def test_every_key_has_hover_text() -> None:
    from marl_core.config.schema import json_schema

    schema = json_schema(Catalog.installed())
    silent = [
        f"{place}.{name}"
        for place, part in [("", schema), *schema["$defs"].items()]
        for name, key in part.get("properties", {}).items()
        if not (
            key.get("description")
            or schema["$defs"].get(str(key.get("$ref")).removeprefix("#/$defs/"), {}).get("description")
        )
    ]
    assert not silent
