"""Strangers: distributions that exist only as folders on sys.path, a module beside a dist-info."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Stranger = Callable[..., Path]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    """`stranger("acme-marl", code, version="2.0", reward={"brevity": "Brevity"})` puts a package in the environment."""
    made: list[str] = []

    def make(package: str, code: str, version: str = "2.0", shelf: str = "site", **families: dict[str, str]) -> Path:
        site = tmp_path / shelf
        module = package.replace("-", "_")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8"
        )
        lines = []
        for family, members in families.items():
            lines += [f"[marl.{family}]", *(f"{name} = {module}:{target}" for name, target in members.items())]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        made.append(module)
        return site

    yield make
    for module in made:
        sys.modules.pop(module, None)
