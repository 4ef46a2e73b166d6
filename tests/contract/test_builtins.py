"""The contract of each family: every built-in keeps it, and each way to break it is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field, PrivateAttr
from torch import Tensor

from marl_core import (
    AdapterBank,
    AdvantageInputs,
    Catalog,
    ConfigError,
    Estimator,
    PluginError,
    Quantization,
    ReferenceFunction,
    RewardFunction,
    Rollout,
    ScoredRollout,
    StepStats,
    Strategy,
    View,
    hookimpl,
)
from marl_core.registry.catalog import Listing
from marl_core.registry.families import FAMILIES, FamilyName
from marl_core.testing import check_strategy, fake_rollout

BUILT_IN: list[Listing] = [
    listing for family in FAMILIES for listing in Catalog.installed().listings(family) if listing.package == "marl-core"
]


@pytest.fixture
def scores_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A reward service on this machine that gives each text its length."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps({"rewards": [len(text) for text in body["completions"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def options(
    sft_adapter: str, reward_adapter: str, rewards_file: str, tiny_folder: str, scores_url: str, tmp_path: Any
) -> dict[str, dict[str, Any]]:
    """What each strategy that needs options is built with; the others are built as they are."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, pad_token_id=0).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    steps_file = tmp_path / "steps.py"
    steps_file.write_text("def tokens(completion_ids, **_):\n    return [[0.5] * len(ids) for ids in completion_ids]\n")
    return {
        "adapter-peft": {"kind": "hira", "r": 4},
        "adapter-miss": {"r": 8},
        "merged-base": {"adapter": sft_adapter},
        "peft-adapter": {"adapter": sft_adapter},
        "adapter": {"path": reward_adapter},
        "model": {"path": str(tmp_path)},
        "function": {"target": f"{rewards_file}:brevity"},
        "trackers": {"to": ["tensorboard"]},
        "reference-model": {"path": tiny_folder},
        "process": {"target": f"{steps_file}:tokens", "per": "token"},
        "http": {"url": scores_url},
        "length-format": {"pattern": "a", "max_tokens": 64},
    }


def test_every_family_has_built_ins() -> None:
    assert {listing.family for listing in BUILT_IN} == set(FAMILIES)
    assert len(BUILT_IN) == 29


@pytest.mark.parametrize("listing", BUILT_IN, ids=lambda listing: f"{listing.family}-{listing.name}")
def test_built_ins_keep_the_contract(listing: Listing, options: dict[str, dict[str, Any]], tiny_folder: str) -> None:
    loaded = Catalog.installed().load(listing.family, listing.name)
    strategy = loaded.build(options.get(f"{listing.family}-{listing.name}", options.get(listing.name, {})))
    check_strategy(listing.family, strategy, AdapterBank.from_pretrained(tiny_folder, device="cpu"))


class Reward(Strategy):
    """A good reward to break."""

    give: Callable[[Rollout], Any] = Field(
        lambda rollout: [0.0] * len(rollout), description="What it gives.", exclude=True
    )

    @hookimpl
    def marl_reward(self) -> RewardFunction:
        return self.give


class Reference(Strategy):
    """A good reference to break."""

    give: Callable[[Rollout], Any] = Field(
        lambda rollout: torch.full(rollout.ids.shape, -1.0), description="What it gives.", exclude=True
    )

    @hookimpl
    def marl_reference(self) -> ReferenceFunction:
        return self.give


class Undescribed(Reward):
    """A reward with an option that nobody explains."""

    strength: int = 1


class Forgetful(Reward):
    """A reward whose option is written as another one than it is read."""

    strength: int = Field(1, description="Strength.")

    def model_dump_json(self, **_: Any) -> str:
        return '{"strength": 2}'


class NoHook(Strategy):
    """A strategy without any hook."""


class Meddler(Reward):
    """A reward that leaves another adapter active."""

    @hookimpl
    def marl_reward(self, bank: AdapterBank) -> RewardFunction:  # type: ignore[override]  # hooks take what they need
        bank.frozen(self.path, "mine")

        def score(rollout: Rollout) -> list[float]:
            bank.activate("mine")
            return [0.0] * len(rollout)

        return score

    path: str = Field("", description="An adapter.")


