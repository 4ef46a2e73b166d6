"""Plays scenarios on so many processes each: `python worker.py FOLDER 2:NAME...`; the test reads what they leave behind.

The libraries are imported once and every rank is forked from here: a dozen launches would spend their time importing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from marl_core import Catalog, DataError, MarlError, RunConfig, Runner, StopRun, Strategy, hookimpl
from marl_core.bank.base import load_for_bank as _load_for_bank  # noqa: F401  # imported before the fork
from marl_core.cli.app import main
from marl_core.config.load import parse_config
from marl_core.errors import RankError
from marl_core.ppo import objectives, update
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.types import Prompts, Rollout

RESPONSES = (
    (5, 6, 7, 8, 9, 2),
    (40, 41, 2),
    (77,),
    (90, 91, 92, 93),
    (8, 2),
    (9, 9, 9, 9, 9),
    (11, 12, 2),
    (13, 14, 15),
)
CASES: dict[str, dict[str, Any]] = {
    "on-policy": {"shaping": {"normalize": True, "missing_eos_penalty": 1.0}},
    "own-value": {"value": {"on": "own", "r": 2}, "ppo": {"microbatch": 1}},
    "groups": {
        "speed": {"pack": False},
        "value": "none",
        "ppo": {"advantage": "grpo", "samples_per_prompt": 2, "aggregation": "sequence"},
    },
    "standing-still": {"speed": {"pack": False}, "ppo": {"learning_rate": 1e-9}},
    "early-stop": {"ppo": {"max_kl": 1e-4}},
    "sharded": {"shard": "fsdp2"},
    "checkpointing": {"shard": "fsdp2", "model": {"gradient_checkpointing": True}},
}


def config(folder: Path, **changes: Any) -> RunConfig:
    """A small run on the inputs in `folder`."""
    asked = changes.pop("shard", "none")
    shard = asked if os.environ["WORLD_SIZE"] != "1" else "none"
    written: dict[str, Any] = {
        "model": {"path": str(folder / "tiny"), "dtype": "float32", "shard": shard} | changes.pop("model", {}),
        "policy": {"r": 4, "alpha": 8},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": f"{folder}/rewards.py:odd"},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "sampling": {"max_new_tokens": 6},
        "ppo": {"steps": 3, "batch": 8, "minibatch": 4, "epochs": 2, "learning_rate": 1e-2,
                "kl": {"coef": 0.2, "target": 0.5, "horizon": 40}} | changes.pop("ppo", {}),
        "run": {"device": "cpu", "timeout_seconds": 20.0} | changes.pop("run", {}),
        **changes,
    }  # fmt: skip
    return parse_config(written, "worker", Catalog.installed())


def state(runner: Runner) -> dict[str, Tensor]:
    """Weights, optimizer state, and the numbers that a step leaves for the next."""
    roles = runner.roles.trained.parameters(runner.bank)
    weights = {f"{role}/{name}": p for role, found in roles.items() for name, p in found.items()}
    moments = {f"{name}|{key}": t for name, p in weights.items() for key, t in runner.optimizer.state[p].items()}
    numbers = {"kl_coef": runner.kl_coef, "done": runner.done, **runner.state.as_dict()["shaper"]}
    return {name: t.detach().clone() for name, t in {**weights, **moments}.items()} | {
        name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()
    }


def joint(folder: Path, out: Path) -> None:
    """Two steps on given responses: every optimizer step's gradients, the weights after each, and the metrics."""
    for name, changes in CASES.items():
        changes = json.loads(json.dumps(changes))
        runner = Runner(config(folder, **changes))
        group = runner.config.ppo.samples_per_prompt
        words = runner.bank.tokenizer
        prompts = Prompts.of([words(f"film {i // group}").input_ids for i in range(8)], words.pad_token_id)
        tensors: dict[str, Tensor] = {}
        runner.optimizer.register_step_pre_hook(lambda *_, r=runner, t=tensors: _record(r, t))
        metrics = []
        for step in range(2):
            rollout = Rollout.from_responses(prompts, RESPONSES, words)
            scored = runner.score(rollout)
            advantages = estimate_advantages(scored, runner.config.ppo, runner.kl_coef)
            metrics.append(dict(runner.finish(scored, advantages, runner.update(scored, advantages)).metrics))
            tensors |= {f"state-{step}/{key}": value for key, value in state(runner).items()}
            tensors |= {f"scored-{step}/logprobs": scored.logprobs, f"scored-{step}/advantages": advantages.advantages}
        save_file({key: value.contiguous() for key, value in tensors.items()}, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(metrics), encoding="utf-8")


