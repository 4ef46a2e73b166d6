"""What stands at the head of a run's report: who started it, when, where, with what."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from marl_core.errors import counted
from marl_core.report.run_data import RunData
from marl_core.report.timeline import Session, Timeline, date, duration

Fact = tuple[str, str]


def facts(run: RunData, timeline: Timeline) -> list[Fact]:
    """(what, value) in a person's words; what isn't known is left out."""
    return [(name, value) for name, value in _facts(run, timeline) if value]


def _facts(run: RunData, timeline: Timeline) -> Iterator[Fact]:
    first = timeline.sessions[0] if timeline.sessions else None
    hardware = run.provenance.get("hardware")
    hardware = hardware if isinstance(hardware, Mapping) else {}
    if first is not None:
        yield "started", date(first.start)
        resumed = f", resumed {counted(len(timeline.resumes), 'time')}" if timeline.resumes else ""
        yield "duration", f"{duration(timeline.seconds)}{resumed}"
        yield from _session(first)
    yield "base", run.base
    yield "device", " · ".join(str(hardware[key]) for key in ("gpu", "device", "processor") if hardware.get(key))
    processes = hardware.get("processes")
    yield "processes", str(processes) if isinstance(processes, int) and processes > 1 else ""
    yield "seed", str(run.provenance.get("seed", ""))
    yield "versions", packages(run.provenance.get("packages"))
    for session in timeline.sessions:
        if session.how == "resume":
            changed = [
                f"{name}: {value}"
                for name, value in _session(session)
                if value and (first is None or (name, value) not in list(_session(first)))
            ]
            yield f"resumed after step {session.step}", "; ".join([date(session.start), *changed])


def _session(session: Session) -> Iterator[Fact]:
    record = session.record
    command = record.get("command")
    yield "command", shlex.join(map(str, command)) if isinstance(command, list) else ""
    yield "in folder", str(record.get("folder") or "")
    yield "config file", str(record.get("config") or "")
    yield "host", str(record.get("host") or "")
    git = record.get("git")
    if isinstance(git, Mapping):
        yield "git commit", f"{git.get('commit')}{', with changes that are not committed' if git.get('dirty') else ''}"


def packages(found: Any) -> str:
    """Packages with their versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items()) if isinstance(found, Mapping) else ""