class Gardener(Reward):
    """A reward that trains a little."""

    @hookimpl
    def marl_reward(self, bank: AdapterBank) -> RewardFunction:  # type: ignore[override]  # hooks take what they need
        def score(rollout: Rollout) -> list[float]:
            with torch.no_grad():
                next(iter(bank.parameters("policy").values())).add_(1.0)
            return [0.0] * len(rollout)

        return score


class Trainer(Reward):
    """A reward that trains the policy too."""

    @hookimpl
    def marl_update_end(self, bank: AdapterBank, policy: str) -> None:
        with torch.no_grad():
            next(iter(bank.parameters(policy).values())).add_(1.0)


class Thaw(Reward):
    """A reward that makes the base trainable."""

    @hookimpl
    def marl_reward(self, bank: AdapterBank) -> RewardFunction:  # type: ignore[override]  # hooks take what they need
        bank.base.requires_grad_(True)
        return self.give


class Anything(Reward):
    """A reward that takes any option."""

    model_config = ConfigDict(extra="ignore")


class Keeper(Reward):
    """A reward that keeps state and never takes it back."""

    @hookimpl
    def marl_state(self) -> dict[str, torch.Tensor]:
        return {"mine": torch.zeros(1)}


class Loser(Keeper):
    """A reward that counts how often it was asked for its state."""

    _asked: int = PrivateAttr(0)

    @hookimpl
    def marl_state(self) -> dict[str, torch.Tensor]:
        self._asked += 1
        return {"mine": torch.tensor([self._asked])}

    @hookimpl
    def marl_restore(self) -> None:
        pass


class Later(Reward):
    """A reward for a marl that doesn't exist yet."""

    api: ClassVar[int] = 2


class Odd(Reward):
    """A reward with a version that is none."""

    api: ClassVar[Any] = "one"


def wider(rollout: Rollout) -> list[float]:
    torch.set_default_dtype(torch.float64)
    return [0.0] * len(rollout)


class HalfQuantization(Strategy):
    """A quantization that gives a name."""

    @hookimpl
    def marl_quantization(self) -> Quantization:
        return "int8"  # type: ignore[return-value]  # the point


class Misspelt(Reward):
    """A reward with a hook that doesn't exist."""

    @hookimpl
    def marl_step_ends(self) -> None:
        pass


class Greedy(Strategy):
    """A reference that takes an argument its hook hasn't."""

    @hookimpl
    def marl_reference(self, everything: Any) -> View:
        return View(None)


class Eager(Strategy):
    """An observer that closes what it has opened, and has opened nothing."""

    _file: Any = PrivateAttr(None)

    @hookimpl
    def marl_run_failed(self) -> None:
        self._file.close()


class Talker(Strategy):
    """An observer that gives a text for an order to stop."""

    @hookimpl
    def marl_step_end(self, stats: StepStats, scored: ScoredRollout) -> str:
        return f"stop at {stats['objective/kl']}, {stats['policy/approx_kl']}, {scored.rollout.texts[0]}"


class LosesCount(Strategy):
    """An observer that counts, and takes back another count than it gave."""

    _steps: int = 0

    @hookimpl
    def marl_step_end(self) -> None:
        self._steps += 1

    @hookimpl
    def marl_state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self._steps)}

    @hookimpl
    def marl_restore(self, state: dict[str, Tensor]) -> None:
        self._steps = 0


class Advantage(Strategy):
    """An estimator that does what it is told to."""

    give: Callable[[AdvantageInputs], Any] = Field(
        lambda inputs: inputs.scores, description="What it gives.", exclude=True
    )

    @hookimpl
    def marl_advantage(self) -> Estimator:
        return Estimator(self.give)


class HalfAdvantage(Strategy):
    """An estimator that gives a function."""

    @hookimpl
    def marl_advantage(self) -> Estimator:
        return lambda inputs: inputs.scores  # type: ignore[return-value]  # the point


class NoDoc(Reward):
    __doc__ = None


def per_row(value: Any) -> Callable[[Rollout], Any]:
    return lambda rollout: [value] * len(rollout)


