"""No secret is written or printed, no code is run that the user didn't name, and generated text is inert in a report."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from marl_core import AdapterBank, ConfigError, MarlError, Plan, RunConfig, Runner
from marl_core.cli.app import main
from marl_core.config.redact import REDACTED, redact
from marl_core.report.page import write_report

MakeConfig = Callable[..., RunConfig]
TOKEN = "hf_" + "q7Zx" * 8
COMMIT = "0123456789abcdef" * 2 + "01234567"


class TestRedact:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("https://me:pass@host/x", f"https://{REDACTED}@host/x"),
            ("s3://KEY@bucket/x", f"s3://{REDACTED}@bucket/x"),
            ("https://host/x?a=1&token=abc&b=2", f"https://host/x?a=1&token={REDACTED}&b=2"),
            ("https://host/x?X-Amz-Signature=abc", f"https://host/x?X-Amz-Signature={REDACTED}"),
            (f"401 for {TOKEN}.", f"401 for {REDACTED}."),
            ("Authorization: Bearer abcdefgh12345", f"Authorization: Bearer {REDACTED}"),
            ("mail me@example.org about policy:v2@home", "mail me@example.org about policy:v2@home"),
            ("reward.path: runs/tokens/key", "reward.path: runs/tokens/key"),
        ],
    )
    def test_shapes(self, text: str, expected: str) -> None:
        assert redact(text, {}) == expected

    def test_values_of_the_environment(self) -> None:
        env = {
            "MY_API_KEY": "longer-than-8",
            "DB_PASSWORD": "short",
            "HOME": "/home/somebody",
            "HF_TOKEN": "longer-than-8-too",
        }
        assert (
            redact("longer-than-8-too longer-than-8 short /home/somebody", env)
            == f"{REDACTED} {REDACTED} short /home/somebody"
        )


def test_no_secret_is_in_any_file_of_a_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward that gets a key as an argument and a token in the environment, and then fails with both in its message."""
    monkeypatch.setenv("JUDGE_API_TOKEN", "swordfish-and-more")
    (tmp_path / "judge.py").write_text(
        "import os\n\ndef score(completions, url, **columns):\n"
        "    if os.environ.get('DOWN'):\n        raise OSError(f'401 for {url} with ' + os.environ['JUDGE_API_TOKEN'])\n"
        "    return [0.0] * len(completions)\n",
        encoding="utf-8",
    )
    url = f"https://user:secret-word@judge.example/score?api_key=abcdef123&hub={TOKEN}"
    run = tmp_path / "run"
    config = make_config(
        reward={"use": "function", "target": f"{tmp_path}/judge.py:score", "arguments": {"url": url}},
        run={"folder": str(run), "checkpoint_every": 1}, ppo={"steps": 1}, observers=["json-lines"],
    )  # fmt: skip
    Runner(config).train()
    write_report(run)
    secrets = [word.encode() for word in ("secret-word", "abcdef123", TOKEN, "swordfish")]
    leaks = [
        f"{file.name}: {word!r}"
        for file in run.rglob("*")
        if file.is_file()
        for word in secrets
        if word in file.read_bytes()
    ]
    assert leaks == []
    assert REDACTED in (run / "config.yaml").read_text(encoding="utf-8")
    assert Runner(config, resume=True).done == 1  # what was struck out is no change of the config
    (tmp_path / "run.yaml").write_text(json.dumps(written(config, tmp_path)), encoding="utf-8")
    monkeypatch.setenv("DOWN", "1")
    for debug in ([], ["--debug"]):
        assert main(["run", str(tmp_path / "run.yaml"), *debug]) == 3
        said = capsys.readouterr()
        assert not [word for word in secrets if word in (said.out + said.err).encode()]
        assert REDACTED in said.err


