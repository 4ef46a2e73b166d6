"""Catalog: who offers which strategy. Find (metadata only), look up (names, clashes), load (import, verify)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from io import StringIO
from typing import Any

from pydantic import ValidationError

from marl_core.errors import ConfigError, MarlError, PluginError, PluginWarning, near_match, warn
from marl_core.registry.deprecation import warn_options
from marl_core.registry.families import FAMILIES, FamilyName
from marl_core.registry.importing import process_state_restored
from marl_core.registry.metadata import unreadable
from marl_core.registry.raised_from import in_brief, raised_from
from marl_core.registry.strategy import Strategy, api_problem


@dataclass(frozen=True, slots=True, order=True)
class Listing:
    """One strategy as its package's metadata announces it."""

    family: FamilyName
    name: str
    target: str
    package: str
    version: str

    @property
    def display_name(self) -> str:
        """For messages: `brevity of acme-marl 2.0 (acme_marl:Brevity)`."""
        return f"{self.name} of {self.package} {self.version} ({self.target})"

    @property
    def qualified_name(self) -> str:
        """`acme-marl/brevity`: unambiguous in a config."""
        return f"{self.package}/{self.name}"


@dataclass(frozen=True, slots=True)
class LoadedStrategy:
    """A listing whose class was imported and verified."""

    listing: Listing
    strategy_class: type[Strategy]

    def build(self, options: Mapping[str, Any]) -> Strategy:
        """The strategy with these options.

        Raises pydantic's ValidationError for wrong options, PluginError when the class fails in another way.
        """
        try:
            strategy = self.strategy_class.model_validate(dict(options))
            warn_options(strategy, f"{self.listing.family} {self.listing.name}: option ")
            return strategy
        except (ValidationError, MarlError):
            raise
        except Exception as error:
            raise PluginError(
                f"{self.listing.family} strategy {self.listing.display_name} failed while reading its options: "
                f"{error!r}. {raised_from(error, self.strategy_class)}That is a fault of the plugin; report it to its authors."
            ) from error


class Catalog:
    """All strategies that can be named. Made from a list, so that tests need no installed package."""

    def __init__(self, listings: Iterable[Listing]) -> None:
        self._listings = tuple(sorted(set(listings)))
        self._loaded: dict[Listing, LoadedStrategy] = {}

    @classmethod
    def installed(cls) -> Catalog:
        """What the packages installed in this environment announce. Imports none of them."""
        return cls(_find_installed())

    def listings(self, family: FamilyName) -> tuple[Listing, ...]:
        """The family's listings, in order of name, then package."""
        return tuple(listing for listing in self._listings if listing.family == family)

    def lookup(self, family: FamilyName, name: str) -> Listing:
        """The one listing called `name` or `package/name`.

        Raises ConfigError when nobody offers it, PluginError when several packages do.
        """
        if not self._listings:
            raise PluginError(
                f"{family} strategy {name!r} was asked for, but no strategies of any kind are installed: marl-core's "
                "own are found by its package metadata, so it isn't installed in this environment. Run `pip install "
                "-e .` in the checkout, or `pip install marl-core`."
            )
        package, _, plain = name.rpartition("/")
        offers = [listing for listing in self.listings(family) if listing.name == plain]
        if package:
            offers = [listing for listing in offers if _same_package(listing.package, package)]
        if not offers:
            raise ConfigError(self._unknown(family, name))
        if len(offers) > 1:
            raise PluginError(
                f"{family} strategy {name!r} is offered by {' and by '.join(_provider(offer) for offer in offers)}: "
                f"uninstall one, or write `use: {offers[0].qualified_name}`."
            )
        return offers[0]

    def listing_of(self, family: FamilyName, kind: type) -> Listing | None:
        """The listing that announces this class; None when nobody does. Nothing is imported."""
        for listing in self.listings(family):
            module, _, name = listing.target.partition(":")
            attribute: Any = sys.modules.get(module.strip())
            for part in name.split("[")[0].strip().split("."):
                attribute = getattr(attribute, part, None)
            if attribute is kind:
                return listing
        return None

    def load(self, family: FamilyName, name: str) -> LoadedStrategy:
        """Look up, import and verify one strategy. Raises as `lookup` does, and PluginError for a broken plugin."""
        listing = self.lookup(family, name)
        if listing not in self._loaded:
            imported = _import(listing)
            label = f"{family} strategy {listing.display_name}"
            self._loaded[listing] = LoadedStrategy(listing, verify(imported, family, label))
        return self._loaded[listing]

    def _unknown(self, family: FamilyName, name: str) -> str:
        names = sorted({listing.name for listing in self.listings(family)})
        candidates = names + [listing.qualified_name for listing in self.listings(family)]
        near = near_match(name, candidates)
        hint = f"; did you mean {near!r}?" if near else "."
        classes = [listing.name for listing in self.listings(family) if listing.target == name]
        if classes:
            hint = f": that is its class; its name is {classes[0]!r}."
        elif ":" in name:
            hint = ": a config that Python has written names the class of an object so. Start from the program that has the object."
        others = sorted({listing.family for listing in self._listings if listing.name == name})
        if others and not near and not classes:
            hint = f"; {name!r} is {' and '.join(FAMILIES[other].with_article for other in others)} strategy."
        elsewhere = FAMILIES[family].elsewhere
        if elsewhere is not None and (said := elsewhere(name)):
            hint = f": {said}"
        return f"no {family} strategy is called {name!r}{hint} Installed: {', '.join(names) or 'none'}."


