"""Measure every kind of adapter that the bank holds: `python tests/kinds/kinds_measure.py` writes docs/kinds.json.

Each kind stands as the policy on a random Llama of width 64, its learning weights moved by noise of 0.05, beside a LoRA and a DoRA. What is
compared is always PEFT alone, on a base of its own, or the same run without the thing in question.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from marl_core import AdapterBank, Catalog, MarlError, Plan, Runner
from marl_core.bank.speed import merged_copies as folding
from marl_core.config.load import parse_config
from marl_core.testing import tiny_model, tiny_tokenizer

TARGET = Path(__file__).parents[2] / "docs" / "kinds.json"
WIDTH: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
IDS = torch.tensor([[36, 224, 74, 82, 40, 41, 90, 91], [37, 68, 71, 5, 60, 61, 2, 99]])
NOISE = 0.05
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"use": "lora", "r": 8},
    "rsLoRA": {"use": "lora", "r": 8, "rslora": True},
    "LoRA+": {"use": "lora", "r": 8, "plus": 16},
    "LoRA, gaussian": {"use": "lora", "r": 8, "init": "gaussian"},
    "LoRA, orthogonal": {"use": "lora", "r": 8, "init": "orthogonal"},
    "MiCA": {"use": "lora", "r": 8, "init": "mica"},
    "LoRA with bias": {"use": "lora", "r": 8, "lora": {"lora_bias": True}},
    "DoRA": {"use": "dora", "r": 8},
    "MiSS": {"use": "miss", "r": 8},
    "MiSS, bat": {"use": "miss", "r": 8, "form": "bat"},
    "MiSS, mini": {"use": "miss", "r": 8, "form": "mini"},
    "OFT": {"use": "oft", "block": 16},
    "IA3": {"use": "ia3"},
    "TinyLoRA": {"use": "tinylora"},
    **{
        title: {"use": "peft", "kind": kind, "options": options}
        for title, kind, options in (
            ("AdaLoRA at fixed rank", "adalora", {"init_r": 8, "target_r": 8, "total_step": 10}),
            ("BOFT", "boft", {"boft_block_size": 8}),
            ("HRA", "hra", {"r": 4}),
            ("RoAd", "road", {"group_size": 32}),
            ("VeRA", "vera", {"r": 16}),
            ("RandLoRA", "randlora", {"r": 8}),
            ("LoHa", "loha", {"r": 4}),
            ("LoKr", "lokr", {"r": 4}),
            ("HiRA", "hira", {"r": 8}),
            ("DeLoRA", "delora", {"r": 8}),
            ("GraLoRA", "gralora", {"r": 8}),
            ("GLoRA", "glora", {"r": 4}),
            ("FourierFT", "fourierft", {"n_frequency": 100}),
            ("WaveFT", "waveft", {"n_frequency": 100}),
            ("C3A", "c3a", {"block_size": 16}),
            ("SHiRA", "shira", {"r": 4, "random_seed": 1}),
            ("Super", "supertuning", {}),
            ("PSOFT", "psoft", {"r": 16}),
            ("DEFT", "deft", {"r": 4}),
            ("PEANuT", "peanut", {"r": 8}),
            ("BEFT", "beft", {}),
            ("LN-tuning", "ln_tuning", {}),
        )
    },
}
"""What `policy` says for each row of the table."""
QUANTIZED = ("bnb-4bit", "bnb-8bit")


def odd(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward: the share of odd tokens."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


class World:
    """The tiny base's folder, prompts, a reward, and the config of a kind on them."""

    def __init__(self, folder: Path) -> None:
        self.base, self.folder = str(folder / "base"), folder
        tiny_model(**WIDTH).save_pretrained(self.base)
        tiny_tokenizer().save_pretrained(self.base)
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text(
            "".join(json.dumps({"prompt": text}) + "\n" for text in ("A good", "Bad", "It", "What a"))
        )

    def config(self, policy: dict[str, Any], **changes: Any) -> Any:
        """A run of three steps."""
        return parse_config(
            {
                "model": {"path": self.base, "dtype": "float32"},
                "policy": policy,
                "reference": {"use": "disabled-adapter"},
                "reward": odd,
                "data": {"prompts": str(self.prompts)},
                "sampling": {"max_new_tokens": 6},
                "ppo": {"steps": 3, "batch": 4, "minibatch": 2, "epochs": 2, "learning_rate": 1e-3},
                "run": {"device": "cpu", "seed": 0, **changes},
            },
            "kinds",
            Catalog.installed(),
        )

    def peft_config(self, policy: dict[str, Any]) -> Any:
        """PEFT's config of the kind, as a run makes it."""
        return Runner(self.config(policy)).bank.config("policy")


