"""torchao's int8 weights: batch-invariant, one kernel in both modes, right gradients on CPU and under checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from marl_core import PluginError, Quantization, Strategy, hookimpl

if TYPE_CHECKING:
    from marl_core import Plan

INSTALL_HINT = "install it with: pip install 'marl-core[torchao]'"


class TorchaoInt8(Strategy):
    """torchao int8, weights only: each row (or group) of a linear layer's weight with its own scale.

    Activations stay in model.dtype. torchao's dynamic int8 isn't offered, because its gradients are wrong, nor its int4,
    which needs a further library that few machines have.
    """

    group_size: PositiveInt | None = Field(
        default=None,
        description="Weights that share a scale; must divide every layer's input size. Absent: a whole row.",
    )

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The backend must be installed."""
        if find_spec("torchao") is None:
            yield f"quantization: {plan.config.quantization.label} needs torchao; {INSTALL_HINT}"

    @hookimpl
    def marl_quantization(self) -> Quantization:
        """transformers' torchao config."""
        scale = 4.0 / self.group_size if self.group_size else 0.0
        return Quantization(_config(self.group_size), bytes_per_weight=1.0 + scale)


def _config(group_size: int | None) -> Any:
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # they tell of kernels for other machines, line by line
        logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow
        from transformers import TorchAoConfig

        granularity = PerGroup(group_size) if group_size else PerRow()
        return TorchAoConfig(Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))
    except Exception as error:  # a half-installed or mismatched torchao fails in many ways
        raise PluginError(
            f"quantization: torchao can't be used ({type(error).__name__}: {error}); {INSTALL_HINT}, or choose another quantization"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
