"""`marl init`: five answers make a config that `marl check` accepts, on a terminal and without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from marl_core import Catalog, Plan, RunConfig, load_config
from marl_core.cli.app import main
from marl_core.config.flatten import flatten
from marl_core.config.run_config import DataSection
from marl_core.config.schema import json_schema
from marl_core.config.yaml_text import parse_yaml
from marl_core.testing import write_tiny_model
from marl_plugins.adapter.lora import Lora


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def score(completions, **columns):\n    return [0.0]\n", encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokenizer has a chat template, with room for marl's usual lengths."""
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_model(folder, max_position_embeddings=512)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(folder)


OPTIONS = ["--base", "owner/model", "--reward", "rewards.py:score", "--data", "prompts.jsonl"]


@pytest.mark.parametrize("memory", ["full", "4bit"])
def test_by_options(folder: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run.yaml", *OPTIONS, "--memory", memory]) == 0
    assert main(["check", "run.yaml"]) == 0
    assert "nothing speaks against this run" in capsys.readouterr().out
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=marl.schema.json\n")
    sections = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) >= len(sections)


def test_an_sft_adapter_is_merged_and_a_reward_adapter_recognized(
    folder: Path, tiny_folder: str, sft_adapter: str, reward_adapter: str
) -> None:
    given = ["--base", tiny_folder, "--sft", sft_adapter, "--reward", reward_adapter, "--data", "prompts.jsonl"]
    assert main(["init", "run.yaml", *given]) == 0
    config = load_config("run.yaml")
    assert (config.reference.use, config.reference.options) == ("merged-base", {"adapter": sft_adapter})
    assert config.reward[0].use == "adapter"
    assert main(["check", "run.yaml", "--set", "sampling.max_new_tokens=16", "--set", "data.max_prompt_tokens=16"]) == 0


def test_without_a_terminal_it_never_asks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run.yaml", "--base", "x"]) == 2
    assert "no terminal to ask on, and no answer for --reward, --data" in capsys.readouterr().err
    assert not Path("run.yaml").exists()


