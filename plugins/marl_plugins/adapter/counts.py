"""How many numbers learn in a layer, and what is held beside them, for each kind of PEFT's: by shapes, as PEFT makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, isqrt
from typing import Any, TypeAlias

from marl_plugins.adapter.base import Layers, Shapes
from marl_plugins.adapter.layers import by_pattern, chosen_layers

Options: TypeAlias = Mapping[str, Any]
OfLayer: TypeAlias = Callable[[Options, str, int, int], int]
"""Of PEFT's options, a layer's name, and how many outputs and inputs it has."""
FLOAT, SHORT, INDEX = 4, 4, 8
"""Bytes of a float32, and of a place in a tensor: int32, int64."""
HAS_BIAS = "has_bias"
"""An option that isn't PEFT's: whether the layer has a bias."""


def _delora(options: Options, name: str, rows: int, columns: int) -> int:
    """A pair of thin matrices, as LoRA's, and the update's size."""
    return _rank(options, name) * (rows + columns) + 1


def _rank(options: Options, name: str) -> int:
    """A layer's own rank, of kinds that PEFT makes with rank 8 unless told otherwise."""
    return by_pattern(options.get("rank_pattern") or {}, name, _number(options, "r", 8))


def _number(options: Options, name: str, default: int) -> int:
    """A whole number among the options."""
    value: int = options.get(name, default)
    return value


def _boft(options: Options, name: str, rows: int, columns: int) -> int:
    """Blocks that cover the inputs, and a factor for each output. PEFT doesn't pass the number of butterfly factors on: it is 1."""
    size, blocks = _number(options, "boft_block_size", 4), _number(options, "boft_block_num", 0)
    size = size or columns // max(blocks, 1)
    return columns * size + rows


def _road(options: Options, name: str, rows: int, columns: int) -> int:
    return {"road_1": 1, "road_2": 2, "road_4": 4}[str(options.get("variant", "road_1"))] * rows


def _randlora(options: Options, name: str, rows: int, columns: int) -> int:
    rank, narrow = _number(options, "r", 32), min(rows, columns)
    return ceil(narrow / rank) * (rank + narrow)


def _lokr(options: Options, name: str, rows: int, columns: int) -> int:
    """A Kronecker product of a small matrix and a larger one, either of which may be a product of two thin ones."""
    rank, factor = _rank(options, name), _number(options, "decompose_factor", -1)
    (small_rows, large_rows), (small_columns, large_columns) = _split(rows, factor), _split(columns, factor)
    small = small_rows * small_columns
    if options.get("decompose_both", False) and rank < max(small_rows, small_columns) / 2:
        small = rank * (small_rows + small_columns)
    large = large_rows * large_columns
    if rank < max(large_rows, large_columns) / 2:
        large = rank * (large_rows + large_columns)
    return small + large


def _split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size, the smaller first: `factor` where it divides the size, else the nearest to its root below that."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    small = next(number for number in range(limit, 0, -1) if size % number == 0)
    return small, size // small


def _glora(options: Options, name: str, rows: int, columns: int) -> int:
    """Two parts on the weight, and, of a layer that has a bias, three on that."""
    rank = _number(options, "r", 8)

    def part(form: str, out: int, into: int) -> int:
        return {"lora": rank * (out + into), "vector": out, "constant": 1, "none": 0}[form]

    on_weight = 2 * part(options.get("config_A_B", "lora"), rows, columns)
    if not options.get(HAS_BIAS):
        return on_weight
    return (
        on_weight
        + part(options.get("config_C", "lora"), columns, 1)
        + 2 * part(options.get("config_D_E", "constant"), rows, 1)
    )


def _glora_zeros(options: Options, name: str, rows: int, columns: int) -> int:
    """Tensors of zeros in the place of parts that aren't there."""
    on_weight = 2 * rows * columns if options.get("config_A_B", "lora") == "none" else 0
    absent = not options.get(HAS_BIAS)
    on_inputs = columns if absent or options.get("config_C", "lora") == "none" else 0
    on_bias = 2 * rows if absent or options.get("config_D_E", "constant") == "none" else 0
    return FLOAT * (on_weight + on_inputs + on_bias)


