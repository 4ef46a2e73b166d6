"""What a kind of adapter must keep: tried on a bank, each broken promise said by name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core.bank.adapters import AdapterBank
    from marl_core.ppo.types import Rollout
    from marl_core.registry.strategy import Adapter

NAME, AGAIN = "adapter-on-trial", "adapter-rebuilt"
SEED, OTHER_SEED = 1, 2
ROUNDING_NATS = 1e-4
"""Nats a token that a fresh adapter may be off the base where it starts as that to rounding; float32."""
PACKED_NATS = 1e-4
"""Nats a token that a response's log-prob may differ alone, in its batch, and packed, float32. What looks at other rows is off by more."""
STEP = 0.02
"""Size of the noise that moves each learning tensor: far above rounding, and small beside weights."""


@dataclass(frozen=True)
class OnTrial:
    """An adapter that was added to a bank, and the rollout it is asked about."""

    label: str
    bank: AdapterBank
    adapter: Adapter
    rollout: Rollout

    def logprobs(self, name: str | None, *, pack: bool = False, rows: slice | None = None) -> Tensor:
        """Log-probs [B, T] through an adapter of the bank, None: through the base."""
        from marl_core.bank.trunk import PassOptions
        from marl_core.bank.views import View
        from marl_core.ppo.budget import PassLimits
        from marl_core.ppo.scoring import view_output

        rollout = self.rollout if rows is None else self.rollout.select(rows)
        limits = PassLimits(len(rollout), options=self.bank.trunk.prepare(PassOptions(pack=pack)))
        return view_output(self.bank, View(name), rollout, 1.0, limits).logprobs

    def learning(self) -> Mapping[str, Any]:
        """The parameters that learn."""
        return self.bank.parameters(NAME)

    def move(self) -> None:
        """Add noise to every learning tensor."""
        import torch

        from marl_core.ppo.seeds import generator

        with torch.no_grad():
            for number, parameter in enumerate(self.learning().values()):
                noise = torch.randn(parameter.shape, generator=generator("noise", number)).to(parameter)
                parameter.add_(noise, alpha=STEP)


@contextmanager
def on_trial(
    label: str, bank: AdapterBank, adapter: Adapter, rollout: Rollout, targets: list[str]
) -> Iterator[OnTrial]:
    """The adapter in the bank, and out of it again."""
    from marl_core.run.trained_adapters import make

    make(bank, NAME, adapter, targets, 0.0, label, SEED)
    try:
        yield OnTrial(label, bank, adapter, rollout)
    finally:
        bank.remove(NAME)


def check_facts(trial: OnTrial) -> None:
    """What the strategy said of it is what it is."""
    learned = sum(parameter.numel() for parameter in trial.learning().values())
    assert learned == trial.adapter.learned, (
        f"{trial.label}: it says that {trial.adapter.learned:,} numbers learn (Adapter.learned), and {learned:,} do"
    )
    names = [part for name in trial.learning() for part in name.split(".")]
    unknown = sorted(set(trial.adapter.rates) - set(names))
    assert not unknown, f"{trial.label}: Adapter.rates names {unknown}, which is a part of no learning parameter's name"


def check_start(trial: OnTrial, base: Tensor) -> None:
    """A fresh one is the base."""
    import torch

    fresh = trial.logprobs(NAME)
    gap = float((fresh - base).abs().max())
    if trial.adapter.start == "base":
        assert torch.equal(fresh, base), (
            f"{trial.label}: a fresh one is off the base by {gap:.3g} nats a token, and Adapter.start is 'base': start at nothing "
            "(zeros in one factor), or say 'rounded' where it is rounding"
        )
    assert gap <= ROUNDING_NATS, (
        f"{trial.label}: a fresh one is off the base by {gap:.3g} nats a token, which is more than rounding: step-0 KL wouldn't be 0"
    )


def check_moved(trial: OnTrial, base: Tensor) -> None:
    """Moved it is another model, seen only through its name, and the same for a row alone, in its batch and packed."""
    import torch

    moved = trial.logprobs(NAME)
    assert not torch.equal(moved, base), f"{trial.label}: its learning tensors were moved, and the log-probs stayed"
    assert torch.equal(trial.logprobs(None), base), (
        f"{trial.label}: with the adapter off the base computes something else"
    )
    assert bool(moved.isfinite().all()), f"{trial.label}: moved a little, it gives log-probs that aren't finite"
    alone = torch.cat([trial.logprobs(NAME, rows=slice(row, row + 1)) for row in range(len(trial.rollout))])
    for what, other in (("alone", alone), ("packed with others", trial.logprobs(NAME, pack=True))):
        gap = float((other - moved).abs().max())
        assert gap <= PACKED_NATS, (
            f"{trial.label}: a response {what} gets other log-probs than in its batch (by {gap:.3g} nats): what it computes for a token "
            "must depend on that token's input alone"
        )


def check_gradient(trial: OnTrial) -> None:
    """A gradient reaches every learning tensor."""
    import torch

    from marl_core.ppo.scoring import forward
    from marl_core.ppo.seeds import generator

    parameters = trial.learning()
    with trial.bank.using(NAME):
        logprobs = forward(trial.bank, trial.rollout, 1.0).logprobs
        loss = (logprobs * torch.randn(logprobs.shape, generator=generator("loss")).to(logprobs)).sum()
        assert loss.requires_grad, f"{trial.label}: no gradient reaches any of its tensors"
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    unmoved = [
        name
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is None or not bool(gradient.any())
    ]
    assert not unmoved, (
        f"{trial.label}: {len(unmoved)} of {len(parameters)} learning tensors get no gradient, first {unmoved[0]}"
    )


def check_file(trial: OnTrial) -> None:
    """Its file and config alone make it again, bit for bit, whatever the seed is then."""
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file

    expected = trial.logprobs(NAME)
    with tempfile.TemporaryDirectory() as folder:
        trial.bank.save(NAME, folder)
        config = PeftConfig.from_pretrained(folder)
        tensors = load_file(Path(folder, "adapter_model.safetensors"))
    config.inference_mode = False
    trial.bank.add(AGAIN, config, trainable=False, seed=OTHER_SEED)
    try:
        trial.bank.fill(AGAIN, tensors)
        rebuilt = trial.logprobs(AGAIN)
    finally:
        trial.bank.remove(AGAIN)
    gap = float((rebuilt - expected).abs().max())
    assert torch.equal(rebuilt, expected), (
        f"{trial.label}: made again from its file it differs by {gap:.3g} nats a token: what it draws at random, or takes from the base, "
        "must stand in its file or follow from its config"
    )