class Terminal:
    """A person at a terminal: answers in their order, and the questions that came. A yes or no has its default, or `agrees`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str, agrees: bool | None = None) -> None:
        self.left, self.asked, self.agrees = list(answers), list[str](), agrees
        monkeypatch.setattr("typer.prompt", self._prompt)
        monkeypatch.setattr("sys.stdin", type("Stdin", (), {"isatty": lambda self: True})())

    def _prompt(self, question: str, *, default: str, show_default: bool) -> str:
        self.asked.append(question)
        if self.agrees is not None and question.lower().endswith("[y/n]"):
            return "y" if self.agrees else "n"
        return self.left.pop(0) or default


def many_rows(file: str = "prompts.jsonl", count: int = 40) -> None:
    rows = [json.dumps({"question": f"{i} plus {i}", "answer": 2 * i}) for i in range(count)]
    Path(file).write_text("\n".join(rows), encoding="utf-8")


def test_on_a_terminal_it_asks_what_is_not_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, "", "rewards.py:score", "8bit", "prompts.jsonl", "", "")
    assert main(["init", "run.yaml", "--base", "owner/model"]) == 0
    assert terminal.left == []
    assert [question.split()[0] for question in terminal.asked] == [
        "SFT",
        "Reward:",
        "Hold",
        "Prompts:",
        "Column",
        "Held-out",
    ]
    config = load_config("run.yaml")
    assert config.quantization.use == "bnb-8bit"
    assert config.reference.use == "disabled-adapter"


def test_each_answer_is_looked_at_and_asked_again(
    folder: Path,
    tiny_folder: str,
    sft_adapter: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    many_rows()
    answers = ["", "./nowhere", sft_adapter, tiny_folder]  # the base
    answers += [tiny_folder, "./nothing", sft_adapter]
    answers += ["", "reward.py:score", "rewards.py:scor", "rewards.py", "rewards.py:", tiny_folder, "rewards.py:score"]
    answers += ["16bit", "full", "", "prompts.json", "prompts.jsonl"]
    answers += [
        "prompt",
        "question: {question",
        "question}",
        "{}",
        "Q: {questio}",
        "Q: {question}\\nA:",
        "prompts.jsonl",
        "rewards.py:score",
        "rewards.py",
        "heldout",
        "40",
        "10",
    ]
    terminal = Terminal(monkeypatch, *answers)
    assert main(["init", "run.yaml"]) == 0
    assert terminal.left == []
    out = capsys.readouterr().out
    for said in (
        "An answer is needed, e.g. HuggingFaceTB/SmolLM2-135M-Instruct.",
        "there is no folder './nowhere'",
        "It is an adapter: give the base it was trained on.",
        "It is a whole model: give the folder of an adapter that was trained on it.",
        "there is no adapter folder './nothing'",
        "there is no file 'reward.py'",
        "Did you mean 'rewards.py'?",
        "rewards.py defines no 'scor'; it defines score. Did you mean 'score'?",
        "'rewards.py' names no function. Write rewards.py:score.",
        "'rewards.py:' names no function. Write it as rewards.py:score.",
        "which gives no scores for texts",
        "'16bit' is none of full, 8bit, 4bit.",
        "there is no file 'prompts.json'. Did you mean 'prompts.jsonl'?",
        "prompts.jsonl: 40 rows. The first one: question: '0 plus 0', answer: 0",
        "has no column 'prompt'. Give question or answer.",
        "has no column 'questio'",
        "'prompts.jsonl' holds the prompts to train on.",
        "'question: {question' is no template",
        "'question}' is no template",
        "'{}' holds {}, not a column",
        "'rewards.py:score' is no file with prompts. Give a json, jsonl, csv or parquet file, or a number of rows",
        "'heldout' is no file with prompts.",
        "40 of 40 rows leave none to train on.",
        "run.yaml: nothing speaks against this run",
    ):
        assert said in out, said
    config = load_config("run.yaml")
    assert config.data is not None
    assert config.data.prompt_template == "Q: {question}\nA:"
    assert config.eval.prompts == "prompts-heldout.jsonl"


def test_chats_are_asked_for_where_the_tokenizer_has_a_template(
    folder: Path, chat_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "--base",
        chat_folder,
        "--sft",
        "",
        "--reward",
        "rewards.py:score",
        "--memory",
        "full",
        "--data",
        "prompts.jsonl",
    ]
    given += ["--field", "prompt", "--held-out", "0"]
    Terminal(monkeypatch, "Be short.", agrees=True)
    assert main(["init", "run.yaml", *given]) == 0
    data = load_config("run.yaml").data
    assert data is not None
    assert (data.chat, data.system_prompt) == (True, "Be short.")
    no = Terminal(monkeypatch, agrees=False)
    assert main(["init", "plain.yaml", *given]) == 0
    data = load_config("plain.yaml").data
    assert data is not None
    assert not data.chat
    assert len(no.asked) == 1


@pytest.mark.parametrize(
    ("given", "chat"),
    [
        ([], True),
        (["--no-chat"], False),
        (["--field", "Say: {prompt}"], False),
        (["--field", "{prompt}", "--chat"], True),
    ],
)
def test_chats_without_a_terminal(folder: Path, chat_folder: str, given: list[str], chat: bool) -> None:
    options = ["--base", chat_folder, "--reward", "rewards.py:score", "--data", "prompts.jsonl"]
    assert main(["init", "run.yaml", *options, *given]) == 0
    data = load_config("run.yaml").data
    assert data is not None
    assert data.chat == chat


def test_rows_that_are_chats_need_a_template(
    folder: Path, tiny_folder: str, chat_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "hello"}]}
    Path("chats.jsonl").write_text(json.dumps(row), encoding="utf-8")
    options = ["--reward", "rewards.py:score", "--data", "chats.jsonl"]
    assert main(["init", "no.yaml", "--base", tiny_folder, *options]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["init", "run.yaml", "--base", chat_folder, *options, "--system", "Be short."]) == 0
    assert "messages: user: hello" in capsys.readouterr().out
    data = load_config("run.yaml").data
    assert data is not None
    assert (data.field, data.chat, data.system_prompt) == ("messages", False, "Be short.")


def test_held_out_rows_are_never_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many_rows()
    before = Path("prompts.jsonl").read_text(encoding="utf-8")
    assert main(["init", "run.yaml", *OPTIONS]) == 0
    assert "prompts-train.jsonl will hold the rows to train on" in capsys.readouterr().out
    config = load_config("run.yaml")
    assert config.data is not None
    assert config.eval.prompts is not None
    train, held_out = (
        Path(file).read_text(encoding="utf-8").splitlines() for file in (config.data.prompts, config.eval.prompts)
    )
    assert len(held_out) == 4
    assert sorted(train + held_out) == sorted(before.splitlines())
    assert Path("prompts.jsonl").read_text(encoding="utf-8") == before
    assert main(["init", "second.yaml", *OPTIONS]) == 2  # the files are there, and stay
    assert "prompts-train.jsonl: there is such a file already" in capsys.readouterr().err
    assert not Path("second.yaml").exists()


def test_prompts_in_the_home_folder_are_split_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    many_rows()
    assert main(["init", "run.yaml", *OPTIONS, "--data", "~/prompts.jsonl", "--held-out", "4"]) == 0
    config = load_config("run.yaml")
    assert config.eval.prompts == str(folder / "prompts-heldout.jsonl")
    assert Path(config.eval.prompts).is_file()
    assert main(["init", "none.yaml", *OPTIONS, "--held-out", "00"]) == 0
    assert load_config("none.yaml").eval.prompts is None


def test_held_out_prompts_of_ones_own(folder: Path) -> None:
    Path("test.jsonl").write_text('{"prompt": "b"}\n', encoding="utf-8")
    assert main(["init", "run.yaml", *OPTIONS, "--held-out", "test.jsonl"]) == 0
    assert load_config("run.yaml").eval.prompts == "test.jsonl"
    hub = ["--base", "owner/model", "--reward", "rewards.py:score", "--data", "owner/data"]
    assert main(["init", "hub.yaml", *hub, "--held-out", "test"]) == 0
    held_out = load_config("hub.yaml").eval
    assert (held_out.prompts, held_out.split) == ("owner/data", "test")


def test_a_reward_model_of_several_labels(
    folder: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((Path(tiny_folder) / "config.json").read_text(encoding="utf-8"))
    labels = {"id2label": {"0": "BAD", "1": "GOOD"}, "architectures": ["LlamaForSequenceClassification"]}
    Path("judge").mkdir()
    Path("judge/config.json").write_text(json.dumps({**config, **labels}), encoding="utf-8")
    given = ["--base", "owner/model", "--reward", "judge", "--data", "prompts.jsonl"]
    assert main(["init", "run.yaml", *given]) == 2
    assert main(["init", "run.yaml", *given, "--label", "FINE"]) == 2
    assert "--label: 'FINE' is none of BAD, GOOD." in capsys.readouterr().err
    assert main(["init", "run.yaml", *given, "--label", "GOOD"]) == 0
    assert load_config("run.yaml").reward[0].options == {"path": "judge", "label": "GOOD"}


@pytest.mark.filterwarnings("always::marl_core.errors.MarlWarning")
def test_a_hub_name_is_said_to_be_unseen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my-model").mkdir()
    given = ["--base", "my-modle", "--reward", "rewards.py:score", "--data", "prompts.jsonl"]
    assert main(["init", "run.yaml", *given]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count("Did you mean 'my-model'?") == said.count("Did you mean") == 1
    given = ["--base", "owner/model", "--reward", "rewards.py:score", "--data", "owner/data"]
    assert main(["init", "hub.yaml", *given]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("model.path: 'owner/model' isn't on this machine") == 1
    assert "owner/data" in said


def test_the_schema_is_written_and_the_check_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    assert main(["init", "sub/run.yaml", *OPTIONS]) == 0
    schema = json.loads(Path("sub/marl.schema.json").read_text(encoding="utf-8"))
    assert schema == json.loads(json.dumps(json_schema(Catalog.installed())))
    assert "sub/run.yaml: nothing speaks against this run" in capsys.readouterr().out


def test_what_the_check_says_is_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake that no answer shows: the config is written, and the check's answer is the command's."""
    Path("runs").write_text("no folder", encoding="utf-8")
    assert main(["init", "run.yaml", *OPTIONS]) == 2
    said = capsys.readouterr()
    assert "`marl check run.yaml` says:" in said.out
    assert "run.folder: 'runs/first' can't be a run's folder" in said.err
    assert Path("run.yaml").is_file()


