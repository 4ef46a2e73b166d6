"""Faults of others at run time: the plugin is named with package and version, the run's files and the others are unharmed."""

from __future__ import annotations

import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import Catalog, NumericError, PluginError, RunConfig, Runner
from marl_core.cli.app import main
from marl_core.errors import MarlWarning
from marl_core.store import checkpoint

Stranger = Callable[..., Path]
MakeConfig = Callable[..., RunConfig]

RUDE = '''
import os, random, sys, torch
from marl_core import Strategy, hookimpl

class Odd(BaseException): ...

class Rude(Strategy):
    """Polite, until a file is there."""
    flag: str
    @hookimpl
    def marl_reward(self, bank):
        def score(rollout):
            good = [float(len(text)) for text in rollout.texts]
            if os.path.exists(self.flag):
                {body}
            return good
        return score
'''
WHOSE = r"rude of rude-marl 0\.4 \(rude_marl:Rude\)"

BROKEN = {
    "raises": ("raise ValueError('no route')", "failed.*ValueError: no route"),
    "sys.exit": ("sys.exit(0)", "failed.*SystemExit"),
    "a base exception of its own": ("raise Odd('x')", r"failed.*Odd\('x'\)"),
    "too few": ("return good[:-1]", "gave 3 rewards for 4 responses"),
    "nested": ("return [[number] * 99 for number in good]", r"response 1 has \d+ tokens and got 99 numbers"),
    "NaN": ("return [float('nan')] * 4", "response 1 got nan, not a finite number"),
    "None for all": ("return [None] * 4", "no source .*gave response 1 a score"),
    "None": ("return None", "returned None; return a list of 4 numbers"),
    "strings": ("return ['good'] * 4", "response 1 got 'good', not a finite number"),
    "complex numbers": ("return [1j] * 4", "response 1 got 1j, not a finite number"),
    "a tensor of another device": ("return torch.empty(4, device='meta')", "tensor without data"),
    "a table": ("return {'a': 1}", "gave a dict"),
    "writes frozen weights": (
        "with torch.no_grad(): bank.base.get_input_embeddings().weight.mul_(1.5)",
        "changed frozen weights: .*embed_tokens",
    ),
    "writes the policy": (
        "with torch.no_grad(): next(iter(bank.parameters('policy').values())).add_(1.0)",
        "changed weights that the optimizer alone may change: .*lora_A.policy",
    ),
}  # fmt: skip


@pytest.fixture
def config(
    stranger: Stranger, make_config: MakeConfig, tmp_path: Path, rewards_file: str
) -> Callable[[str], tuple[RunConfig, Path]]:
    """A run scored by a polite function and by a stranger that does `body` once the file is there."""

    def make(body: str) -> tuple[RunConfig, Path]:
        flag = tmp_path / "flag"
        stranger("rude-marl", RUDE.replace("{body}", body), version="0.4", reward={"rude": "Rude"})
        rewards = [
            {"use": "function", "target": f"{rewards_file}:low"},
            {"use": "rude", "flag": str(flag)},
        ]
        if "None" in body:
            rewards = rewards[1:]
        run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
        return make_config(reward=rewards, run=run, ppo={"steps": 3}, observers=["json-lines"]), flag

    return make


