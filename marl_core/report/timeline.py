"""When a run went: started, resumed, for how long, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from marl_core.report.run_data import RunData

State = Literal["running", "finished", "stopped", "failed", "interrupted", "unknown"]


@dataclass(frozen=True, slots=True)
class Session:
    """From one start or resume to its end. Times are Unix seconds; `until` is the last thing that was written in it."""

    how: str
    step: int
    start: float
    until: float
    record: Mapping[str, Any]
    """As provenance.json has it: command, folder, host, git, packages."""

    @property
    def seconds(self) -> float:
        """How long it was."""
        return max(0.0, self.until - self.start)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The sessions of one run, and how it stands."""

    sessions: Sequence[Session]
    state: State
    reason: str
    """Why it stands so, where that is known; else empty."""

    @classmethod
    def of(cls, run: RunData, now: float | None = None) -> Timeline:
        """Of a run. `now` (Unix seconds, default: the clock's) is until when one that is going lasts."""
        state, reason = _state(run)
        end = _number(run.ended.get("time")) if state != "running" else (time.time() if now is None else now)
        return cls(_sessions(run, end), state, reason)

    @property
    def seconds(self) -> float:
        """Time that the run took, without the pauses between its sessions."""
        return sum(session.seconds for session in self.sessions)

    @property
    def resumes(self) -> Sequence[int]:
        """The steps after which it was resumed."""
        return [session.step for session in self.sessions if session.how == "resume"]

    def elapsed(self, at: float | None) -> float | None:
        """Seconds of the run until a time (Unix seconds), without pauses; None for what isn't within a session."""
        before = 0.0
        found = None
        for session in self.sessions:
            if at is None or at < session.start:
                break
            found = before + min(at - session.start, session.seconds)
            before += session.seconds
        return found


def _sessions(run: RunData, end: float | None) -> list[Session]:
    """As recorded; of a run of an older version one, from its first step to its last."""
    times = [found for line in run.steps if (found := _number(line.get("time"))) is not None]
    found = run.provenance.get("sessions")
    records = [one for one in found if _number(_get(one, "time")) is not None] if isinstance(found, list) else []
    first_step = times[0] - (_number(run.steps[0].get("perf/seconds")) or 0.0) if times else None
    if first_step is not None and (not records or first_step < records[0]["time"]):
        records = [{"how": "start", "step": 0, "time": first_step}, *records]
    starts = [float(one["time"]) for one in records] + [float("inf")]
    sessions = []
    for index, one in enumerate(records):
        inside = [at for at in times if starts[index] <= at < starts[index + 1]]
        is_last = index == len(records) - 1
        seen = [*inside, _number(one.get("until")), end if is_last else None, starts[index]]
        until = min(max(at for at in seen if at is not None), starts[index + 1])
        step = one.get("step")
        sessions.append(
            Session(str(one.get("how")), step if isinstance(step, int) else 0, starts[index], until, dict(one))
        )
    return sessions


def _state(run: RunData) -> tuple[State, str]:
    if run.live:
        return "running", ""
    how, reason = run.ended.get("how"), str(run.ended.get("reason") or "")
    if how in ("finished", "stopped", "failed", "interrupted"):
        return how, reason
    wanted = (run.config.get("ppo") or {}).get("steps")
    if run.has("final/policy") and run.steps and run.steps[-1]["step"] == wanted:
        return "finished", ""
    if run.has("dumps"):
        return "failed", "a phase of a step failed: its batch lies in dumps/"
    return (
        "unknown",
        "" if not run.steps else "no end was written: it was killed, or stopped at once by a second Ctrl-C",
    )


def why_no_steps(run: RunData) -> str:
    """Why the report of a run has no steps to show."""
    state, reason = _state(run)
    if state == "running":
        return "No step has ended yet: the run is going."
    if run.has("final/policy") or run.has("checkpoints"):
        return (
            "This run wrote no steps.jsonl: it was made without the observer json-lines. "
            "Its numbers are where its observers put them; they can't be shown here."
        )
    if state == "failed":
        return f"The run failed before its first step had ended{': ' + reason if reason else '.'}"
    if state in ("stopped", "interrupted"):
        return f"The run was stopped before its first step had ended{': ' + reason if reason else '.'}"
    return "No step has ended yet. The run was stopped before its first step had ended, or is just starting."


def date(at: float | None) -> str:
    """A time (Unix seconds) as a date in UTC; empty for None, and for what is no time."""
    try:
        return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return ""


def duration(seconds: float) -> str:
    """A duration as a person would say it, by its two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.0f} s"


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
