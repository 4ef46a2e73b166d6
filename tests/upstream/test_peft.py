"""Faults of peft: each test reproduces one, and fails when it is mended."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core.testing import tiny_model

Still = Callable[[bool, str], None]
Adapted = Callable[..., Any]
IDS = torch.tensor([[10, 11, 12, 13, 14, 15]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def trainable(model: Any) -> set[str]:
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


def test_load_adapter_drops_the_score_head(still: Still, adapted: Adapted, reward_adapter: str) -> None:
    model = adapted("policy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = model.load_adapter(reward_adapter, adapter_name="reward")
    assert said.unexpected_keys == ["base_model.model.score.weight"]
    still(not any("score" in name for name, _ in model.named_parameters()), "marl_core/bank/heads.py")


def test_a_classifier_without_its_head(still: Still, tiny_folder: str, reward_adapter: str) -> None:
    """The class says SequenceClassification, and gives logits of the vocabulary."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(tiny_model(), reward_adapter)
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    still(logits(model).shape[-1] == 260, "marl_core/bank/heads.py")


def test_disable_adapter_changes_who_learns(still: Still, adapted: Adapted) -> None:
    model = adapted("policy", "value")
    model.base_model.set_adapter(["policy", "value"])
    model.base_model.set_requires_grad(["policy", "value"], True)
    model.base_model.set_adapter("policy")
    model.base_model.set_requires_grad(["policy", "value"], True)
    assert trainable(model) == {"policy", "value"}
    with model.disable_adapter():
        pass
    still(trainable(model) != {"policy", "value"}, "marl_core/bank/mount.py")


def test_set_adapter_makes_a_frozen_one_learn(still: Still, adapted: Adapted) -> None:
    model = adapted("policy", "reward")
    for name, parameter in model.named_parameters():
        if ".reward." in name:
            parameter.requires_grad_(False)
    model.set_adapter("reward")
    still("reward" in trainable(model), "marl_core/bank/mount.py")


def test_gradient_checkpointing_recomputes_through_another_adapter(still: Still, adapted: Adapted) -> None:
    """Two forward passes, one backward: the first adapter's gradient is computed through the second."""

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapted("policy", "value").train()
        if checkpointing:
            base, options = model.base_model.model, {"use_reentrant": False}
            if hasattr(base, "activation_checkpointing_enable"):  # its name since transformers 5.2x
                base.activation_checkpointing_enable(options)
            else:
                base.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        losses = []
        for name in ("policy", "value"):
            model.set_adapter(name)
            model.base_model.set_requires_grad(["policy", "value"], True)
            losses.append(model(input_ids=IDS).logits.pow(2).mean())
        sum(losses).backward()
        return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}

    right, found = gradients(False), gradients(True)
    names = [name for name in right if ".policy." in name]
    one = torch.cat([found.get(name, torch.zeros_like(right[name])) for name in names])
    other = torch.cat([right[name] for name in names])
    still(float((one - other).norm() / other.norm()) > 0.1, "marl_core/bank/adapters.py")


def test_a_fresh_dora_in_bfloat16_is_not_the_base(still: Still, adapted: Adapted) -> None:
    for dtype, exact in ((torch.float32, True), (torch.bfloat16, False)):
        base: Any = tiny_model()
        base.to(dtype)
        before = logits(base)
        gap = float((logits(adapted("policy", noise=0.0, model=base, use_dora=True)) - before).abs().max())
        if exact:
            assert gap < 1e-5 * float(before.abs().max())
        else:
            still(gap > 1e-3, "marl_core/plan/checks.py")


def test_pissa_rewrites_the_base(still: Still, adapted: Adapted) -> None:
    base = tiny_model()
    before = logits(base)
    model = adapted("policy", noise=0.0, model=base, init_lora_weights="pissa")
    with model.disable_adapter():
        gap = float((logits(model) - before).abs().max())
    still(gap > 0.1, "marl_core/artifacts/kind_options.py")


def test_a_mixed_batch_and_a_head_of_one_adapter(still: Still, adapted: Adapted) -> None:
    """A bare KeyError, even for rows of adapters without a saved module."""
    from peft import LoraConfig

    model = adapted("policy", model=tiny_model(tie_word_embeddings=False))
    model.add_adapter("value", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.eval()
    try:
        model(input_ids=IDS, adapter_names=["policy"])
        failed = False
    except KeyError:
        failed = True
    still(failed, "marl_core/bank/heads.py")


def test_an_adapter_of_another_base_loads_in_silence(
    still: Still, tmp_path: Path, adapted: Adapted, recwarn: pytest.WarningsRecorder
) -> None:
    """Same shapes, other weights; and a base with one layer less than the adapter was trained on."""
    from peft import PeftModel

    adapted("policy").save_pretrained(tmp_path)
    where = str(tmp_path / "policy")
    PeftModel.from_pretrained(tiny_model(seed=7), where)
    PeftModel.from_pretrained(tiny_model(num_hidden_layers=1), where)
    still(
        not [w for w in recwarn if "missing" in str(w.message) or "base" in str(w.message)],
        "marl_core/bank/identity/reward_check.py",
    )


def test_the_name_of_the_bare_base_is_free(still: Still, adapted: Adapted) -> None:
    """A mixed batch means the bare base by `__base__`; an adapter may be called that too."""
    still("__base__" in adapted("__base__").peft_config, "marl_core/bank/peft_adapters.py")


def test_an_adapter_s_file_is_filtered_by_the_others_names(still: Still, adapted: Adapted) -> None:
    """A second adapter that is called like a module takes the first one's tensors out of its file."""
    from peft import get_peft_model_state_dict

    alone = get_peft_model_state_dict(adapted("policy"), adapter_name="policy")
    beside = get_peft_model_state_dict(adapted("policy", "layers"), adapter_name="policy")
    still(len(beside) < len(alone), "marl_core/bank/mount.py")


def test_a_pass_through_a_weights_lora_counts_as_a_change(still: Still) -> None:
    """`target_parameters`: each pass sets the base's weight to itself, and torch's counter of changes goes up."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    config = LoraConfig(target_modules=[], target_parameters=["mlp.up_proj.weight"])
    model: Any = get_peft_model(base, config)
    weight = next(p for name, p in model.named_parameters() if name.endswith("up_proj.base_layer.weight"))
    before = weight._version
    logits(model)
    still(weight._version != before, "marl_core/bank/experts.py")
