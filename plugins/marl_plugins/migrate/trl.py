"""A TRL PPO script and its arguments as a marl config: of the classic trainer (to 0.11), and of the one that came after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from marl_core import ConfigError
from marl_plugins.migrate.adapter_section import kind_of, policy_section
from marl_plugins.migrate.foreign_config import (
    DIVIDED,
    Carried,
    ForeignConfig,
    Processes,
    lora_rate,
    names_in,
    rounded_up,
    run_sections,
    schedule,
    steps_of,
    warm_up,
    without_none,
)
from marl_plugins.migrate.foreign_config import processes as processes_told
from marl_plugins.migrate.foreign_files import read_mapping, rows_of
from marl_plugins.migrate.known_keys import TRL_KEYS
from marl_plugins.migrate.launcher import processes_of
from marl_plugins.migrate.reasons import TRL
from marl_plugins.migrate.trl_defaults import (
    CLASSIC_KEYS,
    MULTI_ADAPTER_LABEL,
    Trainer,
    defaults,
    only_before_last,
    release,
)
from marl_plugins.migrate.trl_prompts import (
    HELD_OUT_FILE,
    OWN_RECIPES,
    PROMPTS_FILE,
    SCRIPT_FILE,
    described,
    prompts_script,
)
from marl_plugins.migrate.trl_script import CLASSIFICATION_TASKS, LORA_NAMES, Script, read_script
from marl_plugins.writing import usual_config, usual_lora

NESTED = {
    "ppo_config.": "",
    "peft_config.r": "lora_r",
    "peft_config.target_modules": "lora_target_modules",
    "peft_config.": "",
}
"""Beginnings of arguments as scripts with tyro take them (TRL up to 0.7.10), and what stands for them."""
KL_ESTIMATORS = {"kl": "k1", "mse": "k2"}
ADAM_EPS = 1e-8
"""Torch's and transformers' default, which TRL's trainers leave."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class Command:
    """A command line that starts a script."""

    script: Path | None
    """None where there are arguments alone."""
    words: list[str]
    """The script's arguments."""
    processes: int | None = None
    """How many processes the launcher before the script starts; None where that isn't told."""


def split_command(words: Sequence[str]) -> Command:
    """Tell launcher, script and arguments apart, as in `accelerate launch --num_processes 4 ppo.py --seed 1`."""
    scripts = [index for index, word in enumerate(words) if word.endswith(".py") and not word.startswith("-")]
    if not scripts:
        return Command(None, list(words))
    first = scripts[0]
    return Command(Path(words[first]), list(words[first + 1 :]), processes_of(words[:first]))


