"""Publishing a run's adapter: its files and a model card in a folder, and that folder on a hub when asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from marl_core.artifacts.hub import is_repo_name
from marl_core.config.redact import redact
from marl_core.errors import RESUME, ConfigError, DataError, in_words
from marl_core.report.model_card import model_card, on_a_hub
from marl_core.report.run_data import RunData, read_runs
from marl_core.store.files import new_folder, write_text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "marl.json")


def publish_adapter(run: str | Path, to: str | Path, *, hub: str | None = None, base: str | None = None) -> Path:
    """Copy RUN/final/policy into the new folder `to` beside a README.md; `hub` is the name the card loads it by.

    `base` is the hub name that the card and the adapter's config give for the base, instead of the run's `model.path`.
    DataError when there is no finished run, or something is there already; ConfigError for what is no hub name.
    """
    for name, example in ((hub, "--push-to-hub me/my-adapter"), (base, "--base me/my-base")):
        if name is not None and not is_repo_name(name):
            raise ConfigError(f"publish: {name!r} is no hub name. Give OWNER/NAME, e.g. {example}.")
    source, target = Path(run).expanduser() / "final" / "policy", Path(to).expanduser()
    if not (source.parent.parent / "config.yaml").is_file():
        raise DataError(f"publish: {run} holds no run (no config.yaml). Give the run.folder of a run.")
    missing = [name for name in ADAPTER_FILES[:2] if not (source / name).is_file()]
    if missing:
        raise DataError(
            f"publish: {source} has no {' and no '.join(missing)}: the run hasn't ended. "
            f"Go on with it by {in_words('marl run --resume', f'{RESUME[1]}.train()')}."
        )
    if target.exists():
        raise DataError(f"publish: {target} is there already, and nothing is overwritten. Give --to a new folder.")
    try:
        (data,) = read_runs([run])
        card = model_card(data if base is None else _on_base(data, base), hub)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"publish: the files of {run} can't be read ({error!r}). Restore config.yaml, provenance.json and evals.jsonl."
        ) from error
    try:
        with new_folder(target) as temporary:
            for name in ADAPTER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, temporary / name)
            write_text(temporary / "README.md", redact(card))
            if base is not None:
                _name_base(temporary / "adapter_config.json", base)
    except OSError as error:
        raise DataError(f"publish: {target} can't be written ({error}). Give --to another folder.") from error
    return target


def base_problem(run: str | Path, base: str | None = None) -> str | None:
    """Why others can't load the adapter by what the card calls its base; None when they can."""
    (data,) = read_runs([run])
    path = base or str(data.config["model"]["path"])
    if base is not None or on_a_hub(path):
        return None
    return (
        f"the card names the base {path!r}, which is no hub name (OWNER/NAME), so others can't load the adapter by it. Where these weights "
        "are on a hub, publish into a new folder with --base OWNER/NAME; else upload the base first."
    )


def _on_base(run: RunData, base: str) -> RunData:
    """The run with its base, and a tokenizer that was a folder here, under the base's hub name."""
    model = {key: value for key, value in run.config["model"].items() if key != "revision"}
    if model.get("tokenizer") and not on_a_hub(str(model["tokenizer"])):
        model["tokenizer"] = None
    return replace(run, config={**run.config, "model": {**model, "path": base}})


def _name_base(file: Path, base: str) -> None:
    """PEFT's config names the base too, unless it was prepared (then the adapter belongs to none that can be named)."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("base_model_name_or_path"):
        write_text(file, json.dumps({**config, "base_model_name_or_path": base, "revision": None}, indent=2))


def push(folder: str | Path, name: str, *, public: bool = False) -> str:
    """Upload a folder as the hub repository `name`, made if it isn't there; its address. Credentials are the hub library's own."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Adapter trained with marl")
    except Exception as error:  # network, rights, names: the hub library has a dozen families
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"publish: {name} could not be uploaded ({type(error).__name__}: {first}). {folder} is complete: log in with "
            "`hf auth login`, or check name and network, then upload it by `hf upload`."
        ) from error
    return str(address)
