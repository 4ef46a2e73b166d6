"""A step of marl beside a step of TRL's GRPOTrainer: one shape, one adapter, the same rows and tokens, each in its own process.

python benchmarks/gpu/rivals.py --device cuda --shape full --out build/gpu/rivals.json --seconds 45
python benchmarks/gpu/rivals.py --device cpu --shape tiny     # tries the part itself
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # this folder is no package
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from aside import GROUP, Piece, Work, run_all, serve
from record import Skip, parse


@dataclass(frozen=True, slots=True)
class Size:
    """What both do in a step: `prompts` prompts, `samples` responses to each."""

    shape: str
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    r: int = 16
    alpha: int = 32

    @property
    def responses(self) -> int:
        """Of a step, all in one optimizer step."""
        return self.prompts * self.samples


SIZES = {"full": Size("1b", 8, 4, 64, 64), "tiny": Size("tiny", 2, 2, 8, 12)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPE, LEARNING_RATE = "bfloat16", 1e-5
STEPS = {"full": 2, "tiny": 3}
"""Steps that are measured, after one that warms up."""
PIECES = [
    Piece("marl", "marl", 6, 25),
    Piece("trl", "trl", 7, 25),
    Piece("trl as it comes", "trl", 7, 25),
]
AGILERL = (
    "agilerl 2.58.0: its extra `llm` asks for exactly vllm 0.25.1, transformers 5.14.1, peft 0.21.0, bitsandbytes 0.49.2, liger-kernel "
    "0.8.2 and datasets 5.0.1, and the package itself for jax, tensordict 0.13.0, pygame-ce, pymunk, wandb and more: other versions "
    "than the ones measured here, and too much to carry along"
)


def load(group: str, asked: Namespace) -> Work:
    """What one process measures."""
    warnings.simplefilter("ignore")
    if group == "trl":
        with suppress(Skip):  # said where it is asked for
            _import_trl()
    _ready(asked.device)
    work = {"marl": marl, "trl": trl, "trl as it comes": trl_as_it_comes}
    return lambda name: work[name](asked)


def _ready(device: str) -> None:
    """Load what both need, and the device, before anything is asked."""
    import models  # noqa: F401
    import torch

    import marl_core.run.runner  # noqa: F401

    if device == "cuda":
        torch.zeros(1, device=device)


def _import_trl() -> None:
    try:
        from trl import GRPOTrainer  # noqa: F401
    except Exception as error:  # whatever one of its own imports raises
        raise Skip(f"trl can't be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def said(size: Size, seconds: list[float], peak: float | None, **more: Any) -> dict[str, Any]:
    """The row of one trainer."""
    step = statistics.median(seconds)
    return {
        "seconds_a_step": round(step, 4),
        "tokens_per_second": round(size.responses * size.new_tokens / step, 1),
        **({} if peak is None else {"peak_mib": round(peak, 1)}),
        **more,
        "seconds_of_steps": [round(each, 4) for each in seconds],
        "shape": size.shape,
        "prompts": size.prompts,
        "samples_per_prompt": size.samples,
        "prompt_tokens": size.prompt_tokens,
        "new_tokens": size.new_tokens,
        "dtype": DTYPE,
        "targets": "all linear layers",
        "r": size.r,
    }


def marl(asked: Namespace) -> dict[str, Any]:
    """marl with advantage grpo, no reference, no value: rollout, one scoring pass, one update."""
    import torch
    from models import alone, random_bank, random_rows, runner_on
    from timing import wait

    from marl_core.ppo.types import Prompts

    size, device = SIZES[asked.shape], asked.device
    bank = random_bank(size.shape, DTYPE, device)
    work = alone(
        "rivals",
        prompts=size.responses,
        prompt_tokens=size.prompt_tokens,
        new_tokens=size.new_tokens,
        epochs=1,
        minibatch=size.responses,
        r=size.r,
        alpha=size.alpha,
    )
    changes = {
        "policy.targets": TARGETS,
        "ppo.samples_per_prompt": size.samples,
        "ppo.learning_rate": LEARNING_RATE,
    }
    runner = runner_on(bank, work, changes)
    prompts = Prompts.of(random_rows(size.prompts, size.prompt_tokens, bank.trunk.vocabulary), 0)
    runner.check_start(prompts)
    scores = torch.randn(size.responses, generator=torch.Generator().manual_seed(0)).tolist()
    steps: list[dict[str, float]] = []
    for index in range(1 + STEPS[asked.shape]):
        if index == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runner.seconds.clear()
        wait(device)
        start = time.perf_counter()
        rollout = runner.generate(prompts)
        scored = runner.score(rollout, scores)
        runner.update(scored)
        wait(device)
        steps.append({"step": time.perf_counter() - start, **runner.seconds})
        if int(rollout.mask.sum()) != size.responses * size.new_tokens:
            raise RuntimeError(f"{int(rollout.mask.sum())} tokens were sampled, not all")
    measured = steps[1:]
    phases = {name: round(statistics.median(step[name] for step in measured), 4) for name in runner.seconds}
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return said(
        size,
        [step["step"] for step in measured],
        peak,
        phases=phases,
        does="own decode loop; log-probs once more in a scoring pass; one update; adapters and their products in float32; no recomputing "
        "of layers",
    )


def trl(asked: Namespace) -> dict[str, Any]:
    """TRL with gradient checkpointing off, as in marl's row."""
    return _trl(asked, gradient_checkpointing=False)


