"""The run folder: config, provenance, pre-flight result, evaluations, checkpoints, final adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_core.bank.fingerprint_v1 import is_short_of
from marl_core.config.load import dump_config
from marl_core.config.run_config import RunConfig
from marl_core.errors import ConfigError, DataError
from marl_core.ppo.types import Evaluation
from marl_core.run import checkpoint
from marl_core.run.changes import changed_keys
from marl_core.run.files import append_line, flush_file, keep_lines, new_folder, read_lines, write_json, write_text
from marl_core.run.lock import RunLock
from marl_core.run.provenance import provenance, read_provenance
from marl_core.run.swap import tidy

if TYPE_CHECKING:
    from marl_core.run.preflight import Preflight
    from marl_core.run.runner import Runner

LINES = ("steps.jsonl", "samples.jsonl", "evals.jsonl")


@dataclass
class RunFolder:
    """One run on disk. Nothing is created before `start`."""

    path: Path
    notes: list[str] = field(default_factory=list)
    mine: bool = False
    """Whether this run may write here: it was resumed from this folder, or has made it."""

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
        if resume and used:
            folder._take()
            folder.mine = True
            folder.notes += changed_keys(folder.path / "config.yaml", config, override=override)
            tidy(folder.path)
            tidy(folder.checkpoints)
        return folder

    def _take(self) -> None:
        note = RunLock(self.path).take()
        self.notes += [note] if note else []

    def release(self) -> None:
        """Let another process use the folder."""
        RunLock(self.path).release()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def start(self, runner: Runner, preflight: Preflight) -> None:
        """Write config, provenance and pre-flight result; on resume the first pre-flight result stays."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            self._keep_config(runner)
            write_text(self.path / "config.yaml", dump_config(runner.config))
        except OSError as error:
            raise ConfigError(
                f"run.folder: {self.path} can't be made or written ({error}). Give another folder."
            ) from error
        self.mine = True
        write_json(self.path / "provenance.json", provenance(runner))
        first = self.path / "preflight.json"
        again = self.path / f"preflight-step-{runner.done}.json"
        write_json(again if first.exists() and runner.done else first, preflight.as_dict())

    def _keep_config(self, runner: Runner) -> None:
        """A config that a resume replaces is kept: the steps so far were made with it."""
        file = self.path / "config.yaml"
        if file.exists() and not self.mine:
            raise ConfigError(f"run.folder: {self.path} was taken by another run meanwhile. Give another folder.")
        if file.exists() and (text := file.read_text(encoding="utf-8")) != dump_config(runner.config):
            write_text(self.path / f"config-until-step-{runner.done}.yaml", text)

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
        same = is_short_of(was["base"]["fingerprint"], runner.bank.fingerprint)
        names += [] if same else ["the base's weights"]
        if names:
            raise ConfigError(
                f"resume: changed since the run was started: {', '.join(names)}. Put back what was there, or resume with --override."
            )
        for kind in ("threads", "processes"):
            before, here = was["hardware"].get(kind, 1), now["hardware"][kind]
            if before != here:
                drawn = "other texts are sampled, and " if kind == "processes" else ""
                self.notes.append(
                    f"{here} {kind} instead of {before}: {drawn}the numbers may differ in their last bits"
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
        again = max((line["step"] for line in read_lines(self.path / "steps.jsonl")), default=0) - checkpoint.step_of(
            found
        )
        repeated = f"; {again} step{'s are' if again > 1 else ' is'} repeated" if again > 0 else ""
        self.notes += [*notes, f"resumed from {found.name}{repeated}"]
        return found

    def flush(self) -> None:
        """Put the lines written so far on the disk: a checkpoint must never be ahead of them."""
        for name in LINES:
            flush_file(self.path / name)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps that will be run again."""
        for name in LINES:
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
        from marl_core.run.curves import write_curves
        from marl_core.run.report import write_report

        with new_folder(self.path / "final") as temporary:
            runner.bank.save(runner.roles.trained.policy, temporary / "policy")
            write_json(
                temporary / "policy" / "marl.json",
                {"base": runner.bank.source, "base_prepared_by": runner.bank.prepared},
            )
        write_curves(self.path)
        write_report(self.path)
