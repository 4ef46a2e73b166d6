"""Rewards beyond the three: a service asked by HTTP, scores for steps and tokens, and shaping by form."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marl_core import ConfigError, Plan, PluginError, RunConfig, Runner
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.rewards import score_all
from marl_core.ppo.roles import RewardSource
from marl_core.testing import fake_rollout, tiny_bank, tiny_tokenizer
from marl_plugins.reward_http import HttpReward, Service
from marl_plugins.reward_process import ProcessReward, split, step_ends
from marl_plugins.reward_text import LengthFormat

MakeConfig = Callable[..., RunConfig]
Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


class Server:
    """A real server on this machine: `answer(body, how many requests came before)` gives status and answer."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body, _: (200, {"rewards": [float(len(text)) for text in body["completions"]]})
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    before = len(server.requests)
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                status, answer = server.answer(body, before)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:  # whoever asked didn't wait
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/score"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.close()


def ask(server: Server, **options: Any) -> list[Any]:
    settings = {"url": server.url, "backoff_seconds": 0.0, **options}
    return Service(HttpReward(**settings), tiny_tokenizer())(ROLLOUT)


ROLLOUT = fake_rollout(
    [("p0", "a"), ("p1", "bb"), ("p2", "ccc"), ("p3", "dddd"), ("p4", "eeeee")], [{"label": i} for i in range(5)]
)