def read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and `--flag` as a mapping; `--config FILE` is read first, and a key given beside it wins."""
    options: dict[str, Any] = {}
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if not argument.startswith("--"):
            raise ConfigError(f"{argument!r}: expected --key value, as a TRL script takes them.")
        name, _, value = argument[2:].partition("=")
        index += 1
        parts = [value] if "=" in argument else []
        while "=" not in argument and index < len(arguments) and not arguments[index].startswith("--"):
            parts.append(arguments[index])
            index += 1
        try:
            parsed = [yaml.safe_load(part) for part in parts]
        except yaml.YAMLError:
            parsed = list(parts)  # a text that YAML can't take stays a text
        options[_plain(name)] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    file = options.pop("config", None)
    if file is not None and (isinstance(file, bool) or not isinstance(file, str | int)):
        raise ConfigError("--config: needs one file behind it, as in --config ppo.yaml.")
    return {**(read_mapping(Path(str(file))) if file is not None else {}), **options}


def _plain(name: str) -> str:
    """`ppo_config.batch-size` as `batch_size`."""
    name = name.replace("-", "_")
    start = next((start for start in NESTED if name.startswith(start)), None)
    return name if start is None else NESTED[start] + name.removeprefix(start)


def migrate(
    written: Mapping[str, Any],
    script: Path | None = None,
    trl_version: str | None = None,
    processes: int | None = None,
) -> Carried:
    """The marl config of a script's arguments, and of the script itself where it is given.

    `trl_version`: the release whose defaults count; without it the installed one, or the newest that has the trainer.
    `processes`: how many the run had, where that is known.
    """
    if script is None and not written:
        raise ConfigError(
            "there is nothing to convert: give the script with its arguments, as in marl import trl-args ppo.py --learning_rate 1e-5."
        )
    source = None if script is None else read_script(script, written)
    written = _negated(written, source)
    unknown = _checked(written, source)
    trainer = source.trainer if source else _trainer(written, trl_version)
    number = release(trainer, trl_version, source.span if source else None)
    own_flags = (
        {key for key in source.flags if written.get(key) is True and key in TRL_KEYS.values} if source else set()
    )
    written = {key: value for key, value in written.items() if key not in own_flags}
    given = {**(source.values if source else {}), **written}
    if processes is not None:
        given["num_processes"] = processes
    multi_adapter = bool({"rm_adapter", "reward_adapter"} & set(given))
    foreign = ForeignConfig(
        given,
        defaults(trainer, number, multi_adapter=multi_adapter, script_read=source is not None),
        unknown=unknown,
    )
    many = processes_told(foreign)
    if foreign.take("use_seq2seq"):
        raise ConfigError("use_seq2seq: marl trains causal (decoder-only) language models, and no encoder-decoders.")
    foreign.notes += source.notes if source else []
    for key in sorted(own_flags):
        foreign.note(key, "is a flag of the script's own; TRL's argument of that name takes a value", lost=True)
    classic = trainer == "classic"
    trains_lora = _trains_lora(foreign, source, classic, multi_adapter)
    model, quantization = _model(foreign, source)
    own = (
        "ppo_multi_adapter.py" if multi_adapter else "ppo.py" if classic and "reward_model_path" not in given else None
    )
    data, held_out, rows, files = _data(
        foreign, source, str(model["path"]), own if classic and source is None else None
    )
    reward, value = _reward(foreign, source, classic)
    config = {
        "model": model,
        "quantization": quantization,
        "policy": _policy(foreign, trains_lora, source),
        "reference": _reference(foreign),
        "reward": reward,
        "value": value,
        "data": data,
        "sampling": _sampling(foreign, classic),
        "ppo": _classic_ppo(foreign, rows, many) if classic else _last_ppo(foreign, rows, many),
        "shaping": _shaping(foreign),
        "eval": held_out,
        **run_sections(foreign, TRACKERS, 0 if classic else 42),
    }
    if held_out is not None and "limit" in held_out:
        held_out["limit"] *= many.count  # each process takes a batch
    lora_rate(foreign, config["ppo"], trains_lora, "use" not in config["policy"])
    return foreign.carried(config, TRL, files)


def _negated(written: Mapping[str, Any], source: Script | None) -> dict[str, Any]:
    """`--no_adap_kl_ctrl` as transformers' parser takes it: adap_kl_ctrl is false."""
    declared = source.declared if source else ()
    found: dict[str, Any] = {}
    for key, value in written.items():
        name = key.removeprefix("no_")
        negates = (
            name != key
            and value is True
            and key not in {*TRL_KEYS.flags, *declared}
            and name in {*TRL_KEYS.flags, *declared}
        )
        found.update({name: False} if negates else {key: value})
    return found


def _checked(written: Mapping[str, Any], source: Script | None) -> list[str]:
    """Arguments that neither TRL nor the script knows; ConfigError for a slip of the pen, and for a value that was forgotten."""
    if source is None:
        return TRL_KEYS.unknown(written, dashes="--")
    return TRL_KEYS.unknown(written, source.declared, source.flags, dashes="--")


def _trainer(written: Mapping[str, Any], trl_version: str | None) -> Trainer:
    """Which of TRL's two trainers the arguments are for, by their names and the release."""
    return "classic" if CLASSIC_KEYS & set(written) or only_before_last(trl_version) else "last"


def _trains_lora(foreign: ForeignConfig, source: Script | None, classic: bool, multi_adapter: bool) -> bool:
    """Whether TRL trained a LoRA, or all weights; the latter is said, for marl trains a LoRA whatever was trained."""
    asked = bool(foreign.take("use_peft"))
    lora_arguments = (
        any(name.startswith("lora_") for name in foreign.remaining) if classic and source is None else False
    )
    if source is not None:
        trains = source.lora == "always" or (source.lora == "if use_peft" and asked)
        because = f"{source.name} {'makes no LoRA' if source.lora == 'never' else 'makes a LoRA with --use_peft only'}"
    else:
        trains = asked or multi_adapter or lora_arguments
        because = "without --use_peft TRL's scripts make no LoRA"
    if not trains:
        foreign.note(
            "use_peft",
            f"{because}: all weights were trained. marl trains a LoRA on the frozen base, here with marl's own rank and targets, "
            "so it is another experiment; for more capacity raise policy.r",
        )
    return trains


