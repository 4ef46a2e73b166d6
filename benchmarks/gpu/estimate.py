"""What `marl check --memory` says before a run beside the memory that the run took: the cases of benchmarks/memory.py.

    python benchmarks/gpu/estimate.py --device cuda
    python benchmarks/gpu/estimate.py --device cpu --shape tiny

On a GPU: the most bytes that torch had allocated, all cases in this process. On a CPU each case has a process of its own, as there the
resident size is what counts. The steps part holds the estimate against 1B and 7B shapes.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from memory import CASES, config_of, write_inputs  # these folders are no packages
from record import Record, parse

PARENT = Path(__file__).parents[1]


def main() -> None:
    """Each case is a row."""
    record = Record("estimate", parse("estimate", __doc__))
    asked = record.asked
    chosen = list(CASES) if asked.shape == "full" else ["bf16-8"]
    measure = on_device if asked.device == "cuda" else in_a_process
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for case in chosen:
            record.measure(case, lambda case=case: measure(case, Path(folder)), needs=2)


def on_device(case: str, folder: Path) -> dict[str, Any]:
    """Two steps here; the device's counters say what they took."""
    import torch

    from marl_core import Catalog, Plan, Runner
    from marl_core.config.load import parse_config
    from marl_core.plan.memory import estimate

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = Plan.of(parse_config(config_of(case, folder, "cuda"), case, Catalog.installed()))
    said = estimate(plan).peak
    runner = Runner(plan)
    loaded = torch.cuda.memory_allocated() - before
    for _ in runner.steps():
        pass
    return figures(said, torch.cuda.max_memory_allocated() - before, loaded)


def in_a_process(case: str, folder: Path) -> dict[str, Any]:
    """The same by benchmarks/memory.py itself."""
    command = [sys.executable, str(PARENT / "memory.py"), case, "--device", "cpu", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    found = json.loads(done.stdout.splitlines()[-1])
    return figures(found["estimate"], found["measured"], found["loaded"])


def figures(estimate: float, measured: float, loaded: float) -> dict[str, Any]:
    """In MiB, and the measured as a share of the estimate, less one: what comes on top."""
    return {
        "estimate_mib": round(estimate / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        "loaded_mib": round(loaded / 2**20, 1),
        "on_top": round(measured / estimate - 1, 3),
    }


if __name__ == "__main__":
    main()