def test_leaving_at_a_question_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Terminal(monkeypatch)

    def leave(*asked: Any, **options: Any) -> str:
        raise typer.Abort

    monkeypatch.setattr("typer.prompt", leave)
    assert main(["init", "run.yaml"]) == 130
    assert sorted(path.name for path in folder.iterdir()) == ["prompts.jsonl", "rewards.py"]


def test_a_run_of_what_it_wrote(folder: Path, chat_folder: str) -> None:
    """From the answers to a trained adapter, with numbers before and after."""
    many_rows(count=8)
    Path("rewards.py").write_text(
        "def score(completion_ids, answer):\n    return [float(len(i)) for i in completion_ids]\n"
    )
    given = ["--base", chat_folder, "--reward", "rewards.py:score", "--data", "prompts.jsonl", "--field", "question"]
    assert main(["init", "run.yaml", *given, "--held-out", "2", "--system", "Hi."]) == 0
    small = [
        "ppo.steps=1",
        "ppo.batch=4",
        "ppo.minibatch=2",
        "ppo.epochs=1",
        "sampling.max_new_tokens=4",
        "model.dtype=float32",
    ]
    assert main(["run", "run.yaml", "--quiet", *(word for key in small for word in ("--set", key))]) == 0
    assert (folder / "runs" / "first" / "final" / "policy" / "adapter_config.json").is_file()
    assert len((folder / "runs" / "first" / "evals.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert main(["init", "again.yaml", *given, "--held-out", "0"]) == 0
    assert load_config("again.yaml").run.folder == "runs/first-2"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", " "], "--base: An answer is needed"),
        (["--base", "./nowhere"], "--base: there is no folder './nowhere'"),
        (["--reward", "rewards.py:a-b"], "--reward: 'rewards.py:a-b' names no function"),
        (["--reward", "rewards.py:missing"], "--reward: rewards.py defines no 'missing'"),
        (["--data", ""], "--data: An answer is needed"),
        (["--field", "question"], "--field: row 1 of 'prompts.jsonl' has no column 'question'"),
        (["--field", "promt"], "has no column 'promt'. Give prompt. Did you mean 'prompt'?"),
        (["--field", "Q: {promt}"], "has no column 'promt'. Name in braces prompt. Did you mean 'prompt'?"),
        (["--held-out", "²"], "--held-out: '²' is no file with prompts"),
        (["--held-out", "~/prompts.jsonl"], "holds the prompts to train on"),
        (["--data", "~/prompts.jsonl", "--held-out", "prompts.jsonl"], "holds the prompts to train on"),
        (["--system", "Be short."], "--system: only chats have a system prompt"),
        (["--label", "GOOD"], "--label: 'rewards.py:score' has no labels"),
        (["--held-out", "no.jsonl"], "--held-out: there is no file 'no.jsonl'"),
    ],
)
def test_what_marl_would_not_take_is_not_written(
    folder: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert main(["init", "run.yaml", *OPTIONS, *options]) == 2
    assert said in capsys.readouterr().err
    assert not Path("run.yaml").exists()


def test_a_column_that_can_not_be_guessed_is_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"a": "x", "b": "y"}\n', encoding="utf-8")
    assert main(["init", "run.yaml", *OPTIONS]) == 2
    assert "--field: which column of prompts.jsonl is the prompt? It has a, b." in capsys.readouterr().err


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine", encoding="utf-8")
    assert main(["init", "run.yaml", *OPTIONS]) == 2
    assert Path("run.yaml").read_text(encoding="utf-8") == "mine"
    assert main(["init", "run.yaml", *OPTIONS, "--force"]) == 0


