"""Which reference is right: the table of the design, by what a strategy does and names, never by what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, Strategy, hookimpl
from marl_core.config.load import parse_config
from marl_core.plan.describe import Role, explain, summary
from marl_core.plan.plan import Plan


def plan_of(written: dict[str, Any], catalog: Catalog, **change: Any) -> Plan:
    return Plan.of(parse_config({**written, **change}, "f", catalog), catalog)


def role(plan: Plan, name: str) -> Role:
    return next(role for role in plan.describe() if role.name == name)


@pytest.mark.parametrize(
    ("start", "use", "names_adapter", "note"),
    [
        ("new", "bare", False, "right if it is the bare base"),
        ("new", "merged", True, "the base as this strategy prepares it"),
        ("continue", "frozen", True, "the frozen adapter that the policy continues: step-0 KL is 0"),
        ("continue", "bare", False, "KL pulls towards a model that never saw its training data"),
        ("continue", "merged", True, "already has"),
        ("new", "frozen", True, "KL pulls towards another model than the start"),
    ],
)
def test_the_table(
    written: dict[str, Any],
    catalog: Catalog,
    adapter_folder: Path,
    start: str,
    use: str,
    names_adapter: bool,
    note: str,
) -> None:
    policy = {"start": start, **({"from": str(adapter_folder)} if start == "continue" else {})}
    reference = {"use": use, **({"adapter": f"{adapter_folder}/."} if names_adapter else {})}
    plan = plan_of(written, catalog, policy=policy, reference=reference)
    assert note in role(plan, "reference").note
    is_wrong = note.startswith(("KL", "already"))
    assert bool(plan.warnings()) == is_wrong
    if is_wrong:
        assert "refused at step 0 unless allow_mismatch: true" in plan.warnings()[0]
        allowed = plan_of(written, catalog, policy=policy, reference={**reference, "allow_mismatch": True})
        assert "allowed by allow_mismatch" in allowed.warnings()[0]


@pytest.mark.parametrize("start", ["new", "continue"])
def test_a_reference_that_speaks_for_itself_is_called_nothing_else(
    written: dict[str, Any], catalog: Catalog, adapter_folder: Path, start: str
) -> None:
    class Copies(Strategy):
        """Copies."""

        @hookimpl
        def marl_describe(self) -> str:
            return "a copy of the policy, made now and then"

        @hookimpl
        def marl_reference(self) -> None: ...

    policy = {"start": start, **({"from": str(adapter_folder)} if start == "continue" else {})}
    said = explain(plan_of(written, catalog, policy=policy, reference={"use": Copies()}))
    assert "a copy of the policy, made now and then. The pre-flight check" in said[-1]
    assert not any("bare base" in line or "step-0 KL is 0" in line or "1 adapter" in line for line in said)


def test_coefficient_zero_needs_no_reference(written: dict[str, Any], catalog: Catalog) -> None:
    assert "not evaluated" in role(plan_of(written, catalog, ppo={"kl": {"coef": 0.0}}), "reference").note


def test_every_role_has_a_row(written: dict[str, Any], catalog: Catalog) -> None:
    reward = ["short", {"use": "short", "name": "other", "weight": 0.5}]
    plan = plan_of(written, catalog, reward=reward, eval={"prompts": "p", "judges": {"j": "short"}}, value="own")
    names = [row.name for row in plan.describe()]
    assert names == ["base", "policy", "reference", "reward short", "reward other", "value", "judge j", "observers"]
    assert role(plan, "reward other").note == "weight 0.5"
    assert role(plan, "reference").weights == "bare: The bare base"
    assert role(plan, "value").weights == "LoRA on the base: r=16, alpha=32, all-linear, and a head"


def test_summary_is_the_strategys_own_first_line() -> None:
    class Silent(Strategy):
        pass

    class Spoken(Strategy):
        """One line.

        And more.
        """

    assert summary(Silent) == ""
    assert summary(Spoken) == "One line"
