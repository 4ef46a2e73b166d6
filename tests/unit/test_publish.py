"""marl publish: the card says what was measured, its five lines load the adapter, nothing leaves the machine unasked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from marl_core import Catalog, DataError, Runner
from marl_core.cli.app import main
from marl_core.config.load import parse_config
from marl_core.report.model_card import code, fenced, model_card
from marl_core.report.publish import publish_adapter
from marl_core.report.run_data import read_runs
from marl_core.testing import write_tiny_model

EVIL = '<script>alert("x")</script> | `a`\n```\n# b'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with a judge."""
    place = tmp_path_factory.mktemp("publish")
    write_tiny_model(place / "base")
    (place / "p.jsonl").write_text('{"prompt": "A good"}\n{"prompt": "Bad"}\n', encoding="utf-8")
    (place / "mine.py").write_text(
        "def half(completions, **_): return [0.5] * len(completions)\n"
        "def three(completions, **_): return [3.25] * len(completions)\n",
        encoding="utf-8",
    )
    config = {
        "model": {"path": str(place / "base"), "dtype": "float32"},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": f"{place}/mine.py:half"},
        "data": {"prompts": str(place / "p.jsonl")},
        "eval": {
            "prompts": str(place / "p.jsonl"),
            "judges": {"strict": {"use": "function", "target": f"{place}/mine.py:three"}},
        },
        "sampling": {"max_new_tokens": 4},
        "ppo": {"steps": 1, "batch": 2, "minibatch": 2},
        "observers": ["json-lines"],
        "run": {"folder": str(place / "run")},
    }
    Runner(parse_config(config, "run.yaml", Catalog.installed())).train()
    return place / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """The run's files, with some of them changed."""

    def make(**changed: Callable[[Any], None]) -> Path:
        for file in finished.rglob("*"):
            if file.is_file() and "checkpoints" not in file.parts:
                target = tmp_path / "copy" / file.relative_to(finished)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        for name, change in changed.items():
            file = tmp_path / "copy" / name.replace("_", ".")
            read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
            value = read(file.read_text(encoding="utf-8"))
            change(value)
            file.write_text(write(value), encoding="utf-8")
        return tmp_path / "copy"

    return make


def head(card: str) -> dict[str, Any]:
    """The metadata on top."""
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_five_lines_of_the_card_load_the_adapter(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["publish", str(finished), "--to", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "marl.json",
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL)
    assert len(lines.splitlines()) == 5
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(lines, names)
    saved = load_file(finished / "final" / "policy" / "adapter_model.safetensors")
    loaded = {
        name.replace(".default", ""): tensor for name, tensor in names["model"].state_dict().items() if "lora" in name
    }
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert names["tokenizer"]("Bad").input_ids


def test_the_card_states_base_reference_reward_kl_and_judges(finished: Path) -> None:
    (run,) = read_runs([finished])
    card = model_card(run)
    provenance = json.loads((finished / "provenance.json").read_text(encoding="utf-8"))
    assert f"fingerprint of its weights: `{provenance['base']['fingerprint']}`" in card
    assert "reference:\n  use: disabled-adapter" in card
    assert "mine.py:half" in card
    assert "mean reward of a step: 0.5 (one step)" in card
    assert "| held-out prompts | step 0 | step 1 |" in card
    assert "| reward | 0.5 | 0.5 |" in card
    assert "| judge `strict` | 3.25 | 3.25 |" in card
    kl = run.evaluations[-1]["kl"]
    assert f"| KL to the reference, nats per response | 0 | {kl:.4g} |" in card
    assert f"- peft {provenance['packages']['peft']}" in card
    assert "A PEFT adapter (LoRA), trained with PPO by marl." in card
    assert head(card)["tags"] == ["marl", "ppo", "lora", "rlhf"]
    assert head(card)["library_name"] == "peft"
    assert "base_model" not in head(card)  # a local folder is no hub name
    assert "prepared before training" not in card


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (1, "0 (one step)"),
        (9, "0 in the first step, 8 in the last\n"),
        (40, "1.5 in the first 4 steps, 37.5 in the last 4\n"),  # means of 0..3 and of 36..39
    ],
)
def test_how_many_steps_a_mean_is_over_is_said(finished: Path, steps: int, said: str) -> None:
    (run,) = read_runs([finished])
    longer = replace(run, steps=[{"step": i + 1, "objective/scores": i} for i in range(steps)])
    assert f"- mean reward of a step: {said}" in model_card(longer)


@pytest.mark.parametrize(
    ("options", "title", "tag"),
    [
        ({"peft_type": "OFT"}, "OFT", "oft"),
        ({"use_dora": True}, "DoRA", "lora"),
        ({"peft_type": "FOURIERFT"}, "FourierFT", "fourierft"),
    ],
)
def test_the_card_states_the_kind(copy: Callable[..., Path], options: dict[str, Any], title: str, tag: str) -> None:
    run = copy()
    file = run / "final" / "policy" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **options}), encoding="utf-8")
    card = model_card(read_runs([run])[0])
    assert f"A PEFT adapter ({title}), trained with PPO by marl." in card
    assert head(card)["tags"][2] == tag


