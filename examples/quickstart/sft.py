"""Stage 1: an SFT adapter that continues an opening as a short movie-review sentence, and the base merged with it."""

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from data import Review
from datasets import Dataset
from peft import PeftModel
from training import DTYPE, load_tokenizer, lora, shuffled_batches, train, trainer_settings
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # lazy exports


def train_sft(base: str, reviews: Sequence[Review], folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Train the adapter on whole reviews, each ending in EOS, all of whose tokens carry loss.

    Very short reviews are left out: a continuation should have room to say something.
    """
    tokenizer = load_tokenizer(base)
    steps, batch, seed = settings["steps"], settings["batch"], settings["seed"]
    rows = encode(reviews, tokenizer, settings["max_tokens"], settings["min_tokens"])
    rows = shuffled_batches(rows, len, batch, seed)[: steps * batch]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE),
        args=SFTConfig(**trainer_settings(folder, steps, batch, settings["learning_rate"], seed)),
        train_dataset=Dataset.from_dict({"input_ids": rows}),  # tokenized here, so that EOS is there for certain
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )
    check_eos_is_learnt(trainer, tokenizer.eos_token_id)
    train(trainer, folder, "SFT adapter")
    return {"reviews": len(rows)}


def merge(base: str, adapter: Path, folder: Path, heldout: Sequence[Review]) -> dict[str, float]:
    """Fold the adapter into the base in float32 and save the result: the one base of all later stages.

    Stage 2 trains the reward adapter on exactly these weights and stage 3 runs on them, because an adapter means
    nothing on other weights than those it was trained on. float32 first, because merging in bfloat16 rounds.
    """
    tokenizer = load_tokenizer(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = perplexity(deepcopy(model).to(DTYPE), tokenizer, heldout)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    for config in (merged.config, merged.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"perplexity_before": before, "perplexity_after": perplexity(merged.to(DTYPE), tokenizer, heldout)}


def encode(reviews: Sequence[Review], tokenizer: Any, max_tokens: int, min_tokens: int = 1) -> list[list[int]]:
    """Token ids of each review and EOS; longer ones are left out (a cut review has no end to learn), shorter ones too."""
    rows = [[*tokenizer.encode(review.text, add_special_tokens=False), tokenizer.eos_token_id] for review in reviews]
    return [row for row in rows if min_tokens <= len(row) <= max_tokens]


def check_eos_is_learnt(trainer: SFTTrainer, eos: int) -> None:
    """Fail early if the collator took EOS for padding: such a model never learns to stop."""
    rows: Any = trainer.train_dataset
    examples = [rows[0], rows[len(rows) - 1]]
    labels = trainer.data_collator(examples)["labels"]
    if not bool((labels == eos).any(dim=1).all()):
        raise AssertionError("EOS carries no loss: the padding token must differ from EOS.")


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, reviews: Sequence[Review], batch: int = 32) -> float:
    """exp of the mean negative log-likelihood per token, EOS included, the first token of a text excluded."""
    model.eval()
    rows, total, count = sorted(encode(reviews, tokenizer, 64), key=len), 0.0, 0
    for start in range(0, len(rows), batch):
        chunk = [torch.tensor(row) for row in rows[start : start + batch]]
        ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=-100)
        mask = ids != -100
        logits = model(input_ids=ids.where(mask, 0), attention_mask=mask.long()).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + int(mask[:, 1:].sum())
    return math.exp(total / count)
