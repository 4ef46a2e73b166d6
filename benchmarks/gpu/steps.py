"""PPO steps of marl on 1B and 7B shapes, bfloat16 and 4-bit: seconds by phase, tokens a second, memory by phase.

    python benchmarks/gpu/steps.py --device cuda
    python benchmarks/gpu/steps.py --device cpu --shape tiny

Random Llamas, all four roles on one base (policy LoRA, the bare base as reference, a reward adapter, a value head on the policy), one
epoch. A short step warms the kernels up, the next is measured. Shares are of the matmul peak and the copy bandwidth measured first.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from floor import copy_bandwidth, matmul_peak, step_flops  # these folders are no packages
from models import random_base, random_rows
from record import Record, Skip, parse
from workloads import Work, config_of, nothing, write_reward_adapter  # noqa: F401  # a reward of the policy alone

GIB = 2.0**30


@dataclass(frozen=True)
class Case:
    """One row: a work on a shape, and about how many seconds it takes on an H200."""

    shape: str
    held: str
    """`bfloat16` or `4-bit`."""
    responses: int
    tokens: int
    needs: float
    alone: bool = False

    @property
    def name(self) -> str:
        """E.g. `7b 4-bit 64x256`."""
        return f"{self.shape} {self.held} {self.responses}x{self.tokens}{' policy alone' if self.alone else ''}"

    @property
    def work(self) -> Work:
        """The prompts have a quarter of the response's tokens."""
        size = max(self.responses // 4, 2)
        return replace(
            Work(self.name, prompts=self.responses, prompt_tokens=max(self.tokens // 4, 4), new_tokens=self.tokens),
            epochs=1,
            minibatch=size,
            alone=self.alone,
        )


# In this order a shape's base is made once. The 7B shape first: its 64 responses are what a user would ask for.
CASES = {
    "full": [
        Case("7b", "bfloat16", 64, 256, 15),
        Case("7b", "bfloat16", 64, 256, 14, alone=True),
        Case("7b", "4-bit", 64, 256, 35),
        Case("1b", "bfloat16", 64, 256, 9),
        Case("1b", "bfloat16", 256, 256, 11),
        Case("1b", "bfloat16", 64, 256, 8, alone=True),
        Case("1b", "4-bit", 64, 256, 14),
        Case("7b", "bfloat16", 256, 256, 25),
        Case("1b", "4-bit", 256, 256, 18),
        Case("7b", "4-bit", 256, 256, 45),
    ],
    "tiny": [
        Case("tiny", "bfloat16", 8, 16, 3),
        Case("tiny", "bfloat16", 8, 16, 3, alone=True),
        Case("tiny", "4-bit", 8, 16, 5),
    ],
}


def main() -> None:
    """All cases whose seconds are left, each a row."""
    record = Record("steps", parse("steps", __doc__))
    asked = record.asked
    machine = record.measure("machine", lambda: peaks(asked.device))
    held: Held | None = None
    with scratch() as folder:
        for case in CASES[asked.shape]:
            if held is None or held.key != (case.shape, case.held):
                if held is not None:
                    held.drop()
                held = Held(folder, case, asked.device)
            record.measure(case.name, lambda case=case, held=held: step(case, held, machine), needs=case.needs)


def peaks(device: str) -> dict[str, Any]:
    """What this machine reaches: FLOP/s of a square bfloat16 product, bytes a second of a copy."""
    return {"matmul_tflops": matmul_peak("bfloat16", device) / 1e12, "copy_gb_per_s": copy_bandwidth(device) / 1e9}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the models: in memory where there is room for the largest, so that no disk is waited for."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 20 * GIB
    with tempfile.TemporaryDirectory(dir=memory if room else None, prefix="marl-gpu-") as folder:
        yield Path(folder)


class Held:
    """The bank that several cases share; it is made when the first asks."""

    def __init__(self, folder: Path, case: Case, device: str) -> None:
        self.folder, self.case, self.device = folder / case.shape, case, device
        self.key = (case.shape, case.held)
        self.bank: Any = None

    def get(self) -> Any:
        """The bank. The base is written once a shape, as a user's model folder; a 4-bit one is read and quantized from there."""
        if self.bank is None:
            from marl_core import AdapterBank
            from marl_core.testing import tiny_tokenizer

            base = None
            if not (self.folder / "config.json").is_file():
                base = random_base(self.case.shape, "bfloat16", self.device)
                base.save_pretrained(self.folder)
                tiny_tokenizer().save_pretrained(self.folder)
                write_reward_adapter(str(self.folder), self.folder / "reward", Work("reward"))
            if self.case.held == "4-bit":
                del base
                self.bank = four_bit(str(self.folder), self.device)
            else:
                base = base if base is not None else random_base(self.case.shape, "bfloat16", self.device)
                self.bank = AdapterBank(base, tiny_tokenizer(), source=str(self.folder))
        return self.bank

    def drop(self) -> None:
        """Give its memory back."""
        self.bank = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def four_bit(folder: str, device: str) -> Any:
    """The same base in NF4, as `quantization: bnb-4bit` loads it."""
    from marl_core import AdapterBank

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise Skip(f"bitsandbytes can't be imported: {error}") from error
    from marl_plugins.quantization import Bnb4Bit

    return AdapterBank.from_pretrained(
        folder, dtype="bfloat16", device=device, quantization=Bnb4Bit().marl_quantization("bfloat16")
    )


def step(case: Case, held: Held, machine: dict[str, Any]) -> dict[str, Any]:
    """Warm up, then one step; everything that was seen of it."""
    from marl_core import Catalog, Plan, Runner
    from marl_core.plan.memory import estimate
    from marl_core.ppo.types import Prompts

    bank, work = held.get(), case.work
    loaded = allocated(held.device)
    plan = Plan.of(marl_config(case, held, work), Catalog.installed())
    plan.require()
    said = estimate(plan)
    runner = Runner(plan, bank=bank, policy=f"policy-{len(bank.adapters)}")
    try:
        rows = random_rows(work.prompts // runner.config.ppo.samples_per_prompt, work.prompt_tokens, 250)
        prompts = Prompts.of(rows, bank.tokenizer.pad_token_id or 0)
        few = torch.full((work.prompts,), 8)
        runner.update(runner.score(runner.generate(prompts, limits=few)))
        runner.seconds.clear()
        peaks_by_phase, found = {}, None
        for phase in ("generate", "score", "update"):
            if held.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = getattr(runner, phase)(prompts if found is None else found)
            peaks_by_phase[phase] = peak(held.device)
        seconds = dict(runner.seconds)
        checked = runner.preflight
    finally:
        runner.built.discard()
        gc.collect()
    sequence = work.prompts * work.prompt_tokens + work.tokens
    weights = sum(tensor.nbytes for name, tensor in bank.base.state_dict().items() if hasattr(tensor, "nbytes"))
    flops = step_flops(work, bank.base.config)
    return {
        "seconds_a_step": round(sum(seconds.values()), 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens_per_second": {
            "sampling": round(work.tokens / seconds["generate"]),
            "scoring": round(sequence / seconds["score"]),
            "training": round(work.epochs * sequence / seconds["update"]),
        },
        "peak_gib_in_all": round(max(peaks_by_phase.values()) / GIB, 3),
        **shares(work, bank, machine, seconds, flops, weights),
        "ms_a_token_step": round(1000 * seconds["generate"] / work.new_tokens, 3),
        "base_gib": round(weights / GIB, 3),
        "loaded_gib": round(loaded / GIB, 3),
        "peak_gib": {name: round(value / GIB, 3) for name, value in peaks_by_phase.items()},
        "four_models_gib": round((max(peaks_by_phase.values()) + 3 * weights) / GIB, 3),
        "estimate_gib": round(said.peak / GIB, 3),
        "estimate_over_measured": round(said.peak / max(max(peaks_by_phase.values()), 1.0), 3),
        "responses": work.prompts,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "roles": "policy alone" if case.alone else "policy, reference, reward, value",
        "preflight": {} if checked is None else {check.name: dict(check.numbers) for check in checked.checks},
    }


def shares(
    work: Work, bank: Any, machine: dict[str, Any], seconds: dict[str, float], flops: dict[str, float], weights: float
) -> dict[str, Any]:
    """Of the matmul peak in scoring and training; of the copy bandwidth in sampling, where each token reads weights and cache."""
    if "matmul_tflops" not in machine:
        return {}
    config = bank.base.config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    cache = 2 * 2 * config.num_hidden_layers * heads  # bytes of a position's keys and values, half precision
    positions = work.prompts * (work.prompt_tokens + work.new_tokens / 2)  # held in the mean
    read = work.new_tokens * (weights + cache * positions)
    peak_flops = 1e12 * machine["matmul_tflops"]
    return {
        "share_of_matmul_peak": {
            phase: round(flops[phase] / seconds[phase] / peak_flops, 4) for phase in ("score", "update")
        },
        "share_of_bandwidth_in_sampling": round(read / seconds["generate"] / (1e9 * machine["copy_gb_per_s"]), 4),
        "ms_a_token_step_at_bandwidth": round(1000 * read / work.new_tokens / (1e9 * machine["copy_gb_per_s"]), 3),
    }


def marl_config(case: Case, held: Held, work: Work) -> Any:
    """The run's config, as a user would write it for this model folder."""
    from marl_core import RunConfig

    prompts = held.folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "A"}\n', encoding="utf-8")  # the rows are made here; the file says their length
    changes: dict[str, Any] = {
        "policy.targets": "all-linear",
        "data": {"prompts": str(prompts), "max_prompt_tokens": work.prompt_tokens},
        "ppo.learning_rate": 1e-6,
    }
    if case.held == "4-bit":
        changes["quantization"] = "bnb-4bit"
    config = config_of(work, str(held.folder), str(held.folder / "reward"), "bfloat16", held.device, 2, changes)
    del config["run"]["threads"]
    return RunConfig.model_validate(config)


def allocated(device: str) -> float:
    """Bytes that torch holds on the device now."""
    return float(torch.cuda.memory_allocated()) if device == "cuda" else 0.0


def peak(device: str) -> float:
    """Most bytes that torch has held on the device since the last reset; on a CPU the process's highest resident size."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    import resource

    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
