"""The adapter study: protocol and statistics compute what they claim, pieces are done once, the page says what the results say."""

import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import Catalog, MarlError, Plan
from marl_core.config.load import parse_config
from marl_core.errors import Stopped
from marl_core.testing import write_tiny_model

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "adapter_study"


@pytest.fixture(autouse=True, scope="module")
def on_path() -> Any:
    """Its modules import each other by plain names, in the processes of pieces too."""
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


def study(name: str) -> Any:
    """A module of the study."""
    return importlib.import_module(name)


def finish(piece: Any, result: dict[str, Any]) -> None:
    """Give a piece a result."""
    piece.file.parent.mkdir(parents=True, exist_ok=True)
    piece.file.write_text(
        json.dumps({"arguments": piece.arguments, "commit": None, "result": result}), encoding="utf-8"
    )


def kill_when(log: Path, said: str) -> None:
    """Kill the piece that works once its log says so."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        if log.is_file() and said in log.read_text(encoding="utf-8"):
            for child in multiprocessing.active_children():
                child.kill()
            return
        time.sleep(0.01)


def evals(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations of a run: reward and KL."""
    return [{"step": step, "reward": reward, "kl": kl} for step, (reward, kl) in enumerate(pairs)]


class TestProtocol:
    def test_a_run_is_judged_at_its_last_evaluation_within_the_bound(self) -> None:
        score = study("protocol").score
        run = evals((0.1, 0.0), (0.5, 2.0), (0.4, 3.0), (0.9, 9.0))
        assert score(run, 10.0) == 0.9
        assert score(run, 5.0) == 0.4  # not the 0.5 before it: the last, not the best
        assert score(run, 1.0) == 0.1

    def test_the_best_size_is_that_of_the_best_score_and_of_equals_the_smaller(self) -> None:
        best = study("protocol").best
        runs = {
            "small": evals((0.1, 0), (0.4, 1)),
            "middle": evals((0.1, 0), (0.7, 2)),
            "large": evals((0.1, 0), (0.9, 8)),
        }
        assert best(runs, 10.0) == "large"
        assert best(runs, 5.0) == "middle"
        assert best({**runs, "small": runs["middle"]}, 5.0) == "small"

    def test_a_rate_is_where_the_step_has_its_size(self) -> None:
        rate_for = study("protocol").rate_for
        asked: list[float] = []

        def proportional(rate: float) -> float:
            asked.append(rate)
            return 20 * rate

        assert rate_for(0.1, proportional, (1e-3, 0.02)) == (pytest.approx(5e-3), pytest.approx(0.1))
        assert len(asked) == 1

        rate, size = rate_for(0.1, lambda rate: 30 * rate**1.2, (1e-3, 30 * 1e-3**1.2))  # bent, as large steps are
        assert size == pytest.approx(0.1, rel=0.1)
        assert size == pytest.approx(30 * rate**1.2)

    def test_a_kind_that_cannot_step_so_far_says_where_it_stopped(self) -> None:
        rate, size = study("protocol").rate_for(0.1, lambda rate: 0.01, (1e-3, 0.01))
        assert size == 0.01
        assert rate > 1e-3


class TestAnswers:
    @pytest.mark.parametrize(
        ("probability", "freedom", "table"),
        [(0.975, 4, 2.7764), (0.975, 10, 2.2281), (0.975, 32, 2.0369), (0.995, 10, 3.1693), (0.99833, 32, 3.1754)],
    )
    def test_students_quantiles_are_the_tables(self, probability: float, freedom: int, table: float) -> None:
        assert study("answers").student(probability, freedom) == pytest.approx(table, rel=0.01)

    def test_the_spread_of_seeds_is_pooled(self) -> None:
        noise = study("answers").Noise.of([[1.0, 2.0, 3.0], [5.0, 5.0, 8.0], [4.0]])  # squares 2, 6 and none; freedom 4
        assert (noise.std, noise.freedom) == (pytest.approx(math.sqrt(2)), 4)

    def test_an_interval_by_hand(self) -> None:
        answers = study("answers")
        noise = answers.Noise(0.3, 10)
        found = answers.Difference.of([1.0, 2.0, 3.0], [0.5, 1.0, 1.5], noise)
        assert found.value == pytest.approx(1.0)
        assert found.margin == pytest.approx(2.2281 * 0.3 * math.sqrt(2 / 3), rel=0.01)
        assert found.seen
        assert found.verdict() == f"better (+1.000 ± {found.margin:.3f})"
        wider = answers.Difference.of([1.0, 2.0, 3.0], [0.5, 1.0, 1.5], noise, comparisons=5)
        assert wider.margin == pytest.approx(3.1693 * 0.3 * math.sqrt(2 / 3), rel=0.01)

    def test_no_difference_is_said_as_such(self) -> None:
        found = study("answers").Difference(0.02, 0.05)
        assert found.verdict() == "no difference (+0.020 ± 0.050)"

    def test_of_one_seed_nothing_is_said(self) -> None:
        answers = study("answers")
        found = answers.Difference.of([1.0], [0.0], answers.Noise.of([[1.0], [0.0]]))
        assert not found.seen
        assert "one seed" in found.verdict()

    def test_rank_correlation_by_hand(self) -> None:
        correlation = study("answers").rank_correlation
        assert correlation({"a": (1, 10), "b": (2, 20), "c": (3, 300)}) == pytest.approx(1.0)
        assert correlation({"a": (1, 3), "b": (2, 2), "c": (3, 1)}) == pytest.approx(-1.0)
        assert study("answers").ranks([5.0, 1.0, 5.0]) == [2.5, 1.0, 2.5]

    def test_how_many_times_the_rate_for_a_step_of_equal_size(self) -> None:
        rows = [
            {"way": "all weights", "rate": 1e-4, "size": 0.06},
            {"way": "lora-16", "rate": 1e-3, "size": 0.04},  # so 0.06 is at 1.5e-3, 15 times 1e-4
        ]
        assert study("kinds_page").equal_steps(rows, "all weights", "lora-16") == [pytest.approx(15.0)]


