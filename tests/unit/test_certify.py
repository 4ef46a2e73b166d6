"""`marl certify`, and what `write_certificate` gives back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from marl_core import AdapterBank, DataError, write_certificate
from marl_core.cli.app import main
from marl_core.testing import write_tiny_model
from marl_core.testing.kinds import move, small_config

Told = pytest.CaptureFixture[str]
FILE = "marl_certificate.json"


@pytest.fixture
def adapter(reward_adapter: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reward_adapter, tmp_path / "reward"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of the same shape."""
    return write_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=5)


def test_it_writes_what_a_run_reads_and_says_what(adapter: Path, tiny_folder: str, capsys: Told) -> None:
    assert main(["certify", str(adapter), "--model", tiny_folder]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{adapter / FILE}: written\n")
    assert f"base           {tiny_folder}, " in said
    assert "tensors; it is what the adapter names (" in said
    assert "golden scores  4 texts, from " in said
    assert "as float32     trained on these weights; 4 golden scores match within" in said
    assert len(said) < 1000
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    bank.load_reward(adapter)
    assert "4 golden scores match" in "".join(bank.reward_checks.values())


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("kind", ["oft", "ia3", "vera", "hra"])
def test_a_reward_adapter_of_another_kind(tiny_folder: str, tmp_path: Path, capsys: Told, kind: str) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    model: Any = get_peft_model(base, small_config(kind, task_type="SEQ_CLS"))
    move(model)
    model.save_pretrained(str(tmp_path / "reward"))
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "reward")
    assert main(["certify", str(tmp_path / "reward"), "--model", tiny_folder]) == 0
    assert "as float32     trained on these weights; 4 golden scores match within" in capsys.readouterr().out


def test_it_is_compared_as_the_run_to_come_reads_it(adapter: Path, tiny_folder: str, capsys: Told) -> None:
    assert main(["certify", str(adapter), "--model", tiny_folder, "--dtype", "bfloat16"]) == 0
    assert "as bfloat16    trained on these weights; 4 golden scores match within" in capsys.readouterr().out


def test_a_base_that_cannot_be_compared_is_said(adapter: Path, other: str, capsys: Told) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": "owner/elsewhere"}), encoding="utf-8")
    assert main(["certify", str(adapter), "--model", other]) == 0
    said = capsys.readouterr().out
    assert "it can't be compared with 'owner/elsewhere', which the adapter names: " in said
    assert "trained on these weights" not in said
    assert "as float32     the base that its certificate was written on; 4 golden scores match within" in said
    unchecked = "Whether it was trained on this base could not be checked: its base 'owner/elsewhere' isn't here"
    assert unchecked in said
    assert json.loads((adapter / FILE).read_text(encoding="utf-8"))["verified"] is False
    bank = AdapterBank.from_pretrained(other, device="cpu")
    bank.load_reward(adapter)
    assert unchecked in bank.reward_checks["reward"]


def test_a_base_taken_on_trust_is_compared_when_the_named_one_is_there(
    adapter: Path, other: str, tiny_folder: str, tmp_path: Path
) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    named = tmp_path / "named"
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(named)}), encoding="utf-8")
    assert write_certificate(adapter, other, ["A"])["verified"] is False
    named.symlink_to(tiny_folder)
    with pytest.raises(DataError, match="was trained on other weights than this base"):
        AdapterBank.from_pretrained(other, device="cpu").load_reward(adapter)


def test_a_certificate_that_does_not_say_whether_it_was_compared(adapter: Path, other: str, tiny_folder: str) -> None:
    """Written before certificates said so: it is read, and what it doesn't say is found out where it can be."""
    file = adapter / FILE
    for base, trained in ((tiny_folder, True), (other, False)):
        if not trained:
            config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            renamed = {**config, "base_model_name_or_path": "owner/elsewhere"}
            (adapter / "adapter_config.json").write_text(json.dumps(renamed), encoding="utf-8")
        written = dict(write_certificate(adapter, base, ["A"]))
        assert written.pop("verified") is trained
        file.write_text(json.dumps(written), encoding="utf-8")  # on one line, as it was
        bank = AdapterBank.from_pretrained(base, device="cpu")
        bank.load_reward(adapter)
        assert ("trained on these weights;" in bank.reward_checks["reward"]) == trained
        assert ("could not be checked" in bank.reward_checks["reward"]) != trained


