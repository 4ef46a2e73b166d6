"""Built-in quantization backends: how the frozen base's weights are held. Adapters and heads stay float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from marl_core import PluginError, Quantization, Strategy, hookimpl

if TYPE_CHECKING:
    from marl_core import Plan


class NoQuantization(Strategy):
    """The base in model.dtype."""

    @hookimpl
    def marl_quantization(self) -> Quantization:
        """Nothing to do."""
        return Quantization()


class _BitsAndBytes(Strategy):
    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """The backend must be installed."""
        if find_spec("bitsandbytes") is None:
            label = plan.config.quantization.label
            yield f"quantization: {label} needs bitsandbytes; install it with: pip install 'marl-core[bitsandbytes]'"


class Bnb8Bit(_BitsAndBytes):
    """bitsandbytes int8 (LLM.int8)."""

    threshold: float = Field(
        default=0.0,
        ge=0.0,
        description="Outlier threshold. Above 0 (bitsandbytes' own default is 6) a row's log-probs depend on the other rows of its batch.",
    )

    @classmethod
    def options_for_stored(cls, said: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Folders that bitsandbytes wrote in 8 bits, with the threshold that was written."""
        return {"threshold": float(said.get("llm_int8_threshold", 6.0))} if said.get("load_in_8bit") else None

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """On CPU, train mode and eval mode use different int8 kernels: stay in one."""
        yield from super().marl_check(plan)
        if plan.config.model.gradient_checkpointing:
            yield (
                "model.gradient_checkpointing with quantization bnb-8bit: checkpointing needs train mode, sampling runs in eval mode, and "
                "int8 uses different kernels in the two, so old and new log-probs would differ. Use bnb-4bit, or no checkpointing"
            )

    @hookimpl
    def marl_quantization(self) -> Quantization:
        """transformers' int8 config; batch-invariant only with threshold 0."""
        config = _config(load_in_8bit=True, llm_int8_threshold=self.threshold)
        return Quantization(config, batch_invariant=self.threshold == 0, same_kernels=False, bytes_per_weight=1.0)


class Bnb4Bit(_BitsAndBytes):
    """bitsandbytes 4-bit (QLoRA)."""

    type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit data type.")
    double: bool = Field(default=False, description="Quantize the quantization constants too.")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Dtype of the products; auto: model.dtype."
    )

    @classmethod
    def options_for_stored(cls, said: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Folders that bitsandbytes wrote in 4 bits, as they were written."""
        if not said.get("load_in_4bit"):
            return None
        compute = str(said.get("bnb_4bit_compute_dtype", "auto")).removeprefix("torch.")
        return {
            "type": said.get("bnb_4bit_quant_type", "fp4"),
            "double": bool(said.get("bnb_4bit_use_double_quant", False)),
            "compute_dtype": compute if compute in ("float32", "bfloat16", "float16") else "auto",
        }

    @hookimpl
    def marl_quantization(self, compute_dtype: str) -> Quantization:
        """transformers' 4-bit config, and the CPU setting without which gradients are wrong after a rollout."""
        import torch

        dtype = compute_dtype if self.compute_dtype == "auto" else self.compute_dtype
        config = _config(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.type,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        return Quantization(config, after_load=keep_unpacked, bytes_per_weight=0.53 if self.double else 0.5625)


def _config(**options: Any) -> Any:
    try:
        import bitsandbytes as _bitsandbytes  # noqa: F401  # fails here, with the extra's name, rather than inside transformers
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise PluginError(
            f"quantization: bitsandbytes can't be imported ({error}); install it with: pip install 'marl-core[bitsandbytes]'"
        ) from error
    return BitsAndBytesConfig(**options)


def keep_unpacked(model: Any) -> None:
    """Never let a CPU with AVX512-BF16 repack 4-bit weights: the packed kernel has no right backward.

    Without this, the first pass without gradient (a rollout) repacks each weight, and every gradient after it is wrong
    without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
