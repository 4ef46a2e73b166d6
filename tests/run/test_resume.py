"""Resume is exact: a run that was stopped after any step ends bit for bit like one that never was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from marl_core import ConfigError, DataError, RunConfig, Runner, dump_config
from marl_core.cli.app import main
from marl_core.store.finished import finished

MakeConfig = Callable[..., RunConfig]
STEPS = 4
EVERYTHING = {
    "value": {"on": "own", "r": 2, "learning_rate": 5e-3},
    "policy": {"r": 4, "alpha": 8, "dropout": 0.1},
    "shaping": {"normalize": True, "missing_eos_penalty": 1.0, "clip": 3.0},
    "observers": ["json-lines"],
}
PPO = {
    "steps": STEPS, "batch": 4, "minibatch": 2, "epochs": 2, "schedule": "cosine", "warmup_steps": 2,
    "kl": {"coef": 0.2, "target": 0.5, "horizon": 40},
}  # fmt: skip


def config(make_config: MakeConfig, folder: Path, prompts: str, **changes: Any) -> RunConfig:
    run = {"folder": str(folder), "checkpoint_every": 1, "keep": STEPS}
    return make_config(**EVERYTHING, ppo=PPO, run=run, eval={"prompts": prompts, "every": 2, "limit": 2}, **changes)


def state(runner: Runner) -> dict[str, Tensor]:
    """Weights, optimizer state, and the numbers that a step leaves for the next."""
    weights = {
        f"{role}/{name}": p
        for role, found in runner.roles.trained.parameters(runner.bank).items()
        for name, p in found.items()
    }
    moments = {
        f"{name}|{key}": value for name, p in weights.items() for key, value in runner.optimizer.state[p].items()
    }
    rest = {"kl_coef": torch.tensor(runner.kl_coef, dtype=torch.float64), "done": torch.tensor(runner.done)}
    rest |= {key: torch.tensor(value, dtype=torch.float64) for key, value in runner.state.as_dict()["shaper"].items()}
    return {
        **{name: p.detach().clone() for name, p in weights.items()},
        **{k: v.clone() for k, v in moments.items()},
        **rest,
    }


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """A JSON-lines file without the times."""
    found = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("perf/")} for line in found
    ]


@pytest.fixture(scope="module")
def whole(
    make_config: MakeConfig, prompts_file: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runner = Runner(config(make_config, folder, prompts_file))
    runner.train()
    return folder, state(runner)


def test_all_state_is_in_play(whole: tuple[Path, dict[str, Tensor]]) -> None:
    steps = lines(whole[0], "steps.jsonl")
    assert len({step["objective/kl_coef"] for step in steps}) == STEPS
    assert len({step["policy/learning_rate"] for step in steps}) > 1
    assert len({step["objective/shaped_scores"] for step in steps}) == STEPS
    assert all(step["policy/ratio_max"] > 1 for step in steps)
    assert all(step["policy/first_ratio_error"] > 0 for step in steps[1:])  # dropout: the new pass isn't the old one
    assert float(whole[1]["count"]) == 4 * STEPS
    assert any("policy-value.weight" in name for name in whole[1])


def test_the_same_seed_gives_the_same_run(
    make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.manual_seed(99)  # whatever the caller did before
    runner = Runner(config(make_config, tmp_path / "run", prompts_file))
    runner.train()
    found = state(runner)
    assert all(torch.equal(found[name], value) for name, value in whole[1].items())


@pytest.mark.parametrize("stopped_after", range(1, STEPS))
def test_i20_resume_is_bitwise_the_uninterrupted_run(
    make_config: MakeConfig,
    prompts_file: str,
    whole: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    stopped_after: int,
) -> None:
    """The folder is what a kill leaves behind: lines of later steps are there, their checkpoints are not."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "final")
    for step in range(stopped_after + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 99, "half a li')
    torch.manual_seed(stopped_after)
    runner = Runner(config(make_config, folder, prompts_file), resume=True)
    assert runner.done == stopped_after
    assert runner.folder is not None
    again = "1 step is repeated" if stopped_after == STEPS - 1 else f"{STEPS - stopped_after} steps are repeated"
    assert runner.folder.notes == [f"resumed from step-{stopped_after:06d}; {again}"]
    runner.train()
    found = state(runner)
    assert found.keys() == whole[1].keys()
    assert [name for name, value in whole[1].items() if not torch.equal(found[name], value)] == []
    for name in ("steps.jsonl", "samples.jsonl", "evals.jsonl"):
        assert lines(folder, name) == lines(whole[0], name), name
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "final" / "policy" / file).read_bytes() == (whole[0] / "final" / "policy" / file).read_bytes()


