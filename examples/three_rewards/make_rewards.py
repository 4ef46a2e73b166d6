"""Train one judge of film reviews and save it twice: as an adapter on the base, and as a separate model.

Both give the same scores up to rounding; what differs is what a run holds in memory. The quickstart's stages do the work.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
FOLDER = Path("runs/three_rewards-inputs")
SETTINGS: dict[str, Any] = {"batch": 8, "learning_rate": 3e-4, "max_tokens": 48, "cut_share": 0.5, "seed": 0}
GOLDEN = ("A great film, one of the best of the year.", "A dull film, one of the worst of the year.", "It is a film.")


def main(
    model: Annotated[str | None, typer.Option(help="Hub name or folder of another base.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 100,
    pairs: Annotated[int, typer.Option(help="Held-out pairs to test on.")] = 200,
) -> None:
    """Write adapter/ and model/ below runs/three_rewards-inputs."""
    from data import preference_pairs, read_reviews, split
    from fetch import fetch_model, fetch_text
    from quiet import quiet
    from reward import finish, train_reward

    quiet()
    base, parts = Path(fetch_model(model)), split(read_reviews(fetch_text()))
    wanted = preference_pairs(parts["train"], steps * SETTINGS["batch"] * 3 // 2, SETTINGS["seed"])
    train_reward(base, wanted, FOLDER / "adapter", SETTINGS | {"steps": steps})
    result = finish(base, FOLDER / "adapter", preference_pairs(parts["eval"], pairs, seed=0), GOLDEN)
    merge(base, FOLDER / "adapter", FOLDER / "model")
    print(f"held-out pairwise accuracy {result['accuracy']:.3f} on {result['tested']} pairs")
    for name in ("adapter", "model"):
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        print(f"{FOLDER / name}: {size / 1e6:.1f} MB")


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """The adapter folded into its base, in float32, as a sequence-classification model that needs neither."""
    import torch
    from peft import PeftModel
    from training import load_tokenizer
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(adapter)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
