"""Two policies on one base in memory, trained in turn: one becomes cheerful, the other gloomy.

`python examples/two_policies/two_policies.py`; further arguments are `section.key=value` for both configs.
"""

import sys
from pathlib import Path

from marl_core import Prompts, Runner, load_config

HERE = Path(__file__).parent
MOODS = ("cheerful", "gloomy")
OPENINGS = ("The second half of the film", "My friends and I", "The old captain in the story")


def main(sets: list[str]) -> None:
    """Train both, then let both go on with the same openings."""
    configs = {mood: load_config(HERE / f"{mood}.yaml", sets=sets) for mood in MOODS}
    first = Runner(configs["cheerful"], policy="cheerful")
    second = Runner(configs["gloomy"], policy="gloomy", bank=first.bank)  # the same base: only an adapter more
    show_memory(first)
    for one, other in zip(first.steps(), second.steps(), strict=True):
        print(f"step {one.step:2}   cheerful {one.reward_mean:+.3f}   gloomy {other.reward_mean:+.3f}", flush=True)
    tokenizer = first.bank.tokenizer
    prompts = Prompts.of([tokenizer(text).input_ids for text in OPENINGS], tokenizer.pad_token_id, texts=OPENINGS)
    for mood, runner in zip(MOODS, (first, second), strict=True):
        runner.save()
        for prompt, text in zip(OPENINGS, runner.generate(prompts).texts, strict=True):
            print(f"{mood}: {prompt}", *text.split())


def show_memory(runner: Runner) -> None:
    """Megabytes of the base, and of each adapter on it."""
    sizes = {name: sum(t.nbytes for t in runner.bank.tensors(name).values()) / 1e6 for name in runner.bank.adapters}
    base = sum(p.nbytes for name, p in runner.bank.base.named_parameters() if "lora_" not in name) / 1e6
    print(f"in memory: base {base:.1f} MB, " + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