@pytest.mark.parametrize("said", [False, True])
def test_a_folder_whose_config_has_a_key_by_its_old_name(
    make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path, said: bool
) -> None:
    """As marl wrote it before `speed.fold` was called `speed.merge_for_sampling`, and without the keys that came since."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}")
    written = yaml.safe_load((folder / "config.yaml").read_text())
    speed = written["speed"]
    speed["fold"] = said
    for key in ("merge_for_sampling", "short_attention", "trim_memory"):
        del speed[key]
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    if said:
        with pytest.raises(ConfigError, match=r"speed\.merge_for_sampling: True -> None"):
            Runner(config(make_config, folder, prompts_file), resume=True)
        return
    runner = Runner(config(make_config, folder, prompts_file), resume=True)
    assert runner.folder is not None
    assert not [note for note in runner.folder.notes if "config changed" in note]
    runner.train()
    assert [name for name, value in whole[1].items() if not torch.equal(state(runner)[name], value)] == []


def test_before_the_first_checkpoint_it_starts_again(
    make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints")
    runner = Runner(config(make_config, folder, prompts_file), resume=True)
    assert runner.done == 0
    runner.train()
    assert all(torch.equal(state(runner)[name], value) for name, value in whole[1].items())
    assert lines(folder, "steps.jsonl") == lines(whole[0], "steps.jsonl")
    assert lines(folder, "evals.jsonl") == lines(whole[0], "evals.jsonl")


def test_a_damaged_checkpoint_is_passed_over_and_said(
    make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    file = folder / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    runner = Runner(config(make_config, folder, prompts_file), resume=True)
    assert runner.folder is not None
    assert runner.folder.notes == [
        "step-000004 is damaged (optimizer.safetensors: hash differs)",
        "resumed from step-000003; 1 step is repeated",
    ]
    runner.train()
    assert all(torch.equal(state(runner)[name], value) for name, value in whole[1].items())


class TestFinished:
    """`marl run --resume` on a run with nothing left to do."""

    def test_it_says_so_and_changes_nothing(
        self,
        make_config: MakeConfig,
        prompts_file: str,
        whole: tuple[Path, dict[str, Tensor]],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(dump_config(config(make_config, whole[0], prompts_file)), encoding="utf-8")
        before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
        assert main(["run", str(file), "--resume"]) == 0
        said = capsys.readouterr().out
        assert f"this run is finished, {STEPS} steps of {STEPS} are done" in said
        assert str(whole[0] / "final" / "policy") in said
        assert f"--resume --set ppo.steps={2 * STEPS} --override (the learning rate's schedule" in said
        assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before

    @pytest.mark.parametrize(
        "lost",
        ["final", "report.html", "evals.jsonl", f"checkpoints/step-{STEPS:06d}/policy/adapter_config.json"],
    )
    def test_with_something_left_to_do_it_is_not(
        self,
        make_config: MakeConfig,
        prompts_file: str,
        whole: tuple[Path, dict[str, Tensor]],
        tmp_path: Path,
        lost: str,
    ) -> None:
        folder = tmp_path / "run"
        shutil.copytree(whole[0], folder)
        asked = config(make_config, folder, prompts_file)
        assert finished(asked) is not None
        shutil.rmtree(folder / lost) if lost == "final" else (folder / lost).unlink()
        assert finished(asked) is None

    def test_a_final_adapter_of_fewer_steps_is_none(
        self, make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
    ) -> None:
        folder = tmp_path / "run"
        shutil.copytree(whole[0], folder)
        older = folder / "checkpoints" / "step-000002" / "policy" / "adapter_model.safetensors"
        shutil.copyfile(older, folder / "final" / "policy" / older.name)
        assert finished(config(make_config, folder, prompts_file)) is None

    def test_more_steps_are_work(
        self, make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]]
    ) -> None:
        asked = config(make_config, whole[0], prompts_file)
        longer = asked.model_copy(update={"ppo": asked.ppo.model_copy(update={"steps": STEPS + 1})})
        assert finished(longer) is None


class TestRefused:
    def test_another_runs_mathematics(
        self, make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]]
    ) -> None:
        changed = config(make_config, whole[0], prompts_file, sampling={"temperature": 0.5})
        with pytest.raises(ConfigError, match=r"sampling.temperature: 1.0 -> 0.5"):
            Runner(changed, resume=True)
        assert Runner(changed, resume=True, override=True).done == STEPS

    def test_a_folder_that_holds_a_run(
        self, make_config: MakeConfig, prompts_file: str, whole: tuple[Path, dict[str, Tensor]]
    ) -> None:
        with pytest.raises(ConfigError, match=r"already holds a run. Go on with it by Runner\(config, resume=True\)"):
            Runner(config(make_config, whole[0], prompts_file))

    def test_a_folder_that_holds_none(self, make_config: MakeConfig, prompts_file: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no run"):
            Runner(config(make_config, tmp_path / "none", prompts_file), resume=True)
        assert not (tmp_path / "none").exists()

    def test_no_folder(self, make_config: MakeConfig) -> None:
        with pytest.raises(ConfigError, match=r"no run.folder"):
            Runner(make_config(), resume=True)


def test_more_steps_may_be_asked_for_where_the_schedule_allows(make_config: MakeConfig, tmp_path: Path) -> None:
    """With a constant learning rate, 1 step and then 1 more are 2 steps."""
    run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
    Runner(make_config(ppo={"steps": 1}, run=run)).train()
    longer = Runner(make_config(ppo={"steps": 2}, run=run), resume=True)
    longer.train()
    at_once = Runner(make_config(ppo={"steps": 2}))
    at_once.train()
    expected = state(at_once)
    assert all(torch.equal(value, expected[name]) for name, value in state(longer).items())