def _model(foreign: ForeignConfig, source: Script | None) -> tuple[dict[str, Any], Any]:
    sft, path = foreign.take("sft_model_path"), foreign.take("model_name_or_path")
    if not path and ("model_name" in foreign.remaining or (source is not None and "model_name" in source.reads)):
        path = foreign.take("model_name")
    if not (sft or path):
        raise ConfigError("model_name_or_path (or sft_model_path, model_name): is needed; it is the base.")
    four, eight = foreign.take("load_in_4bit", default=False), foreign.take("load_in_8bit", default=False)
    kind, nested = (
        foreign.take("bnb_4bit_quant_type", default="nf4"),
        foreign.take("use_bnb_nested_quant", default=False),
    )
    named = foreign.take("dtype", "torch_dtype", default="bfloat16" if foreign.take("bf16") else None)
    if named is None:
        foreign.assume(
            "dtype",
            "not given; float32 is written, as transformers 4 loads a model; transformers 5 takes the dtype of its files",
        )
    dtype = str(named or "float32")
    checkpointing = foreign.take("gradient_checkpointing")
    if checkpointing and eight:
        foreign.note("gradient_checkpointing", "not on an 8-bit base, whose kernels differ between train and eval mode")
    model = {
        "path": sft or path,
        "revision": foreign.take("model_revision"),
        "dtype": dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16",
        "attention": foreign.take("attn_implementation"),
        "trust_remote_code": foreign.take("trust_remote_code") or None,
        "gradient_checkpointing": True if checkpointing and not eight else None,
    }
    quantization: Any = "bnb-8bit" if eight else None
    if four:
        quantization = {"use": "bnb-4bit", "type": kind, "double": bool(nested)}
    return without_none(model), quantization


def _policy(foreign: ForeignConfig, trains_lora: bool, source: Script | None) -> dict[str, Any]:
    """The adapter that TRL trained, or marl's usual LoRA where it trained all weights."""
    named = source.adapter if source else "LoraConfig"
    options = dict(source.adapter_options) if source else {}
    if trains_lora and named == "LoraConfig":
        options |= {
            "r": foreign.count("lora_r"),
            "lora_alpha": float(foreign.number("lora_alpha")),
            "lora_dropout": foreign.number("lora_dropout"),
            "use_rslora": foreign.take("use_rslora"),
            "use_dora": foreign.take("use_dora"),
            "target_modules": foreign.take("lora_target_modules"),
            "target_parameters": names_in(foreign.take("lora_target_parameters")) or None,
            "modules_to_save": foreign.take("lora_modules_to_save"),
        }
    plus = foreign.number("loraplus_lr_ratio") if named == "LoraConfig" else None
    for name in [name for name in foreign.remaining if name.startswith("lora_") or name in ("use_rslora", "use_dora")]:
        if name == "lora_task_type":
            continue
        value = foreign.remaining.pop(name)
        if trains_lora and value:
            foreign.note(
                name,
                f"{source.name if source else 'it'} makes an adapter by {named}, which has no such option",
                lost=True,
            )
    if not trains_lora:
        return usual_lora()
    kind = kind_of(named)
    section = policy_section(kind, options, named, LORA_NAMES if named == "LoraConfig" else {}, plus)
    foreign.notes += section.notes
    if options.get("target_modules") is None and section.policy.get("targets") == "all-linear":
        foreign.assumed["lora_target_modules" if kind == "lora" else f"{named}.target_modules"] = (
            "not given; peft takes a few projections then, by architecture (for a LoRA q_proj and v_proj of a Llama). all-linear is "
            "written, which learns more; to have theirs set policy.targets"
        )
    return section.policy


def _reference(foreign: ForeignConfig) -> str:
    """With PEFT, TRL's reference was the model with the adapter off."""
    if foreign.take("ref_adapter_name"):
        foreign.note(
            "ref_adapter_name",
            "it named an adapter in memory: write reference: {use: peft-adapter, adapter: its folder}",
            lost=True,
        )
    return "disabled-adapter"