def written(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The config as a file holds it, with a folder of its own."""
    found: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    return {**found, "run": {**found["run"], "folder": str(folder / "other")}, "observers": []}


class TestRemoteCode:
    @pytest.fixture
    def with_code(self, tiny_folder: str, tmp_path: Path) -> Path:
        """A model folder that brings code of its own, as a Hub model may: it would leave a mark."""
        folder = Path(shutil.copytree(tiny_folder, tmp_path / "coded"))
        (folder / "own.py").write_text(
            f"open({str(tmp_path / 'mark')!r}, 'w').close()\nclass Own: pass\n", encoding="utf-8"
        )
        for name, classes in (
            ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
            ("tokenizer_config.json", ("AutoTokenizer",)),
        ):
            known = json.loads((folder / name).read_text(encoding="utf-8"))
            known |= {"auto_map": dict.fromkeys(classes, "own.Own"), "model_type": "own", "tokenizer_class": "Own"}
            (folder / name).write_text(json.dumps(known), encoding="utf-8")
        return folder

    @pytest.mark.filterwarnings("ignore")
    def test_is_never_run_and_nobody_is_asked(
        self,
        make_config: MakeConfig,
        with_code: Path,
        tiny_folder: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def asked(*_: Any) -> str:
            raise AssertionError("a question on standard input blocks a batch job")

        monkeypatch.setattr(builtins, "input", asked)
        attempts: list[Callable[[], object]] = [
            lambda: Runner(make_config(model={"path": str(with_code)})),
            lambda: Runner(make_config(model={"path": tiny_folder, "tokenizer": str(with_code)})),
            lambda: Runner(make_config(reward={"use": "model", "path": str(with_code)})),
            lambda: AdapterBank.from_pretrained(str(with_code), device="cpu"),
        ]
        for attempt in attempts:
            with pytest.raises(MarlError):
                attempt()
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc", COMMIT[:-1], COMMIT.upper()])
    def test_needs_the_full_commit(self, make_config: MakeConfig, revision: str | None) -> None:
        part = {"path": "owner/model", "revision": revision, "trust_remote_code": True}
        assert any("full commit" in line for line in Plan.of(make_config(model=part)).check())
        with pytest.raises(ConfigError, match="full commit"):
            AdapterBank.from_pretrained("owner/model", revision=revision, trust_remote_code=True)

    def test_with_the_full_commit_or_a_folder_it_may(self, make_config: MakeConfig, with_code: Path) -> None:
        for part in ({"path": "owner/model", "revision": COMMIT}, {"path": str(with_code)}):
            found = Plan.of(make_config(model={**part, "trust_remote_code": True})).check()
            assert not [line for line in found if "trust_remote_code" in line]

    def test_of_a_tokenizer_from_elsewhere_is_refused(self, make_config: MakeConfig, tiny_folder: str) -> None:
        part = {"path": tiny_folder, "tokenizer": "owner/words", "trust_remote_code": True}
        assert any("code of the tokenizer 'owner/words'" in line for line in Plan.of(make_config(model=part)).check())


class TestFunctions:
    """`file.py:function` runs what a config or command line names, when the run starts, and nothing else."""

    def test_code_that_lies_about_is_not_run(
        self,
        make_config: MakeConfig,
        tiny_folder: str,
        sft_adapter: str,
        prompts_file: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        code = f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
        model, adapter = (
            Path(shutil.copytree(source, tmp_path / name)) for source, name in ((tiny_folder, "m"), (sft_adapter, "a"))
        )
        work, data = tmp_path / "work", Path(shutil.copy(prompts_file, tmp_path / "p.jsonl"))
        work.mkdir()
        for folder in (model, adapter, work, tmp_path):
            for name in (
                "sitecustomize.py",
                "conftest.py",
                "reward.py",
                "rewards.py",
                "marl_plugins.py",
                "config.py",
                "__init__.py",
            ):
                (folder / name).write_text(code, encoding="utf-8")
        monkeypatch.chdir(work)
        lines = {"reference": {"use": "merged-base", "adapter": str(adapter)}}
        Runner(make_config(model={"path": str(model)}, data={"prompts": str(data)}, ppo={"steps": 1}, **lines)).train()
        assert not (tmp_path / "mark").exists()

    def test_a_row_of_the_data_names_no_function(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n", encoding="utf-8")
        row = {
            "prompt": "a",
            "target": f"{tmp_path}/evil.py:score",
            "use": "function",
            "reward": f"{tmp_path}/evil.py:score",
        }
        (tmp_path / "p.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
        Runner(make_config(data={"prompts": str(tmp_path / "p.jsonl")}, ppo={"steps": 1})).train()
        assert not (tmp_path / "mark").exists()

    def test_checking_parses_and_does_not_run(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(
            f"open({str(tmp_path / 'mark')!r}, 'w').close()\ndef score(completions, **c):\n    return [0.0] * len(completions)\n",
            encoding="utf-8",
        )
        plan = Plan.of(make_config(reward={"use": "function", "target": f"{tmp_path}/mine.py:score"}))
        assert plan.check() == []
        assert not (tmp_path / "mark").exists()
        Runner(plan)
        assert (tmp_path / "mark").exists()


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"><iframe></iframe></pre></table>&lt;"


def test_whatever_a_model_says_is_inert_in_a_report(make_config: MakeConfig, tmp_path: Path) -> None:
    """Prompts, responses, names of judges and sources, the folder's own name and a config's values."""
    run = tmp_path / "a <script>alert(0)<"
    config = make_config(run={"folder": str(run)}, ppo={"steps": 1}, observers=["json-lines"])
    Runner(config).train()
    sample = {
        "step": 1,
        "prompt": EVIL,
        "response": EVIL,
        "score": 1.0,
        "parts": {EVIL: 1.0},
        "kl_nats": 0.1,
        "finished": True,
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    judged = {"step": 0, "reward": 1.0, "kl": 0.1, "length": 2.0, "judges": {EVIL: {"mean": 1.0}}, "samples": [sample]}
    evaluation = {"reward_std": 0.0, "kl_std": 0.0, "length_std": 0.0, "finished": 1.0, **judged}
    (run / "evals.jsonl").write_text(json.dumps(evaluation) + "\n", encoding="utf-8")
    checks = {"checks": [{"name": EVIL, "ok": True, "detail": EVIL, "numbers": {}}], "ok": True}
    (run / "preflight.json").write_text(json.dumps(checks), encoding="utf-8")
    (run / "provenance.json").write_text(json.dumps({"base": EVIL}), encoding="utf-8")
    page = Tags()
    text = write_report(run).read_text(encoding="utf-8")
    page.feed(text)
    assert "alert(1)" in text  # it is shown
    assert not {"iframe", "object", "embed"} & page.tags
    assert "<script>alert" not in text
    assert not {name for name in page.attributes if name.startswith("on")}
