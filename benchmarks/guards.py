"""What the guards of a step cost: seconds of each beside the step's own.

    python benchmarks/guards.py --model PATH --steps 3

Without --model a random Llama of 30 layers and width 576 is measured, the shape of a 135M model with a small vocabulary.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.02,
}


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added up."""

        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call

    def block(self, name: str, make: Callable[..., AbstractContextManager[None]]) -> Callable[..., Any]:
        """The context manager, its entering and leaving added up, not what happens inside."""
        return lambda *arguments, **named: Edges(self, name, make(*arguments, **named))


class Edges:
    """A context manager whose two ends are timed."""

    def __init__(self, clock: Clock, name: str, inner: AbstractContextManager[None]) -> None:
        self.enter = clock.timed(name, inner.__enter__)
        self.exit = clock.timed(name, inner.__exit__)

    def __enter__(self) -> None:
        self.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        return self.exit(kind, error, traceback)


def config_of(model: str, folder: Path) -> Any:
    """A step of 32 responses of up to 32 tokens, scored by a function."""
    from marl_core import Catalog
    from marl_core.config.load import parse_config

    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Film {i} begins with a"}) + "\n" for i in range(64)))
    (folder / "reward.py").write_text(
        "def size(completion_ids, **_): return [float(len(ids)) for ids in completion_ids]"
    )
    written = {
        "model": {"path": model, "dtype": "float32"},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": f"{folder}/reward.py:size"},
        "data": {"prompts": str(prompts)},
        "sampling": {"max_new_tokens": 32},
        "ppo": {"steps": 100, "batch": 32, "minibatch": 8, "epochs": 4},
        "run": {"folder": str(folder / "run"), "threads": 1, "device": "cpu"},
    }
    return parse_config(written, "benchmark", Catalog.installed())


def measure(runner: Any, steps: int) -> tuple[dict[str, float], float]:
    """Seconds a step of each guard, and of the whole step."""
    clock, checks, guard = Clock(), runner.checks, runner.guard
    runner.prepare()
    checks.check_scored = clock.timed("scored", checks.check_scored)
    checks.check_update = clock.timed("updated", checks.check_update)
    guard.step_ended = clock.timed("frozen weights, who learns", guard.step_ended)
    guard.call = clock.block("around plugins", guard.call)
    runner.plan.hooks.around = guard.call
    clock.seconds.clear()
    start = time.perf_counter()
    going = runner.steps()
    for _ in range(steps):
        next(going)
    whole = (time.perf_counter() - start) / steps
    each = {name: seconds / steps for name, seconds in clock.seconds.items()}
    start = time.perf_counter()
    guard.step_ended(0, thorough=True)
    each["checksum, once a checkpoint"] = time.perf_counter() - start
    return each, whole


def main() -> None:
    """Print a line for each guard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; without one a random Llama")
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    from marl_core import Runner
    from marl_core.testing import write_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asked.model or write_tiny_model(folder / "model", **SHAPE)
        each, whole = measure(Runner(config_of(model, folder)), asked.steps)
    always = sum(seconds for guard, seconds in each.items() if "once a" not in guard)
    for guard, seconds in each.items():
        print(f"{guard:30} {1000 * seconds:8.2f} ms  {100 * seconds / whole:6.3f} %")
    print(f"{'all guards of a step':30} {1000 * always:8.2f} ms  {100 * always / whole:6.3f} %")
    print(
        f"{'a step':30} {1000 * whole:8.0f} ms  ({asked.model or 'random Llama, 30 layers'}; {platform.processor() or platform.machine()})"
    )


if __name__ == "__main__":
    main()
