"""Lines of samples.jsonl: texts, scores, and compactly where each token ends and what its KL is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marl_core import ResponseDecoder, ScoredRollout, StepStats

CONTEXT_TOKENS = 6  # tokens before one that are decoded with it: enough for spaces and split characters
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def sample_rows(stats: StepStats, scored: ScoredRollout, count: int, tokenizer: Any = None) -> list[dict[str, Any]]:
    """The first `count` responses of a step with their scores and KL; by token, where there is a tokenizer.

    `token_ends[i]` is how many characters of `response` the first i + 1 tokens make, `token_kl[i]` log-prob of the policy minus
    that of the reference, in nats. `row` holds the data's other columns.
    What reward functions gave to `log_extra` stands under its own name.
    """
    from marl_core import ResponseDecoder

    rollout = scored.rollout
    scores = scored.scores
    gap = None if scored.ref_logprobs is None else (scored.logprobs - scored.ref_logprobs).float().cpu()
    decoders = ResponseDecoder.of(tokenizer, rollout.prompts) if gap is not None and tokenizer is not None else []
    rows = []
    for i in range(min(count, len(rollout))):
        keep = rollout.mask[i].cpu()
        row: dict[str, Any] = {
            "step": stats.step,
            "prompt": rollout.prompts.seen(i),
            **({"cut_tokens": cut} if (cut := rollout.prompts.cut_of(i)) else {}),
            "response": rollout.texts[i],
            "score": round(float(scores[i]), 4),
            "parts": {name: round(float(part[i]), 4) for name, part in scored.parts.items() if part[i] == part[i]},
            "kl_nats": None if gap is None else round(float(gap[i][keep].sum()), 4),
            "finished": bool(rollout.finished[i]),
        }
        if columns := rollout.prompts.shown_row(i):
            row["row"] = columns
        if scored.logged is not None:
            row |= {
                name if name not in row else f"logged/{name}": column[i]
                for name, column in scored.logged.columns.items()
            }
        if gap is not None and decoders:
            ids = rollout.ids[i].cpu()[keep].tolist()
            row["token_ends"] = token_ends(ids, len(rollout.texts[i]), tokenizer, decoders[i])
            row["token_kl"] = [round(value, 3) for value in gap[i][keep].tolist()]
        rows.append(row)
    return rows


def token_ends(ids: Sequence[int], length: int, tokenizer: Any, decoder: ResponseDecoder | None = None) -> list[int]:
    """For each token, the characters of the decoded text up to its end; a special token adds none.

    `decoder` decodes from the response's beginning, in the context of its prompt.

    A token is decoded together with a few before it: a character may be split over tokens, and then ends with the last of them.
    """
    from marl_core import ResponseDecoder

    decode_response = (decoder or ResponseDecoder(tokenizer)).text
    ends: list[int] = []
    start, characters_before = 0, 0  # the window's first token, and the characters before it
    for i in range(len(ids)):
        window = ids[start : i + 1]
        text: str = tokenizer.decode(window, skip_special_tokens=True) if start else decode_response(window)
        complete = len(text.rstrip(REPLACEMENT_CHARACTER))
        ends.append(min(length, max(ends[-1] if ends else 0, characters_before + complete)))
        if i + 1 - start >= 2 * CONTEXT_TOKENS and complete == len(text):
            tail: str = tokenizer.decode(ids[i + 1 - CONTEXT_TOKENS : i + 1], skip_special_tokens=True)
            if tail and text.endswith(tail):
                start, characters_before = i + 1 - CONTEXT_TOKENS, characters_before + len(text) - len(tail)
    return ends
