"""A separate reward model: decode, template, encode, score."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from marl_core import DataError

if TYPE_CHECKING:
    from marl_core import Rollout
    from marl_plugins.reward import ModelReward


class RewardModel:
    """Callable: Rollout -> scores [B] float32, by a model and tokenizer of its own."""

    def __init__(self, options: ModelReward, device: str) -> None:
        """Load both; DataError when the model has no trained head with one label."""
        self._options, self._device = options, device
        path = os.path.expanduser(options.path)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, revision=options.revision, trust_remote_code=False)
            self._model, report = AutoModelForSequenceClassification.from_pretrained(
                path,
                revision=options.revision,
                dtype=getattr(torch, options.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(
                f"reward.path: {options.path!r} could not be loaded as a sequence-classification model: {first}"
            ) from error
        self._check_head(report)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model.to(device).eval().requires_grad_(False)

    def _check_head(self, report: dict[str, Any]) -> None:
        missing = sorted(report["missing_keys"])
        if missing:
            raise DataError(
                f"reward.path: {self._options.path!r} lacks trained weights for {missing[:3]}: its scores would be random. "
                "Give a model that was trained as a sequence classifier (a reward model)."
            )
        if self._model.config.num_labels != 1:
            raise DataError(
                f"reward.path: {self._options.path!r} has {self._model.config.num_labels} labels; a reward model has one. "
                "Use a function reward to pick a label."
            )

    def _is_chat(self, prompt: Any) -> bool:
        return self._options.template == "chat" or (self._options.template == "auto" and isinstance(prompt, list))

    def text(self, prompt: Any, response: str) -> str:
        """One text as the reward model wants it, special tokens included."""
        if self._is_chat(prompt):
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            whole = [*messages, {"role": "assistant", "content": response}]
            return str(self._tokenizer.apply_chat_template(whole, tokenize=False))
        joined = (prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)) + response
        return joined + (self._tokenizer.eos_token or "" if self._options.append_eos else "")

    def _encode(self, prompt: Any, response: str) -> torch.Tensor:
        """Tokens of one text; a chat template writes its special tokens itself. The end is kept: it is what is judged."""
        own = not self._is_chat(prompt)
        ids = self._tokenizer(self.text(prompt, response), add_special_tokens=own).input_ids
        return torch.tensor(ids[-self._options.max_tokens :], device=self._device)

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Scores [B] float32."""
        prompts = rollout.prompts.texts or [""] * len(rollout)
        rows = [self._encode(prompt, response) for prompt, response in zip(prompts, rollout.texts, strict=True)]
        scores = []
        for start in range(0, len(rows), self._options.batch):
            piece = rows[start : start + self._options.batch]
            ids = pad_sequence(piece, batch_first=True, padding_value=self._tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in piece], batch_first=True)
            scores.append(self._model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1))
        return torch.cat(scores)
