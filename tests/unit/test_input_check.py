"""What `marl check` says of the prompts, and a run before it reads weights: everything at once, with the tokenizer, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from marl_core import ConfigError, DataError, MarlError, MarlWarning, Plan, RunConfig, Runner
from marl_core.cli.app import main
from marl_core.cli.prompts_shown import pieces
from marl_core.data.check import check_inputs
from marl_core.testing import tiny_tokenizer
from marl_core.testing.tokenizers import byte_fallback, byte_level

MakeConfig = Callable[..., RunConfig]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: str, prompts: Sequence[Any]) -> str:
    Path(file).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return file


def said(findings: Sequence[MarlError]) -> str:
    return "\n".join(map(str, findings))


def checked(make_config: MakeConfig, most_rows: int | None = 1000, **changes: Any) -> Any:
    plan = Plan.of(make_config(**changes))
    return check_inputs(plan, plan.findings(), most_rows)


class TestRows:
    def test_everything_that_a_run_would_refuse_is_told_at_once(self, home: Path, make_config: MakeConfig) -> None:
        write("p.jsonl", ["fine", "", None, "an <eos> in it", 3, "x" * 300, {"role": "user"}])
        write("h.jsonl", ["", "fine"])
        changes: dict[str, Any] = {
            "data": {"prompts": "p.jsonl"},
            "eval": {"prompts": "h.jsonl"},
            "sampling": {"stop": ["foo bar"]},
        }
        found = said(checked(make_config, **changes).findings)
        for sentence in (
            "row 5 of p.jsonl has an int as 'prompt'",
            "row 7 of p.jsonl has a dict as 'prompt'",
            "data.prompts: 2 prompts of p.jsonl are empty (rows 2, 3)",
            "data.prompts: 1 prompt of p.jsonl holds control tokens such as '<eos>' (row 4)",
            "data.prompts: 1 prompt of p.jsonl exceeds 250 tokens (row 6)",
            "eval.prompts: 1 prompt of h.jsonl is empty (row 1)",
            "sampling.stop: 'foo bar' is 7 tokens for this tokenizer",
        ):
            assert sentence in found
        with pytest.raises(ConfigError) as raised:
            Runner(make_config(**changes))
        assert [line.strip() for line in str(raised.value).splitlines()[1:]] == found.splitlines()

    def test_one_fault_of_many_rows_is_one_sentence(self, home: Path, make_config: MakeConfig) -> None:
        write("p.jsonl", ["a"] * 30)
        found = checked(make_config, data={"prompts": "p.jsonl", "system_prompt": "Be kind."}).findings
        assert len(found) == 1
        assert "row 1 of p.jsonl is a text, and a system prompt belongs to a chat" in said(found)
        assert "The same holds for 29 more rows (rows 2, 3, 4, 5, 6, ...)." in said(found)

    def test_a_chat_without_a_template(self, home: Path, make_config: MakeConfig) -> None:
        write("p.jsonl", ["a"])
        (finding,) = checked(make_config, data={"prompts": "p.jsonl", "chat": True}).findings
        assert "this model's tokenizer has no chat template" in str(finding)

    def test_many_different_faults_are_counted(self, home: Path, make_config: MakeConfig) -> None:
        Path("p.jsonl").write_text(
            "".join(json.dumps({"prompt": "a", "tools": f"no json {n}"}) + "\n" for n in range(12)), encoding="utf-8"
        )
        words = tiny_tokenizer()
        words.chat_template = CHATML
        words.save_pretrained("words")
        found = checked(make_config, model={"tokenizer": "words"}, data={"prompts": "p.jsonl", "chat": True}).findings
        assert "(no JSON" not in said(found)
        assert len(found) <= 6

    def test_a_source_is_read_in_part_and_that_is_said(self, home: Path, make_config: MakeConfig) -> None:
        write("p.jsonl", ["a"] * 12 + [""])
        part = checked(make_config, most_rows=12, data={"prompts": "p.jsonl"})
        assert not part.findings
        assert "the first 12 rows of p.jsonl were checked; --all-rows checks all" in "\n".join(part.unseen)
        whole = checked(make_config, most_rows=None, data={"prompts": "p.jsonl"})
        assert "is empty (row 13)" in said(whole.findings)
        assert not whole.unseen
        assert not checked(make_config, most_rows=13, data={"prompts": "p.jsonl"}).unseen

    def test_without_the_tokenizer_rows_are_looked_at_and_that_is_said(
        self, home: Path, make_config: MakeConfig
    ) -> None:
        write("p.jsonl", ["a", "", "<eos>"])
        check = checked(make_config, model={"path": "owner/model"}, data={"prompts": "p.jsonl"})
        assert [str(finding)[:50] for finding in check.findings] == [
            "data.prompts: 1 prompt of p.jsonl is empty (row 2)"
        ]
        assert "the tokenizer of 'owner/model' isn't on this machine" in "\n".join(check.unseen)

    def test_a_data_set_by_name_is_not_fetched(self, home: Path, make_config: MakeConfig) -> None:
        check = checked(make_config, data={"prompts": "owner/sums"})
        assert "'owner/sums' is a data set, which is loaded when the run starts" in "\n".join(check.unseen)

    def test_a_large_json_list_is_read_when_asked(
        self, home: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("p.json").write_text(json.dumps([{"prompt": ""}]), encoding="utf-8")
        monkeypatch.setattr("marl_core.artifacts.rows.MAX_JSON_BYTES", 5)
        part = checked(make_config, data={"prompts": "p.json"})
        assert not part.findings
        assert "one large JSON list" in "\n".join(part.unseen)
        assert "is empty (row 1)" in said(checked(make_config, most_rows=None, data={"prompts": "p.json"}).findings)

    def test_what_the_plan_has_told_is_not_told_twice(self, home: Path, make_config: MakeConfig) -> None:
        write("p.jsonl", ["a"])
        missing = checked(make_config, data={"prompts": "p.jsonl", "field": "question"})
        assert not missing.findings
        stops = checked(make_config, data={"prompts": "p.jsonl"}, sampling={"stop": ["<nope>"]})
        assert not stops.findings

    def test_dropped_rows_are_counted(self, home: Path, make_config: MakeConfig) -> None:
        write("p.jsonl", ["a", "", None, "x" * 300, "<eos>"])
        drops = {"on_empty": "drop", "on_long": "drop", "on_control": "drop"}
        check = checked(make_config, data={"prompts": "p.jsonl", **drops})
        assert not check.findings
        assert [remark.split(" of p.jsonl ")[1] for remark in check.remarks] == [
            "are empty (rows 2, 3) and were dropped (data.on_empty: drop).",
            "holds control tokens such as '<eos>' (row 5) and was dropped (data.on_control: drop).",
            "exceeds 250 tokens (row 4) and was dropped (data.on_long: drop).",
        ]

    def test_a_row_that_is_refused_is_told_before_weights_are_read(
        self, home: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def loads(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were read")

        write("p.jsonl", ["a", ""])
        monkeypatch.setattr("marl_core.run.runner.build_roles", loads)
        with pytest.raises(DataError, match="is empty"):
            Runner(make_config(data={"prompts": "p.jsonl"}))
        with pytest.raises(ConfigError, match="a stop must be a single token"):
            Runner(make_config(sampling={"stop": ["foo bar"]}))


@pytest.mark.filterwarnings("always::marl_core.errors.MarlWarning")
class TestCommand:
    def config(self, tiny_folder: str, **changes: str) -> str:
        lines = {
            "model": f"{{path: {tiny_folder}, dtype: float32}}",
            "reference": "disabled-adapter",
            "reward": "{use: length-format, max_tokens: 20}",
            "data": "{prompts: p.jsonl, max_prompt_tokens: 8, on_long: truncate-left}",
            "eval": "{prompts: p.jsonl}",
            "run": "{folder: runs/x, device: cpu}",
        }
        text = "".join(f"{key}: {value}\n" for key, value in {**lines, **changes}.items())
        Path("run.yaml").write_text(text, encoding="utf-8")
        return "run.yaml"

    def test_cut_prompts_are_counted_for_both(
        self, home: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("p.jsonl", ["a long text of many letters"] * 3 + ["short"])
        assert main(["check", self.config(tiny_folder)]) == 0
        said = capsys.readouterr().err
        for key in ("data", "eval"):
            assert f"marl: warning: {key}.prompts: 3 of 4 prompts of p.jsonl were cut to 8 tokens" in said

    def test_show_prints_what_the_model_reads(
        self, home: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = tiny_tokenizer()
        words.chat_template = CHATML
        words.save_pretrained("words")
        write("p.jsonl", ["abc", "not shown"])
        file = self.config(
            tiny_folder, model=f"{{path: {tiny_folder}, tokenizer: words}}", data="{prompts: p.jsonl, chat: true}"
        )
        assert main(["check", file, "--show", "1"]) == 0
        out = capsys.readouterr().out
        count = len(words("<|user|>abc<|end|><|assistant|>").input_ids)
        assert f"data.prompts, row 1: {count} tokens\n<|user|>abc<|end|><|assistant|>\n" in out
        assert "eval.prompts, row 1" in out
        assert "not shown" not in out
        write("p.jsonl", ["0123456789"])
        assert main(["check", self.config(tiny_folder), "--show", "3"]) == 0
        assert "data.prompts, row 1: 8 tokens, cut: 2 tokens of the oldest text\n23456789\n" in capsys.readouterr().out

    def test_one_bad_folder_hides_no_other_problem(
        self, home: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("p.jsonl", ["a", ""])
        Path("file").write_text("x", encoding="utf-8")
        file = self.config(
            tiny_folder,
            reference="{use: merged-base, adapter: no-sft}",
            reward="[{use: adapter, path: no-reward}, {use: length-format, max_tokens: 20}]",
            run="{folder: file/below}",
        )
        assert main(["check", file]) == 2
        err = capsys.readouterr().err
        for sentence in (
            "reference.adapter: there is no adapter folder 'no-sft'",
            "reward.0.path: there is no adapter folder 'no-reward'",
            "run.folder: 'file/below' can't be a run's folder",
            "data.prompts: 1 prompt of p.jsonl is empty (row 2)",
            "eval.prompts: 1 prompt of p.jsonl is empty (row 2)",
        ):
            assert err.count(sentence) == 1

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"reference": "{use: merged-base, adapter: no-sft}", "eval": "{prompts: none.jsonl}"}, 4),
            ({"reference": "{use: merged-base, adapter: no-sft}", "run": "{folder: file/below}"}, 2),
            ({"run": "{folder: file/below}"}, 2),
        ],
    )
    def test_the_exit_code_is_that_of_all_problems_or_of_a_config(
        self, home: Path, tiny_folder: str, changes: Mapping[str, str], code: int
    ) -> None:
        write("p.jsonl", ["a"])
        Path("file").write_text("x", encoding="utf-8")
        file = self.config(tiny_folder, **changes)
        assert main(["check", file]) == code
        assert main(["run", file]) == code

    def test_what_would_stop_the_run_here_is_a_warning(
        self, home: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write("p.jsonl", ["a"])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        Path("runs/x").mkdir(parents=True)
        Path("runs/x/config.yaml").write_text("", encoding="utf-8")
        assert main(["check", self.config(tiny_folder, run="{folder: runs/x, device: cuda}")]) == 0
        said = capsys.readouterr().err
        assert "marl: warning: run.device: cuda was asked for, and CUDA_VISIBLE_DEVICES hides every GPU" in said
        assert (
            "marl: warning: run.folder: runs/x already holds a run. `marl run runs/x --resume` goes on with it" in said
        )

    def test_a_tokenizer_that_cannot_be_read(
        self, home: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("p.jsonl", ["a"])
        Path("words").mkdir()
        Path("words/tokenizer.json").write_text("{", encoding="utf-8")
        assert main(["check", self.config(tiny_folder, model=f"{{path: {tiny_folder}, tokenizer: words}}")]) == 4
        assert "no tokenizer could be loaded from 'words'" in capsys.readouterr().err

    def test_code_beside_a_tokenizer_is_not_run(
        self, home: Path, tiny_folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("p.jsonl", ["a"])
        words = Path("words")
        tiny_tokenizer().save_pretrained(words)
        settings = json.loads((words / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["auto_map"] = {"AutoTokenizer": ["evil.Words", None]}
        (words / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (words / "evil.py").write_text("raise SystemExit('was run')", encoding="utf-8")
        model = f"{{path: {tiny_folder}, tokenizer: words, trust_remote_code: true}}"
        assert main(["check", self.config(tiny_folder, model=model)]) == 0
        assert "brings its own code, which `marl check` doesn't run" in capsys.readouterr().out


class TestSeen:
    """Samples show what the model saw, and say that it isn't all."""

    def test_samples_of_steps_and_evaluations(
        self, home: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("p.jsonl", ["0123456789", "short"])
        config = make_config(
            data={"prompts": "p.jsonl", "max_prompt_tokens": 6, "on_long": "truncate-left", "shuffle": False},
            eval={"prompts": "p.jsonl"},
            ppo={"steps": 1},
            run={"folder": "run"},
            observers=[{"use": "console", "samples_every": 1}, {"use": "json-lines", "samples": 4}],
        )
        with pytest.warns(MarlWarning, match=r"eval\.prompts: 1 of 2 prompts of p\.jsonl was cut to 6 tokens"):
            Runner(config).train()
        rows = [json.loads(line) for line in Path("run/samples.jsonl").read_text(encoding="utf-8").splitlines()]
        marks = [(row["prompt"], row.get("cut_tokens")) for row in rows]
        assert marks == [("456789", 4), ("short", None), ("456789", 4), ("short", None)]
        evaluation = json.loads(Path("run/evals.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert [(row["prompt"], row.get("cut_tokens")) for row in evaluation["samples"]] == marks[:2]
        assert "cut: 4 tokens of the oldest text): 456789" in capsys.readouterr().out


def test_limit_takes_the_first_rows_of_the_training_prompts(home: Path, make_config: MakeConfig) -> None:
    write("p.jsonl", ["a", "b", "c", ""])
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\nno json\n', encoding="utf-8")
    for source in ("p.jsonl", "bad.jsonl"):
        runner = Runner(make_config(data={"prompts": source, "limit": 2}))
        assert runner.data is not None
        assert list(runner.data.texts) == ["a", "b"]
    whole = checked(make_config, data={"prompts": "p.jsonl", "limit": 2}, eval={"prompts": "p.jsonl"})
    assert "eval.prompts: 1 prompt of p.jsonl is empty (row 4)" in said(whole.findings)
    assert "data.prompts" not in said(whole.findings)


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_limit_of_every_kind_of_file(home: Path, make_config: MakeConfig, suffix: str) -> None:
    import pandas

    table = pandas.DataFrame({"prompt": [f"t{n}" for n in range(2500)]})
    source = f"p.{suffix}"
    getattr(table, f"to_{suffix}")(source, **({"orient": "records"} if suffix == "json" else {"index": False}))
    runner = Runner(make_config(data={"prompts": source, "limit": 1200}))
    assert runner.data is not None
    assert len(runner.data) == 1200
    assert runner.data.texts[-1] == "t1199"


@pytest.mark.parametrize("words", [byte_level(), byte_fallback(), tiny_tokenizer()], ids=["byte", "llama", "tiny"])
def test_pieces_add_up_to_the_text(words: Any) -> None:
    tokens = words("the Fräulein 🙂 was").input_ids
    found = list(pieces(words, tokens))
    assert "".join(text for _, text in found) == words.decode(tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for _, text in found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(home: Path, make_config: MakeConfig) -> None:
    Path("closed").mkdir(mode=0o500)
    assert "no permission to write" in "\n".join(Plan.of(make_config(run={"folder": "closed/run"})).check())
