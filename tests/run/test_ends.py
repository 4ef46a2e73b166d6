"""How a run ends when something beside training fails: a picture, a page, a disk, an evaluation's file."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import ConfigError, DataError, MarlWarning, RunConfig, Runner, Strategy, hookimpl
from marl_core.cli.app import main
from marl_core.store import checkpoint, files
from marl_core.store.finished import finished

MakeConfig = Callable[..., RunConfig]
FULL = OSError(28, "No space left on device")
TOLD: list[int] = []


class Told(Strategy):
    """Hears of the end."""

    @hookimpl
    def marl_run_end(self, result: Any) -> None:
        TOLD.append(result.steps)


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def config(make_config: MakeConfig, folder: Path, **changes: Any) -> RunConfig:
    return make_config(run={"folder": str(folder)}, observers=[Told(), "json-lines"], **changes)


@pytest.mark.parametrize("error", [OSError("no font"), RuntimeError("ABI"), KeyError("axes"), MemoryError()])
@pytest.mark.parametrize(
    ("drawing", "name"),
    [("marl_core.report.curves.write_curves", "curves.png"), ("marl_core.report.page.write_report", "report.html")],
)
def test_what_cannot_be_drawn_is_a_warning(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawing: str, name: str, error: Exception
) -> None:
    TOLD.clear()
    monkeypatch.setattr(drawing, raises(error))
    with pytest.warns(MarlWarning, match=rf"{name} could not be written .*{type(error).__name__}.*The run is whole"):
        result = Runner(config(make_config, tmp_path / "run")).train()
    assert TOLD == [result.steps] == [2]
    assert (tmp_path / "run" / "final" / "policy" / "adapter_model.safetensors").is_file()
    others = {"curves.png": "report.html", "report.html": "curves.png"}
    assert (tmp_path / "run" / others[name]).is_file()  # the other one is drawn all the same
    assert not (tmp_path / "run" / name).exists()
    if name == "report.html":
        assert finished(config(make_config, tmp_path / "run")) is None
        monkeypatch.undo()
        Runner(config(make_config, tmp_path / "run"), resume=True).train()
        assert finished(config(make_config, tmp_path / "run")) is not None


def test_a_broken_matplotlib_leaves_no_half_picture(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Any, stream: Any, **_: Any) -> None:
        stream.write(b"half")
        raise ValueError("a glyph is missing")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.warns(MarlWarning, match="curves.png could not be written"):
        Runner(config(make_config, tmp_path / "run")).train()
    assert not [path.name for path in (tmp_path / "run").iterdir() if "curves" in path.name]


@pytest.mark.parametrize("error", [ZeroDivisionError(), RecursionError(), OverflowError("too large")])
def test_marl_report_blames_the_files_and_no_bug(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    Runner(config(make_config, tmp_path / "run", ppo={"steps": 1})).train()
    monkeypatch.setattr("marl_core.report.page.charts", raises(error))
    assert main(["report", str(tmp_path / "run")]) == 4
    said = capsys.readouterr().err
    assert "report: a file in" in said
    assert type(error).__name__ in said


def test_final_that_cannot_be_written_is_an_error(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marl_core.store.folder.new_folder", raises(FULL))
    with pytest.raises(DataError, match=r"final could not be written .*only this is left to do"):
        Runner(config(make_config, tmp_path / "run")).train()


def test_an_evaluation_waits_for_room(
    make_config: MakeConfig, tmp_path: Path, prompts_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines come in order as soon as there is room, and none is written in half or twice."""
    held_out = {"prompts": prompts_file, "every": 1, "limit": 2}
    runner = Runner(config(make_config, tmp_path / "run", eval=held_out, ppo={"steps": 3}))
    steps, file = runner.steps(), tmp_path / "run" / "evals.jsonl"
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr("marl_core.store.folder.append_line", raises(FULL))
        with pytest.warns(MarlWarning, match="evaluation of step 2 can't be written .*No space left.*training goes on"):
            next(steps)
    runner.train()
    assert [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()] == [0, 1, 2, 3]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lines.jsonl"
    files.append_line(file, {"step": 1})
    real = Path.open

    class Small:
        """A disk with room for five bytes more."""

        def __init__(self, stream: Any) -> None:
            self.stream, self.room = stream, 5

        def __enter__(self) -> Small:
            return self

        def __exit__(self, *_: Any) -> None:
            self.stream.close()

        def fileno(self) -> int:
            return int(self.stream.fileno())

        def write(self, content: Any) -> int:
            if not self.room:
                raise FULL
            written = self.stream.write(content[: self.room])
            self.room -= written
            return int(written)

    monkeypatch.setattr(Path, "open", lambda self, *given, **named: Small(real(self, *given, **named)))
    with pytest.raises(OSError, match="No space left"):
        files.append_line(file, {"step": 2})
    monkeypatch.undo()
    assert file.read_text(encoding="utf-8") == '{"step": 1}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_has_not_is_null(tmp_path: Path, value: float) -> None:
    from marl_plugins.lines import Lines

    row = {"step": 1, "deep": [{"x": value}, 0.5], "text": "NaN"}
    files.append_line(tmp_path / "a.jsonl", row)
    files.write_json(tmp_path / "b.json", row)
    assert Lines(tmp_path / "c.jsonl").append([row]) is None
    for name in ("a.jsonl", "b.json", "c.jsonl"):
        found = json.loads((tmp_path / name).read_text(encoding="utf-8"), parse_constant=lambda word: 1 / 0)
        assert found == {"step": 1, "deep": [{"x": None}, 0.5], "text": "NaN"}
    (tmp_path / "a.jsonl").write_text('{"step": 1, "x": NaN}\n', encoding="utf-8")  # as older versions wrote it
    files.keep_lines(tmp_path / "a.jsonl", 1)
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"step": 1, "x": null}\n'


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "preflight.json"])
def test_a_folder_that_cannot_be_begun_is_a_config_error(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = files.write_bytes

    def write(file: Path, content: bytes) -> None:
        if file.name == name:
            raise FULL
        real(file, content)

    monkeypatch.setattr(files, "write_bytes", write)
    with pytest.raises(ConfigError, match=r"run\.folder: .*can't be made or written .*No space left"):
        Runner(config(make_config, tmp_path / "run")).train()


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1, "keep": 1}
    real = shutil.rmtree

    def remove(path: Any, ignore_errors: bool = False, **named: Any) -> None:
        if Path(path).name.startswith("step-"):
            if not ignore_errors:
                raise PermissionError(13, "Permission denied")
            return
        real(path, ignore_errors=ignore_errors, **named)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MarlWarning)
        Runner(make_config(run=run)).train()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-000002"