def test_what_it_writes_fits_the_schema(folder: Path) -> None:
    from jsonschema import Draft202012Validator

    assert main(["init", "run.yaml", *OPTIONS, "--memory", "8bit"]) == 0
    written = parse_yaml(Path("run.yaml").read_text(encoding="utf-8"), "run.yaml")
    Draft202012Validator(json_schema(Catalog.installed())).validate(written)


PLACES = ("data.prompts", "data.field", "model.path", "observers", "run.folder", "run.checkpoint_every")
"""What a first config says for itself: the answers, where to write, who watches."""


def test_all_else_is_what_marl_does_without_a_config(folder: Path) -> None:
    """Every value, key by key, is the class's own default: the study's choice is made in one place."""
    assert main(["init", "run.yaml", *OPTIONS]) == 0
    written = parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"), "run.yaml")
    plain = {"model": {"path": "x"}, "reference": "disabled-adapter", "reward": {"use": "function", "target": "x:y"}}
    usual = RunConfig.model_validate(plain)
    kept = usual.model_dump(by_alias=True) | {"value": {"on": Plan.of(usual).value_on}}
    kept["policy"] |= Lora().model_dump()
    for section in ("model", "policy", "value", "data", "sampling", "ppo", "run"):
        defaults = flatten(kept[section] or DataSection(prompts="x").model_dump(), section)
        for key, value in flatten(written[section], section).items():
            assert key in PLACES or defaults[key] == value, key
    assert load_config("run.yaml").data == DataSection(prompts="prompts.jsonl")


