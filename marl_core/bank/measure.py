"""What a model can do, measured on a few tokens at load: rows beside padding, rows packed into one, a cache that grows.

transformers holds some two hundred causal models, and those with code of their own come on top. None is known here by its
name: each is asked whether a row in a batch gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from marl_core.artifacts import architecture
from marl_core.bank.out_of_memory import raise_if_out_of_memory

if TYPE_CHECKING:
    from marl_core.bank.trunk import Trunk

STATE_TOLERANCE = {torch.float32: 1e-4}
"""Relative difference of hidden states that rounding may make. The models of tests/unit/test_rows_alone.py differ by at most
4.5e-7 in float32; the rest is room for other kernels."""
COARSE_STATE_TOLERANCE = 0.05
"""The same in all other dtypes: room alone, for quantized kernels weren't measured."""
LONGEST_PROBED_WINDOW = 64
"""Longest window that probe rows pass."""
PROBE_ROWS = ((2, 6, 0), (0, 5, 3), (1, 4, 3), (0, 8, 0))
"""Probe rows: padding on the left, tokens, padding on the right. A batch of them pads as prompts with responses do."""


def padding(trunk: Trunk) -> tuple[int, str | None]:
    """Width of the hidden states, and what goes wrong with rows beside padding, in words; None when each is what it is alone.

    And no row may change with what stands in the padding, which holds to the bit in any dtype where no experts are chosen.

    A gradient flows through these passes: see `with_gradient`.
    """
    ids, mask = _probe(trunk)
    with with_gradient(trunk.model):
        alone = [trunk.body_states(row[keep][None])[0] for row, keep in zip(ids, mask, strict=True)]
        begun = trunk.body_states(ids[-1:, :4])[0]
        together = trunk.masked_states(ids, mask)
        other_pads = trunk.masked_states(torch.where(mask, ids, ids.flip(0, 1)), mask)
    width, allowed = int(together.shape[-1]), _allowed(trunk, together)
    seen = _off(begun, alone[-1][:4])
    if seen > allowed:
        return width, (
            f"it isn't causal: a token's hidden state changes by {seen:.2g} of its size with the tokens after it, so what is scored "
            "would not be what was sampled (a model of BERT's kind wants is_decoder: true in its config.json)"
        )
    worst = max(_off(states[keep], own) for states, keep, own in zip(together, mask, alone, strict=True))
    leak = max(_off(states[keep], same[keep]) for states, same, keep in zip(other_pads, together, mask, strict=True))
    if worst <= allowed and leak <= _noise(trunk, together):
        return width, None
    off = worst if worst > allowed else leak
    missing = [name for name in ("attention_mask", "position_ids") if name not in trunk.takes]
    cause = (
        f"its forward takes no {' and no '.join(missing)}"
        if missing
        else "it ignores the attention mask, numbers positions in a way of its own, or keeps a state that padding enters"
    )
    return width, f"a row's hidden states are off by {off:.2g} of their size beside padding: {cause}"


def packing_fault(trunk: Trunk) -> str | None:
    """Why rows can't stand packed in one row, in words; None when they can.

    Told by what the model is made of, then measured: packed rows are the padded ones, and no row changes when those before it
    do, which holds to the bit in any dtype where no experts are chosen.
    """
    other = mixes_positions(trunk)
    if other is not None:
        return f"{other} lets a token see its neighbours other than by attention"
    ids, mask = _probe(trunk)
    changed = ids.clone()
    changed[:-1] = ids[:-1].flip(1)  # every row but the last
    with torch.no_grad():
        padded, packed = trunk.padded_states(ids, mask), trunk.packed_states(ids, mask)
        other_rows = trunk.packed_states(changed, mask)
    worst = max(_off(mine[keep], right[keep]) for mine, right, keep in zip(packed, padded, mask, strict=True))
    if worst > _allowed(trunk, packed):
        return f"packed rows are off by {worst:.2g} of their size"
    leak = _off(other_rows[-1][mask[-1]], packed[-1][mask[-1]])
    if leak > _noise(trunk, packed):
        return f"a packed row changes by {leak:.2g} of its size with the rows before it"
    return None