@pytest.mark.parametrize(("body", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_reward_is_named_and_the_run_goes_on_without_the_fault(
    config: Callable[[str], tuple[RunConfig, Path]], tmp_path: Path, body: str, said: str
) -> None:
    asked, flag = config(body)
    steps = Runner(asked).steps()
    next(steps)
    flag.touch()
    with pytest.raises(PluginError, match=said) as caught:
        next(steps)
    words = str(caught.value)
    assert caught.value.exit_code == 3
    if "no source" not in words:
        assert "rude of rude-marl 0.4 (rude_marl:Rude)" in words
    assert f"marl replay {tmp_path}/run/dumps/step-000002-score" in words
    saved = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-000001"]
    assert checkpoint.damage(saved[0]) is None
    lines = (tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    flag.unlink()
    again = Runner(asked, resume=True)
    assert [stats.step for stats in again.steps()] == [2, 3]


QUIET = {
    "seeds": ("torch.manual_seed(3); random.seed(3)", None),
    "gives a tensor that requires grad": ("return torch.tensor(good, requires_grad=True) * 1.0", None),
    "threads": ("torch.set_num_threads(2)", r"the number of threads \(1 to 2\)"),
    "default dtype": ("torch.set_default_dtype(torch.float64)", "torch's default dtype"),
    "gradient mode": ("torch.set_grad_enabled(True)", "gradient mode"),
    "train mode": ("bank.base.train()", "train mode"),
    "one layer's mode": ("bank.base.get_input_embeddings().train()", "train mode"),
    "active adapter": ("bank.activate('policy')", "the active adapter"),
    "active adapter, behind the bank": (
        "next(iter(bank.wrappers('policy').values())).enable_adapters(False)",
        "the active adapter",
    ),
    "which weights learn": ("bank.base.requires_grad_(True)", "which weights learn"),
}


@pytest.mark.parametrize(("body", "said"), QUIET.values(), ids=QUIET)
def test_what_a_reward_changes_is_put_back_and_changes_no_number(
    config: Callable[[str], tuple[RunConfig, Path]], body: str, said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    def numbers(runner: Runner) -> list[dict[str, float]]:
        return [{k: v for k, v in stats.metrics.items() if not k.startswith("perf/")} for stats in runner.steps()]

    asked, flag = config(body)
    asked = asked.model_copy(update={"run": asked.run.model_copy(update={"folder": None})})
    clean = numbers(Runner(asked))
    flag.touch()
    assert numbers(Runner(asked)) == clean
    found = [str(w.message) for w in recwarn if issubclass(w.category, MarlWarning) and "put back" in str(w.message)]
    if said is None:
        assert found == []
    else:
        assert len(found) == 1, "said once"
        assert "rude of rude-marl 0.4" in found[0]
        assert re.search(said, found[0])
    assert torch.get_num_threads() == 1


def test_what_a_reward_prints_is_not_on_standard_output(
    config: Callable[[str], tuple[RunConfig, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked, flag = config("print('BUY NOW')")
    flag.touch()
    next(Runner(asked).steps())
    captured = capsys.readouterr()
    assert "BUY NOW" not in captured.out
    assert "BUY NOW" in captured.err


OBSERVER = '''
from marl_core import Strategy, hookimpl

class Odd(BaseException): ...

class Loud(Strategy):
    """Watches, and fails at the second step."""
    @hookimpl
    def marl_step_end(self, stats):
        if stats.step == 2:
            {body}
'''


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit", "SystemExit"),
        ("raise Odd", "Odd"),
        ("raise GeneratorExit", "GeneratorExit"),
    ],
)
def test_an_observer_that_fails(
    stranger: Stranger, make_config: MakeConfig, tmp_path: Path, body: str, said: str
) -> None:
    stranger("loud-marl", OBSERVER.replace("{body}", body), version="1.1", observer={"loud": "Loud"})
    run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
    steps = Runner(make_config(run=run, ppo={"steps": 3}, observers=["json-lines", "loud"])).steps()
    next(steps)
    with pytest.raises(PluginError, match=rf"loud of loud-marl 1\.1 .*marl_step_end failed: {said}"):
        next(steps)
    assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "step-000001") is None


IMPORTS = {
    "seed": ("import random; random.seed(1)", "Python's random state"),
    "torch's seed": ("import torch; torch.manual_seed(1)", "torch's random state"),
    "threads": ("import torch; torch.set_num_threads(2)", "the number of threads"),
    "dtype": ("import torch; torch.set_default_dtype(torch.float64)", "torch's default dtype"),
    "folder": ("import os; os.chdir('/')", "the working folder"),
}


@pytest.mark.parametrize(("code", "said"), IMPORTS.values(), ids=IMPORTS)
def test_what_an_import_changes_is_put_back(stranger: Stranger, code: str, said: str) -> None:
    before = (os.getcwd(), torch.get_default_dtype(), torch.get_num_threads(), random.getstate())
    stranger("rude-marl", code + RUDE.replace("{body}", "pass"), version="0.4", reward={"rude": "Rude"})
    with pytest.warns(RuntimeWarning, match=rf"reward strategy {WHOSE} changed on import: {said}; put back"):
        Catalog.installed().load("reward", "rude")
    assert (os.getcwd(), torch.get_default_dtype(), torch.get_num_threads(), random.getstate()) == before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00[marl.reward]\n\x80", b"[marl.reward]\nbrevity"], ids=["bytes", "form"]
)
def test_entry_points_that_nobody_can_read_cost_one_line(tmp_path: Path, stranger: Stranger, content: bytes) -> None:
    """In a process of its own: pydantic reads all packages' entry points as it is imported."""
    site = stranger("rude-marl", RUDE.replace("{body}", "pass"), version="0.4", reward={"rude": "Rude"})
    info = site / "broken_marl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-marl\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_bytes(content)
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    found = subprocess.run(
        [sys.executable, "-m", "marl_core.cli", "schema"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert "rude" in json.dumps(json.loads(found.stdout))
    lines = [line for line in found.stderr.splitlines() if "entry points can't be read" in line]
    assert len(lines) == 1
    assert "broken_marl-1.0.dist-info" in lines[0]
    assert "reinstall it" in lines[0]
    with pytest.warns(RuntimeWarning, match="broken_marl"):
        assert Catalog.installed().lookup("reward", "rude").package == "rude-marl"


def test_what_a_plugin_prints_on_import_is_not_in_the_schema(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger("rude-marl", "print('BUY NOW')\n" + RUDE.replace("{body}", "pass"), version="0.4", reward={"rude": "Rude"})
    with warnings.catch_warnings():
        warnings.simplefilter("always", MarlWarning)
        assert main(["schema"]) == 0
    printed = capsys.readouterr()
    assert "rude" in json.dumps(json.loads(printed.out))
    assert printed.err.startswith("marl: warning: reward strategy rude of rude-marl 0.4")
    assert "printed on import; dropped: 'BUY NOW'" in printed.err


SERVER_REWARD = """
import json, urllib.request

def ask(completions, **columns):
    with urllib.request.urlopen({url!r}) as answer:
        return [json.load(answer)["score"]] * len(completions)
"""


class TestARewardServer:
    @pytest.fixture
    def server(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """A local server and its mood: status and seconds of its next answers."""
        mood: dict[str, Any] = {"status": 200, "seconds": 0.0}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(mood["seconds"])
                self.send_response(mood["status"])
                self.end_headers()
                self.wfile.write(b'{"score": 1.5}')

            def log_message(self, *_: Any) -> None: ...

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}/", mood
            server.shutdown()
            thread.join()

    @pytest.mark.parametrize(
        ("mood", "said"),
        [
            ({"status": 500}, "HTTPError: HTTP Error 500"),
            ({"seconds": 0.6}, r"mine.py:ask gave no answer within 0.2 seconds.*raise reward.timeout_seconds"),
        ],
        ids=["500", "slow"],
    )
    def test_that_fails_is_named_and_may_come_back(
        self,
        server: tuple[str, dict[str, Any]],
        make_config: MakeConfig,
        tmp_path: Path,
        mood: dict[str, Any],
        said: str,
    ) -> None:
        url, state = server
        (tmp_path / "mine.py").write_text(SERVER_REWARD.format(url=url), encoding="utf-8")
        reward = {"use": "function", "target": f"{tmp_path}/mine.py:ask", "timeout_seconds": 0.2}
        run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
        asked = make_config(reward=reward, run=run)
        steps = Runner(asked).steps()
        next(steps)
        state.update(mood)
        with pytest.raises(PluginError, match=said) as caught:
            next(steps)
        assert "marl replay" in str(caught.value)
        state.update(status=200, seconds=0.0)
        assert [stats.step for stats in Runner(asked, resume=True).steps()] == [2]


def test_weights_written_behind_the_counter_stop_before_the_save(
    config: Callable[[str], tuple[RunConfig, Path]], tmp_path: Path
) -> None:
    asked, flag = config("bank.base.get_input_embeddings().weight.data.mul_(1.5)")
    steps = Runner(asked).steps()
    next(steps)
    flag.touch()
    with pytest.raises((PluginError, NumericError), match=r"written past torch's counter.*rude of rude-marl"):
        next(steps)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