def _reward(foreign: ForeignConfig, source: Script | None, classic: bool) -> tuple[Any, Any]:
    """Reward and value: a reward adapter on the base, a classifier, or the last trainer's separate reward and value models."""
    adapter = foreign.take("rm_adapter", "reward_adapter")
    label = source.reward_label if source else MULTI_ADAPTER_LABEL if adapter else None
    if adapter:
        foreign.remaining.pop("reward_model", None)  # the script's other way, which an adapter stands in for
        if label:
            foreign.note(
                "rm_adapter",
                f"{source.name if source else 'ppo_multi_adapter.py of TRL'} reads output {label} of the adapter's head; "
                "marl reads heads with one output (num_labels=1), and refuses others",
            )
        return {"use": "adapter", "path": adapter}, {"on": "policy"}
    model = foreign.take("reward_model_path", "reward_model_name")
    pipeline = foreign.remaining.pop("reward_model", None)
    if model is None and pipeline is None and classic and (source is None or "reward_model" in source.reads):
        pipeline = foreign.take("reward_model")
    model = pipeline or model  # a script's pipeline says more than the argument that it takes its model from
    task, colon, name = str(model or "").partition(":")
    if colon and not os.path.exists(str(model)):
        return _pipeline(foreign, task, name, 1 if label is None else label, source), {"on": "policy"}
    if model:
        if not classic:
            foreign.note(
                "reward_model_path",
                "TRL made the value model a second copy of it; here the value is an adapter of its own on the base",
            )
        return {"use": "model", "path": model}, {"on": "policy" if classic else "own"}
    foreign.note("reward_model_path", "is missing: name a reward; rewards.py:score stands for it")
    return {"use": "function", "target": "rewards.py:score"}, {"on": "policy"}


def _pipeline(foreign: ForeignConfig, task: str, name: str, label: int, source: Script | None) -> dict[str, Any]:
    """A pipeline that classifies texts is a classifier, of which one label's logit is the score."""
    if task not in CLASSIFICATION_TASKS:
        foreign.note(
            "reward_model",
            f"{task}:{name}: marl has no counterpart of such a pipeline. Call it in a reward function: rewards.py:score stands for it",
        )
        return {"use": "function", "target": "rewards.py:score"}
    raw = source is None or source.raw_scores
    foreign.note(
        "reward_model",
        f"the pipeline {task!r} with {name} became reward: {{use: model, label: {label}}}: the score is that label's logit, "
        + ("as in TRL's ppo.py" if raw else "where the script took its probability; shaping.clip bounds it"),
    )
    return {"use": "model", "path": name, "label": label, "append_eos": False}


def _data(
    foreign: ForeignConfig, source: Script | None, model: str, own: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None, int | None, dict[str, str]]:
    """Section data, section eval where there is one, rows where they can be counted, and files to write beside the config.

    `own`: the script of TRL's that arguments alone are for.
    """
    is_assumed = own is not None and not {"dataset_name", "query_dataset"} & set(foreign.remaining)
    if source is not None and "query_dataset" in source.reads and "dataset_name" not in foreign.remaining:
        name = foreign.take("query_dataset")
    elif is_assumed:
        name = foreign.take("dataset_name", "query_dataset") or foreign.take("query_dataset")
    else:
        name = foreign.take("dataset_name") or foreign.remaining.pop("query_dataset", None)
    split, subset = foreign.take("dataset_train_split"), foreign.take("dataset_config")
    if name is None:
        foreign.note("dataset_name", f"is missing: name a file of prompts; {PROMPTS_FILE} stands for it")
    prompts, limit = str(name or PROMPTS_FILE), foreign.number("max_prompt_tokens")
    where = {"prompts": prompts, "split": split, "subset": subset}
    length = {"max_prompt_tokens": limit, "on_long": "drop" if limit else None}
    held_out = _held_out(foreign, source, prompts, str(split or "train"))
    script, recipe, conditions = (source.name, source.recipe, source.conditions) if source else ("", None, [])
    if is_assumed and own is not None:
        script, (recipe, conditions) = f"TRL's {own}", OWN_RECIPES[own]
    if recipe is not None:
        splits = {PROMPTS_FILE: str(split or "train")}
        if held_out is not None:
            splits[HELD_OUT_FILE] = held_out.pop("split")
            held_out["prompts"] = HELD_OUT_FILE
        foreign.note(
            "dataset_name",
            f"{script} makes its prompts {described(recipe)}; marl takes a column as it is. {SCRIPT_FILE}, "
            "written beside the config, makes them so: run it once",
        )
        text = prompts_script(script, recipe, conditions, prompts, subset, splits, model)
        return without_none({"prompts": PROMPTS_FILE, "field": "prompt", **length}), held_out, None, {SCRIPT_FILE: text}
    for condition in source.conditions if source else ():
        foreign.note("dataset_name", f"the script keeps only rows with `{condition}`: leave the others out of the file")
    if name is not None and source is None and own is not None:
        foreign.note(
            "dataset_name",
            "TRL's own scripts make a prompt of the first tokens of a row; give the script to have them made so, or set data.field",
        )
    field = foreign.take("dataset_text_field", default="prompt")
    rows = None if name is None else rows_of(prompts)
    return without_none({**where, "field": field, **length}), held_out, rows, {}


