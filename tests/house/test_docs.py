"""Documentation is a tested artefact: generated pages are up to date, nothing is left out, what is shown works."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from marl_core import Catalog, RunConfig
from marl_core.cli.app import app
from marl_core.cli.guests import GuestCommand
from marl_core.config.choice import Choice
from marl_core.registry.families import FAMILIES
from marl_core.registry.hookspecs import MarlSpecs

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("make_config_reference.py", "config.md"),
        ("make_hooks_reference.py", "hooks.md"),
        ("make_api_reference.py", "api.md"),
        ("make_reliability_table.py", "reliability.md"),
        ("make_models_page.py", "models.md"),
        ("make_metrics_page.py", "metrics.md"),
        ("make_kinds_page.py", "kinds.md"),
        ("make_config_keys.py", "../marl_core/config/keys.py"),
    ],
)
def test_generated_pages_are_up_to_date(script: str, page: str) -> None:
    rendered = runpy.run_path(str(DOCS / script))["render"]()
    assert rendered == (DOCS / page).read_text(encoding="utf-8"), f"run: python docs/{script}"


@pytest.mark.parametrize("hook", [name for name in vars(MarlSpecs) if name.startswith("marl_")])
def test_every_hook_has_its_section(hook: str) -> None:
    assert f"\n## {hook}\n" in (DOCS / "hooks.md").read_text(encoding="utf-8")


def test_the_families_are_listed_where_one_is_asked_for() -> None:
    assert (DOCS / "cli.md").read_text(encoding="utf-8").count(f"--family {'|'.join(FAMILIES)}") == 2


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all below it."""

    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from models(annotation)
        for argument in get_args(annotation):
            yield from inside(argument)

    yield model
    if not issubclass(model, Choice):
        for field in model.model_fields.values():
            yield from inside(field.annotation)


def test_every_key_is_described() -> None:
    silent = {
        f"{model.__name__}.{name}"
        for model in models(RunConfig)
        for name, field in model.model_fields.items()
        if not field.description
    }
    assert not silent


def test_every_option_of_a_built_in_strategy_is_described() -> None:
    catalog = Catalog.installed()
    for family in FAMILIES:
        for listing in catalog.listings(family):
            if listing.package != "marl-core":
                continue
            strategy = catalog.load(family, listing.qualified_name).strategy_class
            assert strategy.__doc__, listing.display_name
            silent = [name for name, field in strategy.model_fields.items() if not field.description]
            assert not silent, f"{listing.display_name}: {silent}"


def test_every_command_and_option_is_documented() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    group: Any = get_command(app)
    for name, held in group.commands.items():
        command: Any = held.loaded() if isinstance(held, GuestCommand) else held
        assert f"\n## marl {name}\n" in page
        section = page.split(f"\n## marl {name}\n", 1)[1].split("\n## ", 1)[0]
        inner: Any = getattr(command, "commands", {})
        for whole, one in [(name, command), *((f"{name} {below}", one) for below, one in inner.items())]:
            assert one.help, whole
            assert f"marl {whole}" in section
            for parameter in one.params:
                for option in parameter.opts:
                    if option.startswith("--") and option != "--help":
                        assert option in section, f"marl {whole} {option}"
    for parameter in group.params:
        assert all(f"`{option}`" in page for option in parameter.opts)
