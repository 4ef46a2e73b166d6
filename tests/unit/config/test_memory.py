"""The memory estimate against sums worked out by hand for the model of the fixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, DataError
from marl_core.config.load import parse_config
from marl_core.plan.memory import MemoryEstimate, RoleMemory, estimate
from marl_core.plan.plan import Plan

# embedding 40 + q 16 + up 32 + norm 4 (the tied output layer isn't counted again)
WEIGHTS, IN_LINEARS = 92, 48


@pytest.fixture
def config(written: dict[str, Any], model_folder: Path) -> dict[str, Any]:
    return {
        **written,
        "model": {"path": str(model_folder)},
        "policy": {"r": 2},
        "sampling": {"max_new_tokens": 8},
        "run": {"device": "cpu"},
    }


def estimate_of(config: dict[str, Any], catalog: Catalog) -> MemoryEstimate:
    return estimate(Plan.of(parse_config(config, "f", catalog), catalog))


def row(memory: MemoryEstimate, name: str) -> RoleMemory:
    return next(role for role in memory.roles if role.name == name)


def test_base_in_its_dtype_and_quantized(config: dict[str, Any], catalog: Catalog) -> None:
    assert row(estimate_of(config, catalog), "base").shared == 2 * WEIGHTS
    assert row(estimate_of({**config, "quantization": "eight"}, catalog), "base").shared == IN_LINEARS + 2 * (
        WEIGHTS - IN_LINEARS
    )


def test_the_policy_is_r_times_in_plus_out_with_gradient_and_two_moments(
    config: dict[str, Any], catalog: Catalog
) -> None:
    all_linear = 2 * (4 + 4) + 2 * (8 + 4)
    policy = row(estimate_of(config, catalog), "policy")
    assert policy.shared == 16 * all_linear
    assert policy.separate == 2 * WEIGHTS + 16 * all_linear
    for targets in (["q_proj"], "q_proj", r".*\.q_proj"):
        changed = {**config, "policy": {"r": 2, "targets": targets}}
        assert row(estimate_of(changed, catalog), "policy").shared == 16 * 2 * (4 + 4)


def test_adapters_are_counted_from_their_files(config: dict[str, Any], catalog: Catalog, adapter_folder: Path) -> None:
    path = str(adapter_folder)
    policy, reference = {"start": "continue", "from": path}, {"use": "frozen", "adapter": path}
    memory = estimate_of(
        {**config, "policy": policy, "reference": reference, "reward": {"use": "short", "path": path}}, catalog
    )
    assert row(memory, "policy").shared == 16 * 16
    assert row(memory, "reference").shared == row(memory, "reward short").shared == 4 * 16
    assert row(memory, "reward short").separate == 2 * WEIGHTS + 4 * 16


def test_a_reference_that_is_the_base_costs_nothing(
    config: dict[str, Any], catalog: Catalog, adapter_folder: Path
) -> None:
    reference = {"use": "merged", "adapter": str(adapter_folder)}
    memory = estimate_of({**config, "reference": reference}, catalog)
    assert row(memory, "reference").shared == 0
    assert row(memory, "reference").separate == 2 * WEIGHTS
    assert "float32" in row(memory, "base").what
    assert row(estimate_of({**config, "ppo": {"kl": {"coef": 0.0}}}, catalog), "reference").shared == 0


def test_a_separate_reward_model_costs_the_same_either_way(
    config: dict[str, Any], catalog: Catalog, model_folder: Path
) -> None:
    reward = row(
        estimate_of({**config, "reward": {"use": "short", "path": str(model_folder)}}, catalog), "reward short"
    )
    assert reward.shared == reward.separate == 4 * (WEIGHTS + 40)


def test_value(config: dict[str, Any], catalog: Catalog) -> None:
    assert row(estimate_of(config, catalog), "value").shared == 16 * (4 + 1)
    own = {**config, "value": {"on": "own", "r": 1, "targets": ["q_proj"]}}
    assert row(estimate_of(own, catalog), "value").shared == 16 * (8 + 5)
    critic_free = {**config, "ppo": {"advantage": "rloo", "samples_per_prompt": 2}}
    assert row(estimate_of(critic_free, catalog), "value").separate == 0


def test_cache_and_activations(config: dict[str, Any], catalog: Catalog) -> None:
    memory = estimate_of({**config, "ppo": {"batch": 4, "minibatch": 2}}, catalog)
    assert row(memory, "sampling").shared == 2 * 1 * 1 * 2 * (4 * 8) * 2
    kept = (
        6 * 4 + 2 * 8 + 4 + 4
    )  # what attention, norms and the gated product keep, and the inputs of two adapted layers
    logits, gradient = 3 * 4 * 2 * 8 * 10, 4 * 4 * 2 * 8 * 4
    assert row(memory, "update").shared == pytest.approx(2 * 16 * kept + logits + gradient)
    assert memory.shared == sum(role.shared for role in memory.roles)
    assert memory.separate > memory.shared


def test_a_model_that_is_not_here_has_no_estimate(config: dict[str, Any], catalog: Catalog) -> None:
    with pytest.raises(DataError, match="isn't on this machine"):
        estimate_of({**config, "model": {"path": "owner/not-here"}}, catalog)


def test_the_peak_is_what_stays_and_the_larger_of_what_passes(
    config: dict[str, Any], catalog: Catalog, adapter_folder: Path
) -> None:
    memory = estimate_of({**config, "ppo": {"batch": 4, "minibatch": 2}}, catalog)
    passing = [row(memory, name).shared for name in ("sampling", "update")]
    assert memory.peak == memory.shared - sum(passing) + max(passing)
    merged = estimate_of({**config, "reference": {"use": "merged", "adapter": str(adapter_folder)}}, catalog)
    stored = 4 * (WEIGHTS + 40)  # the output layer is in the file
    assert merged.loading == stored + 2 * WEIGHTS  # float32, and the cast beside it
    assert memory.loading == stored + 2 * WEIGHTS
    assert estimate_of(
        {**config, "quantization": "eight"}, catalog
    ).loading == stored + 2 * WEIGHTS + IN_LINEARS + 2 * (WEIGHTS - IN_LINEARS)
    exact = {**config, "model": {**config["model"], "dtype": "float32"}}
    assert estimate_of(exact, catalog).loading == stored


def test_merged_copies_count_while_they_are_small(config: dict[str, Any], catalog: Catalog) -> None:
    full = {**config, "model": {**config["model"], "dtype": "float32"}, "speed": {"merge_for_sampling": True}}
    plain = row(estimate_of({**full, "speed": {"merge_for_sampling": False}}, catalog), "sampling").shared
    few = {**full, "policy": {"r": 2, "targets": ["q_proj"]}}  # 16 of 92 weights: below a quarter
    assert row(estimate_of(few, catalog), "sampling").shared == plain + 4 * 16
    assert row(estimate_of(full, catalog), "sampling").shared == plain  # 48 of 92: not merged


def tokens_of(config: dict[str, Any], catalog: Catalog) -> str:
    return row(estimate_of(config, catalog), "update").what


LONG = {"sampling": {"max_new_tokens": 128}, "ppo": {"batch": 512, "minibatch": 512}}
"""65,536 tokens a minibatch: more than any budget."""


@pytest.mark.parametrize(
    ("device", "dtype", "tokens"),
    [
        ("cpu", "float32", "256"),
        ("cpu", "bfloat16", "512"),
        ("cuda", "float32", "2,048"),
        ("cuda", "bfloat16", "2,048"),
    ],
)
def test_a_pass_is_that_of_the_device(
    config: dict[str, Any], catalog: Catalog, device: str, dtype: str, tokens: str
) -> None:
    on_it = {**config, **LONG, "run": {"device": device}, "model": {**config["model"], "dtype": dtype}}
    assert f"activations and logits of {tokens} tokens, a pass on {device}" == tokens_of(on_it, catalog)
    told = {**on_it, "speed": {"microbatch_tokens": 1024}}
    assert "of 1,024 tokens" in tokens_of(told, catalog)
    rows = {**on_it, "ppo": {**LONG["ppo"], "microbatch": 2}}
    assert "of 256 tokens" in tokens_of(rows, catalog)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_runs_own_budget_is_the_estimates(config: dict[str, Any], catalog: Catalog, device: str) -> None:
    from types import SimpleNamespace

    from marl_core.ppo.budget import Budget

    on_it = parse_config({**config, **LONG, "run": {"device": device}}, "f", catalog)
    trunk: Any = SimpleNamespace(device=SimpleNamespace(type=device), sharded=False)
    assert f"{Budget.of(on_it, trunk).train.tokens:,} tokens" in tokens_of(
        {**config, **LONG, "run": {"device": device}}, catalog
    )


def test_auto_is_what_this_machine_looks_like(
    config: dict[str, Any], catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {**config, "run": {"device": "auto"}}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("marl_core.config.device.NVIDIA_DEVICE_FILES", (str(tmp_path / "nvidia0"),))
    assert estimate_of(auto, catalog).device == "cpu"
    (tmp_path / "nvidia0").touch()
    found = estimate_of(auto, catalog)
    assert found.device == "cuda"
    assert "auto will be taken for" in found.caution
    assert "never measured on a GPU" in found.caution
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert estimate_of(auto, catalog).device == "cpu"


@pytest.mark.parametrize(
    ("device", "speed", "said"),
    [
        ("cpu", {"merge_for_sampling": True}, []),
        ("cuda", {}, ["is not measured on a GPU yet", "are off there"]),
        (
            "cuda",
            {"merge_for_sampling": True},
            ["speed.merge_for_sampling, which this config asks for, was never held against the plain path"],
        ),
        (
            "cuda",
            {"capture": True, "compile": True},
            ["speed.capture and speed.compile, which this config asks for, were"],
        ),
    ],
)
def test_a_run_on_a_gpu_is_told_what_was_never_measured_there(
    config: dict[str, Any], catalog: Catalog, device: str, speed: dict[str, bool], said: list[str]
) -> None:
    found = Plan.of(
        parse_config({**config, "run": {"device": device}, "speed": speed}, "f", catalog), catalog
    ).warnings()
    mine = [line for line in found if line.startswith("run.device: cuda")]
    assert len(mine) == bool(said)
    assert all(text in mine[0] for text in said)


def test_a_gpu_holds_nothing_of_the_files(config: dict[str, Any], catalog: Catalog) -> None:
    assert estimate_of({**config, "run": {"device": "cuda"}}, catalog).loading == 2 * WEIGHTS


def test_rows_sampled_at_once_bound_the_cache(config: dict[str, Any], catalog: Catalog) -> None:
    ppo = {"batch": 12, "minibatch": 12, "samples_per_prompt": 3}
    each = 2 * 1 * 1 * 2 * 8 * 2  # two tensors, a layer, a head of width 2, eight tokens, two bytes
    for rows, held in ((None, 12), (6, 6), (7, 6), (1, 3), (100, 12)):
        changed = {**config, "ppo": ppo, "sampling": {"max_new_tokens": 8, "rows": rows}}
        assert row(estimate_of(changed, catalog), "sampling").shared == held * each


def test_checkpointing_keeps_a_layers_input_and_one_layer(config: dict[str, Any], catalog: Catalog) -> None:
    model = {**config["model"], "gradient_checkpointing": True}
    memory = estimate_of({**config, "model": model, "ppo": {"batch": 2, "minibatch": 2}}, catalog)
    kept = 4 + (6 * 4 + 2 * 8) + 4 + 4  # the input of the one layer; what it keeps while it is computed again
    logits, gradient = 3 * 4 * 2 * 8 * 10, 4 * 4 * 2 * 8 * 4
    assert row(memory, "update").shared == pytest.approx(2 * 16 * kept + logits + gradient)


@pytest.mark.parametrize(
    ("dtype", "device", "asked", "kept"),
    [
        ("float32", "cpu", None, 4 * (6 * 4 + 2 * 8 + 4 + 4)),
        ("float32", "cpu", False, 4 * (6 * 4 + 3 * 8 + 4 + 4)),
        ("bfloat16", "cpu", False, 2 * (6 * 4 + 3 * 8) + 4 * (4 + 4)),  # a float32 copy of each adapter's input
        ("bfloat16", "cuda", None, 2 * (6 * 4 + 3 * 8) + 4 * (4 + 4)),
        ("bfloat16", "cuda", True, 2 * (6 * 4 + 2 * 8 + 4 + 4)),
    ],
)
def test_plain_passes_keep_more(
    config: dict[str, Any], catalog: Catalog, dtype: str, device: str, asked: bool | None, kept: int
) -> None:
    """Bytes of a token. By autograd's hooks a Llama of h 256 and f 768 keeps 16,792 a layer in float32 with q and v adapted (the formula:
    16,384), and 18,520 in bfloat16 with all layers adapted (16,896)."""
    on_it = {
        **config,
        "model": {**config["model"], "dtype": dtype},
        "run": {"device": device},
        "speed": {"recompute_cheap": asked},
        "ppo": {"batch": 2, "minibatch": 2},
    }
    logits, gradient = 3 * 4 * 2 * 8 * 10, 4 * 4 * 2 * 8 * 4
    assert row(estimate_of(on_it, catalog), "update").shared == pytest.approx(16 * kept + logits + gradient)


def test_of_quantized_weights_one_layer_is_there_in_full(config: dict[str, Any], catalog: Catalog) -> None:
    plain, eight = (row(estimate_of({**config, **more}, catalog), "update") for more in ({}, {"quantization": "eight"}))
    assert eight.shared - plain.shared == 2 * 8 * 4  # the largest: up, [8, 4], in bfloat16
