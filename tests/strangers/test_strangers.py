"""Other people's packages: good ones work, broken ones are named, and cost nothing as long as nobody asks for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, ConfigError, PluginError
from marl_core.cli.app import main
from marl_core.config.load import parse_config
from marl_core.plan.plan import Plan

Stranger = Callable[..., Path]
HEADER = "from marl_core import Strategy, hookimpl\n"
GOOD = (
    HEADER
    + '''
class Brevity(Strategy):
    """Pay for short answers.

    At length.
    """
    target: int = 64
    @hookimpl
    def marl_reward(self):
        return lambda rollout: None
'''
)
BRAND = {"model": {"path": "m"}, "reference": "disabled-adapter"}


def plan_with(reward: Any) -> Plan:
    catalog = Catalog.installed()
    return Plan.of(parse_config({**BRAND, "reward": reward}, "f", catalog), catalog)


def test_a_good_stranger_works(stranger: Stranger) -> None:
    stranger("acme-marl", GOOD, reward={"brevity": "Brevity"})
    plan = plan_with({"use": "brevity", "target": 3})
    assert plan.hooks.origin(plan.rewards[0][1]) == "brevity of acme-marl 2.0 (acme_marl:Brevity)"
    assert plan_with("acme_marl/brevity").rewards
    with pytest.raises(ConfigError, match=r"reward\.target: should be a valid integer, but '3' was given"):
        plan_with({"use": "brevity", "target": "3"})


def test_finding_imports_nothing(stranger: Stranger) -> None:
    stranger("acme-marl", GOOD, reward={"brevity": "Brevity"})
    names = [listing.name for listing in Catalog.installed().listings("reward")]
    assert "brevity" in names
    assert "acme_marl" not in sys.modules


IMPORT_FAULTS = {
    "missing module": ("import nowhere_to_be_found", "ModuleNotFoundError"),
    "syntax": ("x = 1\ny = [1, 2\n", r"SyntaxError: \S*broken_marl.py, line 2: '\[' was never closed\. "),
    "exit": ("import sys; sys.exit(3)", r"SystemExit\(3\)"),
    "own base exception": ("class Odd(BaseException): pass\nraise Odd()", r"Odd\(\)"),
    "missing attribute": ("x = 1", "AttributeError"),
}


@pytest.mark.parametrize(("code", "said"), IMPORT_FAULTS.values(), ids=IMPORT_FAULTS)
def test_a_broken_import_is_named_and_only_if_asked_for(stranger: Stranger, code: str, said: str) -> None:
    stranger("broken-marl", code, version="0.3", reward={"brevity": "Brevity"})
    assert plan_with({"use": "function", "target": "m:f"}).rewards
    with pytest.raises(
        PluginError, match=rf"brevity of broken-marl 0\.3 \(broken_marl:Brevity\) could not be imported: .*{said}"
    ) as caught:
        plan_with("brevity")
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is not None


def test_ctrl_c_during_an_import_passes(stranger: Stranger) -> None:
    stranger("slow-marl", "raise KeyboardInterrupt", reward={"brevity": "Brevity"})
    with pytest.raises(KeyboardInterrupt):
        plan_with("brevity")


def test_what_is_printed_on_import_is_dropped_with_a_warning(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger("loud-marl", "print('BUY NOW')\nprint('more')\n" + GOOD, reward={"brevity": "Brevity"})
    with pytest.warns(RuntimeWarning, match=r"brevity of loud-marl 2\.0 .* printed on import; dropped: 'BUY NOW'"):
        plan_with("brevity")
    assert capsys.readouterr().out == ""


def test_one_name_of_two_packages(stranger: Stranger) -> None:
    stranger("acme-marl", GOOD, reward={"brevity": "Brevity"})
    stranger("other-marl", GOOD.replace("target", "length"), version="0.3", reward={"brevity": "Brevity"})
    with pytest.raises(
        PluginError,
        match=r"acme-marl 2\.0 \(acme_marl:Brevity\) and by other-marl 0\.3 \(other_marl:Brevity\): uninstall",
    ):
        plan_with("brevity")
    assert plan_with({"use": "other-marl/brevity", "length": 3}).rewards


def test_a_stranger_cannot_take_a_built_ins_name_in_silence(stranger: Stranger) -> None:
    stranger("acme-marl", GOOD, reward={"function": "Brevity"})
    with pytest.raises(PluginError, match=r"offered by acme-marl .* and by marl-core"):
        plan_with("function")


def test_an_old_copy_further_down_the_path_is_not_a_second_package(stranger: Stranger) -> None:
    stranger("acme-marl", GOOD, version="1.0", shelf="old", reward={"brevity": "Brevity"})
    stranger("acme-marl", GOOD, version="2.0", shelf="new", reward={"brevity": "Brevity"})
    assert plan_with("brevity").hooks.strategies


STRATEGY_FAULTS = {
    "a function": ("def Brevity(): ...", "is a function, not a subclass of marl_core.Strategy"),
    "a plain class": ("class Brevity: ...", "is the class Brevity, not a subclass"),
    "no hook": ("class Brevity(Strategy): ...", "has no marl_reward hook"),
    "hook misspelt": (
        "class Brevity(Strategy):\n    @hookimpl\n    def marl_rewrad(self): ...",
        "It has 'marl_rewrad': is that a slip",
    ),
    "hook unmarked": ("class Brevity(Strategy):\n    def marl_reward(self): ...", "isn't marked. Put @hookimpl"),
    "too many arguments": (
        "class Brevity(Strategy):\n    @hookimpl\n    def marl_reward(self, bank, colour): ...",
        "brevity of acme-marl 2.0 .*colour.*may take: bank, tokenizer",
    ),
    "unknown hook beside": (
        GOOD.removeprefix(HEADER) + "    @hookimpl\n    def marl_chek(self): ...",
        "Did you mean marl_check",
    ),
    "check fails": (
        GOOD.removeprefix(HEADER) + "    @hookimpl\n    def marl_check(self): return [1 / 0]",
        "marl_check failed: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize(("code", "said"), STRATEGY_FAULTS.values(), ids=STRATEGY_FAULTS)
def test_a_wrong_strategy_is_named(stranger: Stranger, code: str, said: str) -> None:
    stranger("acme-marl", HEADER + code, reward={"brevity": "Brevity"})
    with pytest.raises(PluginError, match=said) as caught:
        plan_with("brevity").require()
    assert "acme-marl 2.0" in str(caught.value)


def test_the_list_of_plugins_shows_the_broken_one_and_goes_on(
    stranger: Stranger, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger("acme-marl", GOOD, reward={"brevity": "Brevity"})
    stranger("broken-marl", "import nowhere_to_be_found", version="0.3", reward={"silence": "Silence"})
    assert main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("brevity" in line and "acme-marl" in line and "Pay for short answers" in line for line in lines)
    assert any("silence" in line and "broken: " in line for line in lines)
    assert any("merged-base" in line for line in lines)


def test_the_example_package_works_by_metadata_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    example = Path(__file__).parents[2] / "examples" / "third_party"
    project = tomllib.loads((example / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / f"acme_marl-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, members in groups
            for line in (f"[{group}]", *(f"{name} = {target}" for name, target in members.items()))
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(example))
    monkeypatch.delitem(sys.modules, "acme_marl", raising=False)
    plan = plan_with({"use": "brevity", "target": 40})
    assert plan.rewards[0][1].model_dump() == {"target": 40}
    assert plan.check() == []
    sys.modules.pop("acme_marl", None)
