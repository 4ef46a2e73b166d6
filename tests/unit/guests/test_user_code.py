"""A reward function that fails says where in the user's file, and which columns it was given."""

from __future__ import annotations

import importlib
import linecache
import operator
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marl_core import MarlError, MarlWarning, PluginError, Rollout, raised_from
from marl_core.ppo import plugin_calls
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.rewards import score_all
from marl_core.ppo.roles import RewardSource
from marl_core.registry.hooks import Hooks
from marl_core.safety.plugin_guard import PluginGuard
from marl_core.testing import fake_rollout
from marl_plugins.reward import FunctionReward
from marl_plugins.reward_function import wrap

CODE = """import torch
def helper(texts):
    return torch.zeros(2).reshape(len(texts), 7)
def in_torch(prompts, completions, **columns):
    return helper(completions)
def by_name(completions, label):
    return [1.0 / len(())] * len(completions)
async def later(completions):
    raise ValueError("no")
def asks_too_much(completions, answer):
    return [0.0 for _ in completions]
"""

ACME = """import torch
from typing import ClassVar
from marl_core import Estimator, Strategy, hookimpl


def answer(row):
    '''What the row calls right.'''
    return row["anwser"]

class Slip(Strategy):
    '''Fails.'''
    @hookimpl
    def marl_update_end(self, step):
        self.helper(step)
    @hookimpl
    def marl_run_failed(self):
        1 / 0
    @hookimpl
    def marl_reference(self):
        torch.zeros(2).reshape(7)
    @hookimpl
    def marl_advantage(self):
        return Estimator(
            lambda inputs: inputs.rewards)
    @hookimpl
    def marl_reward(self):
        return lambda rollout: [answer(row) for row in rollout.prompts.rows]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(CODE)
    return tmp_path / "rewards.py"


def rollout() -> Rollout:
    """With two columns beside the prompt."""
    found = fake_rollout()
    rows = [{"prompt": "a", "label": 1, "source": "x"} for _ in range(len(found))]
    return replace(found, prompts=replace(found.prompts, rows=rows))


def failure(target: str) -> PluginError:
    bank: Any = None
    with pytest.raises(PluginError) as caught:
        score_all(bank, [RewardSource("r", 1.0, wrap(target, {}), target)], rollout(), PassLimits(2))
    return caught.value


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "in_torch",  # the last line of the user's, not torch's
            "It was raised from rewards.py, line 3, in helper: `return torch.zeros(2).reshape(len(texts), 7)`. "
            "The function was given prompts, completions, completion_ids and the data's columns label, source.",
        ),
        ("by_name", "line 7, in by_name: `return [1.0 / len(())] * len(completions)`"),
        ("by_name", "The function was given completions and the data's columns label; the data also have source."),
        ("later", 'ValueError: no. It was raised from rewards.py, line 9, in later: `raise ValueError("no")`'),
        ("later", "The function was given completions and no columns of the data; the data have label, source."),
    ],
)
def test_the_line_and_the_columns_are_named(file: Path, name: str, said: str) -> None:
    error = failure(f"{file.name}:{name}")
    assert said in str(error)
    assert error.__cause__ is not None


def test_who_takes_a_message_for_a_text_is_told_where_the_text_is(file: Path) -> None:
    file.write_text("def low(completions):\n    return [len(c.lower()) for c in completions]\n", encoding="utf-8")
    found = fake_rollout()
    chats = replace(found, prompts=replace(found.prompts, texts=[[{"role": "user", "content": "Hi"}]] * len(found)))
    bank: Any = None
    sources = [RewardSource("r", 1.0, wrap(f"{file.name}:low", {}), "")]
    with pytest.raises(PluginError, match=r"its text is completion\[0\]\['content'\]") as caught:
        score_all(bank, sources, chats, PassLimits(2))
    assert "'list' object has no attribute 'lower'" in str(caught.value)
    score_all(bank, sources, found, PassLimits(2))  # texts are texts


def test_a_column_that_the_data_lacks_has_no_line(file: Path) -> None:
    said = str(failure(f"{file.name}:asks_too_much"))
    assert "missing 1 required positional argument: 'answer'. The function was given completions and no columns" in said
    assert said.endswith("no columns of the data; the data have label, source.")
    assert "It was raised from" not in said  # the call itself is marl's


def test_a_file_that_fails_on_import_is_named_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import math\nscore = math.sqrt(-1)\n")
    with pytest.raises(PluginError, match=r"from broken\.py, line 2: `score = math\.sqrt\(-1\)`"):
        wrap("broken.py:score", {})


def test_an_error_without_any_of_the_users_code_has_no_place() -> None:
    assert raised_from(ValueError("no")) == ""


class TestPlugins:
    """A strategy that fails is told with the line, as a function is."""

    @pytest.fixture
    def acme(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A plugin that is installed, and whose every hook has a slip of the pen."""
        site = tmp_path / "site-packages"
        site.mkdir()
        (site / "acme_slips.py").write_text(ACME)
        monkeypatch.syspath_prepend(str(site))
        yield importlib.import_module("acme_slips")
        del sys.modules["acme_slips"]

    def test_a_reward(self, acme: Any) -> None:
        guarded = PluginGuard().wrapped(acme.Slip().marl_reward(), "acme")
        bank: Any = None
        with pytest.raises(PluginError) as caught:
            score_all(bank, [RewardSource("slip", 1.0, guarded, "acme")], rollout(), PassLimits(2))
        said = str(caught.value)
        assert said.startswith("reward 'slip' (acme) failed on a batch of 3: KeyError: 'anwser'. It was raised from ")
        assert 'acme_slips.py, line 8, in answer: `return row["anwser"]`. The data\'s columns ' in said

    @pytest.mark.parametrize(
        ("call", "line"),
        [
            (
                lambda hooks, strategy: hooks.update_end(1, None, "policy"),
                "line 14, in marl_update_end: `self.helper(step)`",
            ),
            (lambda hooks, strategy: hooks.run_failed(1, ValueError()), "line 17, in marl_run_failed: `1 / 0`"),
            (
                lambda hooks, strategy: hooks.reference(strategy, None),
                "line 20, in marl_reference: `torch.zeros(2).reshape(7)`",
            ),
        ],
    )
    def test_a_hook(self, acme: Any, call: Callable[[Hooks, Any], None], line: str) -> None:
        strategy = acme.Slip()
        hooks = Hooks([(strategy, "slip of acme 1.0")])
        with warnings.catch_warnings():
            warnings.simplefilter("error", MarlWarning)
            with pytest.raises((PluginError, MarlWarning)) as caught:
                call(hooks, strategy)
        assert "acme_slips.py, " + line in str(caught.value)
        assert "The traceback shows more" in str(caught.value)

    def test_an_estimator(self, acme: Any) -> None:
        strategy = acme.Slip()
        estimator = Hooks([(strategy, "slip of acme 1.0")]).advantage(strategy)
        nothing: Any = None
        with pytest.raises(PluginError, match=r"acme_slips\.py, line 24: `lambda inputs"):
            estimator.estimate(nothing)

    def test_an_error_that_tells_its_place_is_told_once(self, file: Path) -> None:
        assert str(failure(f"{file.name}:by_name")).count("It was raised from") == 1

    def test_without_any_line_of_theirs_the_traceback_is_named(self) -> None:
        built_in: Any = operator.itemgetter("x")
        with pytest.raises(PluginError, match=r"TypeError: .*\. The traceback shows where\.$"):
            plugin_calls.call(built_in, fake_rollout(), "acme")

    def test_marls_own_lines_are_not_the_plugins(self) -> None:
        strategy = FunctionReward(target="nothing.py:f")
        with pytest.raises(MarlError) as caught:
            Hooks([(strategy, "function of marl-core")]).reward(strategy, None, None)  # type: ignore[arg-type]
        assert "It was raised from" not in str(caught.value)


@pytest.mark.parametrize("file_name", ["<ipython-input-3-0af1>", "/tmp/ipykernel_77/123.py"])
def test_a_cell_of_a_notebook_is_called_so(file_name: str) -> None:
    source = "def f(completions):\n    return completions[99]\n"
    linecache.cache[file_name] = (len(source), None, source.splitlines(keepends=True), file_name)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, file_name, "exec"), names)
    with pytest.raises(IndexError) as caught:
        names["f"]([])
    assert raised_from(caught.value, names["f"]) == (
        "It was raised from a cell of the notebook, line 2, in f: `return completions[99]`. "
    )
