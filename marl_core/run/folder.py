"""The run folder: config, provenance, pre-flight result, evaluations, checkpoints, final adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from marl_core.config.load import dump_config
from marl_core.config.run_config import RunConfig
from marl_core.errors import ConfigError, DataError
from marl_core.ppo.types import Evaluation
from marl_core.run import checkpoint
from marl_core.run.files import append_line, keep_lines, new_folder, read_lines, write_json, write_text
from marl_core.run.provenance import provenance, read_provenance

if TYPE_CHECKING:
    from marl_core.run.preflight import Preflight
    from marl_core.run.runner import Runner

HARMLESS = ("observers", "run.checkpoint_every", "run.keep", "run.folder", "run.threads", "ppo.steps", "eval")
"""Keys that may change on resume without changing the mathematics of a step (ppo.steps: with a constant schedule)."""


@dataclass
class RunFolder:
    """One run on disk. Nothing is created before `start`."""

    path: Path
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, config: RunConfig, *, resume: bool, override: bool = False) -> RunFolder | None:
        """The folder of a run, None when the config has none. Refuses to overwrite a run, or to resume another one."""
        if config.run.folder is None:
            return None
        folder = cls(Path(config.run.folder).expanduser())
        used = (folder.path / "config.yaml").exists()
        if used and not resume:
            raise ConfigError(
                f"run.folder: {folder.path} already holds a run. Go on with it by --resume, or give another folder."
            )
        if resume and used and not override:
            folder._refuse_changes(config)
        return folder

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def _refuse_changes(self, config: RunConfig) -> None:
        try:
            was = _flat(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"resume: {self.path / 'config.yaml'} can't be read ({error}).") from error
        now = _flat(yaml.safe_load(dump_config(config)))
        changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        harmless = [name for name in HARMLESS if name != "ppo.steps" or config.ppo.schedule == "constant"]
        serious = [key for key in changed if not any(key == name or key.startswith(name + ".") for name in harmless)]
        if serious:
            lines = "\n".join(f"  {key}: {was.get(key)!r} -> {now.get(key)!r}" for key in serious)
            raise ConfigError(
                f"resume: the config changed the run's mathematics since it was started:\n{lines}\nRestore it, or resume with --override."
            )

    def start(self, runner: Runner, preflight: Preflight) -> None:
        """Write config, provenance and pre-flight result; on resume the first pre-flight result stays."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", dump_config(runner.config))
        except OSError as error:
            raise ConfigError(
                f"run.folder: {self.path} can't be made or written ({error}). Give another folder."
            ) from error
        write_json(self.path / "provenance.json", provenance(runner))
        first = self.path / "preflight.json"
        again = self.path / f"preflight-step-{runner.done}.json"
        write_json(again if first.exists() and runner.done else first, preflight.as_dict())

    def refuse_other_inputs(self, runner: Runner) -> None:
        """ConfigError when the data, an adapter or the base is not what the run was started with."""
        file = self.path / "provenance.json"
        if not file.is_file():
            return
        was, now = read_provenance(file), provenance(runner)
        names = [
            f"{kind} {name}"
            for kind in ("data", "adapters")
            for name in was.get(kind, {})
            if now[kind].get(name) != was[kind][name]
        ]
        names += ["the base's weights"] if was["base"]["fingerprint"] != now["base"]["fingerprint"] else []
        if names:
            raise ConfigError(
                f"resume: changed since the run was started: {', '.join(names)}. Put back what was there, or resume with --override."
            )
        if was["hardware"]["threads"] != now["hardware"]["threads"]:
            self.notes.append(
                f"{now['hardware']['threads']} threads instead of {was['hardware']['threads']}: the numbers may differ in their last bits"
            )

    def newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; None when the run was stopped before its first."""
        if not (self.path / "config.yaml").exists():
            raise DataError(f"resume: {self.path} holds no run. Check run.folder, or start without --resume.")
        if not self.checkpoints.is_dir() or not any(self.checkpoints.glob("step-*")):
            self.rewind(0)
            self.notes.append("no checkpoint yet: starting from step 0")
            return None
        found, notes = checkpoint.newest(self.checkpoints)
        self.notes += [*notes, f"resumed from {found.name}"]
        return found

    def rewind(self, step: int) -> None:
        """Drop the lines of steps that will be run again."""
        for name in ("steps.jsonl", "samples.jsonl", "evals.jsonl"):
            keep_lines(self.path / name, step if step or name != "evals.jsonl" else -1)

    def add_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Append to evals.jsonl, once for each step."""
        if not any(line["step"] == evaluation["step"] for line in read_lines(self.path / "evals.jsonl")):
            append_line(self.path / "evals.jsonl", evaluation)

    def first_evaluation(self) -> Evaluation | None:
        """The evaluation before training."""
        line = next(read_lines(self.path / "evals.jsonl"), None)
        try:
            return Evaluation(**line) if line else None
        except TypeError as error:
            raise DataError(
                f"resume: {self.path / 'evals.jsonl'} is damaged ({error}). Move it away to go on without."
            ) from error

    def finish(self, runner: Runner) -> None:
        """Write final/policy, a plain PEFT adapter, and curves and report where they can be drawn."""
        from marl_core.run.report import write_curves, write_report

        with new_folder(self.path / "final") as temporary:
            runner.bank.save(runner.roles.trained.policy, temporary / "policy")
            write_json(
                temporary / "policy" / "marl.json",
                {"base": runner.bank.source, "base_prepared_by": runner.bank.prepared},
            )
        write_curves(self.path)
        write_report(self.path)


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            key: leaf
            for name, inner in value.items()
            for key, leaf in _flat(inner, f"{place}.{name}" if place else str(name)).items()
        }
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return {key: leaf for i, inner in enumerate(value) for key, leaf in _flat(inner, f"{place}.{i}").items()}
    return {place: value}