def noise(parameters: Any) -> None:
    """Move what learns, the same way everywhere."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_((torch.randn(parameter.shape, generator=random) * NOISE).to(parameter))


def alone(base: Any, config: Any, seed: int, moved: bool = True) -> Any:
    """The adapter in a PeftModel of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain: Any = PeftModel(base, config).eval()
    if moved:
        noise(learning(plain, config))
    return plain


def learning(plain: Any, config: Any) -> list[nn.Parameter]:
    """What learns in it, each once; AdaLoRA's numbers of ranks are no weights."""
    named = {
        id(p): p for name, p in plain.get_base_model().named_parameters() if p.requires_grad and "ranknum" not in name
    }
    return list(named.values())


def loss(logits: Tensor) -> Tensor:
    """A fixed projection of the logits."""
    return (logits.float() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))).mean()


@torch.no_grad()
def seen(bank: AdapterBank, name: str | None) -> Tensor:
    """Logits through an adapter."""
    with bank.using(name) as base:
        found: Tensor = base(IDS).logits
        return found


def bank_of(config: Any, dtype: torch.dtype = torch.float32) -> AdapterBank:
    """A bank with the kind, fresh."""
    model: Any = tiny_model(**WIDTH)
    bank = AdapterBank(model.to(dtype), tiny_tokenizer())
    bank.add("policy", config, seed=0)
    return bank


def start(config: Any, dtype: torch.dtype) -> float:
    """Largest difference of logits between a fresh one and the base."""
    bank = bank_of(config, dtype)
    return float((seen(bank, "policy") - seen(bank, None)).abs().max())


def beside(config: Any) -> dict[str, Any]:
    """Beside a LoRA and a DoRA: logits, and gradients of two kinds at once, against PeftModels of their own."""
    from peft import LoraConfig

    bank = bank_of(config)
    others: dict[str, dict[str, Any]] = {"one": {}, "two": {"use_dora": True}}
    noise(bank.parameters("policy").values())
    for name, options in others.items():
        bank.add(name, LoraConfig(r=4, target_modules="all-linear", **options), seed=1)
        noise(bank.parameters(name).values())
    for name in ("policy", "one", "policy"):
        with bank.using(name) as base:
            loss(base(IDS).logits).backward()
    plain = alone(tiny_model(**WIDTH), config, 0)
    for _ in range(2):
        loss(plain(IDS).logits).backward()
    mine, theirs = list(bank.parameters("policy").values()), learning(plain, config)
    with torch.no_grad():
        logits = bool(torch.equal(plain(IDS).logits, seen(bank, "policy")))
    gradients = len(mine) == len(theirs) and all(
        one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
        for one, other in zip(mine, theirs, strict=True)
    )
    return {"logits": logits, "gradients": gradients, "learned": sum(p.numel() for p in mine)}


def file(config: Any, folder: Path) -> bool:
    """Plain peft gives bitwise the bank's logits from the file that the bank wrote."""
    bank = bank_of(config)
    noise(bank.parameters("policy").values())
    bank.save("policy", folder)
    plain = PeftModel.from_pretrained(tiny_model(**WIDTH), str(folder)).eval()
    with torch.no_grad():
        return bool(torch.equal(plain(IDS).logits, seen(bank, "policy")))


