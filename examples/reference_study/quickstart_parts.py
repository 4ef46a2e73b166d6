"""What the study takes from the quickstart: its stages (SFT adapter, reward adapter, prompts) and the VADER judge."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))  # its modules import each other by plain names

from data import read_reviews, split
from fetch import fetch_model, fetch_text
from judges import vader, vader_positive
from quickstart import FAST, FULL, Story, prepare_prompts
from quiet import quiet
from stages import Stage, console, headline, run_stage

__all__ = ["Stage", "console", "headline", "make_story", "reviews_of", "run_stage", "vader", "vader_positive"]


def make_story(model: str | None, fast: bool) -> Story:
    """The quickstart's first two stages, made now unless they are there: SFT adapter, merged base, reward adapter."""
    quiet()
    inputs = Path("runs/quickstart-fast-inputs" if fast else "runs/quickstart-inputs")
    story = Story(fetch_model(model), split(read_reviews(fetch_text())), FAST if fast else FULL, 0, inputs)
    for stage in (story.sft(), story.merged(), story.reward()):
        run_stage(stage)
    prepare_prompts(story)
    return story


def reviews_of(part: str, count: int) -> list[str]:
    """The first texts of one part of the snippets."""
    return [review.text for review in split(read_reviews(fetch_text()))[part][:count]]
