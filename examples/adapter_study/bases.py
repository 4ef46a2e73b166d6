"""What all runs stand on, made by script: a tiny language model that writes snippets of reviews and adds digits, and a judge.

The base is a Llama of four layers, trained here from nothing on the review snippets of the quickstart and on sums. Half of the sums are
solved by their running totals (`7+5+8+6=12,20,26`); the other half only guess at the last one and are mostly wrong (`7+5+8+6=27`). So the
base can do more than it does, and that is there for PPO to find. The reward model is the same network with a score head, trained on
people's ratings of the snippets. Nothing is fetched but the snippets, and on one machine the same weights come out each time.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))  # its modules import each other by plain names

import pissa
from data import Review, openings, read_reviews, split, write_jsonl
from fetch import fetch_text

WIDTH, LAYERS, HEADS, VOCABULARY, ROOM = 128, 4, 4, 1024, 64
BATCH, BASE_STEPS, REWARD_STEPS = 64, 1500, 300
SUMS_TRAINED, PROMPTS, HELDOUT = 20_000, 600, 128
TERMS = (4, 6)  # numbers of a sum, fewest and most
GUESS = 3  # a guess is off by at most this


@dataclass(frozen=True, slots=True)
class Bases:
    """Where the ingredients are."""

    folder: Path

    @property
    def base(self) -> Path:
        """The language model that every role but the reward stands on."""
        return self.folder / "base"

    @property
    def reward(self) -> Path:
        """The classifier that scores snippets: a model of its own, so that it is the same function for every arm."""
        return self.folder / "reward"

    def prepared(self, name: str) -> Path:
        """A base of a kind's own (`base`), and the adapter that makes the study's base of it (`adapter`)."""
        return self.folder / name

    def prompts(self, task: str) -> Path:
        """What PPO trains on."""
        return self.folder / f"{task}-prompts.jsonl"

    def heldout(self, task: str) -> Path:
        """What nothing was ever trained on."""
        return self.folder / f"{task}-heldout.jsonl"


def make_bases(folder: str, base_steps: int = BASE_STEPS, reward_steps: int = REWARD_STEPS) -> dict[str, float]:
    """Make what isn't there yet; the processor's seconds. A part has its name when it is whole."""
    started = time.process_time()
    bases = Bases(Path(folder))
    bases.folder.mkdir(parents=True, exist_ok=True)
    parts = split(read_reviews(fetch_text()))
    trained, prompts, heldout = sums()
    if not bases.base.is_dir():
        whole(bases.base, lambda out: train_base(out, [one.text for one in parts["train"]], trained, base_steps))
    if not bases.reward.is_dir():
        whole(bases.reward, lambda out: train_reward(out, bases.base, parts["train"], reward_steps))
    if not bases.prepared("pissa").is_dir():
        whole(bases.prepared("pissa"), lambda out: pissa.convert(out, bases.base))
    if not bases.prompts("reviews").is_file():
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(bases.base)
        tested = openings(parts["eval"], tokenizer)[:HELDOUT]
        write_jsonl(bases.heldout("reviews"), tested)
        rows = openings(parts["prompts"], tokenizer, avoid=[row["prompt"] for row in tested])
        write_jsonl(bases.prompts("reviews"), rows[:PROMPTS])
    write_jsonl(bases.heldout("sums"), [{"prompt": one, "answer": answer(one)} for one in heldout])
    write_jsonl(bases.prompts("sums"), [{"prompt": one, "answer": answer(one)} for one in prompts])
    return {"cpu_seconds": round(time.process_time() - started, 1)}


def whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder that has its name when it is whole."""
    draft = folder.with_name(f".{folder.name}.draft")
    make(draft)
    draft.rename(folder)