def _frequencies(default: int) -> OfLayer:
    def count(options: Options, name: str, rows: int, columns: int) -> int:
        return by_pattern(options.get("n_frequency_pattern") or {}, name, _number(options, "n_frequency", default))

    return count


def _c3a(options: Options, name: str, rows: int, columns: int) -> int:
    size = by_pattern(options.get("block_size_pattern") or {}, name, _number(options, "block_size", 256))
    return rows * columns // size


def _sparse(options: Options, name: str, rows: int, columns: int) -> int:
    """A share of the weight's own numbers, and a LoRA where there is one."""
    kept = max(1, int(rows * columns * (1 - options.get("sparsity", 0.99))))
    return kept + (options.get("r") or 0) * (rows + columns)


def _psoft(options: Options, name: str, rows: int, columns: int) -> int:
    rank = _number(options, "r", 32)
    turned = rank * (rank - 1) // 2 if options.get("psoft_orth", True) else rank * rank
    return turned + rank * sum(bool(options.get(part, True)) for part in ("psoft_mag_a", "psoft_mag_b"))


def _psoft_held(options: Options, name: str, rows: int, columns: int) -> int:
    """The weight's main directions, and the places of the angles."""
    rank = _number(options, "r", 32)
    places = 2 * INDEX * rank * (rank - 1) // 2 if options.get("psoft_orth", True) else 0
    return FLOAT * rank * (rows + columns) + places


def _oft_block(options: Options, columns: int) -> tuple[int, int]:
    """How many blocks cover a layer's inputs, and how large each is; PEFT is given one of the two."""
    blocks = _number(options, "r", 0)
    if blocks:
        blocks = nearest_divisor(blocks, columns)
        return blocks, columns // blocks
    size = nearest_divisor(_number(options, "oft_block_size", 32), columns)
    return columns // size, size


def oft_blocks(options: Options, layers: Layers) -> list[int]:
    """The sizes of the blocks that PEFT makes on these layers, smallest first."""
    return sorted({_oft_block(options, columns)[1] for _, columns in layers.values()})


def _oft(options: Options, name: str, rows: int, columns: int) -> int:
    blocks, size = _oft_block(options, columns)
    return (1 if options.get("block_share") else blocks) * size * (size - 1) // 2


def _oft_held(options: Options, name: str, rows: int, columns: int) -> int:
    """The places of a block's angles."""
    _, size = _oft_block(options, columns)
    return 2 * INDEX * size * (size - 1) // 2


def _miss(options: Options, name: str, rows: int, columns: int) -> int:
    across = _number(options, "mini_r", 1) if options.get("init_weights") == "mini" else rows
    return _number(options, "r", 64) * across


def _ia3(options: Options, name: str, rows: int, columns: int) -> int:
    return columns if name in options.get("feedforward_modules", ()) else rows


def nearest_divisor(size: int, width: int) -> int:
    """The number nearest to `size` that divides `width`, the smaller of two, as PEFT chooses OFT's blocks."""
    if size >= width:
        return width
    sizes = [number for number in range(1, width + 1) if width % number == 0]
    return min(sizes, key=lambda number: (abs(number - size), number))


def _tinylora_held(options: Options, name: str, rows: int, columns: int) -> int:
    """The directions r (in + out), and the projections [u, r, r]."""
    rank = _number(options, "r", 2)
    return FLOAT * (rank * (rows + columns) + _number(options, "u", 64) * rank**2)


def _peanut(options: Options, name: str, rows: int, columns: int) -> int:
    rank = _number(options, "r", 32)
    return 2 * rank * rows + 2 * _number(options, "depth", 0) * rank * rank