def recompute_fault(trunk: Trunk, layers: Sequence[nn.Module]) -> str | None:
    """What goes wrong when `layers` are computed again in backward, in words; None when the gradient is the same."""
    ids, mask = _probe(trunk)
    try:
        plain, recomputed = (_gradient(trunk, ids[mask][None], modules) for modules in ((), layers))
    except Exception as error:  # a model of unknown make
        raise_if_out_of_memory(error)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    off = float((recomputed.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-20))
    return None if off <= _allowed(trunk, plain) else f"its gradient is off by {off:.2g} of its size"


def _gradient(trunk: Trunk, ids: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """Gradient of the hidden states with respect to the embeddings, `layers` computed again in backward."""
    leaves: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1].clone()

    hook = trunk.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), training(layers):
            states = trunk.body_states(ids).float()
        (gradient,) = torch.autograd.grad(states.sin().sum(), leaves[:1])
    finally:
        hook.remove()
    return gradient


def outermost(module: nn.Module, chosen: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules below `module` that are chosen and stand in no other that is."""
    chosen_modules: dict[int, nn.Module] = {}
    for child in module.children():
        for one in [child] if chosen(child) else outermost(child, chosen):
            chosen_modules[id(one)] = one
    return list(chosen_modules.values())


@contextmanager
def training(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules alone are told that they train, not what is in them."""
    told = list(layers)
    for layer in told:
        layer.training = True
    try:
        yield
    finally:
        for layer in told:
            layer.training = False


def cache_fault(trunk: Trunk) -> str | None:
    """Why the own decode loop can't sample from this model, in words; None when a grown cache gives what a whole pass gives."""
    if not keeps_keys_and_values(trunk):
        return "it keeps something else than growing keys and values"
    if not {"past_key_values", "use_cache"} <= trunk.takes:
        return "its forward takes no past_key_values"
    ids, mask = _prompts(trunk, _beyond_windows(trunk))
    cache = trunk.new_cache(ids.shape[1])
    with torch.no_grad():
        uncached = trunk.padded_states(ids, mask)[:, -1]
        try:
            trunk.extend(ids[:, :-2], mask[:, :-2], cache)
            trunk.extend(ids[:, -2:-1], mask[:, :-1], cache)
            grown = trunk.extend(ids[:, -1:], mask, cache)[:, -1]
        except Exception as error:  # a model of unknown make
            raise_if_out_of_memory(error)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    worst = _off(grown, uncached)
    return (
        None
        if worst <= _allowed(trunk, uncached)
        else f"with a cache its hidden states are off by {worst:.2g} of their size"
    )


def generate_fault(trunk: Trunk) -> str | None:
    """What goes wrong in transformers' `generate` with padded prompts, in words; None when it computes what a whole pass does."""
    ids, mask = _prompts(trunk, _beyond_windows(trunk))
    config = GenerationConfig(
        max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    worst = 0.0
    try:
        with torch.no_grad(), trunk.generating() as model:
            generated = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)  # type: ignore[operator]  # typed loosely
            for index, (row, keep) in enumerate(zip(generated.sequences, mask, strict=True)):
                text = torch.cat([row[: len(keep)][keep], row[len(keep) :]])
                right = model(input_ids=text[None]).logits[0, -4:-1]
                seen = torch.stack([step[index] for step in generated.logits])
                worst = max(worst, _off(seen.log_softmax(-1), right.log_softmax(-1)))
    except Exception as error:  # a model of unknown make
        raise_if_out_of_memory(error)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None if worst <= _allowed(trunk, right) else f"its log-probs are off by {worst:.2g} of their size"


def keeps_keys_and_values(trunk: Trunk) -> bool:
    """Whether every layer's cache is keys and values that grow: then rows and samples can be taken out of it and doubled."""
    layers = _cache_layers(trunk)
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def mixes_positions(trunk: Trunk) -> str | None:
    """The first part of the body that mixes positions beside attention, by name; None when only attention does.

    Convolutions over tokens, recurrent and linear attention: their state would run from one packed row into the next.
    """
    for name, module in _text_part(trunk).named_modules():
        classes = (kind.__name__ for kind in type(module).__mro__)
        if architecture.mixes_positions(classes, getattr(module, "kernel_size", None)):
            return f"{name} ({type(module).__name__})"
    for index, layer in enumerate(_cache_layers(trunk)):
        if not architecture.holds_keys_and_values(type(layer).__name__):
            return f"layer {index} (its cache is a {type(layer).__name__})"
    return None


def _text_part(trunk: Trunk) -> nn.Module:
    """The part of the body that text goes through: a model that sees or hears has other parts beside it."""
    decoder = trunk.model.get_decoder() if hasattr(trunk.model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not trunk.model else trunk.body


def _cache_layers(trunk: Trunk) -> list[Any]:
    try:
        return list(DynamicCache(config=trunk.model.config).layers)
    except Exception:  # a kind of layer that transformers' cache doesn't know
        return []


def _chooses(trunk: Trunk) -> bool:
    """Whether tokens are sent to experts: then which tokens share a product depends on all of them, and the last bits with it."""
    return architecture.chooses_experts(name for name, _ in trunk.body.named_modules())


def _beyond_windows(trunk: Trunk) -> int:
    """Tokens that make probe rows longer than a model's window, where that is cheap: what a cache drops shows only then."""
    size = architecture.window(vars(trunk.model.config.get_text_config()))
    return size if size <= LONGEST_PROBED_WINDOW else 0


def _probe(trunk: Trunk, more: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, 8 + more]; no token that means something to the model beside its embedding."""
    config, rows = trunk.model.config, [(left, kept + more, right) for left, kept, right in PROBE_ROWS]
    count = len(rows) * sum(rows[0])
    special = {
        token for part in (config, config.get_text_config()) for token in architecture.special_tokens(vars(part))
    }
    usable = [token for token in range(min(trunk.vocabulary, 4 * count + len(special) + 8)) if token not in special]
    picked = [usable[(7 * place + 3) % len(usable)] for place in range(count)]
    ids = torch.tensor(picked, device=trunk.device).reshape(len(PROBE_ROWS), -1)
    mask = torch.tensor([[0] * left + [1] * kept + [0] * right for left, kept, right in rows], device=trunk.device)
    return ids, mask.bool()


def _prompts(trunk: Trunk, more: int = 0) -> tuple[Tensor, Tensor]:
    """The probe rows with all padding on the left."""
    ids, mask = _probe(trunk, more)
    right = torch.tensor([pads for _, _, pads in PROBE_ROWS], device=ids.device)
    places = (torch.arange(ids.shape[1], device=ids.device)[None] - right[:, None]) % ids.shape[1]
    return ids.gather(1, places), mask.gather(1, places)


def _off(states: Tensor, right: Tensor) -> float:
    """Largest difference of one token's states relative to its size; infinite for NaN."""
    states, right = states.detach().float(), right.detach().float()
    off = (states - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-20)
    return float(off.max().nan_to_num(torch.inf))


def _allowed(trunk: Trunk, states: Tensor) -> float:
    rounded = float32_products(states.device) if states.dtype == torch.float32 else states.dtype
    return COARSE_STATE_TOLERANCE if trunk.quantized else STATE_TOLERANCE.get(rounded, COARSE_STATE_TOLERANCE)


def float32_products(device: torch.device) -> torch.dtype:
    """The dtype whose rounding products of float32 numbers have on a device: float32, unless torch was told that less will do.

    `torch.set_float32_matmul_precision` and its relatives let CUDA round factors to TF32, whose 10 bits are float16's, and some CPUs to
    bfloat16's 7. There are several such settings, and what they do depends on the device: so a product is made and looked at.
    """
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, generator=random, dtype=torch.float32).to(device)
    exact = numbers.double() @ numbers.double().T
    off = float((nn.functional.linear(numbers, numbers).double() - exact).norm() / exact.norm())
    return torch.float32 if off < 2e-5 else torch.float16 if off < 1.2e-3 else torch.bfloat16


PRODUCT_SIZE = 256
"""Rows and columns of that product. In float32 it is off by 1.7e-7 on a CPU; with factors of 10 bits by 2.1e-4 when they are rounded and
7.4e-4 when they are cut off, with factors of 7 bits by 1.7e-3 and more."""


def _noise(trunk: Trunk, states: Tensor) -> float:
    """How much a row may change with other rows and pads in places of the same shape: by nothing, unless experts are chosen."""
    return _allowed(trunk, states) if _chooses(trunk) or trunk.quantized else 0.0


@contextmanager
def with_gradient(model: Any) -> Iterator[None]:
    """Inside, a gradient flows from the embeddings on, although nothing learns.

    Some quantized kernels repack their weights in the first pass without one, and the pre-flight check must see the state before.
    """
    hook = model.get_input_embeddings().register_forward_hook(_with_history)
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()


def _with_history(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The embeddings as something computed with a gradient: a leaf could not be changed in place, as some models do."""
    return output.detach().requires_grad_(True).clone()