def test_the_room_that_is_missing_is_said_beside_a_checkpoint_that_is_whole(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(make_config(run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}))
    steps = runner.steps()
    next(steps)
    (first,) = (tmp_path / "run" / "checkpoints").iterdir()
    (first / "state.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(checkpoint, "save_file", raises(FULL))
    with pytest.warns(MarlWarning, match="There is no checkpoint yet"):  # the first one is none any more
        next(steps)


class TestLearnedOnce:
    def test_a_rollout_scored_twice(self, make_config: MakeConfig) -> None:
        """The same scores come out, and the run goes on as if it had been scored once."""
        runs = []
        for times in (1, 3):
            runner = Runner(make_config(shaping={"normalize": True}))
            runner.prepare()
            for _ in range(2):
                assert runner.data is not None
                rollout = runner.generate(runner.data.take([0, 1, 2, 3]))
                scored = [runner.score(rollout) for _ in range(times)]
                assert all(one.shaped_scores.equal(scored[0].shaped_scores) for one in scored)
                runner.update(scored[-1])
            runs.append(
                (runner.state.reward_stats, [p.detach().clone() for p in runner.bank.parameters("policy").values()])
            )
            assert runner.state.reward_stats.count == 8
            del runner
            gc.collect()
        (once, weights), (thrice, same) = runs
        assert once == thrice
        assert all(a.equal(b) for a, b in zip(weights, same, strict=True))

    def test_a_rollout_that_is_only_looked_at(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(shaping={"normalize": True}))
        runner.prepare()
        assert runner.data is not None
        runner.score(runner.generate(runner.data.take([0, 1, 2, 3])))
        assert runner.state.reward_stats.count == 0

    def test_moments_are_those_of_the_raw_scores(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(shaping={"normalize": True, "missing_eos_penalty": 2.0}))
        runner.prepare()
        assert runner.data is not None
        scored = runner.score(runner.generate(runner.data.take([0, 1, 2, 3])), [1.0, 2.0, 3.0, 6.0])
        runner.update(scored)
        runner.update(scored)  # once more on the same: no new scores were seen
        seen = [s - 2.0 * (not f) for s, f in zip([1.0, 2.0, 3.0, 6.0], scored.rollout.finished.tolist(), strict=True)]
        mean = sum(seen) / 4
        assert runner.state.as_dict()["shaper"] == pytest.approx(
            {"count": 4.0, "mean": mean, "squares": sum((x - mean) ** 2 for x in seen)}, abs=1e-6
        )
