"""What the report tells of a run beside its curves: how it went, held-out texts, the data's columns, what isn't normal."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from marl_core import Runner
from marl_core.cli.app import main
from marl_core.report import run_data
from marl_core.report.before_after import MAX_EVALUATIONS, BeforeAfter
from marl_core.report.facts import facts
from marl_core.report.live import LiveReport
from marl_core.report.page import page, remarks, write_report
from marl_core.report.run_data import RunData, read_runs
from marl_core.report.timeline import Timeline, duration, why_no_steps
from marl_core.store.finished import finished
from marl_core.store.live_mark import LIVE_MARK

SESSIONS = [
    {"how": "start", "step": 0, "time": 100.0, "until": 130.0, "command": ["marl", "run", "a b.yaml"], "host": "one"},
    {"how": "resume", "step": 2, "time": 1000.0, "command": ["marl", "run", "--resume"], "host": "two"},
]
TIMES = [110.0, 120.0, 1010.0, 1040.0]


def write(folder: Path, **files: Any) -> Path:
    """A run folder; `steps_jsonl=[...]` are lines, `ended_json={...}` a value."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("ppo: {steps: 4}\nmodel: {path: base}\n", encoding="utf-8")
    for name, value in files.items():
        text = "".join(json.dumps(line) + "\n" for line in value) if name.endswith("jsonl") else json.dumps(value)
        (folder / name.replace("_json", ".json")).write_text(text, encoding="utf-8")
    return folder


def read(folder: Path, is_live: bool | None = False) -> RunData:
    (run,) = read_runs([folder], is_live)
    return run


def steps(**more: Any) -> list[dict[str, Any]]:
    return [{"step": i + 1, "time": at, "perf/seconds": 4.0, **more} for i, at in enumerate(TIMES)]


class TestTimeline:
    def test_pauses_are_no_time_of_the_run(self, tmp_path: Path) -> None:
        run = read(write(tmp_path, steps_jsonl=steps(), provenance_json={"sessions": SESSIONS}))
        timeline = Timeline.of(run)
        assert [(one.start, one.until) for one in timeline.sessions] == [(100, 130), (1000, 1040)]
        assert timeline.seconds == 70
        assert timeline.resumes == [2]
        assert [timeline.elapsed(at) for at in TIMES] == [10, 20, 40, 70]
        assert [timeline.elapsed(at) for at in (50.0, None)] == [None, None]

    def test_a_run_that_is_going_lasts_until_now(self, tmp_path: Path) -> None:
        run = read(write(tmp_path, steps_jsonl=steps(), provenance_json={"sessions": SESSIONS}), is_live=True)
        assert Timeline.of(run, now=1100.0).seconds == 130
        assert Timeline.of(run).state == "running"

    def test_an_older_run_began_with_its_first_step(self, tmp_path: Path) -> None:
        run = read(write(tmp_path, steps_jsonl=steps(), provenance_json={"seed": 1}))
        assert (Timeline.of(run).sessions[0].start, Timeline.of(run).seconds) == (106, 934)
        resumed = read(write(tmp_path, steps_jsonl=steps(), provenance_json={"sessions": SESSIONS[1:]}))
        timeline = Timeline.of(resumed)
        assert [(one.how, one.start, one.until) for one in timeline.sessions] == [
            ("start", 106, 120),
            ("resume", 1000, 1040),
        ]

    @pytest.mark.parametrize("sessions", [3, [3], [{"time": "x"}], [{}], {}])
    def test_a_damaged_record_is_no_record(self, tmp_path: Path, sessions: Any) -> None:
        run = read(write(tmp_path, steps_jsonl=[{"step": 1}], provenance_json={"sessions": sessions}))
        assert Timeline.of(run).sessions == []
        assert page([run])

    def test_facts_tell_what_a_resume_changed(self, tmp_path: Path) -> None:
        provenance = {"sessions": SESSIONS, "hardware": {"device": "cpu", "processes": 2}, "seed": 3}
        run = read(write(tmp_path, steps_jsonl=steps(), provenance_json=provenance))
        found = dict(facts(run, Timeline.of(run)))
        assert found["started"] == "1970-01-01 00:01:40 UTC"
        assert found["duration"] == "1 min 10 s, resumed 1 time"
        assert (found["command"], found["host"]) == ("marl run 'a b.yaml'", "one")
        assert (found["device"], found["processes"], found["seed"]) == ("cpu", "2", "3")
        assert found["resumed after step 2"] == "1970-01-01 00:16:40 UTC; command: marl run --resume; host: two"

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3660, "1 h 1 min"), (90000, "1 d 1 h")],
    )
    def test_durations(self, seconds: float, said: str) -> None:
        assert duration(seconds) == said