def _record(runner: Runner, tensors: dict[str, Tensor]) -> None:
    roles = runner.roles.trained.parameters(runner.bank)
    gradients = [p.grad.flatten() for found in roles.values() for p in found.values() if p.grad is not None]
    number = sum(key.startswith("gradient-") for key in tensors)
    tensors[f"gradient-{number}"] = torch.cat(gradients).clone()


def whole_run(folder: Path, out: Path) -> None:
    """A run from start to end with evaluations; then again from its second checkpoint."""
    for shard in ("none", "fsdp2"):
        target = folder / f"whole-{shard}-{os.environ['WORLD_SIZE']}"
        settings: dict[str, Any] = {
            "run": {"folder": str(target), "checkpoint_every": 1, "keep": 9},
            "eval": {"prompts": str(folder / "prompts.jsonl"), "limit": 5, "every": 2},
            "observers": ["json-lines"],
            "policy": {"r": 4, "alpha": 8, "dropout": 0.1},
            "shard": shard,
        }
        runner = Runner(config(folder, **dict(settings)))
        runner.train()
        save_file(state(runner), out / f"whole-{shard}.safetensors")
        if runner.ranks.first:
            shutil.copytree(target, out / f"whole-{shard}")
            shutil.rmtree(target / "final")
            shutil.rmtree(target / "checkpoints" / "step-000003")
        runner.ranks.all_gather_object(None)
        again = Runner(config(folder, **settings), resume=True)
        assert again.done == 2
        again.train()
        save_file(state(again), out / f"resumed-{shard}.safetensors")
        if again.ranks.first:
            shutil.copytree(target, out / f"resumed-{shard}")


def sampling(folder: Path, out: Path) -> None:
    """What each rank knows of one rollout, and that its first ratio is one."""
    runner = Runner(config(folder, ppo={"samples_per_prompt": 2}, speed={"capture": False}))
    rollout = runner.generate(runner.prompts())
    scored = runner.score(rollout)
    stats = runner.update(scored)
    plain = Runner(config(folder, ppo={"samples_per_prompt": 2}, speed={"decode": "transformers"}))
    same = plain.generate(Prompts.of([[5, 6, 7]] * 4, 0))
    (out / "sampling.json").write_text(
        json.dumps({"texts": list(rollout.texts), "prompts": list(rollout.prompts.texts), "same": same.ids.tolist(),
                    "first_ratio_error": stats.first_ratio_error, "ratio_max": stats.ratio_max}),
        encoding="utf-8",
    )  # fmt: skip


class Enough(Strategy):
    """Has enough after two steps; observers are the first rank's alone."""

    @hookimpl
    def marl_step_end(self, stats: Any) -> StopRun | None:
        return StopRun("enough") if stats.step == 2 else None


def asked_to_stop(folder: Path, out: Path) -> None:
    """One rank alone asks: by a strategy, and by its Runner."""
    by_strategy = Runner(config(folder, observers=[Enough()]))
    results = [by_strategy.train()]
    by_hand = Runner(config(folder))
    if os.environ["RANK"] == "1":
        by_hand.request_stop("not today")
    results.append(by_hand.train())
    found = [[result.steps, result.stopped] for result in results]
    (out / "asked_to_stop.json").write_text(json.dumps(found), encoding="utf-8")


def uneven(folder: Path, out: Path) -> None:
    """Batches that can't be shared out."""
    found = []
    bad: list[dict[str, Any]] = [
        {"minibatch": 1},
        {"batch": 4, "minibatch": 2, "samples_per_prompt": 4},
        {"microbatch": 2, "minibatch": 6, "batch": 6},
    ]
    for ppo in bad:
        try:
            Runner(config(folder, ppo=ppo))
        except MarlError as error:
            found.append(f"{type(error).__name__}: {error}")
    runner = Runner(config(folder))
    words = runner.bank.tokenizer
    try:
        runner.score(Rollout.from_responses(Prompts.of([[5]] * 3, 0), RESPONSES[:3], words))
    except DataError as error:
        found.append(f"DataError: {error}")
    (out / "uneven.json").write_text(json.dumps(found), encoding="utf-8")