def trl_as_it_comes(asked: Namespace) -> dict[str, Any]:
    """TRL with its default, gradient checkpointing on."""
    return _trl(asked, gradient_checkpointing=True)


def _trl(asked: Namespace, gradient_checkpointing: bool) -> dict[str, Any]:
    _import_trl()
    import torch
    from datasets import Dataset
    from models import random_base
    from peft import LoraConfig
    from timing import wait
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from marl_core.testing import tiny_tokenizer

    size, device, steps = SIZES[asked.shape], asked.device, 1 + STEPS[asked.shape]
    begun: list[float] = []
    rewarded: list[float] = []
    ended: list[float] = []
    counts: list[int] = []
    random = torch.Generator().manual_seed(0)

    class Clock(TrainerCallback):
        """Notes when steps begin and end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Before a batch is sampled."""
            wait(device)
            begun.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """After the optimizer's step."""
            wait(device)
            ended.append(time.perf_counter())
            if len(ended) == 1 and device == "cuda":
                torch.cuda.reset_peak_memory_stats()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Costs nothing; says when sampling was over and how much was sampled."""
        wait(device)
        rewarded.append(time.perf_counter())
        counts.append(sum(len(row) for row in completion_ids))
        found: list[float] = torch.randn(len(completion_ids), generator=random).tolist()
        return found

    # byte tokens, so a text of that many letters is a prompt of that many tokens
    texts = [
        f"prompt {index:04d} begins with a long shot of rain ".ljust(256, "x") for index in range(size.prompts * steps)
    ]
    rows = Dataset.from_dict({"prompt": [text[: size.prompt_tokens] for text in texts]})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=size.responses,
            num_generations=size.samples,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            num_iterations=1,
            max_completion_length=size.new_tokens,
            generation_kwargs={"min_new_tokens": size.new_tokens},
            max_steps=steps,
            beta=0.0,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=True,
            gradient_checkpointing=gradient_checkpointing,
            use_vllm=False,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=random_base(size.shape, DTYPE, device),
            reward_funcs=reward,
            args=config,
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=size.r, lora_alpha=size.alpha, target_modules=TARGETS, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trained = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad}
        trainer.train()
    if len(ended) != steps or any(count != size.responses * size.new_tokens for count in counts):
        raise RuntimeError(f"{len(ended)} steps of {steps} ended, with {counts} tokens each")
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    seconds = [end - start for start, end in zip(begun[1:], ended[1:], strict=True)]
    sampling = [reward - start for start, reward in zip(begun[1:], rewarded[1:], strict=True)]
    return said(
        size,
        seconds,
        peak,
        phases={"generate": round(statistics.median(sampling), 4)},
        does="GRPOTrainer: transformers' generate; beta 0, so no reference; no scoring pass: one update a batch needs no old log-probs; "
        f"autocast to bfloat16, adapters in {', '.join(sorted(trained))}; gradient checkpointing "
        f"{'on, its default' if gradient_checkpointing else 'off, on is its default'}; loss {config.loss_type}",
    )


def main() -> None:
    """Measure, or serve one of them."""
    asked = parse("rivals", __doc__)
    if GROUP in os.environ:
        serve(lambda: load(os.environ[GROUP], asked))
        return
    record = run_all("rivals", PIECES, asked, lambda group: load(group, asked))
    if not asked.only:
        record.add({"name": "agilerl", "skipped": AGILERL})


if __name__ == "__main__":
    main()