@pytest.mark.filterwarnings("always::marl_core.errors.MarlWarning")
def test_a_base_in_a_folder_is_warned_of(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(finished), "--to", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "which is no hub name (OWNER/NAME), so others can't load the adapter by it" in shown
    assert "--base OWNER/NAME" in shown


def test_base_names_it_in_card_and_config(
    copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def local_tokenizer(config: Any) -> None:
        config["model"] |= {"tokenizer": "/here/words", "revision": "abc"}

    run, out = copy(config_yaml=local_tokenizer), tmp_path / "out"
    assert main(["publish", str(run), "--to", str(out), "--base", "me/base"]) == 0
    assert capsys.readouterr().err == ""
    card = (out / "README.md").read_text(encoding="utf-8")
    assert head(card)["base_model"] == "me/base"
    assert "AutoModelForCausalLM.from_pretrained('me/base')" in card
    assert "AutoTokenizer.from_pretrained('me/base')" in card
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    assert main(["publish", str(run), "--to", str(tmp_path / "other"), "--base", "./base"]) == 2
    assert "no hub name" in capsys.readouterr().err


def test_base_revision_and_preparation(copy: Callable[..., Path]) -> None:
    def other_base(config: Any) -> None:
        config["model"] |= {"path": "owner/base", "revision": "abc"}

    def prepared(found: Any) -> None:
        found["base"]["prepared_by"] = 'merged-base {"adapter":"sft"}'

    (run,) = read_runs([copy(config_yaml=other_base, provenance_json=prepared)])
    card = model_card(run, "me/adapter")
    assert head(card)["base_model"] == "owner/base"
    assert "base: `owner/base`, revision `abc`" in card
    assert "**prepared before training by** `merged-base" in card
    assert "from_pretrained('owner/base', revision='abc')  # then prepare it as above" in card
    assert "PeftModel.from_pretrained(base, 'me/adapter')" in card


def test_texts_of_others_stay_texts_and_secrets_are_struck_out(
    copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")

    def evil(config: Any) -> None:
        config["model"]["path"] = "base'" + EVIL
        config["reward"] = [
            {"use": "http", "url": "https://me:pw@x.example/?token=abc", "note": "correct-horse-battery"}
        ]

    run = copy(config_yaml=evil)
    assert main(["publish", str(run), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "correct-horse-battery" not in card
    assert "me:pw" not in card
    assert "token=abc" not in card
    (lines,) = re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL)
    compile(lines, "card", "exec")  # the path can't end the text it stands in
    assert len(lines.splitlines()) == 5
    assert not re.search(r"(?m)^# b", card)


def test_markup() -> None:
    assert code(EVIL) == "`<script>alert(\"x\")</script> \\| 'a' ''' # b`"
    assert fenced("a\n````\nb").startswith("`````\n")


class TestPush:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A hub that notes what it is asked for."""
        asked: list[Any] = []

        class Api:
            def create_repo(self, name: str, **options: Any) -> str:
                asked.append((name, options))
                return f"https://hub.example/{name}"

            def upload_folder(self, **options: Any) -> None:
                if "refused" in options["repo_id"]:
                    raise ConnectionError("403 for hf_" + "a" * 20)
                asked.append({file.name for file in Path(options["folder_path"]).iterdir()})

        monkeypatch.setattr("huggingface_hub.HfApi", Api)
        return asked

    def test_nothing_is_uploaded_unless_asked(self, finished: Path, tmp_path: Path, hub: list[Any]) -> None:
        assert main(["publish", str(finished), "--to", str(tmp_path / "out")]) == 0
        assert hub == []

    @pytest.mark.parametrize("public", [True, False])
    def test_the_folder_goes_up(
        self, finished: Path, tmp_path: Path, hub: list[Any], public: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["publish", str(finished), "--to", str(tmp_path / "out"), "--push-to-hub", "me/mine"]
        assert main([*given, *(["--public"] if public else [])]) == 0
        assert hub[0] == ("me/mine", {"private": not public, "exist_ok": True})
        assert hub[1] == {"README.md", "adapter_config.json", "adapter_model.safetensors", "marl.json"}
        assert "https://hub.example/me/mine" in capsys.readouterr().out

    def test_a_refusal_is_said_without_the_token_and_the_folder_stays(
        self, finished: Path, tmp_path: Path, hub: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["publish", str(finished), "--to", str(tmp_path / "out"), "--push-to-hub", "me/refused"]
        assert main(given) == 4
        said = capsys.readouterr().err
        assert "publish: me/refused could not be uploaded (ConnectionError: 403" in said
        assert "hf_aaa" not in said
        assert (tmp_path / "out" / "README.md").is_file()

    def test_a_name_that_is_none(self, finished: Path, tmp_path: Path, hub: list[Any]) -> None:
        assert main(["publish", str(finished), "--to", str(tmp_path / "out"), "--push-to-hub", "mine"]) == 2
        assert not (tmp_path / "out").exists()


class TestRefused:
    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["publish", str(tmp_path), "--to", str(tmp_path / "out")]) == 4
        assert "holds no run" in capsys.readouterr().err

    def test_a_run_that_has_not_ended(
        self, copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = copy()
        (run / "final" / "policy" / "adapter_model.safetensors").unlink()
        assert main(["publish", str(run), "--to", str(tmp_path / "out")]) == 4
        assert "the run hasn't ended. Go on with it by marl run --resume" in capsys.readouterr().err

    def test_a_folder_that_is_there(self, finished: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is there already"):
            publish_adapter(finished, tmp_path)

    def test_damaged_files(self, copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = copy()
        (run / "provenance.json").write_text("{", encoding="utf-8")
        assert main(["publish", str(run), "--to", str(tmp_path / "out")]) == 4
        assert "can't be read" in capsys.readouterr().err
