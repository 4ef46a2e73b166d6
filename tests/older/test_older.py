"""What an older version wrote is still read: a run goes on as it would have, its report is drawn, its dump is tried again.

`house` was written by the version before the step became an object: a model, prompts, a reward, a run of four steps of which the
checkpoint of step 2 was kept, and a run that failed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marl_core import NumericError, Runner, load_config
from marl_core.cli.app import main
from marl_core.run.replay import replay
from marl_core.safety.dump import load

HOUSE = Path(__file__).with_name("house")
RENAMED = {"policy/approxkl": "policy/approx_kl"}
"""Metrics that had another name then."""
KEPT = 2
"""The step whose checkpoint was kept."""
ELSEWHERE = 1e-3
"""How far numbers may be from the recorded ones with other packages, or on a processor that rounds otherwise."""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, and in it: the configs name their files from there."""
    copy = tmp_path / "house"
    shutil.copytree(HOUSE, copy)
    monkeypatch.chdir(copy)
    return copy


def numbers(file: Path) -> list[dict[str, Any]]:
    """A run's lines without times, each metric under the name that it has now."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {RENAMED.get(key, key): value for key, value in line.items() if key != "time" and not key.startswith("perf/")}
        for line in lines
    ]


def allowed(run: Path) -> float:
    """How far a run's numbers may be from the recorded ones: nowhere, with their packages on such a processor."""
    was, now = (json.loads((folder / "provenance.json").read_text(encoding="utf-8")) for folder in (HOUSE / "run", run))
    alike = all(was["hardware"][name] == now["hardware"][name] for name in ("machine", "processor"))
    return 0.0 if was["packages"] == now["packages"] and alike else ELSEWHERE


@pytest.fixture
def resumed(house: Path) -> Path:
    """The run, gone on with from its checkpoint to its end."""
    config = load_config("run/config.yaml")
    assert config.run.threads == 1
    runner = Runner(config, resume=True)
    if runner.bank.device.type != "cpu":
        pytest.skip("the run was made on a CPU")
    assert runner.done == KEPT
    assert runner.folder is not None
    assert runner.folder.notes == [f"resumed from step-{KEPT:06d}; 2 steps are repeated"]
    runner.train()
    return house / "run"


class TestRun:
    def test_goes_on_as_it_would_have(self, resumed: Path) -> None:
        """The steps that the old version made after that checkpoint are made again, number by number."""
        found, recorded = (numbers(folder / "steps.jsonl") for folder in (resumed, HOUSE / "run"))
        assert [line["step"] for line in found] == [1, 2, 3, 4]
        assert found[:KEPT] == recorded[:KEPT]
        for mine, theirs in zip(found[KEPT:], recorded[KEPT:], strict=True):
            assert mine.keys() == theirs.keys()
            assert mine == pytest.approx(theirs, rel=0.0, abs=allowed(resumed))

    def test_ends_with_the_weights_it_would_have(self, resumed: Path) -> None:
        found, recorded = (
            load_file(folder / "final" / "policy" / "adapter_model.safetensors") for folder in (resumed, HOUSE / "run")
        )
        assert found.keys() == recorded.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, recorded[name], rtol=0.0, atol=allowed(resumed))

    def test_is_evaluated_as_it_would_have_been(self, resumed: Path) -> None:
        found, recorded = (numbers(folder / "evals.jsonl") for folder in (resumed, HOUSE / "run"))
        assert [line["step"] for line in found] == [0, 2, 4]
        for mine, theirs in zip(found, recorded, strict=True):
            for name in ("reward", "kl", "length", "finished"):
                assert mine[name] == pytest.approx(theirs[name], rel=0.0, abs=allowed(resumed))

    def test_its_report_is_drawn(self, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["report", "run"]) == 0
        page = house / "run" / "report.html"
        assert Path(capsys.readouterr().out.strip()).resolve() == page
        text = page.read_text(encoding="utf-8")
        assert "KL old to new policy" in text  # a metric that had another name
        assert "score.py:odd" in text


class TestDump:
    PLACE = Path("failed", "dumps", "step-000001-update")

    @pytest.mark.usefixtures("house")
    def test_its_scores_are_taken_for_what_they_were(self) -> None:
        """Its `scores` were shaped ones; those that the reward gave stood beside them under another name."""
        dumped = load(self.PLACE)
        held = load_file(self.PLACE / "batch.safetensors")
        assert dumped.scored is not None
        assert torch.equal(dumped.scored.scores, held["raw_scores"])
        assert torch.equal(dumped.scored.shaped_scores, held["scores"])
        assert not torch.equal(held["scores"], held["raw_scores"])
        assert (dumped.phase, dumped.state.step, dumped.state.kl_coef, dumped.rows) == ("update", 0, 0.2, [2, 3])

    def test_it_fails_again_as_it_did(self, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = sorted(house.rglob("*"))
        again = replay(self.PLACE)
        assert isinstance(again.now, NumericError)
        assert str(again.now).split(";")[0] == again.then.split(";")[0] == "update: the loss is nan"
        assert main(["replay", str(self.PLACE)]) == NumericError.exit_code
        assert "update: the loss is nan" in capsys.readouterr().err
        assert sorted(house.rglob("*")) == before
