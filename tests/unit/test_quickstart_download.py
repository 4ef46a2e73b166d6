"""The quickstart's two files without a network: from the folder that MARL_WHEELS names, and nothing but the pinned ones."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest

from marl_core import DataError

DOWNLOAD = Path(__file__).parents[2] / "examples" / "quickstart" / "download.py"
CONTENT = b"the pinned file"


@pytest.fixture
def module() -> dict[str, Any]:
    return runpy.run_path(str(DOWNLOAD))


@pytest.fixture
def package(module: dict[str, Any]) -> Any:
    return module["Package"]("some-Model==1.2", hashlib.sha256(CONTENT).hexdigest(), ())


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("MARL_WHEELS", str(folder))
    return folder


@pytest.mark.parametrize("name", ["some_model-1.2-py3-none-any.whl", "some-Model-1.2.tar.gz"])
def test_the_pinned_file_is_copied(
    module: dict[str, Any], package: Any, wheels: Path, tmp_path: Path, name: str
) -> None:
    (wheels / f"a-{name}").write_bytes(CONTENT)  # another package's
    (wheels / "some_model-1.2-another.whl").write_bytes(b"the same package's other file")
    (wheels / name).write_bytes(CONTENT)
    got = module["download"](package, tmp_path)
    assert got == tmp_path / name
    assert got.read_bytes() == CONTENT
    assert (wheels / name).exists()


@pytest.mark.parametrize("name", ["some_model-1.2-py3-none-any.whl", "some_model-1.20-py3-none-any.whl", None])
def test_another_file_is_refused(
    module: dict[str, Any], package: Any, wheels: Path, tmp_path: Path, name: str | None
) -> None:
    if name is not None:
        (wheels / name).write_bytes(CONTENT if "1.20" in name else b"not the pinned one")
    with pytest.raises(DataError, match=r"MARL_WHEELS names .*wheels, which lacks the pinned file of some-Model==1\.2"):
        module["download"](package, tmp_path)
    assert [path for path in tmp_path.iterdir() if path != wheels] == []


def test_a_folder_that_is_not_there_is_named(
    module: dict[str, Any], package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARL_WHEELS", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"MARL_WHEELS names .*nowhere"):
        module["download"](package, tmp_path)