class TestHttp:
    def test_batches_keep_their_order(self, server: Server) -> None:
        assert ask(server, batch=2, workers=3) == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert sorted(len(body["prompts"]) for body in server.requests) == [1, 2, 2]
        first = next(body for body in server.requests if "p0" in body["prompts"])
        assert first["completions"] == ["a", "bb"]
        assert first["label"] == [0, 1]
        assert [len(ids) for ids in first["completion_ids"]] == [2, 3]

    def test_what_json_has_no_number_for_is_null(self, server: Server) -> None:
        """A column of floats holds NaN where a row has none; few services read Python's `NaN`."""
        rows = [{"gold": gold, "parts": [gold]} for gold in (1.5, math.nan, -math.inf)]
        service = Service(HttpReward(url=server.url, retries=0), tiny_tokenizer())
        assert service(fake_rollout([("p", "a"), ("p", "b"), ("p", "c")], rows)) == [1.0, 1.0, 1.0]
        assert server.requests[0]["gold"] == [1.5, None, None]
        assert server.requests[0]["parts"] == [[1.5], [None], [None]]

    def test_a_busy_service_is_asked_again(self, server: Server) -> None:
        scores = {"rewards": [1.0, 2.0, 3.0, 4.0, 5.0]}
        server.answer = lambda body, before: (503, {}) if before < 2 else (200, scores)
        assert ask(server, retries=2) == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert len(server.requests) == 3

    def test_patience_ends(self, server: Server) -> None:
        server.answer = lambda body, before: (503, {"why": "overloaded"})
        with pytest.raises(PluginError, match=r"POST http://127.*failed after 1 retries: status 503 .*overloaded"):
            ask(server, retries=1)
        assert len(server.requests) == 2

    def test_a_late_answer(self, server: Server) -> None:
        def slow(body: dict[str, Any], before: int) -> tuple[int, Any]:
            time.sleep(0.5 if before == 0 else 0.0)
            return 200, {"rewards": [0.0] * 5}

        server.answer = slow
        assert ask(server, timeout_seconds=0.1, retries=1) == [0.0] * 5
        server.answer = lambda body, before: slow(body, 0)
        with pytest.raises(PluginError, match=r"timed out.*reward.timeout_seconds"):
            ask(server, timeout_seconds=0.1, retries=0)

    def test_nobody_there(self, server: Server) -> None:
        server.close()
        with pytest.raises(PluginError, match=r"Is the service up\?"):
            ask(server, retries=1)
        server.__init__()  # type: ignore[misc]  # so that the fixture has something to close

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ((200, {"rewards": [1.0]}), "'rewards' holds 1 scores for 5 responses"),
            ((200, {"rewards": 1.0}), "'rewards' holds a float for 5 responses"),
            ((200, {"scores": [1.0] * 5}), "no JSON object with 'rewards'"),
            ((200, b"<html>"), "no JSON object with 'rewards': '<html>'"),
            ((200, [1.0] * 5), "no JSON object"),
            ((404, {}), "status 404 Not Found"),
        ],
    )
    def test_what_isnt_an_answer(self, server: Server, answer: tuple[int, Any], message: str) -> None:
        server.answer = lambda body, before: answer
        with pytest.raises(PluginError, match=message):
            ask(server, retries=0)
        assert len(server.requests) == 1

    def test_the_token_is_sent(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SCORES", "secret")
        ask(server, token_env="SCORES")
        assert server.headers[0]["Authorization"] == "Bearer secret"

    def test_llama_factorys_format(self, server: Server) -> None:
        server.answer = lambda body, before: (200, {"scores": [float(len(text)) for text in body["messages"]]})
        assert ask(server, format="llama-factory") == [8.0, 9.0, 10.0, 11.0, 7.0]
        assert server.requests[0] == {  # with the marks, as LLaMA-Factory decodes for its reward servers
            "model": "model",
            "messages": ["p0a<eos>", "p1bb<eos>", "p2ccc<eos>", "p3dddd<eos>", "p4eeeee"],
        }

    def test_a_run(self, server: Server, make_config: MakeConfig) -> None:
        stats = list(Runner(make_config(reward={"use": "http", "url": server.url, "batch": 3})).steps())
        assert all(step["reward/http"] >= 0 for step in stats)
        assert server.requests[-1]["label"]

    def test_nan_and_null(self, server: Server) -> None:
        """Python's json writes NaN; null abstains."""
        bank, bad = tiny_bank(), HttpReward(url=server.url)
        source = RewardSource("http", 1.0, Service(bad, bank.tokenizer))
        server.answer = lambda body, before: (200, {"rewards": [1.0, None, float("nan"), 0.0, 0.0]})
        with pytest.raises(PluginError, match="response 3 got nan"):
            score_all(bank, [source], ROLLOUT, PassLimits(4))
        server.answer = lambda body, before: (200, {"rewards": [1.0, None, 0.0, 0.0, 0.0]})
        with pytest.raises(PluginError, match=r"no source .* gave response 2 a score"):
            score_all(bank, [source], ROLLOUT, PassLimits(4))

    def test_a_missing_token_is_said_before_the_run(self, make_config: MakeConfig, monkeypatch: Any) -> None:
        monkeypatch.delenv("SCORES", raising=False)
        config = make_config(reward={"use": "http", "url": "http://127.0.0.1:1", "token_env": "SCORES"})
        assert any("'SCORES' is not set" in finding for finding in Plan.of(config).check())


STEPS = """
def steps(steps, **columns):
    return [[float(len(step)) for step in row] for row in steps]

def tokens(completion_ids, **columns):
    return [[float(token % 2) for token in ids] for ids in completion_ids]

def weighted(steps, factor, **columns):
    return [[factor] * len(row) for row in steps]

def one_too_few(steps, **columns):
    return [[0.0] * (len(row) - 1) for row in steps]

def whole(steps, **columns):
    return 1.0

def abstain(steps, **columns):
    return [None for row in steps]
"""


@pytest.fixture(scope="module")
def steps_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("process") / "steps.py"
    file.write_text(STEPS, encoding="utf-8")
    return str(file)


class TestProcess:
    rollout = fake_rollout([("q", "ab\nc\n\ndef"), ("q", ""), ("q", "xyz\n")])

    def scores(self, target: str, **options: Any) -> Any:
        source = ProcessReward(target=target, **options).marl_reward(tiny_tokenizer())
        return source(self.rollout)

    def test_a_steps_score_lands_on_its_last_token(self, steps_file: str) -> None:
        """Bytes are tokens here: steps `ab|`, `c|`, `|`, `def` end at bytes 2, 4, 5; the last ends with EOS at 9."""
        found = self.scores(f"{steps_file}:steps")
        assert found[0] == [0, 0, 3, 0, 2, 1, 0, 0, 0, 3]
        assert found[1] == [0.0]
        assert found[2] == [0, 0, 0, 4]

    def test_each_token(self, steps_file: str) -> None:
        found = self.scores(f"{steps_file}:tokens", per="token")
        assert [len(row) for row in found] == self.rollout.lengths.tolist()

    def test_another_separator_and_arguments(self, steps_file: str) -> None:
        found = self.scores(f"{steps_file}:weighted", separator="c", arguments={"factor": 2.0})
        assert found[0] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 2]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("one_too_few", "response 1 has 4 steps and got 3 numbers"),
            ("whole", "gave a float, not lists of scores for 3 responses"),
        ],
    )
    def test_what_it_may_not_give(self, steps_file: str, name: str, message: str) -> None:
        with pytest.raises(PluginError, match=message):
            self.scores(f"{steps_file}:{name}")

    def test_it_may_abstain(self, steps_file: str) -> None:
        assert self.scores(f"{steps_file}:abstain") == [None, None, None]

    def test_a_run_rewards_tokens_on_the_way(self, steps_file: str, make_config: MakeConfig) -> None:
        runner = Runner(make_config(reward={"use": "process", "target": f"{steps_file}:tokens", "per": "token"}))
        assert runner.data is not None
        scored = runner.score(runner.generate(runner.data.take([0, 1, 2, 3])))
        assert scored.token_scores is not None
        odd = (scored.rollout.ids % 2).float().masked_fill(~scored.rollout.mask, 0.0)
        assert scored.token_scores.equal(odd)
        assert scored.scores.equal(odd.sum(dim=1))
        assert runner.update(scored).policy_grad_norm > 0

    @pytest.mark.parametrize(
        ("text", "steps"),
        [("", [""]), ("a", ["a"]), ("a\n", ["a\n"]), ("\n\na", ["\n", "\n", "a"]), ("a\nb", ["a\n", "b"])],
    )
    def test_split(self, text: str, steps: list[str]) -> None:
        assert split(text, "\n") == steps
        assert "".join(steps) == text

    def test_ends_with_tokens_of_many_letters(self) -> None:
        def decode(ids: Sequence[int]) -> str:
            return "".join({1: "one\n", 2: "two", 3: "\n\n", 4: "x", 9: ""}[token] for token in ids)

        # steps: "one\n" | "two\n" | "\n" | "x": the token "\n\n" ends two of them
        assert step_ends([1, 2, 3, 4, 9], ["one\n", "two\n", "\n", "x"], decode) == [0, 2, 2, 4]


