"""A catalog of fake strategies, and a config that names them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

from marl_core import Catalog, Estimator, Quantization, Strategy, hookimpl
from marl_core.registry.catalog import Listing
from marl_plugins.adapter.lora import Dora, Lora
from marl_plugins.adapter.oft import Oft


class Bare(Strategy):
    """The bare base."""

    @hookimpl
    def marl_reference(self) -> Any:
        return len


class Merged(Strategy):
    """The base with an adapter merged in."""

    adapter: str = Field(description="The adapter.")

    @hookimpl
    def marl_prepare_base(self, base: Any) -> Any:
        return base

    @hookimpl
    def marl_reference(self) -> Any:
        return len


class Frozen(Strategy):
    """A frozen adapter."""

    adapter: str = Field(description="The adapter.")

    @hookimpl
    def marl_reference(self) -> Any:
        return len


class Short(Strategy):
    """Pay for short answers."""

    target: int = Field(64, gt=0, description="Tokens.")
    path: str | None = Field(None, description="Some weights.")

    @hookimpl
    def marl_check(self, plan: Any) -> Iterator[str]:
        if self.target == 666:
            yield "reward.target: 666 is not a good number"

    @hookimpl
    def marl_reward(self) -> Any:
        return len


class Plain(Strategy):
    """As it is."""

    @hookimpl
    def marl_quantization(self) -> Quantization:
        return Quantization()


class Eight(Strategy):
    """One byte a weight."""

    @hookimpl
    def marl_quantization(self) -> Quantization:
        return Quantization(bytes_per_weight=1.0)


class Critic(Strategy):
    """Needs values."""

    @hookimpl
    def marl_advantage(self) -> Estimator:
        return Estimator(lambda inputs: (inputs.rewards, inputs.rewards), needs_values=True, uses_token_rewards=True)


class Compare(Strategy):
    """Compares responses to one prompt."""

    @hookimpl
    def marl_advantage(self) -> Estimator:
        return Estimator(lambda inputs: inputs.scores, needs_groups=True)


class Quiet(Strategy):
    """Says nothing."""


ENTRIES: dict[Any, dict[str, type[Strategy]]] = {
    "reference": {"bare": Bare, "merged": Merged, "frozen": Frozen},
    "reward": {"short": Short},
    "adapter": {"lora": Lora, "dora": Dora, "oft": Oft},
    "quantization": {"none": Plain, "eight": Eight},
    "advantage": {"gae": Critic, "rloo": Compare},
    "observer": {"quiet": Quiet},
}


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    module = ModuleType("marl_fakes")
    listings = []
    for family, members in ENTRIES.items():
        for name, strategy in members.items():
            setattr(module, strategy.__name__, strategy)
            listings.append(Listing(family, name, f"marl_fakes:{strategy.__name__}", "fake-marl", "1.0"))
    broken = Listing("reward", "broken", "marl_fakes:Nothing", "broken-marl", "0.1")
    monkeypatch.setitem(sys.modules, "marl_fakes", module)
    return Catalog([*listings, broken])


@pytest.fixture
def written() -> dict[str, Any]:
    """The smallest config."""
    return {"model": {"path": "some/model"}, "reference": "bare", "reward": "short"}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: some/model}\nreference: bare\nreward: {use: short, target: 8}\n", encoding="utf-8")
    return file


def safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offset)


MODEL_SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model of two linear layers: 40 + 16 + 32 + 4 parameters, the output layer tied to the embedding."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(safetensors(MODEL_SHAPES))
    return folder


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A PEFT adapter of 2 x 8 parameters."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}), encoding="utf-8")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.lora_A.weight": (2, 4), f"{layer}.lora_B.weight": (4, 2)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(shapes))
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "label": 1}\n', encoding="utf-8")
    return file
