"""What the core can say about a plan before any weight is read: reasons against it, and warnings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from marl_core.artifacts.architecture import Architecture
from marl_core.artifacts.hub import cached_adapter
from marl_core.artifacts.model_files import ModelFiles, read_model, unpinned_code
from marl_core.artifacts.rows import look_at_prompts
from marl_core.config.device import device_warnings, missing_device
from marl_core.config.prompt_template import columns_of
from marl_core.config.run_config import RunConfig
from marl_core.config.section import Section
from marl_core.errors import RESUME, ConfigError, DataError, MarlError, PluginError, in_words
from marl_core.plan.adapter_checks import adapter_findings, adapter_warnings
from marl_core.plan.base_named import base_warnings
from marl_core.plan.chosen import Chosen
from marl_core.plan.describe import mismatch
from marl_core.plan.estimator_checks import estimator_findings
from marl_core.plan.fit import fit_findings
from marl_core.plan.hub_names import near_folder_warnings
from marl_core.plan.named_paths import path_options
from marl_core.plan.stored_weights import stored_findings
from marl_core.plan.trained_checks import trained_findings

HIGH_LEARNING_RATE = 0.01
"""A learning rate above which a LoRA by AdamW has hardly ever been trained: thirty times the default."""
KERNEL_FOLDERS = (("/", "proc"), ("/", "sys"))
"""Where root may write by its permissions, and still no file can be made."""


def core_findings(plan: Chosen) -> list[MarlError]:
    """Reasons why the run can't work, as the errors that would be raised for each alone."""
    finders = (
        _estimator,
        _model,
        _compile,
        _adapter,
        adapter_findings,
        stored_findings,
        _trained,
        _data,
        _folder,
    )
    return [finding for find in finders for finding in _gathered(find(plan))]


def _gathered(findings: Iterator[MarlError]) -> Iterator[MarlError]:
    """The findings, and last what ended them: a broken plugin that one section asks hides no other section."""
    try:
        yield from findings
    except MarlError as error:
        yield error


def _estimator(plan: Chosen) -> Iterator[MarlError]:
    yield from (ConfigError(sentence) for sentence in estimator_findings(plan))


def _trained(plan: Chosen) -> Iterator[MarlError]:
    yield from (ConfigError(sentence) for sentence in trained_findings(plan))


def core_warnings(plan: Chosen) -> list[str]:
    """What will run and may not be what was meant, each with its consequence."""
    return [
        *_sampling_warnings(plan.config),
        *_rounding_warnings(plan),
        *_schedule_warnings(plan.config),
        *_reference_warnings(plan),
        *adapter_warnings(plan),
        *base_warnings(plan),
        *near_folder_warnings(plan),
        *_folder_warnings(plan.config),
        *device_warnings(plan.config),
    ]


def remarks_here(plan: Chosen) -> list[str]:
    """What would stop the run as this machine and its folder are now: a config may be written for another machine, or to go on."""
    config = plan.config
    remarks = missing_device(config)
    folder = config.run.folder
    if folder and os.path.exists(os.path.join(os.path.expanduser(folder), "config.yaml")):
        remarks.append(
            f"run.folder: {folder} already holds a run. {in_words(f'`marl run {folder} --resume`', RESUME[1])} goes on with it; a new run "
            "needs another folder."
        )
    return remarks


def _model(plan: Chosen) -> Iterator[MarlError]:
    config, model = plan.config, plan.config.model
    unpinned = unpinned_code(model.path, model.revision, model.tokenizer) if model.trust_remote_code else None
    if unpinned:
        yield ConfigError(f"model.trust_remote_code: {unpinned}")
    try:
        files = read_model(model.path, model.revision)
    except DataError as error:
        yield error
        return
    if files is not None:
        yield from _model_files(config, files)
        yield from fit_findings(plan, files)


def _compile(plan: Chosen) -> Iterator[MarlError]:
    """Compiled layers were compared with the plain ones on unsharded, unquantized bases only; on others they are refused."""
    if not plan.config.speed.compile:
        return
    shard = plan.config.model.shard != "none"
    try:
        quantization = plan.quantization
    except PluginError as error:  # its backend isn't there, and compiled layers would need to know
        yield error
        return
    if shard or quantization.config is not None or quantization.after_load is not None:
        conflict = "model.shard" if shard else f"quantization: {plan.config.quantization.label}"
        yield ConfigError(
            f"speed.compile: compiled layers don't go with {conflict}: nobody has measured that they give the plain layers' numbers there. "
            "Set speed.compile: false."
        )


