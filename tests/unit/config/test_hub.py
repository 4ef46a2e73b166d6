"""What this machine holds of the hub: found as huggingface_hub finds it, by its variables and by branch, tag and commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marl_core import Catalog, DataError, Plan, RunConfig, Runner, cached_adapter, read_adapter
from marl_core.artifacts.model_files import read_model
from marl_core.plan.describe import explain, unseen
from marl_core.plan.memory import estimate
from marl_core.testing import tiny_tokenizer, write_tiny_model

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and nobody to ask."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put(cache: Path, name: str, snapshots: dict[str, Path], refs: dict[str, str]) -> None:
    """A repository in the cache, laid out as the hub's documentation says."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit, folder in snapshots.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
    for ref, commit in refs.items():
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As peft writes them: two SFT adapters of other ranks and weights, and a reward adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, rank, task) in enumerate(
        (("old", 2, "CAUSAL_LM"), ("new", 3, "CAUSAL_LM"), ("reward", 2, "SEQ_CLS"))
    ):
        torch.manual_seed(seed)
        reward = task == "SEQ_CLS"
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        model = kind.from_pretrained(base, **({"num_labels": 1} if reward else {}))
        model.config.pad_token_id = 0
        config = LoraConfig(task_type=task, r=rank, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        get_peft_model(model, config).save_pretrained(str(folder / name))
        tiny_tokenizer().save_pretrained(folder / name) if reward else None
        made[name] = folder / name
    return made


@pytest.mark.parametrize(
    ("revision", "found"),
    [
        (None, NEW),
        ("main", NEW),
        ("v1.0", OLD),
        ("refs/pr/3", OLD),
        (OLD, OLD),
        (NEW, NEW),
        ("v2", None),
        ("3" * 40, None),
    ],
)
def test_models_by_branch_tag_and_commit(cache: Path, base: Path, revision: str | None, found: str | None) -> None:
    put(cache, "owner/name", {OLD: base, NEW: base}, {"main": NEW, "v1.0": OLD, "refs/pr/3": OLD})
    files = read_model("owner/name", revision)
    assert (files.folder.name if files else None) == found
    assert read_model("owner/other") is None
    if files is not None:
        assert files.shapes()["model.norm.weight"] == (32,)


def test_a_name_that_no_repository_can_have(cache: Path) -> None:
    with pytest.raises(DataError, match="the hub has no such names"):
        read_model("a--b")


VARIABLES = {
    "HF_HUB_CACHE": "",
    "HUGGINGFACE_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_the_variables_of_huggingface_hub(name: str, tmp_path: Path, base: Path) -> None:
    """In a process of its own: the library reads them as it is imported."""
    put(tmp_path / VARIABLES[name], "owner/name", {NEW: base}, {"main": NEW})
    clean = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    code = "from marl_core.artifacts.model_files import read_model; print(read_model('owner/name').folder)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, name: str(tmp_path)}
    )
    assert done.stdout.strip().endswith(NEW)


def test_light_commands_import_the_library_only_for_hub_names(tmp_path: Path) -> None:
    code = "import sys, marl_core.cli.app, marl_core.artifacts.hub, marl_core.plan.plan; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"a {i}"}) + "\n" for i in range(4)))
    (tmp_path / "mine.py").write_text(
        "def score(completions, **columns): return [float(len(c)) for c in completions]\n"
    )
    return {
        "model": {"path": str(base), "dtype": "float32"},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": f"{tmp_path}/mine.py:score"},
        "data": {"prompts": f"{tmp_path}/prompts.jsonl", "max_prompt_tokens": 8},
        "sampling": {"max_new_tokens": 4},
        "ppo": {"steps": 1, "batch": 2, "minibatch": 2, "epochs": 1},
        "run": {"device": "cpu"},
    }


def plan_of(settings: dict[str, Any]) -> Plan:
    return Plan.of(RunConfig.model_validate(settings), Catalog.installed())


def continued(revision: str | None) -> dict[str, Any]:
    pinned = {"revision": revision} if revision else {}
    return {
        "policy": {"start": "continue", "from": "owner/sft", **pinned},
        "reference": {"use": "peft-adapter", "adapter": "owner/sft", **pinned},
    }


def rank_of(runner: Runner, adapter: str) -> int:
    config: Any = runner.bank.config(adapter)
    return int(config.r)


class TestAdaptersOfTheHub:
    @pytest.fixture(autouse=True)
    def hub(self, cache: Path, adapters: dict[str, Path]) -> None:
        put(cache, "owner/sft", {OLD: adapters["old"], NEW: adapters["new"]}, {"main": NEW, "v1": OLD})
        put(cache, "owner/judge", {OLD: adapters["reward"]}, {"v1": OLD})

    @pytest.mark.parametrize(("revision", "rank"), [(None, 3), ("v1", 2), (OLD, 2), (NEW, 3)])
    def test_policy_and_reference_are_those_of_the_revision(
        self, settings: dict[str, Any], adapters: dict[str, Path], revision: str | None, rank: int
    ) -> None:
        plan = plan_of(settings | continued(revision))
        assert plan.check() == []
        runner = Runner(plan)
        assert rank_of(runner, "policy") == rank
        assert rank_of(runner, "reference") == rank
        wanted = read_adapter(adapters["old" if rank == 2 else "new"], "x")
        assert {name: tuple(tensor.shape) for name, tensor in runner.bank.tensors("policy").items()} == wanted.shapes

    def test_merged_base(self, settings: dict[str, Any], adapters: dict[str, Path]) -> None:
        by_name = Runner(
            plan_of(settings | {"reference": {"use": "merged-base", "adapter": "owner/sft", "revision": "v1"}})
        )
        by_folder = Runner(plan_of(settings | {"reference": {"use": "merged-base", "adapter": str(adapters["old"])}}))
        ids = torch.tensor([[1, 70, 80]])
        with torch.no_grad(), by_name.bank.bare(), by_folder.bank.bare():
            one, other = (run.bank.trunk.hidden(ids, torch.ones_like(ids).bool()) for run in (by_name, by_folder))
        assert torch.equal(one, other)

    def test_reward_adapter(self, settings: dict[str, Any]) -> None:
        plan = plan_of(settings | {"reward": {"use": "adapter", "path": "owner/judge", "revision": "v1"}})
        assert plan.check() == []
        assert next(iter(Runner(plan).steps())).step == 1

    def test_other_revisions_of_policy_and_reference_are_no_match(self, settings: dict[str, Any]) -> None:
        mixed = continued("v1") | {"reference": {"use": "peft-adapter", "adapter": "owner/sft"}}
        assert any(
            "at revision v1, the reference is at revision main" in line for line in plan_of(settings | mixed).warnings()
        )
        assert not plan_of(settings | continued("v1")).warnings()

    def test_checks_look_into_the_cache(self, settings: dict[str, Any], cache: Path) -> None:
        """A reward adapter that has no head, and a policy that is its own judge, without any weights."""
        headless = settings | {"reward": {"use": "adapter", "path": "owner/sft"}}
        assert any("holds no score weights" in line for line in plan_of(headless).check())
        own = settings | continued("v1") | {"reward": {"use": "adapter", "path": "owner/sft", "revision": "v1"}}
        assert any("can't be its own judge" in line for line in plan_of(own).check())
        snapshot = cache / "models--owner--sft" / "snapshots" / OLD
        (snapshot / "adapter_model.safetensors").write_bytes(b"half")
        assert any("not a whole safetensors file" in line for line in plan_of(settings | continued("v1")).check())

    def test_what_is_told(self, settings: dict[str, Any]) -> None:
        plan = plan_of(settings | continued("v1"))
        assert any("copy of owner/sft" in line for line in explain(plan))
        assert unseen(plan) is None
        two, three = (estimate(plan_of(settings | continued(revision))).roles[1].shared for revision in ("v1", None))
        assert three == two * 3 / 2

    def test_one_that_is_not_here_is_left_to_the_run(self, settings: dict[str, Any]) -> None:
        plan = plan_of(settings | continued("v9"))
        assert plan.check() == []
        assert cached_adapter("owner/sft", "x", "v9") is None
        with pytest.raises(DataError, match=r"policy\.from: 'owner/sft' isn't on this machine"):
            estimate(plan)
        with pytest.raises(
            DataError, match=r"policy\.from: 'owner/sft' .* could not be downloaded from the hub at revision 'v9'"
        ):
            Runner(plan)

    def test_a_subfolder(
        self, settings: dict[str, Any], adapters: dict[str, Path], cache: Path, tmp_path: Path
    ) -> None:
        many = tmp_path / "many"
        shutil.copytree(adapters["old"], many / "last" / "adapter")
        put(cache, "owner/many", {OLD: many}, {"main": OLD})
        for path in ("owner/many", str(many)):
            chosen = {"policy": {"start": "continue", "from": path, "subfolder": "last/adapter"}}
            chosen["reference"] = {"use": "peft-adapter", "adapter": path, "subfolder": "last/adapter"}
            plan = plan_of(settings | chosen)
            assert plan.check() == []
            assert rank_of(Runner(plan), "reference") == 2


def test_revision_belongs_to_from(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the base's revision is model\.revision"):
        RunConfig.model_validate(settings | {"policy": {"revision": "main"}})
