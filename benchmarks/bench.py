"""Time one PPO step of marl on fixed work, phase by phase, beside the FLOP floor measured in the same run.

    python benchmarks/bench.py                       # W1, W2 and W3 in float32
    python benchmarks/bench.py --dtype bfloat16 W1
    python benchmarks/bench.py --device cuda --shape 1b --dtype bfloat16 W1
    python benchmarks/bench.py --set speed.merge_for_sampling=true W1

Every work runs in a process of its own, so that its peak memory is its own. Results are kept as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from workloads import SHAPES, WORKS  # noqa: E402  # this folder is no package


def main() -> int:
    """Run the chosen works one after the other and print a line for each."""
    arguments = parse()
    rows = []
    for name in arguments.works or list(WORKS):
        result = run_child(name, arguments)
        rows.append(result)
        print(line(result), flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=f"any of {', '.join(WORKS)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=list(SHAPES), help="a random Llama of this shape instead of SmolLM2-135M")
    parser.add_argument("--model", help="a model folder or hub name instead of the fetched SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a config key, as YAML")
    parser.add_argument("--out", help="write the results as JSON")
    return parser.parse_args()


def run_child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one work in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        job = {**vars(arguments), "work": name, "folder": folder, "out": str(out)}
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([sys.executable, str(HERE / "child.py"), json.dumps(job)], env=environment, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        result: dict[str, Any] = json.loads(out.read_text())
    result["machine"] = machine()
    return result


def machine() -> dict[str, Any]:
    """What the figures come from."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(row.split(":", 1) for row in info.read_text().split("\n\n")[0].splitlines() if ":" in row)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        cpu = fields.get("model name", cpu)
        flags = " ".join(flag for flag in fields.get("flags", "").split() if flag.startswith(("amx", "avx512_bf16")))
    allocator = Path(os.environ.get("LD_PRELOAD", "")).name or " ".join(platform.libc_ver())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "flags": flags,
        "python": platform.python_version(),
        "allocator": allocator,
    }


def line(result: dict[str, Any]) -> str:
    """One work in one line."""
    seconds = result["seconds"]
    phases = ", ".join(f"{name} {seconds[name]:.2f}" for name in ("generate", "score", "update"))
    computed = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result.get("computed_per_real", {}).items())
    return (
        f"{result['work']:8} {result['dtype']:9} {seconds['step']:6.2f} s a step ({phases}) = {result['ratio_to_floor']:.2f}x the floor "
        f"of {result['floor_seconds']:.2f} s; {result['tokens_per_second']:.0f} tokens/s; peak {result['peak_mib']:.0f} MiB"
        + (f" ({result['peak_device_mib']:.0f} MiB on the device)" if result.get("peak_device_mib") else "")
        + (f"; computed per real position: {computed}" if computed else "")
    )


if __name__ == "__main__":
    raise SystemExit(main())