def _model_files(config: RunConfig, files: ModelFiles) -> Iterator[MarlError]:
    name, model_config = config.model.path, files.config
    if model_config.get("auto_map") and not config.model.trust_remote_code:
        yield ConfigError(
            f"model.path: {name!r} brings its own code (auto_map in config.json). "
            "Read it, then set model.trust_remote_code: true, or use a model that transformers knows."
        )
    if model_config.get("is_encoder_decoder"):
        yield ConfigError(
            f"model.path: {name!r} is an encoder-decoder; marl trains causal (decoder-only) language models."
        )
    limit = Architecture.of(model_config).positions
    response, prompt = config.sampling.max_new_tokens, (config.data.max_prompt_tokens or 0) if config.data else 0
    if limit is not None and response >= limit:
        yield ConfigError(
            f"sampling.max_new_tokens: {response} tokens leave no room for a prompt in the {limit} positions of {name!r}. Lower it."
        )
    elif limit is not None and prompt + response > limit:
        yield ConfigError(
            f"data.max_prompt_tokens + sampling.max_new_tokens: {prompt + response} tokens are more than the {limit} positions "
            f"of {name!r}. Lower one of them."
        )
    try:
        if os.path.isdir(os.path.expanduser(name)):
            files.shapes()
    except DataError as error:
        yield error


def _adapter(plan: Chosen) -> Iterator[MarlError]:
    policy = plan.config.policy
    if policy.source is None:
        return
    try:
        cached_adapter(policy.source, "policy.from", policy.revision, policy.subfolder)
    except DataError as error:
        yield error


def _data(plan: Chosen) -> Iterator[MarlError]:
    config, data = plan.config, plan.config.data
    template = data.prompt_template if data is not None else None
    columns = [data.field if data is not None else "prompt"] if template is None else columns_of(template)
    named_by = "data.field" if template is None else "data.prompt_template"
    limit = data.limit if data is not None else None
    sources = ((data and data.prompts, "data.prompts", limit), (config.eval.prompts, "eval.prompts", None))
    for name, key, limit in sources:
        errors = (look_at_prompts(name, column, key, named_by, limit) for column in columns) if name else ()
        yield from [error for error in errors if error is not None][:1]
    if config.eval.prompts is None and (config.eval.judges or config.eval.every):
        yield ConfigError("eval: judges and `every` need prompts to evaluate on. Set eval.prompts, or remove them.")


def _folder(plan: Chosen) -> Iterator[MarlError]:
    name = plan.config.run.folder
    if name is None:
        return
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    problem = _folder_problem(name, folder)
    if problem:
        yield ConfigError(f"run.folder: {name!r:.200} can't be a run's folder: {problem}. Choose another.")
        return
    for key, path in _inputs(plan):
        if os.path.exists(path) and os.path.realpath(path) == os.path.realpath(folder):
            yield ConfigError(
                f"run.folder: {name!r} is also {key}, which the run reads. Choose another folder to write to."
            )
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        yield ConfigError(
            f"run.folder: {name!r} can't be written: no permission to write in {existing}. Choose another folder."
        )


def _folder_problem(name: str, folder: Path) -> str | None:
    """Why no folder can be made or written under this name; None when one can."""
    if os.path.expanduser(name).startswith("~"):
        return "there is no user of that name"
    if folder == Path(folder.anchor):
        return "it is the root of the file system"
    if folder.parts[:2] in KERNEL_FOLDERS:
        return f"{os.path.join(*folder.parts[:2])} is the system's own view of itself, where no files can be kept"
    try:
        os.lstat(folder)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return f"{next(parent for parent in folder.parents if os.path.exists(parent))} is a file"
    except (OSError, ValueError) as error:  # too long, a file on the way, a NUL byte
        return getattr(error, "strerror", None) or str(error)
    return None if os.path.isdir(folder) else "there is a file of that name"


