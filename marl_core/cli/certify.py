"""`marl certify`: a reward adapter's certificate, written and tried at once as a run would read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

MOST_TEXTS = 32
"""Golden texts of one certificate: each is scored at every load."""
TEXTS = (
    "A good film, and I would see it again.",
    "A bad film.",
    "Question: What is two plus two?\nAnswer: Four.",
    "It was",
)
"""What is scored where no --examples are given."""


def certify(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of the reward adapter (SEQ_CLS, as TRL saves it).")
    ],
    model: Annotated[str, typer.Option("--model", help="Folder or hub name of the base that it was trained on.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision of the base.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(
            "--dtype", help="`model.dtype` of the run to come: the scores are compared as that run would read them."
        ),
    ] = "float32",
    examples: Annotated[
        Path | None,
        typer.Option("--examples", help="Texts to score: .txt (one a line), .json, .jsonl, .csv or .parquet."),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Column of --examples with the text.")] = "text",
    append_eos: Annotated[
        bool,
        typer.Option("--append-eos/--no-append-eos", help="End each text with the EOS, as TRL's RewardTrainer does."),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a certificate that is there.")] = False,
) -> None:
    """Record which base a reward adapter was trained on and what it scores, so that a run refuses another base."""
    from marl_core.artifacts.adapter_files import read_adapter
    from marl_core.artifacts.hub_models import require_model
    from marl_core.errors import ConfigError

    read_adapter(adapter, "certify")  # before the heavy imports
    require_model(model, "--model", revision)
    from marl_core.bank.identity.certificate import FILE

    file = adapter.expanduser() / FILE
    if file.exists() and not force:
        raise ConfigError(f"certify: {file} is there already. Write it anew with --force.")
    texts = _texts(examples, field) if examples is not None else list(TEXTS)
    from marl_core.run.host import quiet_libraries

    quiet_libraries()
    from marl_core.bank.identity.certify import certified

    certificate, verdict = certified(adapter, model, texts, append_eos=append_eos, revision=revision, dtype=dtype)
    scores = certificate.golden_scores
    ends = ", each text with EOS" if append_eos else ""
    typer.echo(
        f"{certificate.file}: written\n"
        f"  base           {model}{f' at {revision}' if revision else ''}, {len(certificate['base']['tensors'])} tensors; "
        f"it {certificate.named}\n"
        f"  reading        the last token that isn't padding (id {certificate['pad_token_id']}){ends}\n"
        f"  golden scores  {len(scores)} texts, from {min(scores):.3f} to {max(scores):.3f}\n"
        f"  as {dtype:<11} {verdict}"
    )


def _texts(file: Path, field: str) -> list[str]:
    """The first texts of a file; DataError naming file and row for what isn't one."""
    from marl_core.artifacts.rows import read_rows
    from marl_core.errors import DataError

    if file.suffix.lower() == ".txt":
        try:
            lines = file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--examples: {file} can't be read ({error}). Give a UTF-8 text file, one text a line."
            ) from error
        found = [line for line in lines if line.strip()]
    else:
        rows = read_rows(str(file), asked_by="--examples")[:MOST_TEXTS]
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(field), str):
                raise DataError(
                    f"--examples: row {number} of {file} has no text as {field!r}; it has: {', '.join(map(str, row))}. "
                    "Name the column of texts: --field COLUMN."
                )
        found = [str(row[field]) for row in rows]
    if not found:
        raise DataError(f"--examples: {file} holds no text.")
    return found[:MOST_TEXTS]