def test_a_name_that_is_not_here_is_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing error is no hub name: a lone name is asked about with no as the default, owner/name with yes."""
    answers = ["run.yaml", "smolm", "", "owner/model", ""]  # the base
    answers += ["sfft", "", "rewardz.py:x", "judge", "maybe", "yes", "full"]
    answers += ["rewardz.py:x", "reward.py", "my prompts", "notes.txt", "promts", "no", "owner/data", "", "prompt"]
    answers += ["rewards.py:score", "12", "test[:10%]"]
    terminal = Terminal(monkeypatch, *answers)
    assert main(["init", "run.yaml"]) == 0
    assert terminal.left == []
    asked, out = "\n".join(terminal.asked), capsys.readouterr().out
    assert "Nothing here is called 'smolm'. Is it a name on the hub? [y/N]" in asked
    assert "Nothing here is called 'owner/model'. Is it a name on the hub? [Y/n]" in asked
    assert "'run.yaml' is the name of a file. A base is a folder with a model, or a name on the hub." in out
    assert "Answer y or n." in out
    for name in ("rewardz.py:x", "reward.py", "my prompts", "notes.txt"):
        assert f"{name!r} is no file with prompts and no name of a data set" in out
    assert "'rewards.py:score' is no file with prompts. Give a json, jsonl, csv or parquet file, or a split" in out
    config = load_config("run.yaml")
    assert config.data is not None
    assert (config.model.path, config.data.prompts) == ("owner/model", "owner/data")
    assert (config.reward[0].options, config.eval.split) == ({"path": "judge"}, "test[:10%]")


def test_all_wrong_options_are_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many_rows()
    wrong = ["--base", "./nowhere", "--reward", "rewards.py:scor", "--data", "prompts.jsonl", "--field", "prompt"]
    assert main(["init", "run.yaml", *wrong, "--held-out", "40", "--memory", "4bit"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for one in (
        "--base: there is no folder './nowhere'",
        "--reward: rewards.py defines no 'scor'",
        "--field: row 1 of 'prompts.jsonl' has no column 'prompt'. Give question or answer.",
        "--held-out: 40 of 40 rows leave none to train on.",
    ):
        assert said.count(one) == 1, one
    assert main(["init", "run.yaml", *wrong[:4], "--data", "prompts.jsonl", "--held-out", "40"]) == 2
    said = capsys.readouterr().err
    for one in ("these answers can't stand", "--base: ", "--reward: ", "--held-out: "):
        assert said.count(one) == 1, one
    Path("columns.jsonl").write_text('{"a": "x", "b": "y"}\n', encoding="utf-8")
    assert main(["init", "run.yaml", *wrong[:4], "--data", "columns.jsonl"]) == 2
    said = capsys.readouterr().err
    for one in ("these answers can't stand", "--base: ", "--reward: ", "which column of columns.jsonl is the prompt?"):
        assert said.count(one) == 1, one
    assert main(["init", "run.yaml", *wrong[:4], "--data", "promts.jsonl"]) == 2
    said = capsys.readouterr().err
    for one in ("these answers can't stand", "--base: ", "--reward: ", "--data: "):
        assert said.count(one) == 1, one
    assert main(["init", "run.yaml", *wrong[:4]]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for one in ("no answer for --data", "--base: there is no folder", "--reward: rewards.py defines no 'scor'"):
        assert said.count(one) == 1, one
    assert main(["init", "run.yaml", *OPTIONS, "--data", "promts.jsonl", "--base", "x.py"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--base: 'x.py' is the name of a file" in said
    assert "--data: there is no file 'promts.jsonl'" in said
    assert main(["init", "run.yaml", *OPTIONS, "--field", "question", "--system", "Hi.", "--label", "a"]) == 2
    said = capsys.readouterr().err
    assert [said.count(f"--{name}: ") for name in ("system", "label")] == [1, 1]
    assert not Path("run.yaml").exists()
