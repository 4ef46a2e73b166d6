"""One line of pyproject.toml fills every address; while it holds a placeholder, nobody is sent there."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import typer

from marl_core.artifacts import addresses
from marl_core.cli.app import app, main

ROOT = Path(__file__).parents[2]


def use(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(addresses, "_address", lambda label: address)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("https://example.org/marl-core", None),
        ("https://docs.example.com/x", None),
        ("https://marl.invalid", None),
        (None, None),
        ("", None),
        ("https://git.acme.dev/marl/", "https://git.acme.dev/marl"),
        ("https://notexample.org/marl", "https://notexample.org/marl"),
    ],
)
def test_a_placeholder_is_no_address(monkeypatch: pytest.MonkeyPatch, written: str | None, read: str | None) -> None:
    use(monkeypatch, written)
    assert addresses.repository() == read
    assert addresses.issues() == (read and f"{read}/issues")
    assert addresses.page("metrics", "a") == (read and f"{read}/blob/HEAD/docs/metrics.md#a")


def test_the_address_is_the_line_in_pyproject() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert list(urls) == ["Repository"]  # everything else follows from it


@pytest.mark.parametrize("address", [None, "https://git.acme.dev/marl"])
def test_a_bug_says_where_it_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str | None
) -> None:
    use(monkeypatch, address)

    def broken() -> None:
        raise ZeroDivisionError("oh")

    command = typer.models.CommandInfo(name="broken", callback=broken)
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands, command])
    assert main(["broken"]) == 1
    said = capsys.readouterr().err
    assert said.strip().endswith(f"please report it at {address}/issues." if address else "please report it.")