LEARNED: Mapping[str, OfLayer] = {
    "adalora": lambda options, name, rows, columns: _number(options, "init_r", 12) * (rows + columns + 1),
    "boft": _boft,
    "hra": lambda options, name, rows, columns: _number(options, "r", 8) * columns,
    "road": _road,
    "vera": lambda options, name, rows, columns: _number(options, "r", 256) + rows,
    "randlora": _randlora,
    "loha": lambda options, name, rows, columns: 2 * _rank(options, name) * (rows + columns),
    "lokr": _lokr,
    "hira": lambda options, name, rows, columns: _number(options, "r", 32) * (rows + columns),
    "delora": _delora,
    "gralora": lambda options, name, rows, columns: (
        (_number(options, "r", 32) + _number(options, "hybrid_r", 0)) * (rows + columns)
    ),
    "glora": _glora,
    "fourierft": _frequencies(1000),
    "waveft": _frequencies(2592),
    "c3a": _c3a,
    "shira": lambda options, name, rows, columns: _number(options, "r", 32) * (rows + columns),
    "supertuning": _sparse,
    "psoft": _psoft,
    "deft": lambda options, name, rows, columns: (
        _number(options, "r", 8) * (rows + (0 if options.get("para") else columns))
    ),
    "peanut": _peanut,
    "beft": lambda options, name, rows, columns: rows,
    "ia3": _ia3,
    "miss": _miss,
    "oft": _oft,
}
"""Numbers that learn in one layer."""
HELD: Mapping[str, OfLayer] = {
    "adalora": lambda options, name, rows, columns: FLOAT,
    "boft": lambda options, name, rows, columns: FLOAT * columns**2,
    "delora": lambda options, name, rows, columns: FLOAT * columns,
    "glora": _glora_zeros,
    "oft": _oft_held,
    "tinylora": _tinylora_held,
    "fourierft": lambda options, name, rows, columns: 2 * INDEX * _frequencies(1000)(options, name, rows, columns),
    "waveft": lambda options, name, rows, columns: 2 * INDEX * _frequencies(2592)(options, name, rows, columns),
    "shira": lambda options, name, rows, columns: 2 * INDEX * _number(options, "r", 32) * (rows + columns),
    "supertuning": lambda options, name, rows, columns: SHORT * _sparse({**options, "r": 0}, name, rows, columns),
    "psoft": _psoft_held,
}
"""Bytes that one layer holds beside them."""


def learned(kind: str, options: Options, layers: Layers, shapes: Shapes) -> int:
    """Numbers that learn on these layers; of kinds that stand elsewhere by the weights' names."""
    if kind in ("ln_tuning", "trainable_tokens"):
        rows = len(options.get("token_indices") or ())
        counts = [shapes[name] for name in _weights(options.get("target_modules") or (), shapes)]
        return sum(rows * shape[-1] if kind == "trainable_tokens" else shape[0] for shape in counts)
    if kind == "tinylora":
        groups = max(1, round(len(chosen_layers(layers, options)) * (1.0 - float(options.get("weight_tying", 0.0)))))
        return _number(options, "u", 64) * groups
    return _over_layers(LEARNED.get(kind), options, layers, shapes)


def _over_layers(count: OfLayer | None, options: Options, layers: Layers, shapes: Shapes) -> int:
    if count is None:
        return 0
    chosen = chosen_layers(layers, options).items()
    return sum(count({**options, HAS_BIAS: f"{name}.bias" in shapes}, name, *shape) for name, shape in chosen)


def held(kind: str, options: Options, layers: Layers, shapes: Shapes) -> int:
    """Bytes that these layers hold beside what learns."""
    if kind == "trainable_tokens":  # the rows as they were
        return FLOAT * learned(kind, options, layers, shapes)
    chosen = chosen_layers(layers, options)
    if not chosen:
        return 0
    rows, columns = (max(shape[axis] for shape in chosen.values()) for axis in (0, 1))
    if kind == "vera":  # one pair of projections for all layers
        return FLOAT * _number(options, "r", 256) * (rows + columns)
    if kind == "randlora":
        rank, narrow, wide = _number(options, "r", 32), min(rows, columns), max(rows, columns)
        return FLOAT * (rank * narrow + wide * ceil(narrow / rank) * rank)
    return _over_layers(HELD.get(kind), options, layers, shapes)


def _weights(modules: Any, shapes: Shapes) -> list[str]:
    """Weights and biases of the modules that are named by their ends."""
    names = [modules] if isinstance(modules, str) else list(modules)
    return [
        weight
        for weight in shapes
        if any(weight.rpartition(".")[0] == name or weight.rpartition(".")[0].endswith(f".{name}") for name in names)
    ]
