"""What an adapter costs at each sampled token, unfolded and folded (marl_core/bank/speed/merged_copies.py), as ratios of one run.

    python benchmarks/folding.py                     # lora, dora, oft, boft, ... on a random Llama of width 256
    python benchmarks/folding.py --kinds hra fourierft
    python benchmarks/folding.py --half MODEL        # what folding would do to a bfloat16 base, in nats a token

Passes of one token are interleaved, the best of each counts. Folding is within its budget of bytes only as far as `--share` says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel

from marl_core.bank.base import load_base
from marl_core.bank.speed import merged_copies as copies
from marl_core.bank.speed.folding import fold, foldable_layers
from marl_core.testing import tiny_model
from marl_core.testing.kinds import move, small_config

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32},
    "dora": {"r": 16, "lora_alpha": 32},
    "miss": {"r": 64},
    "oft": {"oft_block_size": 32},
    "boft": {"boft_block_size": 8},
    "hra": {"r": 8},
    "ia3": {},
    "fourierft": {"n_frequency": 2000},
    "waveft": {"n_frequency": 2592},
    "loha": {"r": 8},
    "vera": {"r": 256},
}


def main() -> None:
    """Print one line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the base's bytes that copies may take")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--half", metavar="MODEL", help="a model folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.half:
        for name in arguments.kinds:
            half(arguments.half, name)
        return
    copies.MERGED_COPIES_SHARE = arguments.share  # type: ignore[attr-defined]
    print("kind        unfolded / base   folded / base   unfolded / lora   folding all, in tokens of the base")
    lora = None
    for name in dict.fromkeys(["lora", *arguments.kinds]):
        bare, plain, folded, once = times(name, arguments.repeat)
        lora = lora or plain / bare
        print(f"{name:10} {plain / bare:16.2f} {folded / bare:15.2f} {plain / bare / lora:17.2f} {once / bare:18.1f}")


@torch.no_grad()
def times(name: str, repeat: int) -> tuple[float, float, float, float]:
    """Seconds of a token through the base, the adapter and its folded copies, and of making these once; the best of each."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = PeftModel(tiny_model(**sizes), small_config(name, **KINDS[name])).eval()
    move(model, by=0.01)
    bare_model, bank = tiny_model(**sizes), SimpleNamespace(base=model)
    token = torch.tensor([[36]])
    passes: list[list[float]] = [[], [], [], []]
    for _ in range(repeat):
        passes[0].append(seconds(lambda: bare_model(token)))
        passes[1].append(seconds(lambda: model(token)))
        begun = time.perf_counter()
        with copies.merged_copies(bank, "default"):  # type: ignore[arg-type]
            passes[3].append(time.perf_counter() - begun)
            model(token)
            passes[2].append(seconds(lambda: model(token)))
    bare, plain, folded, once = map(min, passes)
    return bare, plain, folded, once


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


@torch.no_grad()
def half(path: str, name: str) -> None:
    """KL of next tokens in bfloat16: folded in float32 and cast, against the adapter as it is; beside it what bfloat16 itself does."""
    ids = torch.randint(0, 40_000, (4, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = PeftModel(load_base(path, dtype=dtype), small_config(name)).eval()
        move(model, by=0.002)
        found[dtype] = model(ids).logits.float().log_softmax(-1)
        if dtype == "float32":
            with model.disable_adapter():
                found["base"] = model(ids).logits.float().log_softmax(-1)
            weights = {path: fold(layer) for path, layer in model.named_modules() if layer in foldable_layers(model)}
    found["twice"] = torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in ids])
    for place, folded in weights.items():
        if folded is not None:
            layer = model.get_submodule(place)
            layer.forward = copies._linear(folded[0].bfloat16(), None if folded[1] is None else folded[1].bfloat16())
    found["folded"] = model(ids).logits.float().log_softmax(-1)

    def kl(one: str, other: str) -> float:
        return float((found[one].exp() * (found[one] - found[other])).sum(-1).mean())

    print(
        f"{name}: the adapter's own effect {kl('float32', 'base'):.3g}; bfloat16 against float32 {kl('bfloat16', 'float32'):.3g}, a row "
        f"alone against in its batch {kl('bfloat16', 'twice'):.3g}, folded against unfolded {kl('bfloat16', 'folded'):.3g} nats a token"
    )


if __name__ == "__main__":
    main()
