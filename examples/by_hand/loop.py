"""PPO step by step in your own loop: generate, score with numbers of your own, learn. No data file, no reward in the config.

`python examples/by_hand/loop.py`; arguments: `--model FOLDER_OR_HUB_NAME`, `--steps N`, `--folder RUN`.
"""

import argparse

from marl_core import RunConfig, Runner
from marl_plugins import DisabledAdapter

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


def yes_or_no(texts: list[str]) -> list[float]:
    """1.0 for an answer that begins with Yes or No."""
    return [float(text.strip().startswith(("Yes", "No"))) for text in texts]


def main(model: str, steps: int, folder: str) -> None:
    """Teach the model to begin its answer with Yes or No."""
    config = RunConfig(
        model={"path": model},
        reference=DisabledAdapter(),
        sampling={"max_new_tokens": 8},
        ppo={
            "steps": steps,
            "batch": 32,
            "samples_per_prompt": 4,
            "minibatch": 16,
            "epochs": 2,
            "learning_rate": 2e-4,
            "advantage": "rloo",
        },
        run={"folder": folder},  # steps.jsonl and samples.jsonl are written there, and the report is made of them
    )
    prompts = [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    with Runner(config) as runner:  # the end writes the final adapter
        for step in range(1, steps + 1):
            rollout = runner.generate(prompts)  # four answers to each question
            scores = yes_or_no(list(rollout.texts))  # yours: from a person, a game, a test bench
            stats = runner.step(rollout=rollout, scores=scores)  # log-probs of policy and reference, advantages, update
            text = " ".join(rollout.texts[0].split())
            print(
                f"step {step:2}   yes or no {stats.reward_mean:.3f}   KL {stats.kl_nats:6.3f}   "
                f"approx_kl {stats['policy/approx_kl']:.4f}   {text}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", default="runs/by-hand")
    main(**vars(parser.parse_args()))
