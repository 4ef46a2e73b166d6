"""The contract of each family: every built-in keeps it, and each way to break it is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import Field

from marl_core import (
    AdapterBank,
    Catalog,
    PluginError,
    Quantization,
    ReferenceFunction,
    RewardFunction,
    Rollout,
    Strategy,
    View,
    hookimpl,
)
from marl_core.registry.catalog import Listing
from marl_core.registry.strategy import FAMILIES, FamilyName
from marl_core.testing import check_strategy

BUILT_IN: list[Listing] = [
    listing for family in FAMILIES for listing in Catalog.installed().listings(family) if listing.package == "marl-core"
]


@pytest.fixture
def options(
    sft_adapter: str, reward_adapter: str, rewards_file: str, tiny_folder: str, tmp_path: Any
) -> dict[str, dict[str, Any]]:
    """What each strategy that needs options is built with; the others are built as they are."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, pad_token_id=0).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    return {
        "merged-base": {"adapter": sft_adapter},
        "peft-adapter": {"adapter": sft_adapter},
        "adapter": {"path": reward_adapter},
        "model": {"path": str(tmp_path)},
        "function": {"target": f"{rewards_file}:brevity"},
        "trackers": {"to": ["tensorboard"]},
    }


def test_every_family_has_built_ins() -> None:
    assert {listing.family for listing in BUILT_IN} == set(FAMILIES)
    assert len(BUILT_IN) == 12


@pytest.mark.parametrize("listing", BUILT_IN, ids=lambda listing: f"{listing.family}-{listing.name}")
def test_built_ins_keep_the_contract(listing: Listing, options: dict[str, dict[str, Any]], tiny_folder: str) -> None:
    loaded = Catalog.installed().load(listing.family, listing.name)
    strategy = loaded.build(options.get(listing.name, {}))
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
    "NaN": ("reward", lambda _: Reward(give=per_row(float("nan"))), "response 0 got nan"),
    "text": ("reward", lambda _: Reward(give=per_row("good")), "response 0 got 'good'"),
    "random scores": (
        "reward",
        lambda _: Reward(give=lambda rollout: torch.rand(len(rollout))),
        "two calls on the same rollout gave different numbers",
    ),
    "random state": (
        "reward",
        lambda _: Reward(give=lambda rollout: [0.0 * float(torch.rand(1))] * len(rollout)),
        "changed the bank .* or the random state",
    ),
    "active adapter": ("reward", lambda sft: Meddler(path=sft), "Meddler: changed the bank"),
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
    "infinite log-probs": (
        "reference",
        lambda _: Reference(give=lambda rollout: torch.full(rollout.ids.shape, -torch.inf)),
        "isn't finite",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_the_contract_is_named(what: str, sft_adapter: str, tiny_folder: str) -> None:
    family, make, message = BROKEN[what]
    with pytest.raises((AssertionError, PluginError), match=message):
        check_strategy(family, make(sft_adapter), AdapterBank.from_pretrained(tiny_folder, device="cpu"))


@pytest.mark.parametrize(
    ("family", "strategy"), [("reward", Reward()), ("reference", Reference()), ("observer", NoHook())]
)
def test_the_unbroken_ones_pass(family: FamilyName, strategy: Strategy) -> None:
    check_strategy(family, strategy)
