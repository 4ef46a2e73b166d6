"""What the arms are made of: the quickstart's adapters, and the reward adapter once more as a model of its own.

An adapter's scores mean something on the weights it was trained on only, and the arms' bases differ. As a model of its own,
with its own tokenizer, the reward is the same function in all arms.
"""

from pathlib import Path

from arms import Inputs
from quickstart_parts import Stage, make_story, run_stage


def make_inputs(folder: Path, model: str | None, fast: bool) -> Inputs:
    """All ingredients, made once."""
    story = make_story(model, fast)
    merged, reward = story.merged(), story.reward()

    def build(out: Path) -> dict[str, float]:
        return merge_reward(merged.folder, reward.folder, out)

    stage = Stage(
        "The reward adapter as a model of its own",
        folder / "reward-model",
        {"reward": reward.key},
        build,
        lambda result: f"largest difference from the adapter's own scores: {result['difference']:.1e}",
    )
    run_stage(stage)
    return Inputs(
        raw=story.model,
        sft=str(story.sft().folder),
        merged=str(merged.folder),
        reward=str(reward.folder),
        reward_model=str(stage.folder),
        prompts=str(story.inputs / "prompts.jsonl"),
        heldout=str(story.inputs / "heldout.jsonl"),
    )


def merge_reward(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Fold the reward adapter into the classifier in float32 and save both halves; how far its scores moved."""
    import torch
    from peft import PeftModel
    from training import load_tokenizer
    from transformers import AutoModelForSequenceClassification

    def classifier() -> object:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        return PeftModel.from_pretrained(model, str(adapter)).eval()

    tokenizer = load_tokenizer(adapter)
    ids = tokenizer("A great film, one of the best of the year.", return_tensors="pt").input_ids
    with torch.no_grad():
        before = classifier()(input_ids=ids).logits  # type: ignore[operator]
        model = classifier().merge_and_unload(safe_merge=True)  # type: ignore[attr-defined]
        model.config.pad_token_id = tokenizer.pad_token_id
        after = model(input_ids=ids).logits
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"difference": float((before - after).abs().max())}