class TestLengthFormat:
    def test_golden(self) -> None:
        """Lengths 6, 5, 4, 3, 1 tokens; bound 5 with a cushion of 2: -1, -1, -0.5, 0, 0."""
        texts = [("q", "=abcd"), ("q", "abcd"), ("q", "=ab"), ("q", "ab"), ("q", "=")]
        score = LengthFormat(pattern=r"^=.*", points=2.0, max_tokens=5, cushion=2).marl_reward()
        assert list(score(fake_rollout(texts))) == [1.0, -1.0, 1.5, 0.0, 2.0]

    def test_a_pattern_spans_lines(self) -> None:
        score = LengthFormat(pattern="<a>.*</a>$").marl_reward()
        assert list(score(fake_rollout([("q", "<a>1\n2</a>"), ("q", "<a>1</a> more")]))) == [1.0, 0.0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "give a pattern, or max_tokens"),
            ({"pattern": "("}, "is no regular expression"),
            ({"max_tokens": 4}, "cushion 16 is more than max_tokens 4"),
        ],
    )
    def test_options_that_cannot_work(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            LengthFormat(**options)

    def test_what_check_says(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config(reward=[{"use": "length-format", "pattern": "yes", "max_tokens": 40}])
        rows = {role.name: role.weights for role in Plan.of(config).describe()}
        assert rows["reward length-format"] == "1 for texts that match 'yes', down to -1 near 40 tokens"
