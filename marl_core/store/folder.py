"""The run folder: config, provenance, pre-flight result, evaluations, checkpoints, final adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.identity.fingerprint import Fingerprint
from marl_core.config.load import dump_config
from marl_core.config.run_config import RunConfig
from marl_core.errors import OVERRIDE, RESUME, ConfigError, DataError, in_words, warn
from marl_core.ppo.types import Evaluation
from marl_core.store import checkpoint, ended
from marl_core.store.atomic import recover
from marl_core.store.before_weights import refuse_taken
from marl_core.store.config_diff import changed_keys
from marl_core.store.files import append_line, flush_file, keep_lines, new_folder, read_lines, write_json, write_text
from marl_core.store.lock import RunLock
from marl_core.store.provenance import changes, read_provenance
from marl_core.store.sessions import closed, earlier_sessions, last_seen, session

LINE_FILES = ("steps.jsonl", "samples.jsonl", "evals.jsonl")


@dataclass
class RunFolder:
    """One run on disk. Nothing is created before `start`."""

    path: Path
    notes: list[str] = field(default_factory=list)
    owned: bool = False
    """Whether this run may write here: it was resumed from this folder, or has made it."""
    lock: RunLock = field(init=False)
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _sessions: list[dict[str, Any]] = field(default_factory=list)
    """The sessions before this one, the last with the time that it was seen last at."""

    def __post_init__(self) -> None:
        self.lock = RunLock(self.path)

    @classmethod
    def open(cls, config: RunConfig, *, resume: bool, override: bool = False) -> RunFolder | None:
        """The folder of a run, None when the config has none. Refuses to overwrite a run, or to resume another one."""
        if config.run.folder is None:
            return None
        folder = cls(Path(config.run.folder).expanduser())
        if not resume:
            refuse_taken(folder.path)
        elif (folder.path / "config.yaml").exists():
            folder._take_up(config, override)
        return folder

    def _take_up(self, config: RunConfig, override: bool) -> None:
        try:
            self.hold()
            self.owned = True
            self._sessions = closed(earlier_sessions(self.path / "provenance.json"), last_seen(self.path))
            self.notes += ended.stop_note(self.path)
            self.notes += changed_keys(self.path / "config.yaml", config, override=override)
            recover(self.path)
            recover(self.checkpoints)
        except OSError as error:
            self.release()
            raise ConfigError(
                f"run.folder: {self.path} can't be written ({error}), so the run in it can't go on. "
                "Give it write permission, or copy it to a disk that has it."
            ) from error
        except BaseException:  # a refusal, or Ctrl-C
            self.release()
            raise

    def hold(self) -> None:
        """Lock the folder for this run, unless it is locked. ConfigError when another run holds it, or has taken it over."""
        note = self.lock.take()
        self.notes += [note] if note else []

    def release(self) -> None:
        """Unlock the folder for other processes."""
        self.lock.release()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def start(self, config: RunConfig, step: int, provenance: Mapping[str, Any], preflight: Mapping[str, Any]) -> None:
        """Write config, provenance and pre-flight result of a run that has done `step` steps; the first pre-flight result stays.

        ConfigError when the folder can't be written, or another run has taken it meanwhile.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._keep_config(config, step)
            write_text(self.path / "config.yaml", dump_config(config))
            self.owned = True
            how: Literal["start", "resume"] = "resume" if step or self._sessions else "start"
            sessions = [*self._sessions, session(how, step, provenance.get("packages"))]
            write_json(self.path / "provenance.json", {**provenance, "sessions": sessions})
            first = self.path / "preflight.json"
            resumed = self.path / f"preflight-step-{step}.json"
            write_json(resumed if first.exists() and step else first, preflight)
            self.go_on()
        except OSError as error:
            raise ConfigError(
                f"run.folder: {self.path} can't be made or written ({error}). Give another folder, or make room on that disk."
            ) from error

    def _keep_config(self, config: RunConfig, step: int) -> None:
        """A config that a resume replaces is kept: the steps so far were made with it."""
        file = self.path / "config.yaml"
        message = f"run.folder: {self.path} was taken by another run meanwhile. Give another folder."
        if file.exists() and not self.owned:
            raise ConfigError(message)  # before the lock: in one process it would be taken from that run
        self.hold()
        if file.exists() and not self.owned:
            self.release()
            raise ConfigError(message)
        if file.exists() and (text := file.read_text(encoding="utf-8")) != dump_config(config):
            write_text(self.path / f"config-until-step-{step}.yaml", text)

    @property
    def records_inputs(self) -> bool:
        """Whether it records what the run was started with: a run that was stopped before its first step may not."""
        return (self.path / "provenance.json").is_file()

    def refuse_other_inputs(self, now: Mapping[str, Any], fingerprint: Fingerprint | None, *, override: bool) -> None:
        """ConfigError when a file that decides a step, or the base, is not what the run was started with, unless overridden.

        `now`: this process's provenance. What only evaluations read may change, as the key `eval` may: it is noted. DataError when
        the recorded provenance is damaged.
        """
        file = self.path / "provenance.json"
        try:
            was = read_provenance(file)
        except DataError as error:
            if not override:
                raise
            self.notes.append(f"{error} ({in_words(*OVERRIDE)})")
            return
        serious, judging = changes(was, now, fingerprint)
        if serious and not override:
            raise ConfigError(
                f"resume: changed since the run was started: {', '.join(serious)}. Put back what was there; "
                f"or, if you mean the change, resume with {in_words(*OVERRIDE)}."
            )
        self.notes += [f"changed since the run was started ({in_words(*OVERRIDE)}): {name}" for name in serious]
        self.notes += [
            f"changed since the run was started: {name}, read by evaluations: those before and after don't compare"
            for name in judging
        ]
        for kind in ("threads", "processes"):
            before, after = was["hardware"].get(kind, 1), now["hardware"][kind]
            if before != after:
                drawn = "other texts are sampled, and " if kind == "processes" else ""
                self.notes.append(
                    f"{after} {kind} instead of {before}: {drawn}the numbers may differ in their last bits"
                )

    def way_on(self) -> str:
        """After a failure: what of the run's steps is saved, and how it goes on."""
        way = in_words(f"`marl run {self.path} --resume`", RESUME[1])
        steps = [checkpoint.step_of(path) for path in checkpoint.saved(self.checkpoints)]
        if steps:
            return f"Step {max(steps)} is saved: {way} goes on from there."
        return f"No checkpoint was written yet (run.checkpoint_every), so {way} starts again at step 1."

    def newest_checkpoint(self) -> Path | None:
        """The newest intact checkpoint; None when the run was stopped before its first. DataError without a run, or when none is intact."""
        if not (self.path / "config.yaml").exists():
            raise DataError(
                f"resume: {self.path} holds no run. Check run.folder, or start without {in_words('--resume', 'resume=True')}."
            )
        if not checkpoint.saved(self.checkpoints):
            made = sum(1 for _ in read_lines(self.path / "steps.jsonl"))
            self._rewind(0)
            self.notes.append("no checkpoint yet: starting from step 0")
            if made:
                steps = "the step that was" if made == 1 else f"the {made} steps that were"
                warn(
                    f"resume: {self.path} holds no checkpoint, so it starts again at step 1; {steps} recorded in it are dropped."
                )
            return None
        newest, notes = checkpoint.newest(self.checkpoints)
        repeated_steps = max(
            (line["step"] for line in read_lines(self.path / "steps.jsonl")), default=0
        ) - checkpoint.step_of(newest)
        note = (
            f"; {repeated_steps} step{'s are' if repeated_steps > 1 else ' is'} repeated" if repeated_steps > 0 else ""
        )
        self.notes += [*notes, f"resumed from {newest.name}{note}"]
        return newest

    def flush(self) -> None:
        """Flush the lines written so far to disk: a checkpoint must never be ahead of them."""
        self._write_evaluations()
        for name in LINE_FILES:
            flush_file(self.path / name)

    def go_on_from(self, step: int) -> None:
        """Move aside the checkpoints and drop the lines of steps after `step`: they will be run again."""
        checkpoint.set_aside(self.checkpoints, step)
        self._rewind(step)

    def _rewind(self, step: int) -> None:
        """Drop the lines of steps that will be run again."""
        for name in LINE_FILES:
            keep_lines(self.path / name, step if step or name != "evals.jsonl" else -1)

    def add_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Append to evals.jsonl, once for each step. On a full disk it waits, with a warning, for the next time."""
        self._waiting.append(evaluation)
        try:
            self._write_evaluations()
        except OSError as error:
            warn(
                f"eval: the evaluation of step {evaluation['step']} can't be written into {self.path / 'evals.jsonl'} "
                f"({error.strerror or error}). It waits in memory, and training goes on. Make room on that disk."
            )

    def _write_evaluations(self) -> None:
        file = self.path / "evals.jsonl"
        while self._waiting:
            if not any(line["step"] == self._waiting[0]["step"] for line in read_lines(file)):
                append_line(file, self._waiting[0])
            self._waiting.pop(0)

    def first_evaluation(self) -> Evaluation | None:
        """The evaluation before training, None without one. DataError when the file is damaged."""
        line = next(read_lines(self.path / "evals.jsonl"), None)
        try:
            return Evaluation(**{**line, **_not_measured(line)}) if line else None
        except TypeError as error:
            raise DataError(
                f"resume: {self.path / 'evals.jsonl'} is damaged ({error}). Move it away to go on without."
            ) from error

    def go_on(self) -> None:
        """The run has steps before it: what was said of an end is over."""
        (self.path / ended.FILE).unlink(missing_ok=True)

    def end(self, how: ended.How, reason: str, step: int) -> None:
        """Say how the run in this folder ended, unless it has become another's. A disk that takes no more is a warning."""
        if not self.owned or self.lock.lost:
            return
        try:
            ended.write(self.path, how, reason, step)
        except OSError as error:
            warn(f"{ended.FILE}: how the run ended can't be written into {self.path} ({error.strerror or error}).")

    def finish(self, bank: AdapterBank, policy: str) -> None:
        """Write final/policy, a plain PEFT adapter."""
        with new_folder(self.path / "final") as temporary:
            bank.save(policy, temporary / "policy")
            write_json(temporary / "policy" / "marl.json", {"base": bank.source, "base_prepared_by": bank.prepared})


def _not_measured(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of an evaluation that JSON has as null: a reward that nobody gave."""
    return {name: math.nan for name in ("reward", "reward_std") if line.get(name, 0.0) is None}