def sums() -> tuple[list[str], list[str], list[str]]:
    """Questions such as `7+5+8+6=`: for the base, for PPO, held out. None is in two of them."""
    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < SUMS_TRAINED + PROMPTS + HELDOUT:
        found["+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(*TERMS))) + "="] = None
    questions = list(found)
    return questions[PROMPTS + HELDOUT :], questions[HELDOUT : PROMPTS + HELDOUT], questions[:HELDOUT]


def totals(question: str) -> list[int]:
    """The running totals of a sum, from the second number on."""
    numbers = [int(number) for number in question.rstrip("=").split("+")]
    return [sum(numbers[: count + 1]) for count in range(1, len(numbers))]


def answer(question: str) -> int:
    """The last total."""
    return totals(question)[-1]


def solved(question: str) -> str:
    """A question with its running totals."""
    return question + ",".join(map(str, totals(question)))


def guessed(question: str, rng: random.Random) -> str:
    """A question with a guess at its last total."""
    return question + str(answer(question) + rng.randint(-GUESS, GUESS))


def train_base(out: Path, reviews: Sequence[str], questions: Sequence[str], steps: int) -> None:
    """Tokenizer and language model, from batches of as many snippets as solved sums and guesses."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(reviews), eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=2 * ROOM,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [[*tokenizer.encode(text)[: ROOM - 1], tokenizer.eos_token_id] for text in texts]

    rng = random.Random(0)
    pools = [
        encoded(reviews),
        encoded([solved(question) for question in questions]),
        encoded([guessed(question, rng) for question in questions]),
    ]

    def batches() -> Iterator[Any]:
        for _ in range(steps):
            yield [padded(rng.choices(pool, k=BATCH // 2), tokenizer.pad_token_id) for pool in pools]

    def loss(parts: Any) -> Any:
        """The mean of the parts' losses; each in a pass of its own, because snippets are the longest by far."""
        labels = [ids.masked_fill(ids == tokenizer.pad_token_id, -100) for ids in parts]
        return sum(
            model(input_ids=ids, attention_mask=(marked != -100).long(), labels=marked).loss / len(parts)
            for ids, marked in zip(parts, labels, strict=True)
        )

    learn(model, batches(), loss, steps, 3e-3)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def padded(rows: Sequence[Sequence[int]], pad: int) -> Any:
    """Rows of tokens as one tensor [rows, longest] int64, padded on the right."""
    import torch

    ids = torch.full((len(rows), max(map(len, rows))), pad)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    return ids


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE; each digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_reward(out: Path, base: Path, reviews: Sequence[Review], steps: int) -> None:
    """The base with a score head, trained on mean ratings in [-4, 4], halved; prefixes of snippets too, as PPO's are cut off."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    set_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    rows = [(tokenizer.encode(review.text)[:ROOM], review.rating / 2) for review in reviews]
    rng = random.Random(0)

    def batches() -> Iterator[Any]:
        for _ in range(steps):
            drawn = rng.sample(rows, BATCH)
            cut = [(ids[: rng.randint(12, ROOM)], rating) for ids, rating in drawn]
            ids = padded([row for row, _ in cut], tokenizer.pad_token_id)
            yield ids, torch.tensor([rating for _, rating in cut])

    def loss(batch: Any) -> Any:
        ids, ratings = batch
        scores = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits.squeeze(-1)
        return torch.nn.functional.mse_loss(scores, ratings)

    learn(model, batches(), loss, steps, 5e-4)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def learn(model: Any, batches: Iterator[Any], loss_of: Callable[[Any], Any], steps: int, rate: float) -> None:
    """AdamW, the rate rising over the first twentieth and then falling along a cosine; the mean loss of each tenth is printed."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    told = []
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        told.append(loss.item())
        if step % max(1, steps // 10) == 0:
            print(json.dumps({"step": step, "loss": round(sum(told) / len(told), 4)}), flush=True)
            told.clear()


if __name__ == "__main__":
    print(make_bases(sys.argv[1] if len(sys.argv) > 1 else "runs/adapter-study/bases"))