@cache
def installed_once() -> Catalog:
    """`Catalog.installed()` as it was when this was first called: for what is said early, and said again by whoever builds."""
    return Catalog.installed()


def verify(candidate: object, family: FamilyName, label: str) -> type[Strategy]:
    """`candidate` as a strategy class that has its family's required hook; PluginError naming `label` otherwise."""
    if not (isinstance(candidate, type) and issubclass(candidate, Strategy)):
        kind = f"the class {candidate.__name__}" if isinstance(candidate, type) else f"a {type(candidate).__name__}"
        raise PluginError(
            f"{label} is {kind}, not a subclass of marl_core.Strategy. Its authors must derive it from Strategy."
        )
    problem = api_problem(candidate)
    if problem is not None:
        raise PluginError(f"{label}: {problem}.")
    hook = FAMILIES[family].required_hook
    if hook is None:
        return candidate
    method = getattr(candidate, hook, None)
    if method is None:
        near = near_match(hook, (name for name in vars(candidate) if name.startswith("marl_")))
        hint = f"It has {near!r}: is that a slip of the pen?" if near else f"Every {family} strategy needs one."
        raise PluginError(f"{label} has no {hook} hook. {hint} See docs/hooks.md.")
    if not hasattr(method, "marl_impl"):
        raise PluginError(f"{label} has a method {hook} that isn't marked. Put @hookimpl (from marl_core) above it.")
    return candidate


def _import(listing: Listing) -> object:
    """Import a listing's target. Whatever goes wrong is the plugin's, and named so; only Ctrl-C passes."""
    label = f"{listing.family} strategy {listing.display_name}"
    printed = StringIO()
    try:
        with redirect_stdout(printed), process_state_restored() as restored:
            imported: object = metadata.EntryPoint(listing.name, listing.target, f"marl.{listing.family}").load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(
            f"{label} could not be imported: {in_brief(error)}. {raised_from(error, listing.target.partition(':')[0].strip())}"
            f"Repair or uninstall {listing.package}, or choose another {listing.family}."
        ) from error
    if printed.getvalue():
        first_line = printed.getvalue().strip().splitlines()[:1]
        warn(f"{label} printed on import; dropped: {' '.join(first_line)[:80]!r}", PluginWarning)
    if restored:
        warn(f"{label} changed on import: {', '.join(restored)}; put back", PluginWarning)
    return imported


def _find_installed() -> Iterator[Listing]:
    families = {family.group: family.name for family in FAMILIES.values()}
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group in families]
        except Exception as error:
            warn(unreadable(distribution, error), PluginWarning)
            continue
        try:
            package, version = (distribution.metadata["Name"], distribution.version) if points else ("", "")
        except Exception:  # unreadable metadata of a package without strategies doesn't matter here
            continue
        if points and not package:  # damaged metadata: named, so that the listing can show it
            package, version = str(getattr(distribution, "_path", "a package without a name")), version or "unknown"
        if not points or _normal(package) in seen:  # the first on sys.path is the one that gets imported
            continue
        seen.add(_normal(package))
        for point in points:
            yield Listing(families[point.group], point.name, point.value, package, version)


def _normal(package: str) -> str:
    return package.lower().replace("_", "-").replace(".", "-")


def _same_package(one: str, other: str) -> bool:
    return _normal(one) == _normal(other)


def _provider(listing: Listing) -> str:
    return f"{listing.package} {listing.version} ({listing.target})"
