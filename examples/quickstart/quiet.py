"""Silence, by name, what libraries say that is known and harmless here."""

import logging
import warnings

LOGGERS = (
    "bitsandbytes",  # a CPU kernel for 4-bit weights is missing: no such weights here
    "transformers.modeling_utils",  # stage 2's score head is new: of course it is
    "transformers.distributed.tensor_parallel",  # "layers were not sharded": there is one process
)


def quiet() -> None:
    """Call before transformers is imported; training keeps its own progress bar."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
