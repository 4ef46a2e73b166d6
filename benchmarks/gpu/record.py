"""What a part of the GPU check measured: written after each measurement, so that a run that is cut off has still given something."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Record:
    """The rows of one part, kept as JSON: `{"part", "device", "shape", "versions", "seconds", "rows": [...]}`.

    A row has a `name`, the `seconds` that measuring it took, and its figures; or `skipped`, why it can't be measured here; or
    `failed`, the error, and `where` it arose.
    """

    def __init__(self, part: str, asked: argparse.Namespace) -> None:
        self.part, self.asked = part, asked
        self.start = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the part's limit."""
        return float(self.asked.seconds) - (time.perf_counter() - self.start)

    def measure(self, name: str, work: Callable[[], dict[str, Any]], needs: float = 0.0) -> dict[str, Any]:
        """The figures of `work`, written down at once. What fails is a row too, and the part goes on.

        `needs`: seconds that it takes about; skipped when fewer are left, and when `--only` names others.
        """
        if self.asked.only and not any(name.startswith(only) for only in self.asked.only):
            return {}
        if needs > self.left:
            return self.add(
                {"name": name, "skipped": f"takes about {needs:.0f} s, {max(self.left, 0):.0f} s were left"}
            )
        start = time.perf_counter()
        try:
            found = {"name": name, **work()}
        except Skip as reason:
            found = {"name": name, "skipped": str(reason)}
        except Exception as error:
            where = traceback.format_exc().splitlines()[-12:]
            found = {
                "name": name,
                "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}",
                "where": where,
            }
        self._free()
        return self.add({**found, "seconds_in_all": round(time.perf_counter() - start, 3)})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """One more row, on disk and on stdout."""
        self.rows.append(row)
        self._write()
        print(json.dumps({key: value for key, value in row.items() if key != "where"}), flush=True)
        return row

    def _free(self) -> None:
        """Give a failed or finished measurement's memory back before the next one."""
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _write(self) -> None:
        out = Path(self.asked.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        said = {
            "part": self.part,
            "device": device_name(self.asked.device),
            "shape": self.asked.shape,
            "versions": versions(),
            "seconds": round(time.perf_counter() - self.start, 1),
            "rows": self.rows,
        }
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, out)


class Skip(Exception):
    """A measurement that this machine or shape has no use for; the text says why."""


def parse(part: str, description: str | None) -> argparse.Namespace:
    """The command line that every part has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument(
        "--shape", default="full", choices=["full", "tiny"], help="the real shapes, or tiny ones to try the part"
    )
    parser.add_argument("--out", default=f"build/gpu/{part}.json", help="where the rows are written")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="measurements that would run past this are skipped"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only measurements whose name begins so"
    )
    return parser.parse_args()


def device_name(device: str) -> str:
    """The card, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Of the libraries that the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "torchao", "trl", "liger-kernel", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
