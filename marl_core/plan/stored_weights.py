"""Model folders whose weights are quantized already, as their config.json says: held as what they are, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from marl_core.artifacts.architecture import text_config
from marl_core.artifacts.model_files import read_model
from marl_core.config.run_config import RunConfig
from marl_core.errors import MERGE, ConfigError, DataError, MarlError, in_words
from marl_core.plan.chosen import Chosen
from marl_core.registry.hooks import Hooks
from marl_core.registry.strategy import Quantization, Strategy

if TYPE_CHECKING:
    from marl_core.registry.catalog import Catalog

UNQUANTIZED_HINT = "Give the unquantized model as model.path, and choose a quantization here if memory is short."


@dataclass(frozen=True, slots=True)
class Stored:
    """How a folder's weights are stored, and which strategy holds them."""

    label: str
    strategy: str | None = None
    """None: no installed strategy can hold them."""
    options: Mapping[str, Any] = field(default_factory=dict)


def stored_quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a model's config.json says of its quantized weights; None for plain ones."""
    entries = (
        section.get(key)
        for section in (config, text_config(config))
        for key in ("quantization_config", "compression_config")
    )
    return next((entry for entry in entries if isinstance(entry, Mapping) and entry), None)


def stored_quantization(config: Mapping[str, Any], catalog: Catalog) -> Stored | None:
    """The first of the installed quantizations that holds the folder's weights as they are; None for plain weights."""
    quantization_config = stored_quantization_config(config)
    if quantization_config is None:
        return None
    for listing in catalog.listings("quantization"):
        try:
            options = catalog.load("quantization", listing.qualified_name).strategy_class.options_for_stored(
                quantization_config
            )
        except MarlError:
            continue  # a package that can't be imported holds nothing
        if options is not None:
            return Stored(_describe_storage(quantization_config), listing.name, options)
    return Stored(_describe_storage(quantization_config))


def _describe_storage(quantization_config: Mapping[str, Any]) -> str:
    method = str(quantization_config.get("quant_method") or "by an unnamed method")
    stored_bits = [bits for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)) if quantization_config.get(key)]
    stored_bits += [
        quantization_config[key] for key in ("bits", "w_bit") if isinstance(quantization_config.get(key), int)
    ]
    return f"{method}, {stored_bits[0]} bits" if stored_bits else method


def as_stored(config: RunConfig, catalog: Catalog) -> RunConfig:
    """The config with the quantization that its model folder has, where the config asks for none of its own, or for just that."""
    stored = _stored(config, catalog)
    if stored is None or stored.strategy is None:
        return config
    is_named = _label(config) == stored.strategy and not config.quantization.options
    if not is_named and not _is_unquantized(config, catalog):
        return config
    choice = type(config.quantization)(use=stored.strategy, options=dict(stored.options))
    try:
        choice.resolve(catalog)
    except (MarlError, ValidationError):
        return config  # `stored_findings` says what is wrong
    return config.model_copy(update={"quantization": choice})


def stored_findings(plan: Chosen) -> Iterator[MarlError]:
    """Reasons why a folder's quantized weights can't be the base of this run."""
    from marl_core.registry.catalog import Catalog

    config, stored = plan.config, _stored(plan.config, Catalog.installed())
    if stored is None:
        return
    clause = f"{config.model.path} holds weights that are quantized already ({stored.label})"
    differing = [
        f"{name}: {getattr(plan.quantization_strategy, name)}"
        for name, value in stored.options.items()
        if getattr(plan.quantization_strategy, name, value) != value
    ]
    label = _label(config)
    if stored.strategy is None:
        yield ConfigError(f"model.path: {clause}, and no quantization of marl's holds such weights. {UNQUANTIZED_HINT}")
    elif label != stored.strategy:
        yield ConfigError(
            f"quantization: {label}, but {clause}. Leave quantization out, and they are held as they are ({stored.strategy}); or give the "
            "unquantized model."
        )
    elif differing:
        yield ConfigError(
            f"quantization: {', '.join(differing)}, but {clause}, and was written with other settings. Leave quantization out, and its own "
            "hold; or give the unquantized model."
        )
    if plan.hooks.implements(plan.reference, "marl_prepare_base"):
        yield ConfigError(
            f"reference: {config.reference.label} prepares the base in full precision, but {clause}: merging into them would round. Merge "
            f"into the unquantized model first ({in_words(*MERGE)}), and quantize the result."
        )
    if config.model.shard != "none":
        yield ConfigError(f"model.shard: {clause}, and packed weights can't be sharded. Set model.shard: none.")


def quantization_of_folder(path: str, revision: str | None, dtype: str) -> Quantization | None:
    """How weights that are quantized already are to be held, with their library's guards; None for plain ones.

    ConfigError when no strategy holds such weights.
    """
    from marl_core.registry.catalog import Catalog

    try:
        files = read_model(path, revision)
    except DataError:
        return None  # loading says what is wrong with the folder
    catalog = Catalog.installed()
    stored = stored_quantization(files.config, catalog) if files else None
    if stored is None:
        return None
    if stored.strategy is None:
        raise ConfigError(
            f"model.path: {path} holds weights that are quantized already ({stored.label}). {UNQUANTIZED_HINT}"
        )
    strategy = catalog.load("quantization", stored.strategy).build(stored.options)
    return _quantization_of(strategy, dtype)


def quantized_already(path: str, revision: str | None) -> bool:
    """Whether a model folder's weights are quantized: then its own config.json tells transformers how."""
    try:
        files = read_model(path, revision)
    except DataError:
        return False
    return files is not None and stored_quantization_config(files.config) is not None


def _label(config: RunConfig) -> str:
    return config.quantization.label.rsplit("/", 1)[-1]


def _stored(config: RunConfig, catalog: Catalog) -> Stored | None:
    try:
        files = read_model(config.model.path, config.model.revision)
    except DataError:
        return None  # told elsewhere
    return stored_quantization(files.config, catalog) if files else None


def _is_unquantized(config: RunConfig, catalog: Catalog) -> bool:
    try:
        return _quantization_of(config.quantization.resolve(catalog), config.model.dtype) == Quantization()
    except (MarlError, ValidationError):
        return False  # told where the strategy is built, or where its backend is missing


def _quantization_of(strategy: Strategy, dtype: str) -> Quantization:
    return Hooks([(strategy, type(strategy).__name__)]).quantization(strategy, dtype)