BROKEN: dict[str, tuple[FamilyName, Callable[[str], Strategy], str]] = {
    "undescribed option": ("reward", lambda _: Undescribed(), "Undescribed.strength needs a description"),
    "options that change": (
        "reward",
        lambda _: Forgetful(),
        "Forgetful: its options change when written to JSON and read back",
    ),
    "no docstring": ("reward", lambda _: NoDoc(), "NoDoc needs a docstring"),
    "no hook": ("reward", lambda _: NoHook(), "NoHook has no marl_reward hook, which family reward needs"),
    "hook of another family": ("reference", lambda _: Reward(), "Reward has no marl_reference hook"),
    "misspelt hook": ("reward", lambda _: Misspelt(), "Did you mean marl_step_end?"),
    "argument of its own": ("reference", lambda _: Greedy(), "marl_reference may take: bank"),
    "not a quantization": (
        "quantization",
        lambda _: HalfQuantization(),
        "marl_quantization gave a str, expected a marl_core.Quantization",
    ),
    "one too few": (
        "reward",
        lambda _: Reward(give=lambda rollout: [0.0] * (len(rollout) - 1)),
        "gave 2 rewards for 3 responses",
    ),
    "NaN": ("reward", lambda _: Reward(give=per_row(float("nan"))), "response 1 got nan"),
    "text": ("reward", lambda _: Reward(give=per_row("good")), "response 1 got 'good'"),
    "random scores": (
        "reward",
        lambda _: Reward(give=lambda rollout: torch.rand(len(rollout))),
        "two calls on the same rollout gave different numbers",
    ),
    "random state": (
        "reward",
        lambda _: Reward(give=lambda rollout: [0.0 * float(torch.rand(1))] * len(rollout)),
        "Reward: its call changed torch's random state",
    ),
    "active adapter": (
        "reward",
        lambda sft: Meddler(path=sft),
        r"Meddler: its call changed the active adapter \(None became 'mine'\)",
    ),
    "weights": ("reward", lambda _: Gardener(), r"Gardener: its call changed the weights of .*lora_A.policy"),
    "requires_grad": ("reward", lambda _: Thaw(), "Thaw: while it was built, it changed requires_grad of .* more"),
    "default dtype": (
        "reward",
        lambda _: Reward(give=wider),
        r"its call changed torch's default dtype",
    ),
    "weights after an update": (
        "reward",
        lambda _: Trainer(),
        "Trainer: marl_update_end may write to adapters of its own only, it changed the weights of .*policy",
    ),
    "any option": ("reward", lambda _: Anything(), "Anything takes options it doesn't have: keep extra='forbid'"),
    "state that is never taken back": ("reward", lambda _: Keeper(), "Keeper has marl_state without marl_restore"),
    "state that is taken back wrongly": (
        "reward",
        lambda _: Loser(),
        "Loser: after marl_restore, marl_state gives another 'mine' than was restored",
    ),
    "made for a later marl": ("reward", lambda _: Later(), "it was made for api 2, this marl-core offers 1: upgrade"),
    "api that is none": ("reward", lambda _: Odd(), "its api is 'one'; write the version it was made for"),
    "other responses take part": (
        "reference",
        lambda _: Reference(give=lambda rollout: torch.full(rollout.ids.shape, -float(len(rollout)))),
        r"response 1 gets other log-probs alone than in its batch \(by 2\)",
    ),
    "failing at a failure": (
        "observer",
        lambda _: Eager(),
        "Eager: marl_run_failed must bear being called without marl_run_start: .*'close'",
    ),
    "a text for an order to stop": (
        "observer",
        lambda _: Talker(),
        r"Talker: marl_step_end gave a str, expected None or a marl_core.StopRun",
    ),
    "a count that is lost on resume": (
        "observer",
        lambda _: LosesCount(),
        "LosesCount: after marl_restore, marl_state gives another 'steps' than was restored",
    ),
    "another shape": (
        "reference",
        lambda _: Reference(give=lambda rollout: torch.zeros(1)),
        r"must give log-probs of shape \[3, \d+\]",
    ),
    "log-probs above 0": (
        "reference",
        lambda _: Reference(give=lambda rollout: torch.ones(rollout.ids.shape)),
        "Reference: log-probs above 0: 1",
    ),
    "not an estimator": (
        "advantage",
        lambda _: HalfAdvantage(),
        "marl_advantage gave a function, expected a marl_core.Estimator",
    ),
    "random advantages": (
        "advantage",
        lambda _: Advantage(give=lambda inputs: torch.rand_like(inputs.scores)),
        "Advantage: two calls on the same rewards gave different advantages",
    ),
    "random state of an estimator": (
        "advantage",
        lambda _: Advantage(give=lambda inputs: inputs.scores + 0.0 * float(torch.rand(1))),
        "Advantage: it changed torch's random state",
    ),
    "token rewards that it says it doesn't use": (
        "advantage",
        lambda _: Advantage(give=lambda inputs: inputs.rewards),
        r"depend on which token a reward stands on; say so: Estimator\(..., uses_token_rewards=True\)",
    ),
    "groups that it says it doesn't need": (
        "advantage",
        lambda _: Advantage(give=lambda inputs: inputs.scores / (inputs.samples_per_prompt - 1)),
        "gave advantages that aren't finite",
    ),
    "advantages of another shape": (
        "advantage",
        lambda _: Advantage(give=lambda inputs: inputs.scores[:1]),
        r"Advantage gave advantages of shape \[1\], expected \[4, \d+\] or \[4\]",
    ),
    "infinite log-probs": (
        "reference",
        lambda _: Reference(give=lambda rollout: torch.full(rollout.ids.shape, -torch.inf)),
        "isn't finite",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_the_contract_is_named(what: str, sft_adapter: str, tiny_folder: str) -> None:
    family, make, message = BROKEN[what]
    dtype = torch.get_default_dtype()
    with pytest.raises((AssertionError, PluginError), match=message):
        check_strategy(family, make(sft_adapter), AdapterBank.from_pretrained(tiny_folder, device="cpu"))
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("reward", Reward()), ("reference", Reference()), ("advantage", Advantage()), ("observer", NoHook())],
)
def test_the_unbroken_ones_pass(family: FamilyName, strategy: Strategy) -> None:
    check_strategy(family, strategy)