def _held_out(foreign: ForeignConfig, source: Script | None, prompts: str, split: str) -> dict[str, Any] | None:
    """Where TRL evaluated, it looked at one batch of its held-out prompts."""
    strategy, every = foreign.take("eval_strategy", "evaluation_strategy", default="no"), foreign.number("eval_steps")
    test, size = foreign.take("dataset_test_split"), foreign.count("per_device_eval_batch_size", default=8)
    if source is not None and source.held_out:
        foreign.note(
            "eval_dataset",
            f"{source.name} keeps the last {source.held_out} rows for evaluation: put them into a file of their own, and set eval.prompts",
            lost=True,
        )
        return None
    if strategy in ("no", False) or (test or "test") == split:  # YAML reads a bare no as false
        if every:
            foreign.note(
                "eval_steps",
                "became nothing, for there was no eval_strategy: name eval.prompts, and set eval.every",
                lost=True,
            )
        return None
    return without_none({"prompts": prompts, "split": test or "test", "limit": size, "every": every})


def _sampling(foreign: ForeignConfig, classic: bool) -> dict[str, Any]:
    """The classic loop took its generation arguments in Python; the last trainer's are among its own."""
    if foreign.take("stop_token_id") is not None:
        foreign.note(
            "stop_token_id", "write the token's text into sampling.stop; the tokenizer's EOS always stops", lost=True
        )
    if foreign.take("stop_token", default="eos") != "eos":
        foreign.note("stop_token", "the tokenizer's EOS always stops; further ones stand in sampling.stop", lost=True)
    usual = usual_config().sampling
    top_p, top_k = foreign.number("top_p", default=1.0), foreign.number("top_k", default=0)
    if top_p < 1 or top_k:
        foreign.note(
            "top_k" if top_k else "top_p",
            "is kept, and cuts what is sampled but not what is scored: ratio and KL are biased, as they were. Without it (top_p 1, "
            "top_k 0) they aren't",
        )
    length = foreign.number("max_new_tokens") if classic else foreign.number("response_length", "max_new_tokens")
    if length is None:
        length = usual.max_new_tokens
        foreign.assumed["max_new_tokens"] = f"not found in the script; {length} is marl's default"
    return without_none(
        {
            "max_new_tokens": length,
            "temperature": float(foreign.number("temperature", default=usual.temperature)),
            "top_p": float(top_p) if top_p < 1 else None,
            "top_k": int(top_k) or None,
        }
    )


def _classic_ppo(foreign: ForeignConfig, rows: int | None, many: Processes) -> dict[str, Any]:
    batch = foreign.count("batch_size")
    mini = foreign.count("mini_batch_size", "forward_batch_size")
    backward = mini * foreign.count("gradient_accumulation_steps")
    if batch % backward and "mini_batch_size" in foreign.assumed:
        foreign.assumed["mini_batch_size"] += f"; it doesn't divide batch_size {batch}, which is taken for it"
        mini = backward = batch
    adaptive = foreign.take("adap_kl_ctrl", default=True)
    penalty = str(foreign.take("kl_penalty", default="kl"))
    if penalty not in KL_ESTIMATORS:
        foreign.note("kl_penalty", f"{penalty!r}: marl has k1 (kl), k2 (mse) and k3; k1 is taken")
    kl = {
        "estimator": KL_ESTIMATORS.get(penalty, "k1"),
        "into": "reward",
        "coef": float(foreign.number("init_kl_coef")),
    }
    if adaptive:
        kl |= {"target": float(foreign.number("target")), "horizon": float(foreign.number("horizon"))}
    else:
        foreign.take("target"), foreign.take("horizon")
    stops = foreign.take("early_stopping", default=False)
    limit = foreign.number("target_kl") if stops else foreign.remaining.pop("target_kl", None)
    grad_norm = foreign.number("max_grad_norm")
    if grad_norm is None:
        foreign.assumed["max_grad_norm"] = "not given; TRL's classic trainer clips no gradients then"
    section = without_none(
        {
            "steps": _classic_steps(foreign, batch, rows, many),
            "batch": batch * many.count,
            "minibatch": backward * many.count,
            "microbatch": mini if mini != backward * many.count else None,
            "epochs": foreign.number("ppo_epochs"),
            "learning_rate": float(foreign.number("learning_rate")),
            "adam_eps": ADAM_EPS,
            "kl": kl,
            "max_kl": round(1.5 * limit, 12) if stops else None,
            **_shared(foreign),
        }
    )
    return {**section, "max_grad_norm": grad_norm}


