"""A memory estimate from shapes alone: what each role of a run holds, and what four separate models would.

Only what follows from the shapes is counted: weights, gradients, optimizer states, the cache of keys and values, and activations by the
formulas below. What an allocator loses between blocks and what a backend's kernels hold for themselves depends on the machine and
comes on top; `OVERHEAD_SHARES` says how much that was where it was measured.
Letters: h hidden size, f feed-forward size, V vocabulary, L layers, N tokens of a microbatch (prompt and response),
T response tokens of a microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from marl_core.artifacts.adapter_files import read_adapter
from marl_core.artifacts.architecture import (
    Architecture,
    Shapes,
    adaptable_layers,
    as_held,
    counted_once,
    linear_layers,
)
from marl_core.artifacts.hub import adapter_folder
from marl_core.artifacts.lora_targets import matches
from marl_core.artifacts.model_files import ModelFiles, read_model
from marl_core.config.device import device_of
from marl_core.config.speed_config import MERGED_COPIES_SHARE, TILE_TOKENS, TILE_VOCABULARY, is_on, usual_tokens
from marl_core.errors import DataError
from marl_core.plan.chosen import Chosen
from marl_core.plan.named_paths import (
    adapter_options,
    is_adapter_option,
    not_here,
    path_options,
    revision_and_subfolder,
)
from marl_core.registry.strategy import Strategy

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED_BYTES = 4 * 4  # float32 weight, gradient, and AdamW's two moments
FROZEN_BYTES = 4  # adapters and heads stay float32
WORTH_SAYING = 2**20  # bytes
ASSUMED_PROMPT_TOKENS = 512  # tokens, where the config sets no limit
OVERHEAD_SHARES = (0.09, 0.69)
"""How much more than this estimate nine runs took on a CPU, least and most (benchmarks/results/memory.json; glibc 2.36)."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Bytes one role needs on the shared base, and as a model of its own."""

    name: str
    shared: float
    separate: float
    what: str
    transient: bool = False
    """Whether it is held only for a phase of the step."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """All roles of a plan."""

    roles: tuple[RoleMemory, ...]
    loading: float = 0.0
    """Bytes while the base is loaded and prepared, before anything else is there."""
    device: str = "cpu"
    """`cpu` or `cuda`: whose passes, and whose memory."""
    assumed: bool = False
    """Whether the device is what this machine looks like (`run.device: auto`)."""

    @property
    def caution(self) -> str:
        """What the numbers leave out, and how much that has been."""
        least, most = (round(100 * share) for share in OVERHEAD_SHARES)
        basis = f"by shapes alone. What the allocator and kernels hold comes on top, a guess: {least} to {most} % in nine runs on a CPU"
        label = f"{self.device}{', which run.device: auto will be taken for here' if self.assumed else ''}"
        return f"estimate for {label}, {basis}{', never measured on a GPU' if self.device == 'cuda' else ''}."

    @property
    def peak(self) -> float:
        """Bytes at the worst moment: all that stays, and the larger of what passes; or loading, if that is more."""
        resident = sum(role.shared for role in self.roles if not role.transient)
        return max(resident + max((role.shared for role in self.roles if role.transient), default=0.0), self.loading)

    @property
    def shared(self) -> float:
        """Bytes of this run, everything on one base."""
        return sum(role.shared for role in self.roles)

    @property
    def separate(self) -> float:
        """Bytes of the same run with a model for each of policy, reference, reward and value."""
        return sum(role.separate for role in self.roles)


def estimate(plan: Chosen) -> MemoryEstimate:
    """Per-role bytes from config.json and safetensors headers. DataError when the model isn't on this machine."""
    model = plan.config.model
    files = read_model(model.path, model.revision)
    if files is None:
        raise DataError(
            f"model.path: {model.path!r} isn't on this machine, so its shapes aren't known. "
            f"Download it first (`hf download {model.path}`), or give a folder, to estimate memory."
        )
    shapes = _counted_once(files)
    base = _base_bytes(plan, shapes)
    return MemoryEstimate(
        (
            _base(plan, shapes, base),
            _policy(plan, shapes, base),
            _reference(plan, base),
            *(_scorer(f"reward {choice.name or choice.label}", strategy, base) for choice, strategy in plan.rewards),
            *(_scorer(f"judge {name}", strategy, 0.0) for name, (_, strategy) in plan.judges.items()),
            _value(plan, files, base),
            _sampling(plan, files, shapes, base),
            _update(plan, files, shapes),
        ),
        loading=_loading(plan, files, shapes, base),
        device=device_of(plan.config),
        assumed=plan.config.run.device == "auto",
    )