def packed(config: Any) -> float:
    """Packed against padded hidden states, of their size."""
    bank = bank_of(config)
    noise(bank.parameters("policy").values())
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad(), bank.using("policy"):
        one, other = bank.trunk.packed_states(IDS, mask), bank.trunk.padded_states(IDS, mask)
    return float((one - other).abs().max() / other.abs().max())


def fold(config: Any) -> float | None:
    """Folded against unfolded logits; None where it isn't folded."""
    bank = bank_of(config)
    noise(bank.parameters("policy").values())
    with torch.no_grad(), bank.using("policy") as base:
        before = base(IDS).logits
        with folding.merged_copies(bank, "policy") as any_folded:
            after = base(IDS).logits
    return float((before - after).abs().max()) if any_folded else None


def quantized(config: Any, world: World, name: str) -> float | str:
    """Cosine of the gradient on a quantized base with that on the same base dequantized; or `refused`."""

    def load() -> AdapterBank:
        written = world.config({"use": "lora"}).model_dump(by_alias=True) | {"quantization": {"use": name}}
        plan = Plan.of(parse_config(written, "kinds", Catalog.installed()))
        return AdapterBank.from_pretrained(world.base, dtype="float32", device="cpu", quantization=plan.quantization)

    bank = load()
    try:
        bank.add("policy", config, seed=0)
    except MarlError:
        return "refused"
    noise(bank.parameters("policy").values())
    with bank.using("policy") as base:
        loss(base(IDS).logits).backward()
    plain_base: Any = load().base
    plain = alone(plain_base.dequantize().float(), config, 0)
    loss(plain(IDS).logits).backward()
    one, other = (
        torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
        for parameters in (bank.parameters("policy").values(), learning(plain, config))
    )
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def run(world: World, policy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Three steps, the same resumed after two: the policy's bytes, and the base's before and after."""
    whole = Runner(world.config(policy, folder=str(folder / "whole")))
    before = {name: p.detach().clone() for name, p in whole.bank.base_parameters().items()}
    stats = list(whole.steps())
    after = whole.bank.base_parameters()
    stopped = Runner(world.config(policy, folder=str(folder / "stopped"), checkpoint_every=1))
    for one in stopped.steps():
        if one.step == 2:
            break
    stopped.end()
    again = Runner(world.config(policy, folder=str(folder / "stopped"), checkpoint_every=1), resume=True)
    list(again.steps())
    mine, theirs = whole.bank.tensors("policy"), again.bank.tensors("policy")
    return {
        "base": all(torch.equal(before[name], after[name]) for name in before),
        "resumed": all(torch.equal(mine[name], theirs[name]) for name in mine),
        "steps": len(stats),
    }


def attempt(measure: Callable[[], Any]) -> Any:
    """What was measured, or the error in words."""
    try:
        return measure()
    except Exception as error:  # one kind's error is a cell of the table
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def row(world: World, policy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All that is measured of one kind."""
    try:
        config = world.peft_config(policy)
    except MarlError as error:
        return {"refused": " ".join(str(error).split())}
    return {
        "start": {name: attempt(partial(start, config, getattr(torch, name))) for name in ("float32", "bfloat16")},
        "beside": attempt(lambda: beside(config)),
        "file": attempt(lambda: file(config, folder / "file")),
        "run": attempt(lambda: run(world, policy, folder)),
        "packed": attempt(lambda: packed(config)),
        "fold": attempt(lambda: fold(config)),
        **{name: attempt(partial(quantized, config, world, name)) for name in QUANTIZED},
    }


def main(names: list[str]) -> None:
    """Measure these rows, all without names, and write them beside what is there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    vars(folding)["MERGED_COPIES_SHARE"] = 10.0  # of so small a base every layer may have its copy
    found = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() and names else {}
    with tempfile.TemporaryDirectory() as temporary:
        world = World(Path(temporary))
        for number, (title, policy) in enumerate(KINDS.items()):
            if names and title not in names:
                continue
            found[title] = {"policy": policy, **row(world, policy, Path(temporary) / str(number))}
            print(title, json.dumps(found[title]), flush=True)
    TARGET.write_text(
        json.dumps({title: found[title] for title in KINDS if title in found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