class TestHowItEnded:
    @pytest.mark.parametrize("how", ["finished", "stopped", "failed", "interrupted"])
    def test_as_recorded(self, tmp_path: Path, how: str) -> None:
        folder = write(tmp_path, ended_json={"how": how, "reason": "<b> of 9", "step": 2, "time": 150.0})
        assert f'class="status {how}"' in page([read(folder)])
        assert "&lt;b&gt; of 9" in page([read(folder)])

    def test_of_an_older_run(self, tmp_path: Path) -> None:
        run = read(write(tmp_path / "run", steps_jsonl=steps()))
        assert Timeline.of(run).state == "unknown"
        (tmp_path / "run" / "final" / "policy").mkdir(parents=True)
        assert Timeline.of(run).state == "finished"

    def test_why_there_are_no_steps(self, tmp_path: Path) -> None:
        run = read(write(tmp_path / "run"))
        assert "is just starting" in why_no_steps(run)
        assert "the run is going" in why_no_steps(read(tmp_path / "run", is_live=True))
        write(tmp_path / "run", ended_json={"how": "failed", "reason": "no memory"})
        assert "failed before its first step had ended: no memory" in why_no_steps(read(tmp_path / "run"))
        write(tmp_path / "run", ended_json={"how": "stopped", "reason": "KL"})
        assert "stopped before its first step had ended: KL" in why_no_steps(read(tmp_path / "run"))
        (tmp_path / "run" / "final" / "policy").mkdir(parents=True)
        assert "without the observer json-lines" in page([read(tmp_path / "run")])


def evaluation(step: int, *responses: str) -> dict[str, Any]:
    samples = [
        {
            "prompt": "p",
            "response": text,
            "score": step + i,
            "kl": 0.5,
            "length": 3,
            "finished": True,
            "judges": {"short": 2.0},
        }
        for i, text in enumerate(responses)
    ]
    numbers = dict.fromkeys(("reward", "reward_std", "kl", "kl_std", "length", "length_std", "finished"), 1.0)
    return {"step": step, **numbers, "judges": {}, "samples": samples, "logged": {}}


