"""Several processes make the run that one makes: same gradients, same weights on every rank, one end for all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("worker.py")
CASES = ("on-policy", "own-value", "groups", "standing-still", "early-stop", "sharded", "checkpointing")
FAULTS = ("raises", "killed", "hangs", "not_finite", "stopped")

REWARDS = """
import os, signal, time

CALLS = []


def odd(completion_ids, **columns):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


low = odd


def second_step(completion_ids):
    CALLS.append(len(completion_ids))  # the first call is the pre-flight check's
    return len(CALLS) == 3 and os.environ["RANK"] == "1"


def raises_on_rank_1(completion_ids, **columns):
    if second_step(completion_ids):
        raise RuntimeError("the judge is out")
    return odd(completion_ids)


def kills_rank_1(completion_ids, **columns):
    if second_step(completion_ids):
        os.kill(os.getpid(), signal.SIGKILL)
    return odd(completion_ids)


def hangs_on_rank_1(completion_ids, **columns):
    if second_step(completion_ids):
        time.sleep(4)
    return odd(completion_ids)


def stops_rank_1(completion_ids, **columns):
    if second_step(completion_ids):
        os.kill(os.getpid(), signal.SIGTERM)
    return odd(completion_ids)
"""


@pytest.fixture(scope="module")
def played(tiny_folder: str, prompts_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all scenarios were played: on one process what is compared, on two everything."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny").symlink_to(tiny_folder)
    (folder / "prompts.jsonl").symlink_to(prompts_file)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    names = ["joint", "whole_run", "sampling", "asked_to_stop", "uneven", "disagree", *FAULTS]
    asked = ["1:joint", "1:sampling", *(f"2:{name}" for name in names)]
    subprocess.run([sys.executable, str(WORKER), str(folder), *asked], check=True, timeout=300)
    return folder


def ended(played: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((played / "results.json").read_text(encoding="utf-8"))[f"2:{name}"]
    return found


def said(played: Path, name: str) -> list[str]:
    return [(played / f"{name}-2" / rank / "stderr").read_text(encoding="utf-8") for rank in ("0", "1")]


@pytest.fixture(scope="module")
def joint(played: Path) -> Path:
    assert [rank["code"] for rank in ended(played, "joint")] == [0, 0], said(played, "joint")
    return played


def tensors(played: Path, place: str) -> dict[str, Tensor]:
    return load_file(played / place)


class TestJointBatch:
    """Given responses: two processes with half of each minibatch are one process with all of it."""

    @pytest.mark.parametrize("case", CASES)
    def test_gradients_are_the_same(self, joint: Path, case: str) -> None:
        one, two = tensors(joint, f"joint-1/0/{case}.safetensors"), tensors(joint, f"joint-2/0/{case}.safetensors")
        names = sorted(name for name in one if name.startswith("gradient-"))
        assert names == sorted(name for name in two if name.startswith("gradient-"))
        assert case == "early-stop" or len(names) == 8
        for name in names if case == "standing-still" else ["gradient-0"]:  # the others move, and rounding with them
            assert float((two[name] - one[name]).norm() / one[name].norm()) < 1e-6
            assert float(one[name].norm()) > 1e-3

    @pytest.mark.parametrize("case", CASES)
    def test_weights_after_each_step_are_the_same(self, joint: Path, case: str) -> None:
        """Adam divides by the gradient's size, so rounding of tiny gradients grows: the bound is on weights, not bits."""
        one, two = tensors(joint, f"joint-1/0/{case}.safetensors"), tensors(joint, f"joint-2/0/{case}.safetensors")
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-5, msg=name)

    @pytest.mark.parametrize("case", CASES)
    def test_ranks_are_bitwise_equal_after_each_step(self, joint: Path, case: str) -> None:
        first, second = (tensors(joint, f"joint-2/{rank}/{case}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []

    @pytest.mark.parametrize("case", CASES)
    def test_metrics_are_of_all_ranks(self, joint: Path, case: str) -> None:
        one, first, second = (
            json.loads((joint / place / f"{case}.json").read_text(encoding="utf-8"))
            for place in ("joint-1/0", "joint-2/0", "joint-2/1")
        )
        for step in range(2):
            names = {name for name in one[step] if not name.startswith("perf/")}
            assert {name: first[step][name] for name in names} == {name: second[step][name] for name in names}
            for name in names:
                noise = 1e-3 if name == "policy/ratio_std" else 2e-4  # the root of a difference of equal squares
                assert first[step][name] == pytest.approx(one[step][name], rel=2e-3, abs=noise), name
        assert one[0]["policy/first_ratio_error"] == first[0]["policy/first_ratio_error"] == 0.0

    def test_the_early_stop_stopped_early(self, joint: Path) -> None:
        (first, *_) = json.loads((joint / "joint-2/0/early-stop.json").read_text(encoding="utf-8"))
        assert first["policy/stopped_early"] == 1.0
        assert 0 < first["policy/optimizer_steps"] < 4

    def test_the_kl_coefficient_moved(self, joint: Path) -> None:
        found = tensors(joint, "joint-2/0/on-policy.safetensors")
        assert float(found["state-1/kl_coef"]) != 0.2


class TestSampling:
    def test_two_processes_draw_what_one_draws(self, played: Path) -> None:
        first, second = (json.loads((played / f"sampling-2/{rank}/sampling.json").read_text()) for rank in (0, 1))
        assert first == second
        one = json.loads((played / "sampling-1/0/sampling.json").read_text())
        assert (first["prompts"], first["texts"]) == (one["prompts"], one["texts"])
        assert len(set(first["texts"])) > 4

    def test_the_plain_decoder_draws_other_texts_on_each_rank(self, played: Path) -> None:
        found = json.loads((played / "sampling-2/0/sampling.json").read_text())
        assert found["same"][:4] != found["same"][4:]  # all from one prompt, half of them on each rank

    def test_the_first_ratio_is_bitwise_one(self, played: Path) -> None:
        found = json.loads((played / "sampling-2/0/sampling.json").read_text())
        assert found["first_ratio_error"] == 0.0
        assert found["ratio_max"] > 1.0


class TestRun:
    @pytest.mark.parametrize("shard", ["none", "fsdp2"])
    def test_resume_is_bitwise_the_uninterrupted_run(self, played: Path, shard: str) -> None:
        assert [rank["code"] for rank in ended(played, "whole_run")] == [0, 0], said(played, "whole_run")
        whole = tensors(played, f"whole_run-2/0/whole-{shard}.safetensors")
        for other in ("0/resumed", "1/whole", "1/resumed"):
            found = tensors(played, f"whole_run-2/{other}-{shard}.safetensors")
            assert found.keys() == whole.keys()
            assert [name for name in whole if not torch.equal(found[name], whole[name])] == [], other

    @pytest.mark.parametrize("shard", ["none", "fsdp2"])
    def test_the_first_rank_writes_and_nobody_else(self, played: Path, shard: str) -> None:
        folder = played / f"whole_run-2/0/whole-{shard}"
        steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps] == [1, 2, 3]
        evaluations = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
        assert [line["step"] for line in evaluations] == [0, 2, 3]
        assert (folder / "final/policy/adapter_model.safetensors").is_file()
        assert json.loads((folder / "provenance.json").read_text())["hardware"]["processes"] == 2
        again = played / f"whole_run-2/0/resumed-{shard}"
        for name in ("evals.jsonl", "samples.jsonl"):
            assert (again / name).read_text() == (folder / name).read_text()

    def test_the_evaluation_is_of_every_held_out_prompt_once(self, played: Path, prompts_file: str) -> None:
        """Five prompts on two ranks: the sixth place is filled up, and not counted."""
        (first, *_) = (played / "whole_run-2/0/whole-none/evals.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in Path(prompts_file).read_text().splitlines()]
        samples = [sample["prompt"] for sample in json.loads(first)["samples"]]
        assert samples == prompts[: len(samples)]


class TestRefused:
    def test_batches_that_cannot_be_shared_out(self, played: Path) -> None:
        found = json.loads((played / "uneven-2/0/uneven.json").read_text())
        assert found == json.loads((played / "uneven-2/1/uneven.json").read_text())
        minibatch, prompts, microbatch, by_hand = found
        assert minibatch.startswith("ConfigError: ppo.minibatch: 1 can't be shared out over 2 processes (remainder 1)")
        assert prompts.startswith("ConfigError: ppo.batch / ppo.samples_per_prompt: 1 can't be shared out")
        assert microbatch.startswith("ConfigError: ppo.microbatch: 2 does not divide the 3 responses")
        assert by_hand.startswith("DataError: a batch of 3 responses")

    def test_ranks_that_differ(self, played: Path) -> None:
        found = json.loads((played / "disagree-2/0/disagree.json").read_text())
        assert found == json.loads((played / "disagree-2/1/disagree.json").read_text())
        assert [text.split(" of rank 1")[0] for text in found] == [
            "the config",
            "the config",
            "the trained weights after step 1",
        ]


class TestOneEndForAll:
    """No agent watches here: each rank must find out by itself, and the first cause is said once."""

    def test_an_error_on_one_rank(self, played: Path) -> None:
        assert [rank["code"] for rank in ended(played, "raises")] == [3, 3]
        quiet, loud = said(played, "raises")
        assert "[rank 1] marl: " in loud
        assert "the judge is out" in loud
        assert "Traceback" not in quiet + loud
        assert "the judge is out" not in quiet

    def test_a_rank_that_is_killed(self, played: Path) -> None:
        assert [rank["code"] for rank in ended(played, "killed")] == [5, -9]
        assert "rank 1 died without a word while rank 0 exchanged rows" in said(played, "killed")[0]
        assert ended(played, "killed")[0]["seconds"] < 15

    def test_a_rank_that_hangs(self, played: Path) -> None:
        first, second = ended(played, "hangs")
        assert (first["code"], second["code"]) == (5, 5)
        assert first["seconds"] < second["seconds"]
        assert "rank 0 waited 1 s (run.timeout_seconds) for rank 1 to bring its rows" in said(played, "hangs")[0]

    def test_a_loss_that_is_not_finite_on_one_rank(self, played: Path) -> None:
        assert [rank["code"] for rank in ended(played, "not_finite")] == [5, 5]
        quiet, loud = said(played, "not_finite")
        assert "[rank 1] marl: update: the loss is nan" in loud
        assert "loss" not in quiet

    def test_one_rank_that_asks_stops_all(self, played: Path) -> None:
        for rank in (0, 1):
            file = played / "asked_to_stop-2" / str(rank) / "asked_to_stop.json"
            by_strategy, by_hand = json.loads(file.read_text(encoding="utf-8"))
            assert by_strategy == [2, "enough (Enough of __main__)"]
            assert by_hand == [0, "not today"]

    def test_a_signal_to_one_rank_stops_all_after_the_step(self, played: Path) -> None:
        assert [rank["code"] for rank in ended(played, "stopped")] == [143, 143]
        texts = "".join(said(played, "stopped"))
        assert texts.count("stopped by SIGTERM after step 2; saved in ") == 1
        assert (played / "run-stops_rank_1/checkpoints/step-000002").is_dir()