def _counted_once(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """All shapes; an output layer tied to the embedding is not a second tensor."""
    return counted_once(files.shapes(), Architecture.of(files.config).tied)


def _base_bytes(plan: Chosen, shapes: Shapes) -> float:
    dtype_bytes = DTYPE_BYTES[plan.config.model.dtype]
    linear_bytes = plan.quantization.bytes_per_weight or dtype_bytes
    linear_weights = sum(prod(shape) for _, shape in linear_layers(shapes))
    return (
        linear_weights * linear_bytes + (sum(prod(shape) for shape in shapes.values()) - linear_weights) * dtype_bytes
    )


def _base(plan: Chosen, shapes: Shapes, base: float) -> RoleMemory:
    what = f"{plan.config.model.dtype}, quantization {plan.config.quantization.label}"
    if plan.hooks.implements(plan.reference, "marl_prepare_base"):
        float32_bytes = 4 * sum(prod(shape) for shape in shapes.values())
        what += f"; while it is prepared in float32, {float32_bytes / 2**20:,.0f} MiB"
    return RoleMemory("base", base, 0.0, what)


def _policy(plan: Chosen, shapes: Shapes, base: float) -> RoleMemory:
    policy, adapter = plan.config.policy, plan.policy_adapter
    count, held = (adapter.learned, adapter.held) if adapter is not None else (0, 0)
    if policy.source is not None:
        folder = adapter_folder(policy.source, policy.revision, policy.subfolder)
        if folder is None:
            raise DataError(
                f"policy.from: {policy.source!r} isn't on this machine, so its shapes aren't known. "
                f"Download it first (`hf download {policy.source}`), or give a folder, to estimate memory."
            )
        count = _adapter_parameters(folder)
    trained_bytes = count * TRAINED_BYTES + held
    what = f"{count:,} trained parameters, gradients and AdamW in float32"
    what += f"; {held / 2**20:,.1f} MiB that it holds beside them" if held >= WORTH_SAYING else ""
    return RoleMemory("policy", trained_bytes, base + trained_bytes, what)


def _reference(plan: Chosen, base: float) -> RoleMemory:
    if plan.config.ppo.kl.coef == 0:
        return RoleMemory("reference", 0.0, base, "not evaluated: ppo.kl.coef is 0")
    if plan.hooks.implements(plan.reference, "marl_prepare_base"):
        return RoleMemory("reference", 0.0, base, "the base itself")
    return _scorer("reference", plan.reference, base)


def _scorer(name: str, strategy: Strategy, base: float) -> RoleMemory:
    """What a strategy's weights take, by the folders its options name: an adapter, a model, or neither."""
    adapters = [path for _, path in adapter_options(strategy)]
    if adapters:
        weight_bytes = sum(_adapter_parameters(path) for path in adapters) * FROZEN_BYTES
        return RoleMemory(name, weight_bytes, base + weight_bytes, "an adapter on the base, frozen, float32")
    for _, path in path_options(strategy):
        try:
            model = read_model(path, revision_and_subfolder(strategy)[0])
            count = sum(prod(shape) for shape in model.shapes().values()) if model else 0
        except DataError:
            continue
        if count:
            weight_bytes = count * DTYPE_BYTES.get(getattr(strategy, "dtype", "float32"), 4)
            return RoleMemory(name, weight_bytes, weight_bytes, f"a model of its own, {count:,} parameters")
    missing = not_here(strategy)
    if missing:
        what = f"not counted: {missing[1]!r} isn't on this machine, so its size isn't known"
        return RoleMemory(name, 0.0, base if name == "reference" or is_adapter_option(strategy) else 0.0, what)
    return RoleMemory(name, 0.0, base if name == "reference" else 0.0, "no weights of its own that its options show")


def _value(plan: Chosen, files: ModelFiles, base: float) -> RoleMemory:
    value_on = plan.value_on
    if value_on == "none":
        return RoleMemory("value", 0.0, 0.0, f"advantage {plan.config.ppo.advantage.label} needs none")
    head = Architecture.of(files.config).hidden_size + 1
    own = plan.value_adapter
    learned, held = (own.learned, own.held) if own is not None else (0, 0)
    alone = own or plan.policy_adapter  # a value model of its own would have such an adapter, too
    separate = alone.learned if alone is not None else 0
    what = "a head on the policy's trunk" if value_on == "policy" else f"{learned:,} trained parameters and a head"
    return RoleMemory(
        "value", (learned + head) * TRAINED_BYTES + held, base + (separate + head) * TRAINED_BYTES + held, what
    )


def _loading(plan: Chosen, files: ModelFiles, shapes: Shapes, base: float) -> float:
    """The files' pages, and what is made of them beside: a cast, float32 for a base that is prepared, quantized weights.

    On CUDA that happens in the machine's own memory.
    """
    if device_of(plan.config) == "cuda":
        return base
    prepared = plan.hooks.implements(plan.reference, "marl_prepare_base")
    count, dtype_bytes = sum(prod(shape) for shape in shapes.values()), DTYPE_BYTES[plan.config.model.dtype]
    stored_bytes, width = float(files.stored_bytes()), 4 if prepared else dtype_bytes
    cast = stored_bytes != width * sum(prod(shape) for shape in files.shapes().values())
    total = stored_bytes + (width * count if cast else 0)
    total += dtype_bytes * count if dtype_bytes < width else 0
    return total + (base if plan.quantization.bytes_per_weight else 0)


def _sampling(plan: Chosen, files: ModelFiles, shapes: Shapes, base: float) -> RoleMemory:
    """KV cache: 2 L kv_heads head_dim values for each token of the rows sampled at once; and merged copies of adapted weights."""
    model = Architecture.of(files.config)
    rows = plan.config.sampling.at_once(plan.config.ppo.batch, plan.config.ppo.samples_per_prompt)
    tokens = rows * _sequence(plan)
    width = model.key_value_heads * model.head_dim
    total = float(2 * model.layers * width * tokens * DTYPE_BYTES[plan.config.model.dtype])
    total += _merged_copies(plan, files, shapes, base)
    what = f"KV cache of {rows} responses; gone before the update"
    return RoleMemory("sampling", total, total, what, transient=True)


def _merged_copies(plan: Chosen, files: ModelFiles, shapes: Shapes, base: float) -> float:
    """Copies of the adapted weights with the policy merged in: float32 bases, of a LoRA where they stay small beside the base."""
    dear = plan.policy_adapter is not None and plan.policy_adapter.folded
    asked = plan.config.speed.merge_for_sampling
    if (
        not (dear and is_on(None, device_of(plan.config)) if asked is None else asked)
        or plan.config.model.dtype != "float32"
        or plan.quantization.bytes_per_weight
    ):
        return 0.0
    copies = 4.0 * sum(prod(shape) for shape in _adapted(plan, files, shapes).values())
    return copies if dear or copies <= MERGED_COPIES_SHARE * base else 0.0


def _update(plan: Chosen, files: ModelFiles, shapes: Shapes) -> RoleMemory:
    """What backward needs of N tokens.

    Kept for a token and layer (bank/speed/recompute.py): 6 h + 2 f values and the inputs of adapted layers; without `speed.recompute_cheap`
    another f, and on a half precision base a float32 copy of its input for each adapted layer. With checkpointing h, and one layer's
    at a time. Logits come in tiles, three buffers each; the policy's gradient of the hidden states is held in float32; of
    quantized weights one layer's at a time is there in full.
    """
    model = Architecture.of(files.config)
    hidden, layers, feed_forward = model.hidden_size, max(model.layers, 1), model.feed_forward
    width = DTYPE_BYTES[plan.config.model.dtype]
    setting, linear = plan.config.speed.recompute_cheap, list(_adapted(plan, files, shapes).items())
    recomputes = is_on(setting, device_of(plan.config))
    shared = {(name.rpartition(".")[0], shape[1]) for name, shape in linear}
    rows, tokens = _at_once(plan)
    layer_activations = tokens * width * (6 * hidden + (2 if recomputes else 3) * feed_forward)  # of one layer
    input_bytes = (
        4 * sum(shape[1] for _, shape in linear)
        if width < 4 and not recomputes
        else width * sum(size for _, size in shared)
    )
    adapted_activations = tokens * input_bytes  # of all layers
    kept = plan.policy_adapter.kept if plan.policy_adapter is not None else 1.0
    activations: float = kept * (layers * layer_activations + adapted_activations)
    if plan.config.model.gradient_checkpointing:
        activations = layers * hidden * width * tokens + kept * (layer_activations + adapted_activations / layers)
    responses = min(rows * plan.config.sampling.max_new_tokens, tokens)
    logits = 3 * 4 * min(TILE_TOKENS * TILE_VOCABULARY, responses * model.vocabulary)
    dequantized = max((prod(shape) for _, shape in linear_layers(shapes)), default=0) * width
    total = activations + logits + 4 * FROZEN_BYTES * responses * hidden
    total += dequantized if plan.quantization.bytes_per_weight else 0
    what = f"activations and logits of {tokens:,} tokens, a pass on {device_of(plan.config)}"
    return RoleMemory("update", total, total, what, transient=True)


def _at_once(plan: Chosen) -> tuple[int, int]:
    """Rows and tokens of one forward and backward: `ppo.microbatch`, or even parts of a minibatch within the budget of tokens."""
    config, sequence_tokens = plan.config, _sequence(plan)
    rows = config.ppo.microbatch
    if not rows:
        default_tokens = usual_tokens(device_of(plan.config), config.model.dtype)
        budget = max(config.speed.microbatch_tokens or default_tokens, sequence_tokens)
        parts = ceil(config.ppo.minibatch * sequence_tokens / budget)
        rows = ceil(config.ppo.minibatch / parts)
    return rows, rows * sequence_tokens


def _adapted(plan: Chosen, files: ModelFiles, shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The linear layers that the policy's targets match, (out, in) of each."""
    kind = Architecture.of(files.config).model_type
    layers = adaptable_layers(as_held(shapes, kind), kind)
    return {name: shape for name, shape in layers.items() if matches(plan.config.policy.targets, name)}


def _sequence(plan: Chosen) -> int:
    prompt = (plan.config.data.max_prompt_tokens or ASSUMED_PROMPT_TOKENS) if plan.config.data else 0
    return prompt + plan.config.sampling.max_new_tokens


def _adapter_parameters(path: str) -> int:
    return sum(prod(shape) for shape in read_adapter(path, "adapter").shapes.values())
