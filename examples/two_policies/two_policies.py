"""Two policies on one base in memory, trained in turn: one learns to use long words, the other short ones.

`python examples/two_policies/two_policies.py`; further arguments are `section.key=value` for both configs.
"""

import sys
from pathlib import Path

from marl_core import Prompts, Runner, load_config

HERE = Path(__file__).parent
POLICIES = ("long_words", "short_words")
OPENINGS = ("The second half of the film", "My friends and I", "The old captain in the story")


def main(sets: list[str]) -> None:
    """Train both, then let both go on with the same openings."""
    configs = {name: load_config(HERE / f"{name}.yaml", sets=sets) for name in POLICIES}
    first = Runner(configs["long_words"], policy="long_words")
    second = Runner(
        configs["short_words"], policy="short_words", bank=first.bank
    )  # the same base: only an adapter more
    show_memory(first)
    for one, other in zip(first.steps(), second.steps(), strict=True):
        print(
            f"step {one.step:2}   long words {one.reward_mean:+.3f}   short words {other.reward_mean:+.3f}", flush=True
        )
    tokenizer = first.bank.tokenizer
    prompts = Prompts.of([tokenizer(text).input_ids for text in OPENINGS], tokenizer.pad_token_id, texts=OPENINGS)
    for name, runner in zip(POLICIES, (first, second), strict=True):
        runner.train()  # no step is left: writes the final adapter
        for prompt, text in zip(OPENINGS, runner.generate(prompts).texts, strict=True):
            print(f"{name}: {prompt}", *text.split())


def show_memory(runner: Runner) -> None:
    """Megabytes of the base, and of each adapter on it."""
    sizes = {name: sum(t.nbytes for t in runner.bank.tensors(name).values()) / 1e6 for name in runner.bank.adapters}
    base = sum(p.nbytes for name, p in runner.bank.base.named_parameters() if "lora_" not in name) / 1e6
    print(f"in memory: base {base:.1f} MB, " + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
