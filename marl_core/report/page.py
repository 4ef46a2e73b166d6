"""The report: one self-contained HTML page about one or several runs. It loads nothing, from no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from marl_core.errors import DataError, MarlError
from marl_core.report import sections
from marl_core.report.markup import Markup, join, tag
from marl_core.report.run_data import RunData, read_runs
from marl_core.report.samples import samples_section
from marl_core.store.files import write_text

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about these runs; its path.

    By default RUN/report.html, for several runs comparison.html in the first one's folder. DataError when a folder holds no
    run, or a file in it is damaged.
    """
    many = [folders] if isinstance(folders, str | Path) else list(folders)
    try:
        runs = read_runs(many)
        target = Path(out) if out else runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")
        write_text(target, page(runs))
    except MarlError:
        raise
    except Exception as error:  # damaged numbers may break the drawing anywhere
        where = ", ".join(str(folder) for folder in many)
        raise DataError(
            f"report: a file in {where} is damaged or can't be written ({type(error).__name__}: {error}). "
            "Each line of steps.jsonl, evals.jsonl and samples.jsonl is one JSON object; preflight.json and provenance.json are one each."
        ) from error
    return target


def page(runs: Sequence[RunData]) -> str:
    """The whole page as text."""
    title = " · ".join(run.name for run in runs)
    body = [
        part
        for part in (
            sections.summary(runs),
            sections.differences(runs),
            sections.curves(runs),
            sections.phases(runs),
            sections.evaluations(runs),
            sections.preflight(runs),
            samples_section(runs),
            sections.provenance(runs),
        )
        if part is not None
    ]
    head = tag("header", tag("h1", title), tag("p", "marl report", class_="note"))
    return "<!doctype html>\n" + tag("html", _head(title), tag("body", tag("main", head, body), _script()), lang="en")


def _head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} – marl report"),
        tag("style", Markup(_resource("report.css"))),
    )


def _script() -> Markup:
    return tag("script", Markup(_resource("report.js")))


def _resource(name: str) -> str:
    return files("marl_core.report").joinpath(name).read_text(encoding="utf-8")


__all__ = ["join", "page", "write_report"]
