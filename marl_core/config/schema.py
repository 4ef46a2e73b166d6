"""JSON Schema of a config: RunConfig's own, with the options of the strategies installed here."""

from __future__ import annotations

from typing import Any

from marl_core.config.choice import Choice, choice_at
from marl_core.config.run_config import RunConfig
from marl_core.errors import PluginError
from marl_core.registry.catalog import Catalog, Listing, LoadedStrategy
from marl_core.registry.families import FAMILIES, Family, family_keys

REF = "#/$defs/{model}"


def json_schema(catalog: Catalog) -> dict[str, Any]:
    """The schema, for editors and other programs. Strategies that can't be imported are named in `$comment`."""
    schema = RunConfig.model_json_schema(by_alias=True, ref_template=REF)
    broken: list[str] = []
    for family in FAMILIES.values():
        loaded = _load_all(catalog, family, broken)
        for choice in dict.fromkeys(choice_at(family, key) for key in family.keys):
            schema["$defs"].update(_definitions(family, choice, loaded, catalog))
    schema["$defs"].pop("Strategy", None)
    _require(schema)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "marl run"}
    comment = {"$comment": "Left out: " + " | ".join(broken)} if broken else {}
    return {**head, **comment, **{key: value for key, value in schema.items() if key != "title"}}


def _require(schema: dict[str, Any]) -> None:
    """What a run from a file must name, and a config made in Python needn't (`Key.at_least`)."""
    for _, key in family_keys():
        if key.at_least and not key.section:
            schema["required"].append(key.name)
            for form in schema["properties"][key.name]["anyOf"]:
                if form.get("type") == "array":
                    form["minItems"] = key.at_least


def _load_all(catalog: Catalog, family: Family, broken: list[str]) -> list[LoadedStrategy]:
    loaded = []
    for listing in catalog.listings(family.name):
        try:
            loaded.append(catalog.load(family.name, listing.qualified_name))
        except PluginError as error:
            broken.append(str(error))
    return loaded


def _definitions(
    family: Family, choice: type[Choice], loaded: list[LoadedStrategy], catalog: Catalog
) -> dict[str, Any]:
    """The choice as a union discriminated on `use`, and each strategy's options."""
    names = [listing.name for listing in catalog.listings(family.name)]
    place = (
        getattr(choice, "place", None) or family.name
    )  # a section that is a choice has keys of its own in each member
    short_names: list[str] = []
    definitions: dict[str, Any] = {}
    members = []
    for strategy in loaded:
        spellings = _spellings(strategy.listing, names)
        short_names += spellings
        key = f"{place}:{strategy.listing.qualified_name}".replace("/", ".")
        definitions.update(_strategy(key, strategy, choice, spellings))
        members.append({"$ref": f"#/$defs/{key}"})
    short = {"type": "string", "enum": short_names, "description": "Name of a strategy; short for {use: name}."}
    is_short = choice.long_form("name") == {"use": "name"}  # of a section a word may mean something else
    union: dict[str, Any] = {"oneOf": members} if members else {"not": {}}
    union |= {"discriminator": {"propertyName": "use"}} if members and choice.default_use is None else {}
    about = (choice.__doc__ or "").strip() if place != family.name else family.about
    return {choice.__name__: {"description": about, "anyOf": [*([short] if is_short else []), union]}, **definitions}


def _spellings(listing: Listing, names: list[str]) -> list[str]:
    """How a config may name it: `package/name` always, `name` if only one package offers it."""
    return [listing.name, listing.qualified_name] if names.count(listing.name) == 1 else [listing.qualified_name]


def _strategy(key: str, strategy: LoadedStrategy, choice: type[Choice], spellings: list[str]) -> dict[str, Any]:
    """One member of the union: `use`, the choice's own keys and the strategy's options; and what they refer to."""
    options = strategy.strategy_class.model_json_schema(by_alias=True, ref_template=f"#/$defs/{key}:{{model}}")
    own = choice.model_json_schema(by_alias=True)["properties"]
    shared = {name: own[name] for name in own if name not in ("use", "options")}
    use = {"enum": spellings, "description": "Name of the strategy."}
    inner = {f"{key}:{name}": definition for name, definition in options.pop("$defs", {}).items()}
    options["properties"] = {"use": use, **shared, **options.get("properties", {})}
    needed = [] if choice.default_use in spellings else ["use"]
    options["required"] = [*needed, *options.get("required", [])]
    options["description"] = (strategy.strategy_class.__doc__ or "").strip()
    return {key: options, **inner}
