"""Stage 2: a reward adapter on the merged base, from pairs of reviews that people rated differently."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import Pair
from datasets import Dataset
from peft import PeftModel
from training import DTYPE, load_tokenizer, lora, shuffled_batches, train, trainer_settings
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer  # type: ignore[attr-defined]  # lazy exports

from marl_core import write_certificate


def train_reward(base: Path, pairs: Sequence[Pair], folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Train the adapter and its score head.

    A whole review ends in EOS, as TRL trains it. Others are cut after 12 to 24 tokens and then have no EOS, because PPO
    will also show the reward responses that ran into the length limit.
    """
    tokenizer = load_tokenizer(base)
    steps, batch, seed = settings["steps"], settings["batch"], settings["seed"]
    rows = encode_pairs(pairs, tokenizer, settings["max_tokens"], settings["cut_share"], seed)
    rows = shuffled_batches(rows, lambda row: max(map(len, row)), batch, seed)[: steps * batch]
    trainer = RewardTrainer(
        model=load_classifier(base),
        args=RewardConfig(**trainer_settings(folder, steps, batch, settings["learning_rate"], seed)),
        train_dataset=Dataset.from_list(
            [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in rows]
        ),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    model: Any = trainer.model
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "score" in name:
            parameter.data = parameter.data.float()  # bfloat16 would round the head's small updates away
    train(trainer, folder, "Reward adapter")
    return {"pairs": len(rows)}


def finish(base: Path, folder: Path, pairs: Sequence[Pair], golden: Sequence[str]) -> dict[str, float]:
    """Test the saved adapter on held-out pairs through transformers' own classifier; certify its base and reading."""
    model, tokenizer = load_classifier(base, folder), load_tokenizer(folder)
    model.config.pad_token_id = tokenizer.pad_token_id  # the base may name another: the classifier would read padding
    accuracy = pair_accuracy(model, pairs, tokenizer)
    write_certificate(folder, base, golden)
    return {"accuracy": accuracy, "tested": len(pairs)}


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, max_tokens: int, cut_share: float, seed: int) -> list[Any]:
    """(chosen ids, rejected ids) of each pair; reviews over `max_tokens` are left out.

    Of the pairs in `cut_share`, two thirds are cut on both sides (which of two unfinished texts is better?), and one
    third on one side (so that ending a text is no merit and no fault by itself).
    """
    rng = random.Random(seed)
    kinds = [(False, False), (True, True), (True, False), (False, True)]  # which sides are cut
    weights = [1 - cut_share, cut_share * 2 / 3, cut_share / 6, cut_share / 6]
    rows = []
    for pair in pairs:
        kind, keep = rng.choices(kinds, weights)[0], rng.randint(12, 24)
        texts = [tokenizer.encode(review.text, add_special_tokens=False) for review in (pair.chosen, pair.rejected)]
        ends = [ids[:keep] if cut else [*ids, tokenizer.eos_token_id] for ids, cut in zip(texts, kind, strict=True)]
        rows.append(ends)
    return [row for row in rows if max(map(len, row)) <= max_tokens]


def load_classifier(base: Path, adapter: Path | None = None) -> Any:
    """transformers' own classifier on `base`, with the reward adapter if there is one yet."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=DTYPE)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.no_grad()
def scores(model: Any, rows: Sequence[Sequence[int]], pad: int, batch: int = 32) -> list[float]:
    """The reward of each row of token ids."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    result = [0.0] * len(rows)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        width = max(len(rows[index]) for index in chosen)
        ids = torch.tensor([[*rows[index], *[pad] * (width - len(rows[index]))] for index in chosen])
        rewards = model(input_ids=ids, attention_mask=(ids != pad).long()).logits.squeeze(-1).float()
        for index, reward in zip(chosen, rewards.tolist(), strict=True):
            result[index] = reward
    return result


def pair_accuracy(model: Any, pairs: Sequence[Pair], tokenizer: Any, cut: int | None = None) -> float:
    """Share of pairs whose better review scores higher; with `cut`, of their first `cut` tokens without EOS."""
    end = [tokenizer.eos_token_id] if cut is None else []
    texts = [review.text for pair in pairs for review in (pair.chosen, pair.rejected)]
    rows = [[*tokenizer.encode(text, add_special_tokens=False)[:cut], *end] for text in texts]
    values = scores(model, rows, tokenizer.pad_token_id)
    return sum(good > bad for good, bad in zip(values[::2], values[1::2], strict=True)) / len(pairs)
