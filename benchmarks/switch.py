"""What a switch between two adapters costs: mounting beside the ways that PEFT's layers offer, in turns in one run.

    python benchmarks/switch.py

A random Llama of 28 layers, LoRA on its seven linear layers each: 196 places. Medians of many switches, in microseconds of
processor time; the ratio is what counts on a shared machine.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from marl_core import AdapterBank
from marl_core.testing import tiny_model, tiny_tokenizer

LAYERS, TURNS, CALLS = 28, 7, 50


def fields_of(model: Any) -> Callable[[str], None]:
    """Two fields of each of PEFT's layers: what marl did before it mounted."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def switch(name: str) -> None:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [name]

    return switch


def measure(switch: Callable[[str], None], calls: int) -> float:
    """Microseconds of processor time for one switch."""
    start = time.process_time()
    for number in range(calls):
        switch("one" if number % 2 else "two")
    return 1e6 * (time.process_time() - start) / calls


def main() -> None:
    """Print the medians and ratios as JSON."""
    torch.set_num_threads(1)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    bank = AdapterBank(tiny_model(num_hidden_layers=LAYERS), tiny_tokenizer())
    plain = PeftModel(tiny_model(num_hidden_layers=LAYERS), config, adapter_name="one")
    plain.add_adapter("two", config)
    for name in ("one", "two"):
        bank.add(name, config, seed=0)
    ways: dict[str, tuple[Callable[[str], None], int]] = {
        "mounting": (bank.activate, CALLS),
        "two fields of each layer": (fields_of(plain), CALLS),
        "peft's set_adapter": (plain.set_adapter, 4),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, (switch, calls) in ways.items():
            found[name].append(measure(switch, calls))
    medians = {name: statistics.median(times) for name, times in found.items()}
    result = {
        "places": len(bank.wrappers("one")),
        "microseconds": {name: round(value, 1) for name, value in medians.items()},
        "of the two fields": {
            name: round(value / medians["two fields of each layer"], 3) for name, value in medians.items()
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
