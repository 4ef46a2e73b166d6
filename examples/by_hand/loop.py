"""PPO step by step in your own loop: generate, score with numbers of your own, update. No data file, no reward strategy.

`python examples/by_hand/loop.py`; arguments: `--model FOLDER_OR_HUB_NAME`, `--steps N`.
"""

import argparse
from typing import Any

from marl_core import Prompts, RunConfig, Runner
from marl_plugins.reference import DisabledAdapter

QUESTIONS = (
    "Is the sky blue?",
    "Do fish live in water?",
    "Is fire cold?",
    "Can dogs fly?",
    "Is ice warm?",
    "Is a lemon sour?",
    "Do cats bark?",
    "Is the moon far away?",
)


def yes_or_no(completions: list[str], **columns: Any) -> list[float]:
    """1.0 for an answer that begins with Yes or No."""
    return [float(text.strip().startswith(("Yes", "No"))) for text in completions]


def main(model: str, steps: int) -> None:
    """Teach the model to begin its answer with Yes or No."""
    config = RunConfig(
        model={"path": model},
        reference=DisabledAdapter(),
        reward=yes_or_no,  # what `score` would use without scores of your own
        sampling={"max_new_tokens": 8},
        ppo={
            "batch": 32,
            "samples_per_prompt": 4,
            "minibatch": 16,
            "epochs": 2,
            "learning_rate": 2e-4,
            "advantage": "rloo",
        },
    )
    runner = Runner(config)
    tokenizer = runner.bank.tokenizer
    texts = [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    prompts = Prompts.of([tokenizer(text).input_ids for text in texts], tokenizer.pad_token_id, texts=texts)

    for step in range(1, steps + 1):
        rollout = runner.generate(prompts)  # four answers to each question
        scores = yes_or_no(rollout.texts)  # yours: from a person, a game, a test bench
        scored = runner.score(rollout, scores)  # log-probs of policy and reference beside them
        update = runner.update(scored)  # ends the step
        share, text = sum(scores) / len(scores), " ".join(rollout.texts[0].split())
        print(f"step {step:2}   yes or no {share:.3f}   approx_kl {update.approx_kl:.4f}   {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=12)
    main(**vars(parser.parse_args()))
