"""Silence, by name, what libraries print on every run and is known and harmless here."""

from __future__ import annotations

import logging
import warnings

LOGGERS = (
    "bitsandbytes",  # a CPU kernel for 4-bit weights is missing: the plain one is used
    "transformers.distributed.tensor_parallel",  # "layers were not sharded": there is one process
    "torchao",  # kernels for other machines; peft imports it wherever it is installed
    "torch.utils._pytree",  # torchao registers its enums in a way that torch will give up
)
WARNINGS = (
    (r".*is_gradient_checkpointing.*", FutureWarning),  # transformers renamed a property that peft still reads
    (r".*MatMul8bitLt: inputs will be cast.*", UserWarning),  # once for each int8 layer
)


def quiet_libraries() -> None:
    """For the command line: a run's output should be the run's. Call before transformers loads anything."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR if name != "bitsandbytes" else logging.CRITICAL)
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
