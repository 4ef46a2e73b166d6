"""Run the parts of the GPU check in the order of their worth, each in a process of its own with its own limit.

    python benchmarks/gpu/run.py                              # all of it, within 8 minutes
    python benchmarks/gpu/run.py --parts tests steps          # some
    python benchmarks/gpu/run.py --device cpu --shape tiny    # to try it where there is no GPU

A part writes OUT/<part>.json after each measurement, so one that is cut off has given what it had. What parts print goes to OUT/log.txt;
the terminal gets a line a measurement, and at the end what failed and a table. The exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One part: its script is `<name>.py`."""

    name: str
    seconds: float
    """Its limit on the full shapes; killed a little later."""
    expected: float
    """Seconds it should take on an H200: reckoned, not measured yet."""
    tiny: float
    """Its limit with `--shape tiny`, on two CPU cores that other work shares."""
    what: str


PARTS = (
    Part(
        "tests", 120, 90, 900, "pytest: every strategy and path on the device, and the invariants with its tolerances"
    ),
    Part("steps", 165, 150, 240, "steps on 1B and 7B shapes, bfloat16 and 4-bit"),
    Part("estimate", 20, 15, 240, "the memory estimate beside what was measured"),
    Part("pieces", 95, 90, 240, "log-probs, attention, decode loops, recomputation, budgets"),
    Part("quickstart", 50, 45, 600, "the quickstart's PPO on the real model"),
    Part("rivals", 30, 25, 240, "TRL's GRPO on the same shape"),
)
GRACE = 5.0
"""Seconds past its limit after which a part is killed; it looks at its limit between measurements."""


def main() -> int:
    """Run the parts; 0 when nothing failed."""
    asked = parse()
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not asked.parts or part.name in asked.parts]
    began, done = time.perf_counter(), []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for part in chosen:
            left = 60 * asked.minutes - (time.perf_counter() - began)
            limit = min(asked.seconds or (part.tiny if asked.shape == "tiny" else part.seconds), left - GRACE)
            if limit < 5:
                done.append({"part": part.name, "ended": "not begun: no time was left", "seconds": 0.0})
                continue
            print(f"== {part.name}: {part.what} (at most {limit:.0f} s)", flush=True)
            done.append(run(part, limit, asked, out, log))
            summarize(done, out)  # as far as it came
    return tell(done, out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="full", choices=["full", "tiny"])
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="some parts instead of all")
    parser.add_argument("--out", default="build/gpu", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of the whole")
    parser.add_argument("--seconds", type=float, help="limit of each part, instead of its own")
    return parser.parse_args()


def run(part: Part, limit: float, asked: argparse.Namespace, out: Path, log: IO[str]) -> dict[str, Any]:
    """One part, killed with all its children when it runs past its limit."""
    file = out / f"{part.name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{part.name}.py"), "--device", asked.device, "--shape", asked.shape]
    command += ["--out", str(file), "--seconds", f"{limit:.0f}"]
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_NO_PROGRESS": "1",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
    log.write(f"\n== {part.name}: {' '.join(command)}\n")
    log.flush()
    began = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
    )
    reader = threading.Thread(target=show, args=(child, log), daemon=True)
    reader.start()
    try:
        code: int | None = child.wait(limit + GRACE)
    except subprocess.TimeoutExpired:
        code = None
    kill(child)
    reader.join(timeout=5)
    ended = "done" if code == 0 else "killed at its limit" if code is None else f"ended with exit code {code}"
    return {"part": part.name, "ended": ended, "seconds": round(time.perf_counter() - began, 1)}


def show(child: subprocess.Popen[str], log: IO[str]) -> None:
    """Everything to the log; of each measurement a short line to the terminal."""
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            log.write(line)
            log.flush()
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "name" in row and not row.get("quiet"):
                print(f"  {brief(row)}", flush=True)


def kill(child: subprocess.Popen[str]) -> None:
    """The part and whatever it started."""
    for sign, wait in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, sign)
        except (ProcessLookupError, PermissionError):
            return
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def brief(row: dict[str, Any]) -> str:
    """One measurement in a line of at most 200 characters."""
    for kind in ("failed", "skipped"):
        if kind in row:
            return f"{row['name']}: {kind.upper()}: {row[kind]}"[:200]
    said = ", ".join(f"{key} {short(value)}" for key, value in row.items() if key not in ("name", "seconds_in_all"))
    return f"{row['name']}: {said}"[:200]


def short(value: Any) -> str:
    """A figure of four digits, or of a table its figures."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {short(one)}" for key, one in value.items()) + ")"
    return str(value)


def rows_of(part: str, out: Path) -> list[dict[str, Any]]:
    """What a part has written, also when it was cut off."""
    file = out / f"{part}.json"
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []
    return rows


def summarize(done: list[dict[str, Any]], out: Path) -> None:
    """OUT/summary.json: each part's end, and how many of its measurements were made, skipped, failed."""
    for part in done:
        rows = rows_of(part["part"], out)
        part["failed"] = sum("failed" in row for row in rows)
        part["skipped"] = sum("skipped" in row for row in rows)
        part["measured"] = len(rows) - part["failed"] - part["skipped"]
    expected = {part.name: part.expected for part in PARTS}
    said = [{**part, "expected_on_an_h200": expected[part["part"]]} for part in done]
    (out / "summary.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def tell(done: list[dict[str, Any]], out: Path) -> int:
    """What failed, then the table; the exit code."""
    summarize(done, out)
    failures = [(part["part"], row) for part in done for row in rows_of(part["part"], out) if "failed" in row]
    print(f"\n{len(failures)} failed" if failures else "\nnothing failed")
    for name, row in failures[:40]:
        print(f"  {name}: {row['name']}: {row['failed'][:300]}")
        for line in row.get("where", [])[-3:]:
            print(f"      {line.strip()[:160]}")
    print(f"\n{'part':12} {'seconds':>8} {'measured':>9} {'skipped':>8} {'failed':>7}  how it ended")
    for part in done:
        print(
            f"{part['part']:12} {part['seconds']:8.1f} {part['measured']:9} {part['skipped']:8} {part['failed']:7}  {part['ended']}"
        )
    print(f"results in {out}")
    return int(bool(failures) or any(part["ended"] != "done" for part in done))


if __name__ == "__main__":
    raise SystemExit(main())