class TestBeforeAndAfter:
    def test_the_same_prompt_stands_together(self, tmp_path: Path) -> None:
        lines = [evaluation(0, "first", "second"), evaluation(2, "middle"), evaluation(4, "last", "late")]
        run = read(write(tmp_path, evals_jsonl=lines))
        found = BeforeAfter.of([run])
        assert [(column.step, column.shown) for column in found.columns] == [(0, True), (2, False), (4, True)]
        answers = [[(one.line["response"], one.change) for one in held.answers] for held in found.prompts]
        assert answers == [[("first", None), ("middle", 2.0), ("last", 4.0)], [("second", None), ("late", 4.0)]]
        text = page([run])
        assert text.count('<div class="version" data-key="0-2" hidden>') == 1
        assert "before training" in text
        assert "+4" in text
        assert "short 2" in text

    def test_runs_stand_beside_each_other(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            write(tmp_path / name, evals_jsonl=[evaluation(0, name + " before"), evaluation(4, name + " after")])
        found = BeforeAfter.of(read_runs([tmp_path / "one", tmp_path / "two"]))
        (held,) = found.prompts
        assert [one.line["response"] for one in held.answers if one.column.shown] == [
            "one before",
            "one after",
            "two after",
        ]

    def test_a_long_run_keeps_its_ends(self, tmp_path: Path) -> None:
        run = read(write(tmp_path, evals_jsonl=[evaluation(step, "a") for step in range(50)]))
        found = BeforeAfter.of([run])
        assert len(found.columns) == MAX_EVALUATIONS
        assert (found.columns[0].step, found.columns[-1].step) == (0, 49)

    def test_one_evaluation_is_shown_alone(self, tmp_path: Path) -> None:
        text = page([read(write(tmp_path, evals_jsonl=[evaluation(0, "only")]))])
        assert "only" in text
        assert 'id="versions"' not in text


def sample(**more: Any) -> dict[str, Any]:
    return {"step": 1, "prompt": "p", "response": "r", "score": 1.0, **more}


class TestSamples:
    def test_columns_and_cuts_are_shown(self, tmp_path: Path) -> None:
        line = sample(row={"answer": 13, "<b>": "<i>"}, cut_tokens=37)
        text = page([read(write(tmp_path, samples_jsonl=[line]))])
        assert "<dt>answer</dt><dd>13</dd>" in text
        assert "<dt>&lt;b&gt;</dt><dd>&lt;i&gt;</dd>" in text
        assert "cut: 37 tokens of the prompt" in text
        assert "cut:" not in page([read(write(tmp_path, samples_jsonl=[sample()]))])

    def test_of_very_many_an_even_choice_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_data, "MAX_SAMPLES", 5)
        run = read(write(tmp_path, samples_jsonl=[sample(step=i, response="é\u2028") for i in range(101)]))
        assert [line["step"] for line in run.samples] == [0, 25, 50, 75, 100]
        assert run.samples_written == 101

    def test_a_line_that_is_being_written_is_left_out(self, tmp_path: Path) -> None:
        folder = write(tmp_path, samples_jsonl=[sample(), sample()])
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as stream:
            stream.write('{"step": 2, "prompt"')
        assert [line["step"] for line in read(folder).samples] == [1, 1]