def run(kind: str, size: str, seed: int, rate: float, rewards: tuple[float, float], kl: float = 1.0) -> dict[str, Any]:
    """A run as results/runs.jsonl has it: rewards before and after."""
    return {
        "task": "sums", "kind": kind, "size": size, "seed": seed, "rate": rate, "learned": 100, "broken": None, "cpu_seconds": 1.0,
        "peak_mib": 1, "rewards": [], "evals": evals((rewards[0], 0.0), (rewards[1], kl)),
    }  # fmt: skip


class TestPage:
    def test_page_and_results_agree(self) -> None:
        rendered = study("kinds_page").render(study("measured").Measured())
        assert (ROOT / "docs" / "adapter-study.md").read_text(encoding="utf-8") == rendered

    def test_every_run_is_what_the_protocol_says(self) -> None:
        measured, protocol, kinds = study("measured").Measured(), study("protocol"), study("kinds")
        runs = [(row["task"], row["kind"], row["size"], row["seed"]) for row in measured.runs]
        assert len(set(runs)) == len(runs)
        for row in measured.runs:
            if row["size"] in protocol.SIZES:
                assert row["rate"] == measured.probes[row["task"], row["kind"]]["rates"][row["size"]]
            else:
                yardstick = measured.best_runs(row["task"], protocol.YARDSTICK)
                assert row["rate"] == yardstick[0]["rate"]
            config = kinds.read_tasks()[row["task"]].config
            steps = [*range(0, config["ppo"]["steps"], config["eval"]["every"]), config["ppo"]["steps"]]
            told = [one["step"] for one in row["evals"]]
            assert told == steps if row["broken"] is None else told == steps[: len(told)]

    def test_figures_are_there_and_named_by_the_page(self) -> None:
        frontiers, measured = study("frontiers"), study("measured").Measured()
        page = (ROOT / "docs" / "adapter-study.md").read_text(encoding="utf-8")
        for name in [*map(frontiers.frontier, measured.tasks()), frontiers.RATE]:
            assert f"figures/{name}.svg" in page
            assert (frontiers.FIGURES / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")

    def test_every_kind_is_in_a_figure(self) -> None:
        assert study("frontiers").unknown() == set()

    def test_what_went_wrong_is_told_apart(self) -> None:
        fate = study("measured").Measured().fate
        assert fate(run("lora-1", "large", 0, 1e-3, (0.2, 0.9), kl=99.0)) == "too far"
        assert fate(run("lora-1", "large", 0, 1e-3, (0.2, 0.1), kl=99.0)) == "collapsed"
        assert fate(run("lora-1", "large", 0, 1e-3, (0.2, 0.9)) | {"broken": "step 3: nan"}) == "broke"
        assert fate(run("lora-1", "large", 0, 1e-3, (0.2, 0.9))) == ""

    def test_verdicts_follow_from_numbers(self, tmp_path: Path) -> None:
        """Three kinds: two ranks that end alike, and PiSSA, which falls apart with large steps and at the one rate."""
        measured, kinds_page = study("measured"), study("kinds_page")
        rates = {"small": 1e-4, "middle": 2e-4, "large": 4e-4}
        ends = {
            "lora-1": {"small": 0.3, "middle": 0.50, "large": 0.4},
            "lora-16": {"small": 0.3, "middle": 0.51, "large": 0.4},
            "pissa": {"small": 0.5, "middle": 0.3, "large": 0.1},
        }
        runs = [
            run(kind, size, 0, rates[size], (0.2, end)) for kind, sizes in ends.items() for size, end in sizes.items()
        ]
        for seed in (1, 2):
            runs += [run("lora-1", "middle", seed, 2e-4, (0.2, 0.50 + seed / 50))]
            runs += [run("lora-16", "middle", seed, 2e-4, (0.2, 0.51 + seed / 50))]
            runs += [run("pissa", "small", seed, 1e-4, (0.2, 0.50 + seed / 50))]
        runs += [run("lora-1", "one", 0, 2e-4, (0.2, 0.5)), run("pissa", "one", 0, 2e-4, (0.2, 0.1))]
        probes = [
            {"task": "sums", "kind": kind, "at_first_rate": size, "rates": rates, "sizes": rates}
            for kind, size in {"lora-1": 0.11, "lora-16": 0.1, "pissa": 0.5}.items()
        ]
        measured.write(tmp_path / "runs.jsonl", runs)
        measured.write(tmp_path / "probes.jsonl", probes)
        steps = {"all weights": (1e-4, 0.06), "linear layers": (1e-4, 0.05), "lora-16": (1e-3, 0.04)}
        full = [{"task": "sums", "way": way, "rate": rate, "size": size} for way, (rate, size) in steps.items()]
        measured.write(tmp_path / "full.jsonl", full)
        told = kinds_page.TaskTold(measured.Measured(tmp_path), "sums")
        assert told.noise.std == pytest.approx(0.02)  # 0.50, 0.52, 0.54 in each
        assert told.ranks().startswith(
            "No difference: LoRA r=16 less LoRA r=1, the largest difference of two ranks, is +0.010 ±"
        )
        assert told.svd().startswith(
            "Its large steps collapse (lora-16: none). At its best rate, beside lora-16: no difference (-0.010 ±"
        )
        assert "where its first step is 5.0 times as large, it collapses" in told.svd()
        assert told.artefact().startswith(
            "Mostly not. At one rate the kinds' standard deviation is 0.234, each at its best rate 0.006"
        )
        assert "correlation of -1.00 with how many times" in told.artefact()
        assert "2 of the other 2 kinds can't be told apart" in told.smallest()
        assert "15 times where all weights learn, 12 times where linear layers learn" in told.ten_times()
        assert told.ten_times().endswith("ten is about right.")
        assert not told.whole


class TestBases:
    def test_no_sum_is_in_two_sets(self) -> None:
        bases = study("bases")
        sets = bases.sums()
        assert [len(one) for one in sets] == [bases.SUMS_TRAINED, bases.PROMPTS, bases.HELDOUT]
        assert len(set().union(*sets)) == sum(map(len, sets))

    def test_sums_and_their_check_by_hand(self) -> None:
        bases, last_total = study("bases"), study("checks").last_total
        assert bases.solved("7+5+8+6=") == "7+5+8+6=12,20,26"
        guesses = {bases.guessed("7+5+8+6=", random.Random(seed)) for seed in range(100)}
        assert guesses == {f"7+5+8+6={26 + off}" for off in range(-3, 4)}
        assert last_total([""] * 5, ["12,20,26", "26", " 26 ", "26,", "2,6"], [26] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]

    def test_pissas_base_with_its_adapter_is_the_base(self, make_config: Any, tmp_path: Path) -> None:
        """Another base, the same start: that is what makes its arm comparable."""
        from transformers import AutoModelForCausalLM

        from marl_core import Runner

        base = write_tiny_model(tmp_path / "base")
        study("pissa").convert(tmp_path / "pissa", Path(base))
        mine, adapter = str(tmp_path / "pissa" / "base"), str(tmp_path / "pissa" / "adapter")
        ids = torch.arange(4, 16)[None]
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        left = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
        config = make_config(
            model={"path": mine},
            policy={"start": "continue", "from": adapter},
            reference={"use": "peft-adapter", "adapter": adapter},
        )
        runner = Runner(config)
        with torch.no_grad(), runner.bank.using("policy"):
            whole = runner.bank.base(input_ids=ids).logits
        with torch.no_grad():
            assert (left(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 1e-2
            assert torch.allclose(whole, plain(input_ids=ids).logits, atol=1e-4)
        assert "kl" in str(runner.prepare()).lower()


class TestPlan:
    def test_every_kind_is_a_valid_config_on_every_task(self, tmp_path: Path) -> None:
        kinds = study("kinds")
        bases = study("bases").Bases(tmp_path)
        for task in kinds.read_tasks().values():
            for kind in kinds.read_kinds().values():
                config = parse_config(kinds.config_of(task, kind, bases, 1e-3, 2), kind.name, Catalog.installed())
                assert (config.run.seed, config.ppo.learning_rate) == (2, 1e-3)
                if not kind.prepared:
                    Plan.of(config)

    def test_runs_follow_from_what_was_measured(self, tmp_path: Path) -> None:
        """No run before its kind's probe, no second seed before all three sizes, the one rate is the yardstick's best."""
        plan, protocol, kinds = study("plan"), study("protocol"), study("kinds")
        mine = plan.Study(tmp_path)
        task = kinds.read_tasks()["reviews"]
        kind, other = (kinds.read_kinds()[name] for name in (protocol.YARDSTICK, "lora-1"))
        assert mine.tried(task, "middle") == []
        rates = {"small": 1e-4, "middle": 3e-4, "large": 1e-3}
        for one in (kind, other):
            finish(mine.probe(task, one), {"rates": rates})
        assert [piece.name for piece in mine.tried(task, "middle")] == [
            "reviews/lora-1/middle-0",
            "reviews/lora-16/middle-0",
        ]
        assert mine.repeated(task, 1) == []
        for size, reward in {"small": 0.1, "middle": 0.3, "large": 0.2}.items():
            finish(mine.run(task, kind, size), {"evals": evals((0.0, 0.0), (reward, 1.0))})
        (again,) = mine.repeated(task, 2)
        assert again.name == "reviews/lora-16/middle-2"
        assert again.arguments["config"]["run"]["seed"] == 2
        ones = mine.one_rate(task)
        assert {piece.arguments["config"]["ppo"]["learning_rate"] for piece in ones} == {3e-4}
        assert len(ones) == len(kinds.read_kinds()) - 1  # the yardstick's own run at that rate is there

    def test_a_piece_of_another_config_is_not_taken_for_this_one(self, tmp_path: Path) -> None:
        pieces = study("pieces")
        piece = pieces.Piece("one", tmp_path / "one.json", print, {"key": 1})
        finish(piece, {})
        with pytest.raises(MarlError, match="another config"):
            pieces.do_all([pieces.Piece("one", piece.file, print, {"key": 2})], 1)


class TestPieces:
    def test_a_piece_killed_half_way_gives_the_same_when_done_again(self, make_config: Any, tmp_path: Path) -> None:
        pieces = study("pieces")
        config = make_config(ppo={"steps": 40}).model_dump(mode="json", exclude_unset=True, by_alias=True)
        config["eval"] = {"prompts": config["data"]["prompts"], "every": 20}
        whole, torn = (
            pieces.Piece(name, tmp_path / f"{name}.json", study("trial").run, {"config": config})
            for name in ("whole", "torn")
        )
        told: list[str] = []
        pieces.do_all([whole], 1, told.append)
        working = threading.Thread(target=kill_when, args=(torn.log, '"step": 0'))
        working.start()
        with pytest.raises(MarlError, match="1 of 1 pieces failed"):
            pieces.do_all([torn], 1, told.append)
        working.join()
        assert not torn.file.exists()
        pieces.do_all([whole, torn], 1, told.append)
        assert "pieces: 2, done before: 1" in told
        one, other = (
            {k: v for k, v in piece.result.items() if k not in ("cpu_seconds", "peak_mib")} for piece in (whole, torn)
        )
        assert one == other
        assert len(one["rewards"]) == 40
        assert [row["step"] for row in one["evals"]] == [0, 20, 40]

    def test_a_signal_lets_the_piece_under_way_end_and_starts_no_more(self, tmp_path: Path) -> None:
        pieces = study("pieces")
        first, second = (pieces.Piece(name, tmp_path / f"{name}.json", json.loads, {"s": "{}"}) for name in ("1", "2"))

        def ask() -> None:
            while not multiprocessing.active_children():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)

        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(Stopped):
            pieces.do_all([first, second], 1, lambda line: None)
        asking.join()
        assert first.finished
        assert not second.finished
        pieces.do_all([first, second], 1, lambda line: None)
        assert second.finished

    def test_one_that_fails_stops_no_other(self, tmp_path: Path) -> None:
        pieces = study("pieces")
        bad = pieces.Piece("bad", tmp_path / "bad.json", study("trial").run, {"config": {"model": {"path": "nowhere"}}})
        good = pieces.Piece("good", tmp_path / "good.json", json.loads, {"s": '{"done": true}'})
        with pytest.raises(MarlError, match="1 of 2 pieces failed"):
            pieces.do_all([bad, good], 1, lambda line: None)
        assert good.result == {"done": True}
        assert "nowhere" in bad.log.read_text(encoding="utf-8")
