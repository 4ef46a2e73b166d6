"""A run folder where a config file is expected: the run's own config, and the folder wherever it is now."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from marl_core.config.flatten import flatten
from marl_core.config.load import load_config
from marl_core.config.overrides import Setting, settings_from_environment, settings_from_options
from marl_core.config.redact import REDACTED
from marl_core.config.run_config import RunConfig
from marl_core.config.yaml_text import parse_yaml
from marl_core.errors import ConfigError, DataError
from marl_core.registry.catalog import Catalog

CONFIG_FILE = "config.yaml"
FOLDER_KEY = ("run", "folder")


def not_started(folder: Path) -> ConfigError:
    """What to tell who gives `marl run` a folder without --resume."""
    file = _config_file(folder)
    return ConfigError(
        f"{folder}: is the folder of a run. Go on with it: `marl run {folder} --resume`. See it: `marl report {folder}`. "
        f"To start another run with its config: `marl run {file} --set run.folder=ANOTHER`."
    )


def config_of_run(folder: Path, sets: Iterable[str], catalog: Catalog) -> tuple[RunConfig, str | None]:
    """The config of the run in `folder`, with `sets` on top, and a sentence when the folder isn't where the run was started.

    ConfigError for a folder that holds no run, and for a config that isn't whole without what only its author has: a secret, or
    an object of a Python program.
    """
    file, sets = _config_file(folder), list(sets)
    settings = settings_from_environment(os.environ) + settings_from_options(sets)
    elsewhere = [setting for setting in settings if setting.path == FOLDER_KEY]
    if elsewhere:
        raise ConfigError(
            f"{elsewhere[-1].source}: the run in {folder} goes on in its own folder. Leave run.folder out; "
            "to go on in another place, copy the whole folder there and give the copy."
        )
    recorded = _require_whole(file, settings)
    here = folder.expanduser()
    if recorded is not None and os.path.realpath(Path(recorded).expanduser()) == os.path.realpath(here):
        return load_config(file, sets, catalog), None
    config = load_config(file, [*sets, f"run.folder={json.dumps(str(here))}"], catalog)
    return config, f"{folder}: this run was started as {recorded}; it goes on where it is now."


@contextmanager
def told_where_it_started(run: Path) -> Iterator[None]:
    """A block that works with the run in this folder: what it doesn't find is told with the folder that relative paths were meant from.

    Nothing is added for a config file, for a run that was started here, and where nobody recorded the folder.
    """
    try:
        yield
    except (ConfigError, DataError) as error:
        started = _started_in(run.expanduser())
        if started is None or os.path.realpath(started) == os.path.realpath(os.curdir):
            raise
        kind = ConfigError if isinstance(error, ConfigError) else DataError
        raise kind(
            f"{error} The run was started in {started}, and relative paths in its config are meant from there: run the command there."
        ) from error


def _started_in(run: Path) -> str | None:
    """The folder that the run was last started or resumed in; None where that isn't recorded."""
    try:
        sessions = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["sessions"]
        folder = sessions[-1]["folder"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return folder if isinstance(folder, str) else None


def _config_file(folder: Path) -> Path:
    file = folder / CONFIG_FILE
    if not file.expanduser().is_file():
        runs = sorted(folder / path.parent.name for path in folder.expanduser().glob(f"*/{CONFIG_FILE}"))
        near = runs or sorted(folder / path.name for path in folder.expanduser().glob("*.y*ml"))
        instead = (
            f" Did you mean {' or '.join(map(str, near[:3]))}?" if near else " Give a config file or a run folder."
        )
        raise ConfigError(f"{folder}: is a folder without a {CONFIG_FILE}, so it holds no run.{instead}")
    return file


def _require_whole(file: Path, settings: Iterable[Setting]) -> str | None:
    """The folder that the config in `file` names. ConfigError naming each key whose value the file doesn't hold and no setting gives."""
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: can't be read ({error}). Resume with the config file that the run was started with."
        ) from error
    given = [setting.path for setting in settings]
    keys = flatten(parse_yaml(text, str(file)))
    missing = {
        key: value
        for key, value in keys.items()
        if (REDACTED in str(value) or _is_object(key, value))
        and not any(tuple(key.split(".")[: len(path)]) == path for path in given)
    }
    objects = [f"{key} ({value})" for key, value in missing.items() if _is_object(key, value)]
    if objects:
        raise ConfigError(
            f"{file}: this run was started from Python with objects as strategies: {', '.join(objects)}. A file can't hold them. Resume "
            "where they are: Runner(config, resume=True); or name a strategy instead by --set."
        )
    if missing:
        raise ConfigError(
            f"{file}: a run folder holds no secrets: {', '.join(missing)} {'were' if len(missing) > 1 else 'was'} struck out. "
            f"Give it by --set {next(iter(missing))}=..., or resume with the config file that the run was started with."
        )
    recorded = keys.get(".".join(FOLDER_KEY))
    return None if recorded is None else str(recorded)


def _is_object(key: str, value: object) -> bool:
    """Whether the value is written as the config of a Python program writes a strategy that was given as an object."""
    return key.rpartition(".")[2] == "use" and ":" in str(value)