class TestWhatIsNormal:
    def test_what_is_not_is_said_once_in_the_summary_and_beside_its_chart(self, tmp_path: Path) -> None:
        run = read(write(tmp_path, steps_jsonl=steps(**{"val/explained_var": -1.5, "policy/clipfrac": 0.5})))
        assert [(name, value) for name, value, _ in remarks(run)] == [("policy/clipfrac", 0.5)]  # values settle later
        text = page([run])
        assert text.count("Updates are too large for") == 2 + text.count("raise value.learning_rate")

    def test_a_metric_has_both_its_names(self, tmp_path: Path) -> None:
        text = page([read(write(tmp_path, steps_jsonl=steps(**{"policy/clipfrac": 0.5, "my/number": 1.0})))])
        assert text.count("<b>clip fraction</b> <code>policy/clipfrac</code>") == 2  # worth a look; every number
        assert "<td><code>my/number</code>" in text

    def test_every_chart_says_what_is_normal(self, tmp_path: Path) -> None:
        text = page([read(write(tmp_path, steps_jsonl=steps(**{"objective/kl": 1.0})))])
        assert text.count("<summary>what is normal</summary>") == text.count("<figure") == 2
        assert "docs/metrics.md" in text  # no address of the project is known, so no link

    def test_where_the_project_has_an_address_there_are_links(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("marl_core.artifacts.addresses.repository", lambda: "https://git.acme.dev/marl")
        text = page([read(write(tmp_path, steps_jsonl=steps(**{"objective/kl_per_token": 1.0})))])
        assert 'href="https://git.acme.dev/marl/blob/HEAD/docs/metrics.md#perfseconds"' in text

    def test_what_a_reward_logged_has_a_chart(self, tmp_path: Path) -> None:
        text = page([read(write(tmp_path, steps_jsonl=steps(**{"my/number": 3.0, "my/text": "x"})))])
        assert 'data-metric="my/number"' in text
        assert 'data-metric="my/text"' not in text


class TestPage:
    EVALUATION: Mapping[str, Any] = {
        "step": 0,
        "reward": 1.0,
        "reward_std": 0.0,
        "kl": 0.0,
        "length": 3.0,
        "judges": {},
    }
    CHECKS: Mapping[str, Any] = {"checks": [{"name": "ratio", "ok": True, "detail": "1"}]}

    def test_the_navigation_leads_to_what_is_there(self, tmp_path: Path) -> None:
        parts = {"evals_jsonl": [self.EVALUATION], "preflight_json": self.CHECKS}
        whole = page([read(write(tmp_path / "whole", steps_jsonl=steps(), **parts))])
        for name in ("curves", "held-out", "pre-flight", "provenance"):
            assert f'<a href="#{name}">' in whole
            assert f'<section id="{name}">' in whole
        bare = page([read(write(tmp_path / "bare"))])
        assert bare.count('<a href="#') == 1  # provenance

    def test_one_sampling_seed_has_no_spread(self, tmp_path: Path) -> None:
        folder = write(tmp_path, evals_jsonl=[self.EVALUATION])
        assert "standard deviation" not in page([read(folder)])
        (folder / "config.yaml").write_text("eval: {seeds: 2}\n", encoding="utf-8")
        assert "standard deviation over sampling seeds" in page([read(folder)])


class TestCsv:
    def test_every_number_of_every_step(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folders = [write(tmp_path / name, steps_jsonl=steps(**{"a,b": 0.1, name: 2})) for name in ("one", "two")]
        file = tmp_path / "out" / "values.csv"
        assert main(["report", *map(str, folders), "--csv", str(file)]) == 0
        assert capsys.readouterr().out == f"{file}\n"
        assert not (folders[0] / "comparison.html").exists()
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == 8
        assert rows[0] == {
            "run": "one", "step": "1", "time": "110.0", "date": "1970-01-01 00:01:50 UTC",
            "elapsed": "4.0", "perf/seconds": "4.0", "a,b": "0.1", "one": "2", "two": "",
        }  # fmt: skip
        assert main(["report", str(folders[0]), "--csv", str(file), "--out", str(tmp_path / "page.html")]) == 0
        assert (tmp_path / "page.html").is_file()
        assert file.read_text(encoding="utf-8").startswith("step,time,date,elapsed,perf/seconds")

    def test_of_a_very_long_run_the_page_holds_every_nth_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("marl_core.report.values.MAX_STEPS", 3)
        run = read(write(tmp_path, steps_jsonl=[{"step": i, "x": i} for i in range(1, 9)]))
        text = page([run]).split('id="values">')[1].split("</script>")[0]
        (values,) = json.loads(text)["runs"]
        assert (values["stride"], values["steps"], values["values"]["x"]) == (3, [1, 4, 7, 8], [1, 4, 7, 8])


class TestLive:
    def test_the_page_reloads_while_the_run_is_going(self, make_config: Callable[..., Any], tmp_path: Path) -> None:
        folder = tmp_path / "run"
        config = make_config(run={"folder": str(folder), "checkpoint_every": 1}, observers=["json-lines"])
        runner = Runner(config)  # holds the folder
        going = iter(runner.steps())
        next(going)
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert f'<html lang="en" {LIVE_MARK}="10">' in text
        assert 'class="status running"' in text
        assert finished(config) is None
        assert LIVE_MARK in write_report(folder).read_text(encoding="utf-8")[:200]  # `marl report` beside it
        del going
        assert LIVE_MARK not in (folder / "report.html").read_text(encoding="utf-8")[:200]

    def test_the_page_of_a_finished_run_stands_still(self, make_config: Callable[..., Any], tmp_path: Path) -> None:
        config = make_config(run={"folder": str(tmp_path / "run")}, observers=["json-lines"])
        Runner(config).train()
        text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert LIVE_MARK not in text[:200]
        assert 'class="status finished"' in text
        assert LIVE_MARK not in write_report(tmp_path / "run").read_text(encoding="utf-8")[:200]

    def test_a_page_on_the_way_is_no_sign_of_the_end(self, make_config: Callable[..., Any], tmp_path: Path) -> None:
        """A run that was killed between final/ and its last page isn't finished."""
        config = make_config(run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}, observers=["json-lines"])
        Runner(config).train()
        assert finished(config) is not None
        write_report(tmp_path / "run", live=True)
        assert finished(config) is None

    def test_it_is_written_now_and_then(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, writings = [100.0], list[tuple[float, bool]]()

        def writes(folder: Path, live: bool) -> None:
            writings.append((clock[0], live))
            clock[0] += 1.0  # a large page: a second

        monkeypatch.setattr("marl_core.report.page.write_report", writes)
        monkeypatch.setattr("time.monotonic", lambda: clock[0])
        report = LiveReport(tmp_path)
        for _ in range(30):
            report.update()
            clock[0] += 4.0
        report.close()
        assert writings == [(100.0, True), (153.0, True), (206.0, True), (221.0 + 2, False)]

    def test_a_page_that_cannot_be_drawn_stops_nothing(self, make_config: Callable[..., Any], tmp_path: Path) -> None:
        report = LiveReport(tmp_path / "nowhere")
        report.update()
        report.close()
        assert not (tmp_path / "nowhere").exists()

    def test_nothing_is_written_before_a_run_began(self, tmp_path: Path) -> None:
        LiveReport(write(tmp_path)).close()
        assert not (tmp_path / "report.html").exists()


def test_a_resume_is_recorded_and_marked(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr("__main__.__spec__", None)
    monkeypatch.setattr("sys.argv", ["train.py", "--hub-token", "hf_abcdefghijklmnopqrst"])

    def run(steps: int, resume: bool) -> Mapping[str, Any]:
        config = make_config(ppo={"steps": steps}, run={"folder": str(folder)}, observers=["json-lines"])
        Runner(config, resume=resume).train()
        found: Mapping[str, Any] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        return found

    (first,) = run(2, resume=False)["sessions"]
    assert (first["how"], first["step"], first["command"]) == ("start", 0, ["train.py", "--hub-token", "[redacted]"])
    assert (first["folder"], first["packages"]["marl-core"] != "") == (str(Path.cwd()), True)
    again, second = run(4, resume=True)["sessions"]
    assert again == {**first, "until": again["until"]}
    assert first["time"] <= again["until"] <= second["time"]
    assert (second["how"], second["step"]) == ("resume", 2)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>resumed after step 2</title>" in text
    assert "hf_abc" not in text


def test_samples_and_evaluations_carry_the_columns(make_config: Callable[..., Any], tmp_path: Path) -> None:
    prompts = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} plus 1", "answer": i + 1, "source": "https://me:pass@host/"} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "run"
    config = make_config(
        data={"prompts": str(prompts)},
        eval={"prompts": str(prompts), "limit": 2},
        run={"folder": str(folder)},
        observers=["json-lines"],
    )
    Runner(config).train()
    first = json.loads((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["row"] == {"answer": int(first["prompt"].split()[0]) + 1, "source": "https://[redacted]@host/"}
    held = json.loads((folder / "evals.jsonl").read_text(encoding="utf-8").splitlines()[-1])["samples"][0]
    assert held["row"]["answer"] == int(held["prompt"].split()[0]) + 1
    assert "<dt>answer</dt>" in (folder / "report.html").read_text(encoding="utf-8")
