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
from trl import RewardConfig, RewardTrainer

from marl_core.bank.certificate import write_certificate

def train_reward(base: Path, pairs: Sequence[Pair], folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Train the adapter and its score head.

    A whole review ends in EOS, as TRL trains it. Some of the longer ones are cut after 16 to 28 tokens and then have no
    EOS, because PPO will also show the reward responses that ran into the length limit.
    """
    tokenizer = load_tokenizer(base)
    steps, batch, seed = settings["steps"], settings["batch"], settings["seed"]
    rows = encode_pairs(pairs, tokenizer, settings["max_tokens"], settings["cut_share"], seed)
    rows = shuffled_batches(rows, lambda row: max(map(len, row)), batch, seed)[: steps * batch]
    model = load_classifier(base)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trainer_settings(folder, steps, batch, settings["learning_rate"], seed)),
        train_dataset=Dataset.from_dict({"chosen_ids": [row[0] for row in rows], "rejected_ids": [row[1] for row in rows]}),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "score" in name:
            parameter.data = parameter.data.float()  # bfloat16 would round the head's small updates away
    train(trainer, folder, "Reward adapter")
    return {"pairs": len(rows)}


def finish(base: Path, folder: Path, pairs: Sequence[Pair], golden: Sequence[str]) -> dict[str, float]:
    """Test the saved adapter on held-out pairs, read back as transformers reads it, and certify its base and reading."""
    accuracy = pair_accuracy(load_classifier(base, folder), pairs, load_tokenizer(folder))
    write_certificate(folder, base, golden)
    return {"accuracy": accuracy, "tested": len(pairs)}


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, max_tokens: int, cut_share: float, seed: int) -> list[Any]:
    """(chosen ids, rejected ids) of each pair; reviews over `max_tokens` are left out."""
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        keep = rng.randint(16, 28)
        return ids[:keep] if keep < len(ids) and rng.random() < cut_share else [*ids, tokenizer.eos_token_id]

    rows = [(encode(pair.chosen.text), encode(pair.rejected.text)) for pair in pairs]
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
