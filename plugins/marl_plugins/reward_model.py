"""A separate reward model: decode, template, encode, score."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from marl_core import DataError, hub_read, position_limit, warn
from marl_plugins.conversation import answered, text_of
from marl_plugins.reward_labels import label_index, labels_of

if TYPE_CHECKING:
    from marl_core import Rollout
    from marl_plugins.reward import ModelReward

Encoded = dict[str, list[int]]
"""What a tokenizer gives for one text: ids, mask, and types where the model takes them."""
PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""How much a score may move, relative to 1 + |score|, when its row is padded: rounding, and far less than another token's score."""


class RewardModel:
    """Callable: Rollout -> scores [B] float32, by a model and tokenizer of its own."""

    def __init__(self, options: ModelReward, device: str) -> None:
        """Load both; DataError when the model has no trained head, or several labels and none is named."""
        self._options, self._device = options, device
        path = os.path.expanduser(options.path)
        try:
            with hub_read(path, "reward.path", options.revision):
                self._tokenizer = AutoTokenizer.from_pretrained(
                    path, revision=options.revision, trust_remote_code=False
                )
                self._model, report = AutoModelForSequenceClassification.from_pretrained(
                    path,
                    revision=options.revision,
                    dtype=getattr(torch, options.dtype),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the folder
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(
                f"reward.path: {options.path!r} could not be loaded as a sequence-classification model: {first}"
            ) from error
        self._check_head(report)
        self._model.to(device).eval().requires_grad_(False)
        self._read_tokenizer()
        self._inputs = inspect.signature(self._model.forward).parameters.keys()
        self._warned_of_truncation = False
        self._padding_is_safe: bool | None = None
        """Whether texts of different lengths may share a pass; None: not measured yet."""

    def _read_tokenizer(self) -> None:
        """What it puts around a text, how long a text may be, and from which side it is cut."""
        tokenizer = self._tokenizer
        ids = tokenizer("a").input_ids
        self._adds_bos, self._adds_eos = ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]
        limits = [length for length in (position_limit(self._model), int(tokenizer.model_max_length)) if length]
        self._limit = min([self._options.max_tokens, *limits])
        if "truncation_side" not in tokenizer.init_kwargs and self._limit == self._options.max_tokens:
            tokenizer.truncation_side = "left"  # nobody said otherwise: the response is what is judged

    def _check_head(self, report: dict[str, Any]) -> None:
        missing = sorted(report["missing_keys"])
        if missing:
            raise DataError(
                f"reward.path: {self._options.path!r} lacks trained weights for {missing[:3]}: its scores would be random. "
                "Give a model that was trained as a sequence classifier (a reward model)."
            )
        self._label = label_index(labels_of(self._model.config.to_dict()), self._options.label, self._options.path)
        """The output of the head that is the score."""

    def _is_chat(self, prompt: Any) -> bool:
        return self._options.template == "chat" or (self._options.template == "auto" and not isinstance(prompt, str))

    def text(self, prompt: Any, response: str) -> str:
        """One text as the reward model wants it, special tokens included that its tokenizer doesn't add itself."""
        if self._is_chat(prompt):
            before, answer = answered(
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, response
            )
            if self._tokenizer.chat_template is None:
                raise DataError(
                    f"reward.template: the prompts are chats, and the tokenizer of {self._options.path!r} has no chat template. "
                    "Set reward.template: plain to have the messages' texts joined, or give a reward model for chats."
                )
            messages = [dict(message) for message in (*before, answer)]
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        joined = (prompt if isinstance(prompt, str) else "\n".join(map(text_of, prompt))) + response
        if self._adds_bos:
            joined = joined.removeprefix(self._tokenizer.bos_token)
        end = self._tokenizer.eos_token or ""
        return joined + end if self._options.append_eos and not (self._adds_eos or joined.endswith(end)) else joined

    def _encode(self, prompt: Any, response: str) -> Encoded:
        """One text as its tokenizer gives it; a chat template writes its special tokens itself."""
        encoding = self._tokenizer(
            self.text(prompt, response),
            add_special_tokens=not self._is_chat(prompt),
            truncation=True,
            max_length=self._limit,
        )
        return {name: list(values) for name, values in encoding.items() if name in self._inputs}

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Scores [B] float32: for each text what the model gives for it alone."""
        prompts = rollout.prompts.texts or [""] * len(rollout)
        rows = [self._encode(prompt, response) for prompt, response in zip(prompts, rollout.texts, strict=True)]
        self._warn_of_truncation(rows)
        size = self._options.batch
        return torch.cat([self._scores(rows[start : start + size]) for start in range(0, len(rows), size)])

    def _warn_of_truncation(self, rows: list[Encoded]) -> None:
        full = sum(len(row["input_ids"]) >= self._limit for row in rows)
        if full and not self._warned_of_truncation:
            self._warned_of_truncation = True
            warn(
                f"reward.path: {full} of {len(rows)} texts fill the {self._limit} tokens that {self._options.path!r} reads at most "
                f"(reward.max_tokens, its positions, or its tokenizer's model_max_length); what is longer is cut on the "
                f"{self._tokenizer.truncation_side}. Said once."
            )

    def _scores(self, rows: list[Encoded]) -> torch.Tensor:
        """One batch, padded on the right where that changes nothing: measured once, on the row that is padded most."""
        lengths = [len(row["input_ids"]) for row in rows]
        if min(lengths) == max(lengths):
            return self._pass(rows)
        if self._padding_is_safe is not False:
            scores = self._pass(rows)
            if self._padding_is_safe is None:
                shortest = lengths.index(min(lengths))
                unpadded = self._pass([rows[shortest]])[0]
                tolerance = PADDING_TOLERANCE[self._options.dtype] * (1 + unpadded.abs())
                self._padding_is_safe = bool((scores[shortest] - unpadded).abs() <= tolerance)
            if self._padding_is_safe:
                return scores
        return torch.cat([self._pass([row]) for row in rows])

    def _pass(self, rows: list[Encoded]) -> torch.Tensor:
        """Scores of one pass. A classifier finds the last token by the pad id of its config; one that names none, or none that
        it has, gets an id that no text holds.
        """
        config = self._model.config.get_text_config()
        config_pad_id = config.pad_token_id
        present = {token for row in rows for token in row["input_ids"]}
        is_usable = (
            config_pad_id is not None and 0 <= config_pad_id < self._model.get_input_embeddings().weight.shape[0]
        )
        pad_id = (
            config_pad_id if is_usable else next(token for token in range(len(present) + 1) if token not in present)
        )
        fill = {"input_ids": pad_id, "token_type_ids": self._tokenizer.pad_token_type_id}
        inputs = {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in rows[0]
        }
        config.pad_token_id = pad_id if len(rows) > 1 else config_pad_id
        try:
            scores = self._model(**{name: values.to(self._device) for name, values in inputs.items()}).logits
        finally:
            config.pad_token_id = config_pad_id
        return torch.as_tensor(scores).float().reshape(len(rows), -1)[:, self._label]
