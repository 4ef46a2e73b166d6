"""One measurement in a process of its own: build the run, warm up, time the steps, write what was seen."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from floor import matmul_peak, step_flops  # this folder is no package
from workloads import WORKS, Work, config_of, prompt_ids, write_cast, write_reward_adapter, write_shape


def main() -> None:
    """Read the job from the command line, write the result as JSON."""
    job = json.loads(sys.argv[1])
    work, folder = WORKS[job["work"]], Path(job["folder"])
    base = base_of(job, folder)
    # prepared in a process of its own: what building the inputs takes is not the run's memory
    reward = str(folder / "reward")
    in_child(lambda: write_reward_adapter(base, Path(reward), work))
    warnings.simplefilter("ignore")
    import yaml

    changes = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in job["set"])}
    config = config_of(work, base, reward, job["dtype"], job["device"], job["threads"], changes)
    in_child(lambda: (folder / "ids.json").write_text(json.dumps(prompt_ids(base, work, job["shape"]))))
    result = measure(work, config, json.loads((folder / "ids.json").read_text()), job)
    Path(job["out"]).write_text(json.dumps(result))


def base_of(job: dict[str, Any], folder: Path) -> str:
    """The model folder that is measured."""
    if job["shape"]:
        in_child(lambda: write_shape(job["shape"], folder / "base", job["dtype"]))
        return str(folder / "base")
    from fetch import fetch_model

    source = fetch_model(job["model"])
    if job["dtype"] == "float32":
        return source
    in_child(lambda: write_cast(source, folder / "base", job["dtype"]))  # as the hub holds it: nothing is cast at load
    return str(folder / "base")


def in_child(work: Any) -> None:
    """Run something in a forked process before torch is loaded here."""
    import os

    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(1)


def measure(work: Work, config: dict[str, Any], ids: list[list[int]], job: dict[str, Any]) -> dict[str, Any]:
    """Warm up, then the median step."""
    import torch

    from marl_core import RunConfig, Runner
    from marl_core.ppo.types import Prompts
    from marl_core.run.host import set_up_process

    set_up_process()  # as `marl run` does
    runner = Runner(RunConfig.model_validate(config))
    loaded = peak_mib()
    samples = runner.config.ppo.samples_per_prompt
    prompts = Prompts.of(ids[: len(ids) // samples], runner.bank.tokenizer.pad_token_id or 0)
    limits = None
    if work.ragged:
        limits = torch.tensor(work.lengths())
        never = (runner.bank.trunk.vocabulary - 1,)  # a token that is never sampled: the schedule alone ends rows
        sampler: Any = runner.algorithm.sampler
        runner.algorithm = replace(runner.algorithm, sampler=replace(sampler, stops=never))
    steps, positions = [], {"generate": 0, "score": 0, "update": 0}
    count = position_counter(runner.bank.trunk.body)
    for index in range(job["warmup"] + job["repeat"]):
        start = time.perf_counter()
        if runner.preflight is None:
            runner.check_start(prompts)
            start = time.perf_counter()
        at = [count[0]]
        rollout = runner.generate(prompts, limits=limits)
        at.append(count[0])
        scored = runner.score(rollout)
        at.append(count[0])
        runner.update(scored)
        at.append(count[0])
        positions = {name: at[place + 1] - at[place] for place, name in enumerate(positions)}
        seconds = {"step": time.perf_counter() - start, **runner.seconds}
        runner.seconds.clear()
        assert int(rollout.mask.sum()) == work.tokens, (int(rollout.mask.sum()), work.tokens)
        if index >= job["warmup"]:
            steps.append(seconds)
    peak = peak_mib()
    device_peak = torch.cuda.max_memory_allocated() / 2**20 if job["device"] == "cuda" else 0.0
    names = sorted({name for step in steps for name in step})
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    speed = matmul_peak(job["dtype"], job["device"])
    flops = step_flops(work, runner.bank.base.config.get_text_config())
    floor = sum(flops.values()) / speed
    import peft
    import transformers

    return {
        "work": work.name,
        "dtype": job["dtype"],
        "device": torch.cuda.get_device_name() if job["device"] == "cuda" else "cpu",
        "shape": job["shape"] or "SmolLM2-135M",
        "threads": job["threads"],
        "changes": job["set"],
        "seconds": medians,
        "all_steps": [step["step"] for step in steps],
        "floor_seconds": floor,
        "floor_by_phase": {name: value / speed for name, value in flops.items()},
        "matmul_gflops": speed / 1e9,
        "ratio_to_floor": medians["step"] / floor,
        "tokens_per_second": work.tokens / medians["step"],
        "peak_mib": peak,
        "loaded_mib": loaded,
        "peak_device_mib": device_peak,
        "computed_per_real": computed_per_real(work, positions),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def position_counter(body: Any) -> list[int]:
    """One number: token positions that have gone through the body from now on, padding included."""
    count = [0]

    def add(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        count[0] += named["input_ids"].numel()

    body.register_forward_pre_hook(add, with_kwargs=True)
    return count


def computed_per_real(work: Work, positions: dict[str, int]) -> dict[str, float]:
    """Token positions that went through the trunk, padding included, over those that had to."""
    prompt, lengths = work.prompt_tokens, work.lengths()
    sequence = work.prompts * prompt + work.tokens
    decode = work.prompts * prompt + sum(length - 1 for length in lengths)  # the last token is never fed
    passes = round(positions["score"] / sequence)
    real = {"generate": decode, "score": max(1, passes) * sequence, "update": work.epochs * sequence}
    return {name: positions[name] / real[name] for name in real}


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