def _classic_steps(foreign: ForeignConfig, batch: int, rows: int | None, many: Processes) -> int:
    """The classic trainer counted the responses of one process; its loop ended with the data, which the processes share."""
    if rows and "steps" not in foreign.remaining:
        many.assume(foreign, "TRL", DIVIDED)
        foreign.assumed["steps"] = f"not given; TRL's loop made one pass over the data (rows: {rows})"
        return max(1, rows // (batch * many.count))
    many.assume(foreign, "TRL", "")
    episodes = float(foreign.number("steps"))
    if "steps" in foreign.assumed:
        foreign.assumed["steps"] += (
            " (responses), but its loop ended after one pass over the data: set ppo.steps to rows / ppo.batch"
        )
        return max(1, ceil(episodes / batch))
    return rounded_up(foreign, "steps", episodes / batch, f"{episodes:g} responses / {batch}")


def _last_ppo(foreign: ForeignConfig, rows: int | None, many: Processes) -> dict[str, Any]:
    micro = foreign.count("per_device_train_batch_size")
    mini = micro * foreign.count("gradient_accumulation_steps") * many.count
    batch = mini * foreign.count("num_mini_batches")
    episodes, max_steps = foreign.number("total_episodes"), foreign.number("max_steps", default=-1)
    steps = (
        rounded_up(foreign, "total_episodes", episodes / batch, f"{episodes:g} episodes / {batch}")
        if episodes
        else max_steps
        if max_steps > 0
        else steps_of(foreign, "num_train_epochs", foreign.number("num_train_epochs"), rows, batch)
    )
    many.assume(foreign, "TRL", DIVIDED if episodes or max_steps <= 0 else "")
    foreign.remaining.pop("num_train_epochs", None)
    return without_none(
        {
            "steps": steps,
            "batch": batch,
            "minibatch": mini,
            "microbatch": micro if micro != mini else None,
            "epochs": foreign.number("num_ppo_epochs"),
            "learning_rate": float(foreign.number("learning_rate")),
            "schedule": schedule(foreign),
            "warmup_steps": warm_up(foreign, steps),
            "weight_decay": foreign.number("weight_decay"),
            "adam_eps": float(foreign.number("adam_epsilon", default=ADAM_EPS)),
            "max_grad_norm": foreign.number("max_grad_norm"),
            "kl": {
                "estimator": foreign.take("kl_estimator", default="k1"),
                "into": "reward",
                "coef": float(foreign.number("kl_coef")),
            },
            **_shared(foreign),
        }
    )


def _shared(foreign: ForeignConfig) -> dict[str, Any]:
    """What both trainers call the same."""
    numbers = {
        "gamma": foreign.number("gamma"),
        "lam": foreign.number("lam"),
        "clip": foreign.number("cliprange"),
        "value_clip": foreign.number("cliprange_value"),
        "value_coef": foreign.number("vf_coef"),
    }
    return without_none({name: None if value is None else float(value) for name, value in numbers.items()})


def _shaping(foreign: ForeignConfig) -> dict[str, Any] | None:
    scaled, normed = foreign.take("use_score_scaling", default=False), foreign.take("use_score_norm", default=False)
    if scaled and not normed:
        foreign.note(
            "use_score_scaling",
            "without use_score_norm it divided by the running deviation only; shaping.normalize also subtracts the mean",
        )
    if normed and not scaled:
        foreign.note("use_score_norm", "has no effect without use_score_scaling, as in TRL", lost=True)
    section = without_none(
        {
            "missing_eos_penalty": foreign.number("missing_eos_penalty"),
            "normalize": True if scaled else None,
            "clip": foreign.number("score_clip"),
        }
    )
    return section or None
