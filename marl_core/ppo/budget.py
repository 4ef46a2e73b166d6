"""How much goes through the base at once: decided once for a run, from its config and its device."""

from __future__ import annotations

from dataclasses import dataclass

from marl_core.bank.trunk import PassOptions, Trunk
from marl_core.config.run_config import RunConfig
from marl_core.config.speed_config import usual_tokens

INFERENCE_ROWS = 32
"""Rows that a pass may always hold where no ratio is taken from it, however small the pieces of the update are."""
INFERENCE_TOKENS_FACTOR = 4
"""How many times more tokens such a pass may hold: it keeps nothing for backward."""


@dataclass(frozen=True, slots=True)
class PassLimits:
    """The most rows and tokens of one pass (`tokens` None: any number), and its options (None: those of the block around it)."""

    rows: int
    tokens: int | None = None
    options: PassOptions | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of two kinds of passes: `train`, of which a ratio is taken, so scored and updated in equal pieces; `inference`, all others."""

    train: PassLimits
    inference: PassLimits

    @classmethod
    def of(cls, config: RunConfig, trunk: Trunk, options: PassOptions | None = None, ranks: int = 1) -> Budget:
        """The budget of a run on this trunk, of as many processes as `ranks`.

        Where `ppo.microbatch` gives the size in rows no tokens are counted. Nor where the base's layers are spread over processes:
        every pass needs all ranks then, so each must make as many, whatever the lengths of its rows.
        """
        ppo = config.ppo
        tokens = None
        if not (ppo.microbatch or trunk.sharded):
            tokens = config.speed.microbatch_tokens or usual_tokens(trunk.device.type, config.model.dtype)
        return cls(
            train=PassLimits(ppo.microbatch or ppo.minibatch // ranks, tokens, options),
            inference=PassLimits(
                max(ppo.microbatch or ppo.minibatch, INFERENCE_ROWS),
                None if tokens is None else INFERENCE_TOKENS_FACTOR * tokens,
                options,
            ),
        )
