"""Peak memory of real runs beside what `marl check --memory` says before them.

    python benchmarks/memory.py            # all cases, each in a process of its own; a table on stdout
    python benchmarks/memory.py bf16-8     # one case

On CPU: the highest resident size during two PPO steps, less the resident size once the libraries are imported. On a GPU (--device cuda):
the highest number of bytes that torch had allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from workloads import W1, write_reward_adapter  # this folder is no package

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 1024,
}
"""A random Llama of 110 million parameters: the size of the machine's noise is small beside it."""

EIGHT = {"microbatch": 8}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "fp32-8": {"ppo": EIGHT},
    "bf16-8": {"model": {"dtype": "bfloat16"}, "ppo": EIGHT},
    "fp32-checkpointing": {"model": {"gradient_checkpointing": True}, "ppo": EIGHT},
    "fp32-own-value": {"value": {"on": "own"}, "ppo": EIGHT},
    "fp32-policy-only": {
        "value": "none",
        "ppo": {**EIGHT, "advantage": "grpo", "samples_per_prompt": 2, "kl": {"coef": 0.0}},
    },
    "fp32-all-roles": {"reward": {"use": "adapter"}, "ppo": EIGHT},
    "nf4": {"model": {"dtype": "bfloat16"}, "quantization": "bnb-4bit"},
}


def config_of(case: str, folder: Path, device: str) -> dict[str, Any]:
    """The case's config: 16 prompts of 32 tokens, 96 new tokens each."""
    changes = CASES[case]
    function = {"use": "function", "target": f"{folder / 'rewards.py'}:length"}
    reward = {**changes["reward"], "path": str(folder / "reward")} if "reward" in changes else function
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32", **changes.get("model", {})},
        "quantization": changes.get("quantization", "none"),
        "policy": {"r": 16, "targets": "all-linear"},
        "reference": "disabled-adapter",
        "reward": reward,
        "value": changes.get("value", {"on": "policy"}),
        "data": {"prompts": str(folder / "prompts.jsonl"), "max_prompt_tokens": 32},
        "sampling": {"max_new_tokens": 96, "min_new_tokens": 96},
        "ppo": {"steps": 2, "batch": 16, "minibatch": 8, "epochs": 1, **changes.get("ppo", {})},
        "run": {"device": device, "seed": 0},
    }


def write_inputs(folder: Path) -> None:
    """Model, prompts of 32 byte tokens, a reward that costs nothing."""
    from marl_core.testing import write_tiny_model

    write_tiny_model(folder / "model", **SHAPE)
    write_reward_adapter(str(folder / "model"), folder / "reward", W1)
    rows = [
        json.dumps({"prompt": f"{index:02d} film that begins with rain."[:32].ljust(32, ".")}) for index in range(16)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "rewards.py").write_text(
        "def length(completion_ids, **_):\n    return [len(ids) / 100 for ids in completion_ids]\n", encoding="utf-8"
    )


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def measure(case: str, folder: Path, device: str) -> dict[str, float]:
    """Estimate, then run, in this process."""
    from marl_core import Catalog, Plan
    from marl_core.config.load import parse_config
    from marl_core.plan.memory import estimate

    plan = Plan.of(parse_config(config_of(case, folder, device), case, Catalog.installed()))
    said = estimate(plan).peak
    import torch

    from marl_core.run.host import set_up_process
    from marl_core.run.roles import build_roles  # noqa: F401  # the libraries, before the base line is taken
    from marl_core.run.runner import Runner

    set_up_process()  # as `marl run` does
    torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again
    runner = Runner(plan)
    loaded = resident("VmRSS") - before
    for _ in runner.steps():
        pass
    peak = torch.cuda.max_memory_allocated() if runner.bank.device.type == "cuda" else resident("VmHWM") - before
    return {"estimate": said, "measured": float(peak), "loaded": float(loaded)}


def main() -> None:
    """All cases, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", type=Path, help="inputs of a parent process")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    asked = parser.parse_args()
    if asked.folder is not None:
        print(json.dumps(measure(asked.cases[0], asked.folder, asked.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        print("| case | estimate, MiB | measured, MiB | estimate / measured |\n| --- | --- | --- | --- |")
        measured = {}
        for case in asked.cases:
            command = [sys.executable, __file__, case, "--device", asked.device, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            said, peak = found["estimate"] / 2**20, found["measured"] / 2**20
            measured[case] = {"measured_mib": round(peak), "loaded_mib": round(found["loaded"] / 2**20)}
            print(f"| {case} | {said:,.0f} | {peak:,.0f} | {said / peak:.2f} |", flush=True)
        if asked.out is not None:
            asked.out.write_text(
                json.dumps({"device": asked.device, "cases": measured}, indent=1) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main()