def test_a_person_can_read_it(adapter: Path, tiny_folder: str) -> None:
    certificate = write_certificate(adapter, tiny_folder, ["A good film.", "Bad"])
    text = (adapter / FILE).read_text(encoding="utf-8")
    assert json.loads(text) == certificate
    lines = text.splitlines()
    assert lines[:3] == ["{", ' "version": 2,', ' "verified": true,']
    assert len(lines) > 10 + len(certificate["base"]["tensors"])
    head = lines[: lines.index(' "base": {')]
    assert len(head) == 10  # two golden texts among them
    assert max(map(len, head)) < 200


def test_transformers_does_not_report_the_head_as_missing(
    adapter: Path, tiny_folder: str, capfd: Told, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        write_certificate(adapter, tiny_folder, ["A"])
    finally:
        transformers_logging.disable_propagation()
    assert "LOAD REPORT" not in caplog.text
    assert "MISSING" not in capfd.readouterr().err


def test_another_base_is_refused_before_anything_is_written(
    adapter: Path, other: str, tiny_folder: str, capsys: Told
) -> None:
    assert main(["certify", str(adapter), "--model", other]) == 4
    said = capsys.readouterr().err
    assert (
        f"certify: the reward adapter {adapter} was trained on '{tiny_folder}', whose weights are not those of" in said
    )
    assert not (adapter / FILE).exists()
    with pytest.raises(DataError, match=r"write_certificate: the reward adapter .* was trained on"):
        write_certificate(adapter, other, ["A"])


def test_one_that_is_there_stays_unless_forced(adapter: Path, tiny_folder: str, capsys: Told) -> None:
    (adapter / FILE).write_text("mine", encoding="utf-8")
    assert main(["certify", str(adapter), "--model", tiny_folder]) == 2
    assert "is there already. Write it anew with --force" in capsys.readouterr().err
    assert (adapter / FILE).read_text(encoding="utf-8") == "mine"
    assert main(["certify", str(adapter), "--model", tiny_folder, "--force"]) == 0
    assert json.loads((adapter / FILE).read_text(encoding="utf-8"))["version"] == 2


@pytest.mark.parametrize("before", [None, "mine"])
def test_scores_that_marl_does_not_get_are_not_certified(
    adapter: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is not None:
        (adapter / FILE).write_text(before, encoding="utf-8")

    def differs(*_: Any) -> str:
        raise DataError("certify: scores its own golden texts differently here")

    monkeypatch.setattr("marl_core.bank.identity.reward_check._check_golden", differs)
    assert main(["certify", str(adapter), "--model", tiny_folder, "--force"]) == 4
    assert (adapter / FILE).is_file() == (before is not None)
    if before is not None:
        assert (adapter / FILE).read_text(encoding="utf-8") == before


def test_examples_of_ones_own(adapter: Path, tiny_folder: str, tmp_path: Path, capsys: Told) -> None:
    lines, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    lines.write_text("Good\n\n" + "Bad\n" * 40, encoding="utf-8")
    rows.write_text('{"review": "Good"}\n{"review": "Bad"}\n', encoding="utf-8")
    command = ["certify", str(adapter), "--model", tiny_folder, "--force", "--no-append-eos"]
    assert main([*command, "--examples", str(lines)]) == 0
    assert "32 texts" in capsys.readouterr().out
    assert main([*command, "--examples", str(rows), "--field", "review"]) == 0
    written = json.loads((adapter / FILE).read_text(encoding="utf-8"))
    assert len(written["golden"]) == 2
    assert written["append_eos"] is False
    assert main([*command, "--examples", str(rows)]) == 4
    assert f"row 1 of {rows} has no text as 'text'; it has: review. Name the column" in capsys.readouterr().err
    lines.write_text("\n", encoding="utf-8")
    assert main([*command, "--examples", str(lines)]) == 4
    assert main([*command, "--examples", str(tmp_path / "none.txt")]) == 4


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sft", "holds no score head"),
        ("nothing", "certify: there is no adapter folder"),
        ("base", "isn't a PEFT adapter"),
    ],
)
def test_what_is_no_reward_adapter(sft_adapter: str, tiny_folder: str, capsys: Told, what: str, message: str) -> None:
    folder = {"sft": sft_adapter, "nothing": "nowhere", "base": tiny_folder}[what]
    assert main(["certify", folder, "--model", tiny_folder]) == 4
    assert message in capsys.readouterr().err


def test_a_notebook_prints_a_line(adapter: Path, tiny_folder: str) -> None:
    certificate = write_certificate(adapter, tiny_folder, ["A good film.", "Bad"])
    assert len(repr(certificate)) < 300
    assert str(adapter / FILE) in repr(certificate)
    assert certificate == json.loads((adapter / FILE).read_text(encoding="utf-8"))  # still the dict that it was
    assert len(certificate["golden"]) == 2
