"""marl's own step with four separate models in memory: what sharing one base saves, with nothing else changed.

`four_models.py` is another implementation, written without marl, and checks the mathematics. Here the same `Step` runs as in every
other arm; only the roles live elsewhere: reference, reward and value each on a copy of the base of their own.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from marl_core import AdapterBank, EvalSection, Rollout, RunConfig, Runner, load_config, response_logprobs
from marl_core.run.optimizer import make_optimizer


def spread(runner: Runner, reward: str) -> Runner:
    """Give reference, reward and value of a run on one base a copy of the base each. Their weights stay what they are."""
    step, shared = runner.algorithm, runner.bank
    reference, judge, critic = (_copy(shared, runner.config) for _ in range(3))
    rows = step.budget.train.rows

    def logprobs(rollout: Rollout) -> Tensor:
        return response_logprobs(reference, rollout, step.temperature, rows)

    view = judge.load_reward(reward)

    def scores(rollout: Rollout) -> Tensor:
        return judge.score(view, rollout.sequence_ids, rollout.sequence_mask)

    trained = step.roles.trained
    value, head = str(trained.value_adapter), str(trained.value_head)
    critic.add(value, shared.config(value), seed=0)
    critic.add_value_head(head)
    for name, tensor in shared.tensors(value).items():
        critic.tensors(value)[name].copy_(tensor)
    critic.heads[head].load_state_dict(shared.heads[head].state_dict())
    for name in [name for name in shared.adapters if name != trained.policy]:
        shared.remove(name)
    shared.heads.pop(head, None)

    roles = replace(
        step.roles,
        trained=replace(trained, value_bank=critic),
        reference=logprobs,
        rewards=tuple(replace(source, score=scores) for source in step.roles.rewards),
    )
    runner.algorithm = replace(step, roles=roles)
    runner.optimizer = make_optimizer(roles.trained.parameters(shared), runner.config)
    runner.guard.start(shared)
    return runner


def _copy(bank: AdapterBank, config: RunConfig) -> AdapterBank:
    return AdapterBank.from_pretrained(config.model.path, dtype=config.model.dtype, device=config.run.device)


def main(config_file: str, base: str, reward: str) -> None:
    """Train as the config says, without evaluations, and write steps.jsonl as marl does."""
    written = load_config(Path(config_file))
    folder = Path(str(written.run.folder))
    folder.mkdir(parents=True, exist_ok=True)
    shared = written.with_changes(
        {
            "model.path": base,
            "reference": "disabled-adapter",
            "reward": {"use": "adapter", "path": reward},
            "value.on": "own",
            "run.folder": None,
            "observers": [],
            "eval": EvalSection(),
        }
    )
    runner = spread(Runner(shared), reward)
    with open(folder / "steps.jsonl", "w") as steps:
        while runner.done < written.ppo.steps:
            stats = runner.step(runner.prompts())
            print(json.dumps({"step": stats.step, **stats.metrics}), file=steps, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