class TestColumns:
    """A strategy that reads columns of the data is given some."""

    rewarding = Reward(
        give=lambda rollout: [
            float(row["answer"] in text) for row, text in zip(rollout.prompts.rows, rollout.texts, strict=True)
        ]
    )

    def test_without_rows_the_remedy_is_said(self) -> None:
        with pytest.raises(PluginError) as caught:
            check_strategy("reward", self.rewarding)
        said = str(caught.value)
        assert "KeyError: 'answer'. It was raised from " in said
        assert "test_builtins.py, line " in said
        assert said.endswith("where 'answer' is one, give it: check_strategy(..., rows=[{'answer': ...}]).")

    def test_another_key_than_the_rows_have_is_a_fault(self) -> None:
        with pytest.raises(PluginError) as caught:
            check_strategy("reward", self.rewarding, rows=[{"anwser": "film"}])
        assert "KeyError: 'answer'" in str(caught.value)
        assert "Without rows" not in str(caught.value)

    @pytest.mark.parametrize("count", [1, 3, 5])
    def test_with_rows(self, count: int) -> None:
        seen: list[Rollout] = []

        def give(rollout: Rollout) -> list[float]:
            seen.append(rollout)
            return [float(row["answer"]) for row in rollout.prompts.rows]

        rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(count)]
        check_strategy("reward", Reward(give=give), rows=rows)
        assert [row["answer"] for row in seen[0].prompts.rows] == [1 + i % count for i in range(max(count, 3))]
        assert list(seen[0].prompts.texts)[:count] == [row["prompt"] for row in rows]

    def test_with_a_rollout(self) -> None:
        seen: list[list[str]] = []

        def give(rollout: Rollout) -> list[float]:
            seen.append(list(rollout.texts))
            return [0.0] * len(rollout)

        check_strategy("reward", Reward(give=give), rollout=fake_rollout([("2 + 2 =", " 4"), ("2 + 3 =", " 5")]))
        assert seen[0] == [" 4", " 5"]

    def test_a_reference_reads_them_too(self) -> None:
        def give(rollout: Rollout) -> torch.Tensor:
            worth = torch.tensor([-float(row["answer"]) for row in rollout.prompts.rows], device=rollout.ids.device)
            return worth[:, None].expand(rollout.ids.shape)

        check_strategy("reference", Reference(give=give), rows=[{"answer": 1}, {"answer": 2}])

    @pytest.mark.parametrize("given", [{"rows": []}, {"rows": [{}], "rollout": fake_rollout()}])
    def test_what_cannot_be_meant(self, given: Any) -> None:
        with pytest.raises(ConfigError, match="check_strategy: rows"):
            check_strategy("reward", Reward(), **given)
