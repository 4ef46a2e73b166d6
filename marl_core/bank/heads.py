"""Heads: a score head read from a reward adapter's file, and a value head to be trained. Both float32, outside PEFT."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import skip_init

from marl_core.artifacts.adapter_files import AdapterFiles
from marl_core.bank.views import Position
from marl_core.errors import DataError


def score_head_of(adapter: str) -> str:
    """What a bank calls the score head of a reward adapter."""
    return f"{adapter}-score"


def value_head_of(policy: str) -> str:
    """What a bank calls the value head of a policy."""
    return f"{policy}-value-head"


def read_score_head(files: AdapterFiles, hidden_size: int, asked_by: str) -> nn.Linear:
    """The score head [1, hidden] of a reward adapter; DataError when it isn't there.

    TRL's RewardTrainer keeps it in the adapter's file, and PEFT drops it without a word when the adapter is loaded onto a
    causal model; LLaMA-Factory keeps it beside the adapter, in value_head.safetensors.
    """
    file, shapes = files.reward_head
    weights = [key for key in shapes if key.endswith("weight")]
    if not weights:
        raise DataError(
            f"{asked_by}: {files.weights} holds no score weights, so its rewards can't be computed. "
            "The adapter was saved without its head: train it with task_type='SEQ_CLS' in its PEFT config, or modules_to_save=['score']."
            f"{files.pickled_head}"
        )
    shape = shapes[weights[0]]
    if len(weights) > 1 or shape != (1, hidden_size):
        raise DataError(
            f"{asked_by}: the score head in {file} is {[(key, list(shapes[key])) for key in weights]}; "
            f"this base needs one of shape [1, {hidden_size}]. Train the classifier with num_labels=1 on this base."
        )
    biases = [key for key in shapes if key.endswith("bias")]
    head = nn.Linear(hidden_size, 1, bias=bool(biases), dtype=torch.float32)
    with safe_open(str(file), "pt") as tensors, torch.no_grad():
        head.weight.copy_(tensors.get_tensor(weights[0]))
        if biases:
            head.bias.copy_(tensors.get_tensor(biases[0]))
    if not all(bool(torch.isfinite(parameter).all()) for parameter in head.parameters()):
        raise DataError(f"{asked_by}: the score head in {file} holds NaN or infinite weights. Save the adapter again.")
    return head.requires_grad_(False)


def new_value_head(hidden_size: int, device: torch.device | str) -> nn.Linear:
    """A trainable value head, zero at the start: V = 0 (detail 2 of "The N Implementation Details of RLHF with PPO")."""
    head: nn.Linear = skip_init(
        nn.Linear, hidden_size, 1, dtype=torch.float32, device=device
    )  # nothing random is drawn
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def score_positions(ids: Tensor, mask: Tensor, position: Position, pad_id: int | None) -> Tensor:
    """Index of the token whose hidden state is scored: ids, mask [B, L] -> [B] int64.

    `last-attended`: the last token of the sequence. `last-non-pad`: the last attended token that isn't `pad_id`.
    """
    counts = mask.bool()
    if position == "last-non-pad" and pad_id is not None:
        without_pad = counts & (ids != pad_id)
        counts = torch.where(without_pad.any(dim=1, keepdim=True), without_pad, counts)
    places = torch.arange(ids.shape[1], device=ids.device)
    return (places * counts).argmax(dim=1)


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Head on hidden states [..., H] of any dtype -> [...] float32, under autocast too."""
    with torch.autocast(hidden.device.type, enabled=False):
        value: Tensor = head(hidden.float())
    return value.squeeze(-1)
