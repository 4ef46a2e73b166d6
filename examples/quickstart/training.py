"""What both TRL stages share: model and tokenizer, LoRA, trainer settings, a progress bar, tidy outputs."""

import random
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import RewardTrainer, SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # lazy exports

CHECKPOINTING = next(  # its name since transformers 5.2x, and the one before
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in signature(SFTConfig).parameters
)
DTYPE = torch.bfloat16  # of the frozen base; adapters and heads stay in float32


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer, with a padding token that is not the end-of-sequence token.

    With pad == eos nobody can tell the end of a text from padding: a collator that masks padding never teaches the
    model to stop, and a classifier reads its score one token too early.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [tokenizer.unk_token, *tokenizer.all_special_tokens]
        free = [token for token in others if token not in (None, tokenizer.eos_token, tokenizer.bos_token)]
        if not free:
            raise ValueError(f"The tokenizer of {path} has no special token besides EOS to pad with: choose another.")
        tokenizer.pad_token = free[0]
    return tokenizer


def lora(task_type: str) -> LoraConfig:
    """LoRA r=16 on every linear layer of the trunk."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task_type)


def trainer_settings(folder: Path, steps: int, batch: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """The arguments that `SFTConfig` and `RewardConfig` have in common."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 20),
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "sequential",  # `shuffled_batches` has shuffled already
        "seed": seed,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        CHECKPOINTING: False,
        "pad_to_multiple_of": 8,  # few different shapes: CPU kernels are prepared once for each
        "use_cpu": not torch.cuda.is_available(),
        "max_length": None,
    }


def shuffled_batches(rows: Sequence[Any], length: Any, batch: int, seed: int) -> list[Any]:
    """Rows in batches of similar length (less padding), the batches in random order."""
    ordered = sorted(rows, key=length)
    batches = [ordered[start : start + batch] for start in range(0, len(ordered) - batch + 1, batch)]
    random.Random(seed).shuffle(batches)
    return [row for one in batches for row in one]


def train(trainer: SFTTrainer | RewardTrainer, folder: Path, label: str) -> None:
    """Train with a progress bar; leave the adapter and the tokenizer in `folder`, and no pickle."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bar(label))
    trainer.train()
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)
    (folder / "README.md").unlink(missing_ok=True)


class Bar(TrainerCallback):
    """A progress bar with loss and estimated time left."""

    def __init__(self, label: str) -> None:
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")
        self.progress = Progress(
            TextColumn("{task.description}"), *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        )
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.label, total=state.max_steps, loss="-")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