def disagree(folder: Path, out: Path) -> None:
    """Ranks that were given different seeds, and different weights on the way."""
    rank = os.environ["RANK"]
    found = []
    for changes in ({"run": {"seed": int(rank)}}, {"ppo": {"clip": 0.1 + int(rank) / 10}}, {}):
        runner = Runner(config(folder, **changes))
        try:
            scored = runner.score(runner.generate(runner.prompts()))
            if rank == "1":
                runner.optimizer.param_groups[0]["initial_lr"] *= 1.001
            runner.update(scored)
        except RankError as error:
            found.append(str(error))
    (out / "disagree.json").write_text(json.dumps(found), encoding="utf-8")


def _command(folder: Path, reward: str, timeout: float = 20.0) -> int:
    file = folder / f"{reward}-{os.environ['RANK']}.yaml"
    file.write_text(
        "reference: disabled-adapter\n"
        f"model: {{path: {folder}/tiny, dtype: float32}}\npolicy: {{r: 2, alpha: 4}}\n"
        f"reward: {{use: function, target: '{folder}/rewards.py:{reward}'}}\ndata: {{prompts: {folder}/prompts.jsonl}}\n"
        "sampling: {max_new_tokens: 4}\nppo: {steps: 3, batch: 4, minibatch: 4, epochs: 1}\n"
        f"run: {{device: cpu, folder: {folder}/run-{reward}, timeout_seconds: {timeout}}}\n",
        encoding="utf-8",
    )
    return main(["run", str(file)])


def not_finite(folder: Path, out: Path) -> int:
    """A loss that is NaN on the second rank alone."""
    plain = objectives.value_loss

    def broken(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        losses, clipped = plain(values, *rest)
        return losses * float("nan"), clipped

    if os.environ["RANK"] == "1":
        setattr(update, "value_loss", broken)  # noqa: B010  # what update imported, not what it offers
    return _command(folder, "low")


SCENARIOS: dict[str, Callable[[Path, Path], int | None]] = {
    "joint": joint,
    "whole_run": whole_run,
    "sampling": sampling,
    "asked_to_stop": asked_to_stop,
    "uneven": uneven,
    "disagree": disagree,
    "raises": lambda folder, out: _command(folder, "raises_on_rank_1"),
    "killed": lambda folder, out: _command(folder, "kills_rank_1"),
    "hangs": lambda folder, out: _command(folder, "hangs_on_rank_1", timeout=1.0),
    "not_finite": not_finite,
    "stopped": lambda folder, out: _command(folder, "stops_rank_1"),
}


def play(name: str, folder: Path, size: int) -> list[dict[str, Any]]:
    """Fork the ranks of one scenario and wait for them: exit code and seconds of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    children = [_fork(name, folder, rank, size, port) for rank in range(size)]
    ended: dict[int, dict[str, Any]] = {}
    while len(ended) < size:
        for rank, child in enumerate(children):
            done, status = os.waitpid(child, os.WNOHANG) if rank not in ended else (0, 0)
            if done:
                ended[rank] = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
        if time.monotonic() - start > 90:  # the test says which one is missing
            for rank, child in enumerate(children):
                if rank not in ended:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [ended[rank] for rank in range(size)]


def _fork(name: str, folder: Path, rank: int, size: int, port: int) -> int:
    out = folder / f"{name}-{size}" / str(rank)
    out.mkdir(parents=True)
    child = os.fork()
    if child:
        return child
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 99
    try:
        code = SCENARIOS[name](folder, out) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    asked = [(int(size), name) for size, _, name in (text.partition(":") for text in sys.argv[2:])]
    results = {f"{size}:{name}": play(name, where, size) for size, name in asked}
    (where / "results.json").write_text(json.dumps(results), encoding="utf-8")
