"""The whole story in one command: text -> SFT adapter -> reward adapter on the merged base -> PPO -> before and after.

`make quickstart` runs this. Finished stages are skipped; an interrupted PPO run is resumed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from data import Parts, preference_pairs, read_reviews, split, write_prompts
from fetch import fetch_model, fetch_text
from ppo import run_ppo
from quiet import quiet
from stages import Stage, console, headline, run_stage
from table import show

from marl_core.errors import MarlError

FULL: dict[str, Any] = {
    "sft": {"steps": 120, "batch": 8, "learning_rate": 4e-4, "max_tokens": 48, "min_tokens": 18},
    "reward": {"steps": 150, "batch": 8, "learning_rate": 3e-4, "max_tokens": 48, "cut_share": 0.5},
    "tested_pairs": 500,
    "tested_reviews": 256,
    "heldout_prompts": 128,
}
FAST: dict[str, Any] = {  # proves that the parts fit together, and nothing else
    "sft": FULL["sft"] | {"steps": 3},
    "reward": FULL["reward"] | {"steps": 3},
    "tested_pairs": 32,
    "tested_reviews": 16,
    "heldout_prompts": 8,
}
GOLDEN = ("A great film, one of the best of the year.", "A dull film, one of the worst of the year.", "It is a film.")


@dataclass(frozen=True, slots=True)
class Story:
    """Everything the stages share."""

    model: str
    parts: Parts
    settings: dict[str, Any]
    seed: int
    inputs: Path  # folder of stages 1 and 2

    def sft(self) -> Stage:
        """Stage 1a: the SFT adapter."""

        def build(folder: Path) -> dict[str, float]:
            from sft import train_sft

            return train_sft(self.model, self.parts["train"], folder, settings)

        settings = self.settings["sft"] | {"seed": self.seed}
        return Stage(
            "Stage 1: SFT adapter on review snippets",
            self.inputs / "sft",
            settings | {"model": self.model},
            build,
            lambda result: f"trained on {result['reviews']:.0f} snippets, each ending in EOS",
        )

    def merged(self) -> Stage:
        """Stage 1b: base and SFT adapter merged, the one base of all that follows."""

        def build(folder: Path) -> dict[str, float]:
            from sft import merge

            return merge(self.model, self.sft().folder, folder, self.parts["eval"][:count])

        count = self.settings["tested_reviews"]
        return Stage(
            "Merge it into the base, in float32: the base of all that follows",
            self.inputs / "merged",
            {"sft": self.sft().key, "tested": count},
            build,
            lambda result: (
                f"perplexity on {count} held-out snippets: "
                f"{result['perplexity_before']:.1f} -> {result['perplexity_after']:.1f}"
            ),
        )

    def reward(self) -> Stage:
        """Stage 2: the reward adapter, trained on exactly the weights that PPO will use."""
        settings = self.settings["reward"] | {"seed": self.seed}
        tested = self.settings["tested_pairs"]

        def build(folder: Path) -> dict[str, float]:
            from reward import finish, train_reward

            wanted = settings["steps"] * settings["batch"] * 3 // 2  # long reviews will be left out
            pairs = preference_pairs(self.parts["train"], wanted, self.seed)
            result = train_reward(self.merged().folder, pairs, folder, settings)
            heldout = preference_pairs(self.parts["eval"], tested, seed=0)
            return result | finish(self.merged().folder, folder, heldout, GOLDEN)

        return Stage(
            "Stage 2: reward adapter on the merged base",
            self.inputs / "reward",
            settings | {"merged": self.merged().key, "tested": tested},
            build,
            lambda result: f"held-out pairwise accuracy {result['accuracy']:.3f} on {result['tested']:.0f} pairs",
        )

    def ppo_settings(self) -> dict[str, Any]:
        """Keys of ppo.yaml that depend on what was made here."""
        return {
            "model.path": self.model,
            "reference.adapter": self.sft().folder,  # merged into the base at load, in float32: the same weights again
            "reward.path": self.reward().folder,
            "data.prompts": self.inputs / "prompts.jsonl",
            "eval.prompts": self.inputs / "heldout.jsonl",
            "run.seed": self.seed,
        }


def main(
    model: Annotated[str | None, typer.Option(help="Hub name or folder of another model.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of all stages.")] = 0,
    steps: Annotated[int | None, typer.Option(help="PPO steps instead of ppo.yaml's.", show_default=False)] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps of each stage, to see that it works.")] = False,
) -> None:
    """SFT adapter, reward adapter and PPO on one base; then a table of before and after."""
    run = Path("runs/quickstart-fast" if fast else "runs/quickstart")
    try:
        code = tell(run, model, seed, 2 if fast and steps is None else steps, FAST if fast else FULL)
    except MarlError as error:
        console.print(f"[red]quickstart:[/] {error}", soft_wrap=True)
        code = error.exit_code
    raise typer.Exit(code)


def tell(run: Path, model: str | None, seed: int, steps: int | None, settings: dict[str, Any]) -> int:
    """The story from start to end; returns the exit code."""
    quiet()
    headline("Fetch model and text (once)")
    parts = split(read_reviews(fetch_text()))
    story = Story(fetch_model(model), parts, settings, seed, run.with_name(f"{run.name}-inputs"))
    shares = ", ".join(f"{len(rows)} snippets for {name}" for name, rows in parts.items())
    console.print(f"{story.model}; {shares}", soft_wrap=True)
    for stage in (story.sft(), story.merged(), story.reward()):
        run_stage(stage)
    prepare_prompts(story)
    code = run_ppo(run, story.ppo_settings() | ({} if steps is None else {"ppo.steps": steps}), story.reward().key)
    if code == 0:
        headline("Before and after")
        show(run, console)
    return code


def prepare_prompts(story: Story) -> None:
    """Write the openings for PPO and for the table; identical when written again."""
    from training import load_tokenizer

    count = story.settings["heldout_prompts"]
    trained, tested = write_prompts(story.inputs, story.parts, load_tokenizer(story.merged().folder), count)
    console.print(f"prompts: {trained} openings for PPO, {tested} held-out ones for the table, none in both")


if __name__ == "__main__":
    typer.run(main)