def _inputs(plan: Chosen) -> Iterator[tuple[str, str]]:
    """Everything the run reads that may be a path, with its key."""
    config = plan.config
    named = [
        ("model.path", config.model.path),
        ("model.tokenizer", config.model.tokenizer),
        ("policy.from", config.policy.source),
    ]
    named += [("data.prompts", config.data.prompts if config.data else None), ("eval.prompts", config.eval.prompts)]
    yield from ((key, os.path.expanduser(path)) for key, path in named if path)
    strategies = [
        plan.reference,
        *(strategy for _, strategy in plan.rewards),
        *(strategy for _, strategy in plan.judges.values()),
    ]
    for strategy in strategies:
        yield from ((f"{key} of {plan.hooks.origin(strategy)}", path) for key, path in path_options(strategy))


def _sampling_warnings(config: RunConfig) -> Iterator[str]:
    sampling = config.sampling
    for key, is_on in (("top_p", sampling.top_p < 1.0), ("top_k", sampling.top_k > 0)):
        if is_on:
            yield (
                f"sampling.{key}: {getattr(sampling, key)} cuts the distribution that is sampled from, while "
                "log-probs are of the whole one: ratio and KL are biased. Use temperature alone for unbiased PPO."
            )
    if config.ppo.kl.into == "loss" and config.ppo.kl.estimator == "k1":
        yield "ppo.kl: the gradient of k1 in the loss is zero in expectation, so it pulls nowhere. Use k2 or k3 with into: loss."
    if config.policy.dropout > 0:
        yield (
            f"policy.dropout: {config.policy.dropout} makes new log-probs differ from old ones before any update: "
            "the ratio starts away from 1. Use 0 for PPO."
        )


def _rounding_warnings(plan: Chosen) -> Iterator[str]:
    dtype = plan.config.model.dtype
    try:
        adapter = plan.adapter_said("policy") if dtype != "float32" else None
    except MarlError:
        return  # told as a finding
    if adapter is not None and adapter.start == "rounded":
        yield (
            f"policy: a fresh {plan.config.policy.label} adapter of these options on a {dtype} base rounds: step-0 KL is not quite 0."
        )


def _schedule_warnings(config: RunConfig) -> Iterator[str]:
    steps = config.ppo.steps
    rate = config.ppo.learning_rate
    if rate > HIGH_LEARNING_RATE:
        yield (
            f"ppo.learning_rate: {rate:g} is far above what adapters are trained with (1e-5 to 1e-3): the policy will most likely break "
            "in its first steps."
        )
    if config.ppo.warmup_steps >= steps:
        yield f"ppo.warmup_steps: {config.ppo.warmup_steps} of {steps} steps: all of the run is warm-up."
    for key, every, what_is_left in (
        ("run.checkpoint_every", config.run.checkpoint_every, "the only checkpoint is the one at the end"),
        ("eval.every", config.eval.every, "held-out prompts are answered before and after training only"),
    ):
        if every > steps:
            yield f"{key}: {every} is more than the {steps} steps of the run, so {what_is_left}."
    if _is_changed(config.ppo.kl, "horizon") and config.ppo.kl.target is None:
        yield "ppo.kl.horizon has no effect without ppo.kl.target: the coefficient is fixed."
    for index, choice in enumerate(config.reward):
        if choice.weight == 0:
            yield f"reward.{index}.weight: 0: this source is measured and never trained on."


def _folder_warnings(config: RunConfig) -> Iterator[str]:
    """A run folder with other files in it: a project, most likely."""
    folder = os.path.expanduser(config.run.folder or "")
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder else []
    except (OSError, ValueError):
        return  # not there yet, or told with the mistakes
    if names and "config.yaml" not in names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield (
            f"run.folder: {config.run.folder!r} holds other files already ({shown}), and the run's files will be written among them. "
            "Choose a folder of its own, e.g. runs/first."
        )


def _is_changed(section: Section, name: str) -> bool:
    """Whether a key has another value than its default; a config that was written out names them all."""
    default: object = type(section).model_fields[name].get_default(call_default_factory=True, validated_data={})
    return bool(getattr(section, name) != default)


def _reference_warnings(plan: Chosen) -> Iterator[str]:
    problem = mismatch(plan)
    if problem and plan.config.ppo.kl.coef > 0:
        consequence = (
            "allowed by allow_mismatch"
            if plan.reference_choice.allow_mismatch
            else "refused at step 0 unless allow_mismatch: true"
        )
        yield f"reference: {problem} ({consequence})."
