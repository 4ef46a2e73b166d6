"""What `marl check` tells a person who mistyped a path, a column or a key: whose fault it is, and what was meant."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import DataError, Plan, RunConfig
from marl_core.artifacts.rows import read_rows
from marl_core.cli.app import main
from marl_core.data.check import check_inputs

MakeConfig = Callable[..., RunConfig]
Write = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(make_config: MakeConfig, **changes: Any) -> list[str]:
    """All reasons against the run, of the plan and of its rows, without who says them."""
    plan = Plan.of(make_config(**changes))
    findings = plan.findings()
    inputs = check_inputs(plan, findings)
    return [str(finding).partition(" (says ")[0] for finding in [*findings, *inputs.findings]]


class TestNamesThatAreNotHere:
    """A mistyped folder looks like a name on the hub."""

    @pytest.mark.parametrize(
        ("key", "changes"),
        [
            ("reward.path", {"reward": {"use": "adapter", "path": "rm/adaptr"}}),
            ("reward.path", {"reward": {"use": "model", "path": "rm/adaptr"}}),
            ("reward.path", {"reward": {"use": "adapter", "path": "rms/adapter"}}),
            ("reference.adapter", {"reference": {"use": "merged-base", "adapter": "rm/adaptr"}}),
            ("reference.path", {"reference": {"use": "model", "path": "rm/adaptr"}}),
            ("model.path", {"model": {"path": "rm/adaptr"}}),
            ("model.tokenizer", {"model": {"tokenizer": "rm/adaptr"}}),
            (
                "policy.from",
                {
                    "policy": {"start": "continue", "from": "rm/adaptr"},
                    "reference": {"use": "peft-adapter", "adapter": "x/y"},
                },
            ),
            ("eval.judges.j.path", {"eval": {"judges": {"j": {"use": "adapter", "path": "rm/adaptr"}}}}),
        ],
    )
    def test_a_folder_of_nearly_that_name(
        self, home: Path, make_config: MakeConfig, key: str, changes: dict[str, Any]
    ) -> None:
        (home / "rm" / "adapter").mkdir(parents=True)
        found = [line for line in Plan.of(make_config(**changes)).warnings() if line.startswith(f"{key}:")]
        assert len(found) == 1
        assert "is no folder here, so it is looked for on the hub" in found[0]
        assert found[0].endswith("Did you mean 'rm/adapter'?")

    def test_a_name_like_no_folder_is_noted_by_check_alone(
        self, home: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = Plan.of(make_config(reward={"use": "adapter", "path": "somebody/reward"}))
        assert not [line for line in plan.warnings() if "somebody/reward" in line]
        Path("run.yaml").write_text(json.dumps(plan.config.model_dump(mode="json", by_alias=True)), encoding="utf-8")
        assert main(["check", "run.yaml"]) == 0
        out = capsys.readouterr().out
        assert "note: reward.path: 'somebody/reward' is no folder here" in " ".join(out.split())
        assert out.rstrip().endswith("as far as could be checked.")

    def test_options_that_are_no_names_of_the_hub_are_left_alone(self, home: Path, make_config: MakeConfig) -> None:
        (home / "logs").mkdir()
        plan = Plan.of(make_config(observers=[{"use": "trackers", "to": ["tensorboard"]}]))
        assert not [line for line in plan.warnings() if "hub" in line]


class TestAnotherBase:
    """An adapter's own config names the base that it was trained on."""

    def warned(self, make_config: MakeConfig, **changes: Any) -> list[str]:
        return [line for line in Plan.of(make_config(**changes)).warnings() if "was trained on" in line]

    def test_other_weights(
        self, home: Path, make_config: MakeConfig, tiny_folder: str, reward_adapter: str, write_other: str
    ) -> None:
        reward = {"use": "adapter", "path": reward_adapter}
        (found,) = self.warned(make_config, model={"path": write_other}, reward=reward)
        assert found.startswith(f"reward.path: {reward_adapter} was trained on '{tiny_folder}'")
        merged = {"use": "merged-base", "adapter": reward_adapter}
        assert not self.warned(make_config, model={"path": tiny_folder}, reward=reward)
        assert len(self.warned(make_config, model={"path": write_other}, reward=reward, reference=merged)) == 1

    def test_a_copy_and_a_link_are_the_same(
        self, home: Path, make_config: MakeConfig, tiny_folder: str, reward_adapter: str
    ) -> None:
        shutil.copytree(tiny_folder, "copy")
        os.symlink(tiny_folder, "link")
        for path in ("copy", "link"):
            assert not self.warned(make_config, model={"path": path}, reward={"use": "adapter", "path": reward_adapter})

    def test_a_base_that_is_not_here_tells_nothing(
        self, home: Path, make_config: MakeConfig, reward_adapter: str
    ) -> None:
        shutil.copytree(reward_adapter, "rm")
        file = Path("rm/adapter_config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}), encoding="utf-8")
        assert not self.warned(make_config, reward={"use": "adapter", "path": "rm"})

    @pytest.fixture
    def write_other(self, tmp_path: Path) -> str:
        from marl_core.testing import write_tiny_model

        return write_tiny_model(tmp_path / "other", seed=5)


class TestKeys:
    """A strategy names its options by its family's key; people see the key that theirs stand under."""

    def test_judges_and_lists(self, home: Path, make_config: MakeConfig, prompts_file: str) -> None:
        missing = {"use": "function", "target": "judges.py:ok"}
        found = told(
            make_config,
            reward=[{"use": "length-format", "max_tokens": 20}, missing],
            eval={"prompts": prompts_file, "judges": {"x": missing}},
        )
        said = "there is no file 'judges.py'"
        assert [line.partition(" (looked")[0] for line in found] == [
            f"reward.1.target: {said}",
            f"eval.judges.x.target: {said}",
        ]

    def test_an_error_that_is_raised(self, home: Path, make_config: MakeConfig, prompts_file: str) -> None:
        judge = {"use": "adapter", "path": "./nothing"}
        (found,) = told(make_config, eval={"prompts": prompts_file, "judges": {"x": judge}})
        assert found.startswith("eval.judges.x.path: there is no adapter folder './nothing'")

    def test_who_says_it_is_told_apart_by_the_key(self, home: Path, make_config: MakeConfig) -> None:
        missing = {"use": "function", "target": "judges.py:ok"}
        findings = [str(finding) for finding in Plan.of(make_config(reward=[missing, missing])).findings()]
        assert [finding.rpartition(", ")[2] for finding in findings][1:] == ["reward.1)"]
        assert "[" not in "".join(findings)


class TestFolders:
    """A folder as prompts."""

    def test_a_folder_that_is_no_data_set(self, home: Path, make_config: MakeConfig) -> None:
        Path("notes/deep").mkdir(parents=True)
        Path("notes/readme.md").write_text("hello", encoding="utf-8")
        (found,) = told(make_config, data={"prompts": "notes"})
        assert found == (
            "data.prompts: 'notes' is a folder, and neither a saved data set nor one of data files. Give a .json, .jsonl, .csv or "
            ".parquet file in it."
        )
        with pytest.raises(DataError, match="'notes' is a folder"):
            read_rows("notes")

    def test_a_large_folder_is_not_crawled(
        self, home: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("marl_core.artifacts.rows.MOST_ENTRIES", 3)
        for name in ("a.json", "b.txt", "c.txt", "d.txt"):
            Path(name).write_text("[]", encoding="utf-8")
        before = time.monotonic()
        (found,) = told(make_config, data={"prompts": "."})
        assert "'.' is a folder with more than 3 files and folders in it" in found
        assert time.monotonic() - before < 5

    @pytest.mark.parametrize("place", ["rows", "rows/data", "rows/train"])
    def test_data_files_pass(self, home: Path, make_config: MakeConfig, place: str) -> None:
        Path(place).mkdir(parents=True)
        Path(place, "part-0.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
        assert told(make_config, data={"prompts": "rows"}) == []

    @pytest.mark.parametrize("splits", [False, True])
    def test_a_saved_data_set_is_read(self, home: Path, make_config: MakeConfig, splits: bool) -> None:
        import datasets

        rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
        (datasets.DatasetDict({"train": rows}) if splits else rows).save_to_disk("saved")
        assert told(make_config, data={"prompts": "saved"}) == []
        assert [row["prompt"] for row in read_rows("saved")] == ["a", "b"]


class TestRows:
    """A column that a few rows lack, and one that none has."""

    def write(self, names: list[str]) -> None:
        rows = ({name: "" if i == 7 else "hi"} for i, name in enumerate(names))
        Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def test_one_row_hides_no_other(self, home: Path, make_config: MakeConfig) -> None:
        self.write(["prompt"] * 5 + ["promt"] + ["prompt"] * 24)
        assert told(make_config, data={"prompts": "p.jsonl"}) == [
            "data.prompts: 1 of 30 rows of p.jsonl lacks the column 'prompt' of data.field (row 6); row 6 has: promt. Correct it.",
            "data.prompts: 1 prompt of p.jsonl is empty (row 8). Correct it, or set data.on_empty: drop.",
        ]

    def test_no_row_has_it(self, home: Path, make_config: MakeConfig) -> None:
        self.write(["promt"] * 3)
        (found,) = told(make_config, data={"prompts": "p.jsonl"})
        assert found.endswith("has no column 'prompt'. Set data.field to one of: promt. Did you mean 'promt'?")


class TestRewardFunctions:
    """What a function requires and the data lack."""

    SOURCE = """
import functools
def ok(completions, **columns): ...
def answer(completions, answer): ...
def wants(prompts, completions, wants, limit=3): ...
def given(completions, *, temperature): ...
@functools.cache
def decorated(completions, answer): ...
def twice(completions, answer): ...
def twice(completions): ...
def steps(completions, steps): ...
def positional(prompts, completions, completion_ids, want, /): ...
class Scorer:
    def __call__(self, completions, answer): ...
"""

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("ok", None),
            ("answer", "requires 'answer', and data.prompts has no such column; it has want. Add the column"),
            ("wants", "requires 'wants', and data.prompts has no such column; it has want. Did you mean 'want'?"),
            ("given", "requires 'temperature'"),
            ("decorated", None),
            ("twice", None),
            ("steps", "requires 'steps'"),
            ("positional", None),
            ("Scorer", None),
        ],
    )
    def test_columns(self, home: Path, make_config: MakeConfig, name: str, sentence: str | None) -> None:
        Path("p.jsonl").write_text('{"prompt": "a", "want": "b"}\n', encoding="utf-8")
        Path("rewards.py").write_text(self.SOURCE, encoding="utf-8")
        reward = {"use": "function", "target": f"rewards.py:{name}"}
        found = told(make_config, data={"prompts": "p.jsonl"}, reward=reward)
        assert len(found) == (sentence is not None)
        assert all(f"reward.target: rewards.py:{name} {sentence}" in line for line in found)
        if name == "given":
            more = {**reward, "arguments": {"temperature": 1}}
            assert told(make_config, data={"prompts": "p.jsonl"}, reward=more) == []
        if name == "steps":
            assert told(make_config, data={"prompts": "p.jsonl"}, reward={**reward, "use": "process"}) == []

    def test_a_function_of_python_and_a_judges_own_prompts(self, home: Path, make_config: MakeConfig) -> None:
        def score(completions: list[str], label: list[int]) -> list[float]:
            return [0.0] * len(completions)

        Path("p.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
        Path("h.jsonl").write_text('{"prompt": "a", "label": 1}\n', encoding="utf-8")
        judged = {"data": {"prompts": "p.jsonl"}, "eval": {"prompts": "h.jsonl", "judges": {"j": score}}}
        assert told(make_config, **judged) == []
        (found,) = told(make_config, **judged, reward=score)
        assert "requires 'label', and data.prompts has no such column" in found


class TestSmallThings:
    def test_the_table_shows_what_is_chosen(
        self,
        home: Path,
        make_config: MakeConfig,
        rewards_file: str,
        prompts_file: str,
        reward_adapter: str,
        sft_adapter: str,
    ) -> None:
        plan = Plan.of(
            make_config(
                reward=[
                    {"use": "function", "target": f"{rewards_file}:odd"},
                    {"use": "adapter", "path": reward_adapter},
                ],
                reference={"use": "merged-base", "adapter": sft_adapter},
                eval={"prompts": prompts_file, "judges": {"j": {"use": "function", "target": f"{rewards_file}:low"}}},
            )
        )
        weights = {role.name: role.weights for role in plan.describe()}
        assert weights["reward function"] == f"the function {rewards_file}:odd"
        assert reward_adapter in weights["reward adapter"]
        assert weights["judge j"] == f"the function {rewards_file}:low"
        assert f"(adapter: {sft_adapter})" in weights["reference"]

    @pytest.mark.filterwarnings("ignore::marl_core.errors.MarlWarning")
    def test_the_last_line_says_what_the_warnings_mean(
        self, home: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("runs").mkdir()
        Path("runs/config.yaml").write_text("", encoding="utf-8")
        config = make_config(run={"folder": "runs"}).model_dump(mode="json", by_alias=True)
        Path("run.yaml").write_text(json.dumps(config), encoding="utf-8")
        assert main(["check", "run.yaml"]) == 0
        ending = "nothing speaks against this run, but it can't start on this machine as it is: see the warnings."
        assert capsys.readouterr().out.rstrip().endswith(ending)

    def test_run_folders(self, home: Path, make_config: MakeConfig) -> None:
        Path("mine.py").write_text("", encoding="utf-8")
        (found,) = [line for line in Plan.of(make_config(run={"folder": "."})).warnings() if "run.folder" in line]
        assert "holds other files already (mine.py), and the run's files will be written among them" in found
        Path("config.yaml").write_text("", encoding="utf-8")
        assert not [line for line in Plan.of(make_config(run={"folder": "."})).warnings() if "run.folder" in line]
        (found,) = told(make_config, run={"folder": "/proc/marl"})
        assert found.startswith("run.folder: '/proc/marl' can't be a run's folder: /proc is the system's own view")

    def test_a_learning_rate_of_three(self, home: Path, make_config: MakeConfig) -> None:
        (found,) = Plan.of(make_config(ppo={"learning_rate": 3.0})).warnings()
        assert found.startswith("ppo.learning_rate: 3 is far above")

    def test_no_room_for_prompts_is_no_fault_of_theirs(self, home: Path, make_config: MakeConfig) -> None:
        for tokens in (256, 9000):
            (found,) = told(make_config, sampling={"max_new_tokens": tokens})
            assert found.startswith(
                f"sampling.max_new_tokens: {tokens} tokens leave no room for a prompt in the 256 positions"
            )

    def test_special_tokens_that_end_responses_come_first(
        self, home: Path, make_config: MakeConfig, tiny_folder: str
    ) -> None:
        shutil.copytree(tiny_folder, "model")
        tokenizer = json.loads(Path("model/tokenizer.json").read_text(encoding="utf-8"))
        tokenizer["added_tokens"] += [{"content": f"<a{i}>"} for i in range(20)] + [{"content": "<|end|>"}]
        Path("model/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        Path("model/chat_template.jinja").write_text("{{ m }}<|end|>", encoding="utf-8")
        found = Plan.of(make_config(model={"path": "model"}, sampling={"stop": ["<|nothing-here|>"]})).check()
        (line,) = [line for line in found if line.startswith("sampling.stop")]
        assert "Its special tokens are <eos>, <|end|>, <a0>" in line
        assert line.endswith(" more.")
