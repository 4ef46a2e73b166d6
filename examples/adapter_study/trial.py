"""One run and one probe, by marl's own loop. Everything that takes a model is here and in bases.py."""

import json
import resource
import time
from collections.abc import Mapping
from typing import Any

from marl_core import RunConfig, Runner, response_logprobs
from marl_core.config.load import parse_config
from marl_core.errors import NumericError
from marl_core.registry.catalog import Catalog

Result = dict[str, Any]


def run(config: Mapping[str, Any]) -> Result:
    """Train as the config says, and tell evaluations, training rewards and costs.

    Nothing is left on disk. A policy that breaks (numbers that aren't finite) is a result: its evaluations so far, and what broke.
    """
    before = time.process_time()
    runner = Runner(read(config))
    evals, rewards, broken = [], [], None
    try:
        runner.prepare()
        evals.append(evaluation(runner))
        while runner.done < runner.config.ppo.steps:
            stats = runner.step(runner.prompts())
            rewards.append(short(stats.reward_mean))
            if runner.done % runner.config.eval.every == 0 or runner.done == runner.config.ppo.steps:
                evals.append(evaluation(runner))
    except NumericError as error:
        broken = f"step {runner.done + 1}: {error}"
    return {
        "evals": evals,
        "rewards": rewards,
        "broken": broken,
        "learned": learned(runner),
        "cpu_seconds": round(time.process_time() - before, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def first_step(config: Mapping[str, Any], rate: float) -> float:
    """The size of one step at this rate: mean |change of log-prob| over the tokens of the run's first rollout, in nats.

    One step of the optimizer on the whole rollout: with minibatches the first would move the ratio of the second.
    """
    written = dict(config)
    ppo = written["ppo"] | {"learning_rate": rate, "epochs": 1, "minibatch": written["ppo"]["batch"]}
    runner = Runner(read(written | {"ppo": ppo, "eval": {}}))
    rollout = runner.generate(runner.prompts())
    before = response_logprobs(runner.bank, rollout, adapter="policy")
    runner.update(runner.score(rollout))
    after = response_logprobs(runner.bank, rollout, adapter="policy")
    return float((after - before).abs().sum() / rollout.mask.sum())


def read(config: Mapping[str, Any]) -> RunConfig:
    """The config, checked."""
    return parse_config(dict(config), "the study's config", Catalog.installed())


def learned(runner: Runner) -> int:
    """How many numbers of the policy's adapter learn."""
    return sum(parameter.numel() for parameter in runner.bank.parameters("policy").values())


def evaluation(runner: Runner) -> Result:
    """A held-out evaluation in a line, in the piece's log too."""
    found = runner.evaluate()
    assert found is not None
    judges = {name: short(judge["mean"]) for name, judge in found.judges.items() if judge["mean"] is not None}
    row = {"step": found.step, "reward": short(found.reward), "kl": short(found.kl)} | judges
    print(json.dumps(row), flush=True)
    return row


def short(number: float) -> float:
    """Five digits."""
    return float(f"{number:.5g}")
