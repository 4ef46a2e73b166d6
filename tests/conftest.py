"""What many tests share: one thread, a tiny model on disk with adapters for it, and configs that name them.

MARL_TEST_DEVICE says where they compute: `cpu` (the default), `cuda`, or `pretended`, the CPU in the part of a CUDA device
(gpu/pretend.py). With the last two, tests that make tensors of their own on the CPU to compare with fail for that alone.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., str]
MakeConfig = Callable[..., Any]
TEST_DEVICE = os.environ.get("MARL_TEST_DEVICE", "cpu")
RUN_DEVICE = "cpu" if TEST_DEVICE == "cpu" else "cuda"

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

if TEST_DEVICE == "pretended":  # to the end of the process: test modules make tensors as they are imported
    from pretend import pretended_cuda

    whole = pretended_cuda()
    whole.__enter__()
    atexit.register(whole.__exit__, None, None, None)

if RUN_DEVICE == "cuda":  # before any test module imports them
    from marl_core import testing

    fake = testing.fake_rollout
    testing.tiny_bank = functools.partial(testing.tiny_bank, device="cuda")
    testing.fake_rollout = lambda *given, **named: fake(*given, **named).to("cuda")

REWARDS = """
def odd(completion_ids, **columns):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def low(completion_ids, **columns):
    return [sum(4 <= token < 36 for token in ids) / len(ids) for ids in completion_ids]


def brevity(prompts, completions, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def letters(completions, **columns):
    return [sum(map(ord, text)) / 100 / (len(text) + 1) for text in completions]


async def labels(completions, label, **columns):
    return [float(value) for value in label]


def nan(completions, **columns):
    return [float("nan")] * len(completions)


def one_too_few(completions, **columns):
    return [0.0] * (len(completions) - 1)
"""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of tests/gpu are marked `gpu`."""
    folder = Path(__file__).parent / "gpu"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise comparisons need a fixed number of threads, and a shared machine is quicker with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model and its tokenizer as a model folder."""
    from marl_core.testing import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose layers bitsandbytes' packed kernels accept: sizes divisible by 64."""
    from marl_core.testing import write_tiny_model

    return write_tiny_model(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=64, intermediate_size=128, num_attention_heads=2
    )


@pytest.fixture(scope="session")
def write_sft_adapter() -> Write:
    """Write a LoRA adapter with random weights, none of them zero, as SFTTrainer would save it."""

    def write(base: str, folder: Path, seed: int = 1, scale: float = 0.1, **options: Any) -> str:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
        _save_with_noise(get_peft_model(model, LoraConfig(**settings)), folder, seed, scale)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def write_reward_adapter() -> Write:
    """Write a SEQ_CLS reward adapter with random weights and its head, as TRL's RewardTrainer saves it."""

    def write(base: str, folder: Path, seed: int = 2, scale: float = 0.1, labels: int = 1, **options: Any) -> str:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS", **options}
        _save_with_noise(get_peft_model(model, LoraConfig(**settings)), folder, seed, scale)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def sft_adapter(tiny_folder: str, write_sft_adapter: Write, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SFT adapter on `tiny_folder`."""
    return write_sft_adapter(tiny_folder, tmp_path_factory.mktemp("adapters") / "sft")


@pytest.fixture(scope="session")
def reward_adapter(tiny_folder: str, write_reward_adapter: Write, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward adapter on `tiny_folder`."""
    return write_reward_adapter(tiny_folder, tmp_path_factory.mktemp("adapters") / "reward")


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six short prompts with a further column."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    texts = ["A good", "It was", "The cast", "Bad", "I never", "What a film"]
    file.write_text(
        "".join(json.dumps({"prompt": text, "label": i}) + "\n" for i, text in enumerate(texts)), encoding="utf-8"
    )
    return str(file)


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of reward functions, good and bad ones: see REWARDS."""
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(REWARDS, encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def make_config(tiny_folder: str, prompts_file: str, rewards_file: str) -> MakeConfig:
    """A small RunConfig as YAML would give it; keyword arguments are laid over its sections."""

    def make(**changes: Any) -> Any:
        from marl_core import Catalog
        from marl_core.config.load import parse_config

        written = {
            "model": {"path": tiny_folder, "dtype": "float32"},
            "policy": {"r": 4, "alpha": 8},
            "reference": "disabled-adapter",
            "reward": {"use": "function", "target": f"{rewards_file}:odd"},
            "value": "policy",
            "data": {"prompts": prompts_file},
            "sampling": {"max_new_tokens": 6},
            "ppo": {"steps": 2, "batch": 4, "minibatch": 2, "epochs": 2, "learning_rate": 1e-2},
            "run": {"device": RUN_DEVICE, "seed": 0},
        }
        merged = _merged(written, changes)
        if merged["policy"].get("start") == "continue":  # its shape is the adapter's
            merged["policy"] = {
                key: value for key, value in merged["policy"].items() if key not in ("r", "alpha", "targets")
            }
        return parse_config(merged, "test", Catalog.installed())

    return make


@pytest.fixture
def device() -> Iterator[Any]:
    """`cuda:0`: a real one where there is one, the pretended one elsewhere."""
    import torch
    from pretend import CUDA, pretended_cuda

    if torch.cuda.is_available() and TEST_DEVICE != "pretended":
        yield CUDA
        return
    with pretended_cuda() as found:
        yield found


@pytest.fixture
def on_cuda(device: Any, make_config: MakeConfig) -> MakeConfig:
    """`make_config` for runs on that device."""

    def make(**changes: Any) -> Any:
        return make_config(**{**changes, "run": {"device": "cuda", **changes.get("run", {})}})

    return make


@pytest.fixture(scope="session")
def base_state() -> Callable[[Any], dict[str, Any]]:
    """The frozen base's tensors, packed bytes included, by name: for comparisons before and after training."""

    def state(bank: Any) -> dict[str, Any]:
        found = bank.base.state_dict()  # of quantized layers: packed bytes, scales and code books
        tensors = {name: value for name, value in found.items() if "lora_" not in name and hasattr(value, "clone")}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    return state


def _save_with_noise(peft: Any, folder: Path, seed: int, scale: float) -> None:
    import torch

    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * scale)
    peft.save_pretrained(str(folder))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = result.get(key)
        is_choice = isinstance(value, dict) and "use" in value
        result[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) and not is_choice else value
        )
    return result
