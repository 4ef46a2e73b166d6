"""Nothing is ever unpickled: a pickle that would leave a mark is laid wherever a file is read, and leaves none."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import AdapterBank, MarlError, RunConfig, Runner
from marl_core.artifacts.rows import read_rows
from marl_core.bank.identity.certificate import read_certificate
from marl_core.bank.merge import merge_adapter
from marl_core.cli.app import main

MakeConfig = Callable[..., RunConfig]


class Mark:
    """Unpickling one writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.file, "code was run"))


class Traps:
    """Malicious pickles, plain and in torch's zip container, and the mark they would leave."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "mark"
        self.plain = pickle.dumps(Mark(self.mark))
        container = folder / "container.pt"
        with zipfile.ZipFile(container, "w") as archive:
            archive.writestr("archive/data.pkl", self.plain)
            archive.writestr("archive/version", "3")
        self.zipped = container.read_bytes()

    def lay(self, file: Path) -> None:
        """Both kinds, one beside the other where the name allows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.zipped if file.suffix in (".bin", ".pt", ".pth") else self.plain)


@pytest.fixture
def traps(tmp_path: Path) -> Traps:
    found = Traps(tmp_path)
    pickle.loads(found.plain)  # it does bite
    found.mark.unlink()
    return found


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json", "prompts.csv", "prompts.parquet"])
def test_data(traps: Traps, tmp_path: Path, name: str) -> None:
    traps.lay(tmp_path / name)
    with pytest.raises(MarlError):
        read_rows(str(tmp_path / name))
    assert not traps.mark.exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "prompts.arrow"])
def test_a_pickled_data_set_is_no_data(traps: Traps, tmp_path: Path, name: str) -> None:
    traps.lay(tmp_path / "set" / name)
    with pytest.raises(MarlError):
        read_rows(str(tmp_path / "set"))
    assert not traps.mark.exists()


@pytest.mark.parametrize("command", ["check", "report", "run"])
def test_configs(traps: Traps, tmp_path: Path, command: str) -> None:
    traps.lay(tmp_path / "run" / "config.yaml")
    assert main([command, str(tmp_path / "run" if command == "report" else tmp_path / "run" / "config.yaml")]) in (2, 4)
    assert not traps.mark.exists()


ADAPTER_FILES = ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json", "tokenizer_config.json", "marl_certificate.json",
                 "training_args.bin", "optimizer.pt"]  # fmt: skip


@pytest.mark.parametrize("only", [False, True], ids=["beside the weights", "instead of them"])
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_adapters(
    traps: Traps, tmp_path: Path, tiny_folder: str, sft_adapter: str, reward_adapter: str, name: str, only: bool
) -> None:
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    for number, (source, load) in enumerate(((sft_adapter, "load"), (reward_adapter, "load_reward"))):
        folder = Path(shutil.copytree(source, tmp_path / f"{number}"))
        traps.lay(folder / name)
        if only:
            (folder / "adapter_model.safetensors").unlink()
        try:
            bank.load(f"a{number}", folder) if load == "load" else bank.load_reward(folder)
        except MarlError:
            pass
        else:
            assert not only
        with contextlib.suppress(MarlError):
            merge_adapter(tiny_folder, str(folder), tmp_path / f"out{number}")
        with contextlib.suppress(MarlError):
            read_certificate(folder)
    assert not traps.mark.exists()


MODEL_FILES = ["pytorch_model.bin", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "model.safetensors.index.json", "tf_model.h5", "training_args.bin"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # transformers says much about a folder like these
@pytest.mark.parametrize("only", [False, True], ids=["beside the weights", "instead of them"])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_models(traps: Traps, make_config: MakeConfig, tmp_path: Path, tiny_folder: str, name: str, only: bool) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    traps.lay(folder / name)
    if only:
        (folder / "model.safetensors").unlink(missing_ok=True)
    for changes in ({"model": {"path": str(folder)}}, {"reward": {"use": "model", "path": str(folder)}}):
        try:
            Runner(make_config(**changes))
        except MarlError:
            continue
        assert not only or "reward" in changes
    assert not traps.mark.exists()


def test_run_folders(traps: Traps, make_config: MakeConfig, tmp_path: Path) -> None:
    """Each file of a run in turn, and strangers' names beside them: read on resume, by nobody with pickle."""
    good = tmp_path / "good"
    Runner(
        make_config(run={"folder": str(good), "checkpoint_every": 1}, ppo={"steps": 1}, observers=["json-lines"])
    ).train()
    names = [str(path.relative_to(good)) for path in sorted(good.rglob("*")) if path.is_file()]
    beside = [
        "checkpoints/step-000001/optimizer.pt",
        "checkpoints/step-000001/rng_state.pth",
        "checkpoints/step-000001/policy/adapter_model.bin",
    ]
    for number, name in enumerate([*names, *beside]):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        traps.lay(folder / name)
        config = make_config(
            run={"folder": str(folder), "checkpoint_every": 1}, ppo={"steps": 1}, observers=["json-lines"]
        )
        with contextlib.suppress(MarlError):
            Runner(config, resume=True)
        if not name.startswith(("checkpoints", "final")):
            main(["report", str(folder)])
        assert not traps.mark.exists(), name


def test_no_code_of_ours_unpickles() -> None:
    """Neither pickle nor torch.load is named anywhere in the package, nor safetensors switched off."""
    root = Path(__file__).parents[2]
    files = [*root.joinpath("marl_core").rglob("*.py"), *root.joinpath("plugins").rglob("*.py")]
    assert len(files) > 40
    banned = ("import pickle", "torch.load", "joblib", "dill", "marshal", "shelve", "yaml.load(", "unsafe_load", "use_safetensors=False",
              "weights_only=False", "allow_pickle")  # fmt: skip
    found = [f"{file.name}: {word}" for file in files for word in banned if word in file.read_text(encoding="utf-8")]
    assert found == []
