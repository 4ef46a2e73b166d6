"""Configs of other trainers: each key lands where it belongs, or is named with a reason; the result is a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, ConfigError, Plan
from marl_core.cli.app import main
from marl_core.config.load import load_config, parse_config
from marl_plugins.migrate import llamafactory, trl
from marl_plugins.writing import render

BASE = {"model_name_or_path": "owner/base", "reward_model": "saves/reward", "stage": "ppo"}


def carried(module: Any, written: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The config, checked to be one, and the notes by key."""
    found = module.migrate(written)
    parse_config(found.config, "carried", Catalog.installed())
    return found.config, dict(found.refused)


def test_batches_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/rows.json").write_text(json.dumps([{"instruction": str(i)} for i in range(100)]), encoding="utf-8")
    Path("data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"}}), encoding="utf-8")
    given = {
        "dataset": "mine",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "ppo_buffer_size": 3,
    }
    config, refused = carried(llamafactory, {**BASE, **given, "num_train_epochs": 2.0, "warmup_ratio": 0.1})
    assert config["data"]["prompts"] == "data/rows.json"
    assert config["data"]["field"] == "instruction"
    shape = {key: config["ppo"][key] for key in ("batch", "minibatch", "microbatch", "steps", "warmup_steps")}
    assert shape == {"batch": 24, "minibatch": 8, "microbatch": 2, "steps": 10, "warmup_steps": 1}  # 2 x ceil(100 / 24)
    assert config["ppo"]["kl"] == {"estimator": "k1", "into": "reward", "coef": 0.2, "target": 6.0, "horizon": 10000.0}
    assert set(refused) == {
        "top_p",
        "top_k",
        "num_train_epochs",
    }  # the first two: LLaMA-Factory's defaults, which cut the distribution
    assert refused["num_train_epochs"] == "2 x 100 prompts / 24 is 8.333 steps; ppo.steps is rounded up to 10"
    of_four = llamafactory.migrate({**BASE, **given, "num_train_epochs": 2.0}, 4)
    shape = {key: of_four.config["ppo"][key] for key in ("batch", "minibatch", "microbatch", "steps")}
    assert shape == {"batch": 96, "minibatch": 32, "microbatch": 2, "steps": 4}
    assert "number of processes" not in dict(of_four.assumed)


@pytest.mark.parametrize(
    ("given", "policy", "reference"),
    [
        ({}, "new", "disabled-adapter"),
        ({"adapter_name_or_path": "sft"}, "continue", {"use": "peft-adapter", "adapter": "sft"}),
        (
            {"adapter_name_or_path": "sft", "create_new_adapter": True},
            "new",
            {"use": "merged-base", "adapter": "sft"},
        ),
        ({"ref_model": "owner/base", "ref_model_adapters": "sft"}, "new", {"use": "peft-adapter", "adapter": "sft"}),
    ],
)
def test_reference_of_llamafactory(given: dict[str, Any], policy: str, reference: Any) -> None:
    config, refused = carried(llamafactory, {**BASE, **given})
    assert config["policy"]["start"] == policy
    assert config["reference"] == reference
    assert ("adapter_name_or_path" in refused) == (policy == "continue")


@pytest.mark.parametrize(
    ("given", "reward", "noted"),
    [
        ({"reward_model": "owner/base", "reward_model_adapters": "rm"}, {"use": "adapter", "path": "rm"}, None),
        (
            {"reward_model": "owner/base", "reward_model_adapters": "one, rm"},
            {"use": "adapter", "path": "rm"},
            ("reward_model_adapters", "merge all but the last first (marl merge): one"),
        ),
        (
            {"reward_model_type": "full", "reward_model": "owner/other", "reward_model_adapters": ["rm"]},
            {"use": "adapter", "path": "rm"},
            ("reward_model", "was trained on it, and marl scores on the policy's base, owner/base"),
        ),
        (
            {"reward_model_adapters": "rm"},
            {"use": "adapter", "path": "saves/reward"},
            ("reward_model_adapters", "LLaMA-Factory reads reward_model as the adapter"),
        ),
        (
            {"reward_model": "owner/base", "reward_model_adapters": "rm", "reward_model_quantization_bit": 4},
            {"use": "adapter", "path": "rm"},
            ("reward_model_quantization_bit", "shares the policy's base"),
        ),
    ],
)
def test_reward_adapters_of_llamafactory(
    given: dict[str, Any], reward: dict[str, str], noted: tuple[str, str] | None
) -> None:
    config, refused = carried(llamafactory, {**BASE, **given})
    assert config["reward"] == reward
    told = {key: why for key, why in refused.items() if key.startswith("reward_model")}
    assert set(told) == ({noted[0]} if noted else set())
    assert noted is None or noted[1] in told[noted[0]]


def test_reference_adapters_of_llamafactory() -> None:
    config, _ = carried(llamafactory, {**BASE, "ref_model": "owner/base", "ref_model_adapters": "first,second"})
    assert config["reference"] == {"use": "peft-adapter", "adapter": "second"}
    config, refused = carried(llamafactory, {**BASE, "ref_model_adapters": "first"})
    assert config["reference"] == "disabled-adapter"
    assert "without ref_model" in refused["ref_model_adapters"]


def test_rewards_of_llamafactory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried(llamafactory, BASE)[0]["reward"] == {"use": "adapter", "path": "saves/reward"}
    full, refused = carried(llamafactory, {**BASE, "reward_model_type": "full"})
    assert full["reward"] == {"use": "model", "path": "saves/reward"}
    assert "sequence-classification" in refused["reward_model_type"]
    twice = {**BASE, "reward_model_type": "full", "reward_model": "owner/base", "reward_model_adapters": "rm"}
    assert carried(llamafactory, twice)[0]["reward"] == {"use": "adapter", "path": "rm"}
    api = {**BASE, "reward_model_type": "api", "reward_model": "http://localhost:8000/v1/score"}
    monkeypatch.setattr(llamafactory, "offers", lambda *asked: False)
    config, refused = carried(llamafactory, api)
    assert config["reward"]["use"] == "function"
    assert "reward service" in refused["reward_model"]
    monkeypatch.setattr(llamafactory, "offers", lambda *asked: True)
    assert llamafactory.migrate(api).config["reward"] == {
        "use": "http",
        "url": "http://localhost:8000/v1/score",
        "format": "llama-factory",
    }


def test_lora_and_quantization_of_llamafactory() -> None:
    given = {"lora_rank": 32, "lora_target": "q_proj, v_proj", "quantization_bit": 4, "bf16": True}
    config, _ = carried(llamafactory, {**BASE, **given})
    assert config["policy"]["r"] == 32
    assert config["policy"]["alpha"] == 64.0
    assert config["policy"]["targets"] == ["q_proj", "v_proj"]
    assert config["quantization"] == {"use": "bnb-4bit", "type": "nf4", "double": True}
    assert config["model"] == {"path": "owner/base", "dtype": "bfloat16", "gradient_checkpointing": True}
    eight, refused = carried(llamafactory, {**BASE, "quantization_bit": 8})
    assert "gradient_checkpointing" not in eight["model"]
    assert "8-bit" in refused["disable_gradient_checkpointing"]


def test_every_unknown_key_is_named() -> None:
    given = {**BASE, "ppo_whiten_rewards": True, "frobnicate": 1, "template": "llama3", "low_cpu_mem_usage": True}
    _, refused = carried(llamafactory, given)
    assert next(iter(refused)) == "frobnicate"
    assert "is the name right?" in refused["frobnicate"]
    assert refused["low_cpu_mem_usage"] == "marl has no such setting"
    assert "marl check --show 1" in refused["template"]
    assert "whitens advantages" in refused["ppo_whiten_rewards"]
    assert "chat template" in refused["template"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ({**BASE, "stage": "dpo"}, "stage: 'dpo' is no PPO"),
        ({}, "model_name_or_path"),
        ({**BASE, "seed": "x"}, "seed: 'x'"),
        ({**BASE, "ppo_bufer_size": 2}, "ppo_bufer_size: LLaMA-Factory has no such key. Did you mean ppo_buffer_size"),
        ({**BASE, "reward_model": True}, "reward_model: needs a value"),
    ],
)
def test_what_can_not_be_carried_at_all(written: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        llamafactory.migrate(written)


def test_arguments_of_the_last_trainer() -> None:
    words = (
        "--sft_model_path sft-model --reward_model_path rm --use_peft --lora_r 8 --lora_target_modules q_proj v_proj "
        "--per_device_train_batch_size 16 --gradient_accumulation_steps 2 --num_mini_batches 4 --total_episodes 1000 "
        "--learning_rate 3e-6 --missing_eos_penalty=1.0 --kl_estimator k3 --local_rollout_forward_batch_size 64"
    )
    config, refused = carried(trl, trl.read_arguments(words.split()))
    assert config["model"]["path"] == "sft-model"
    assert config["policy"]["targets"] == ["q_proj", "v_proj"]
    shape = {key: config["ppo"][key] for key in ("batch", "minibatch", "microbatch", "steps", "learning_rate")}
    assert shape == {"batch": 128, "minibatch": 32, "microbatch": 16, "steps": 8, "learning_rate": 3e-6}
    assert config["ppo"]["kl"] == {"estimator": "k3", "into": "reward", "coef": 0.05}
    assert config["sampling"] == {"max_new_tokens": 53, "temperature": 0.7}
    assert config["shaping"] == {"missing_eos_penalty": 1.0}
    assert config["reward"] == {"use": "model", "path": "rm"}
    assert config["value"] == {"on": "own"}
    assert refused["total_episodes"] == "1000 episodes / 128 is 7.812 steps; ppo.steps is rounded up to 8"
    assert set(refused) == {
        "total_episodes",
        "reward_model_path",
        "dataset_name",
        "local_rollout_forward_batch_size",
        "learning_rate",  # kept, and small for a LoRA
    }


def test_arguments_of_the_classic_trainer() -> None:
    words = (
        "--model_name base --rm_adapter rm --log_with wandb --steps 1000 --batch_size 64 --mini_batch_size 4 "
        "--gradient_accumulation_steps 2 --ppo_epochs 2 --init_kl_coef 0.1 --target 3 --use_score_scaling "
        "--use_score_norm --score_clip 5 --cliprange 0.1 --early_stopping --target_kl 0.5 --seed 7"
    )
    config, refused = carried(trl, trl.read_arguments(words.split()))
    assert config["reward"] == {"use": "adapter", "path": "rm"}
    assert config["ppo"]["steps"] == 16  # TRL's steps are responses
    assert (config["ppo"]["minibatch"], config["ppo"]["microbatch"]) == (8, 4)
    assert config["ppo"]["kl"]["target"] == 3.0
    assert (config["ppo"]["max_kl"], config["ppo"]["clip"]) == (0.75, 0.1)
    assert config["shaping"] == {"normalize": True, "clip": 5}
    assert config["observers"][-1] == {"use": "trackers", "to": ["wandb"]}
    assert config["run"]["seed"] == 7
    assert set(refused) == {"dataset_name", "top_p", "rm_adapter", "steps"}


def test_a_config_file_beside_arguments(tmp_path: Path) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_text("learning_rate: 1.0e-5\nseed: 1\n", encoding="utf-8")
    assert trl.read_arguments(["--config", str(file), "--seed", "2"]) == {"learning_rate": 1e-5, "seed": 2}
    with pytest.raises(ConfigError, match="expected --key value"):
        trl.read_arguments(["seed"])
    with pytest.raises(ConfigError, match="can't be read"):
        trl.read_arguments(["--config", str(tmp_path / "no.yaml")])


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lf.yaml").write_text("\n".join(f"{key}: {value}" for key, value in BASE.items()) + "\nlora_rank: 4\nxyz: 1\n")
    assert main(["import", "llamafactory", "lf.yaml", "--to", "run.yaml"]) == 0
    captured = capsys.readouterr()
    assert "not converted: xyz: marl has no such setting" in captured.err
    assert "partly: top_k" in captured.err
    assert "not converted: top_k" not in captured.err
    assert "missing: dataset: name a file of prompts" in captured.err
    assert main(["import", "llamafactory", "lf.yaml", "--num-processes", "2", "--to", "two.yaml"]) == 0
    assert load_config("two.yaml").ppo.batch == 16
    assert "#   xyz: marl has no such setting" in Path("run.yaml").read_text(encoding="utf-8")
    plan = Plan.of(load_config("run.yaml"))
    assert plan.config.policy.options["r"] == 4
    assert main(["import", "llamafactory", "lf.yaml", "--to", "run.yaml"]) == 2
    assert "--force to overwrite" in capsys.readouterr().err
    assert main(["import", "trl-args", "--model_name", "base", "--rm_adapter", "rm", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    Path("printed.yaml").write_text(out, encoding="utf-8")
    assert load_config("printed.yaml").run.seed == 3
    assert main(["import", "llamafactory", "no.yaml"]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_a_schema_that_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("marl.schema.json").write_text("mine", encoding="utf-8")
    assert main(["import", "trl-args", "--model_name", "base", "--rm_adapter", "rm", "--to", "run.yaml"]) == 0
    assert Path("marl.schema.json").read_text(encoding="utf-8") == "mine"


def test_the_schema_that_the_first_line_names_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    assert main(["import", "trl-args", "--model_name", "base", "--rm_adapter", "rm", "--to", "sub/run.yaml"]) == 0
    first = Path("sub/run.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert (Path("sub") / first.partition("$schema=")[2]).is_file()
    assert json.loads(Path("sub/marl.schema.json").read_text(encoding="utf-8"))["properties"]["reward"]
    assert "marl.schema.json: written" in capsys.readouterr().out


def test_what_was_not_given_is_said_to_be_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assumed = dict(llamafactory.migrate({**BASE, "learning_rate": 1e-4}).assumed)
    assert assumed["per_device_train_batch_size"] == "not given; 8 is LLaMA-Factory's default"
    assert "learning_rate" not in assumed
    assert {"bf16", "disable_gradient_checkpointing", "reward_model_type", "finetuning_type", "lora_target"} <= set(
        assumed
    )
    assert "multiply ppo.batch and ppo.minibatch by N, and divide ppo.steps by N" in assumed["number of processes"]
    words = ["--model_name", "base", "--use_peft", "--reward_model_path", "rm", "--mini_batch_size", "64"]
    assert main(["import", "trl-args", "--trl-version", "0.11.4", *words, "--to", "run.yaml"]) == 0
    line = "batch_size: not given; 128 is TRL 0.11.4's default"
    err = capsys.readouterr().err
    assert f"assumed: {line}" in err
    assert "scripts often set inside what is assumed here: look there" in err
    assert f"#   {line}" in Path("run.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "rate"), [("full", 3e-4), ("lora", 1e-6)])
def test_a_rate_for_all_weights_is_not_one_for_a_lora(kind: str, rate: float) -> None:
    config, refused = carried(llamafactory, {**BASE, "finetuning_type": kind, "learning_rate": 1e-6})
    assert config["ppo"]["learning_rate"] == rate
    assert ("too small for a LoRA" in refused["learning_rate"]) == (kind == "full")
    assert ("another experiment" in refused.get("finetuning_type", "")) == (kind == "full")


def test_max_samples_becomes_a_limit_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset([{"instruction": "a"}] * 40)
    given = {**BASE, "dataset": "mine", "max_samples": 16, "per_device_train_batch_size": 8, "num_train_epochs": 1.0}
    config, refused = carried(llamafactory, given)
    assert config["data"]["limit"] == 16
    assert config["ppo"]["steps"] == 2
    assert "max_samples" not in refused


@pytest.mark.parametrize("module", [llamafactory, trl])
def test_pushing_to_the_hub_names_the_command(module: Any) -> None:
    given = {"model_name_or_path": "x", "reward_model_path": "y", "push_to_hub": True, "hub_model_id": "me/x"}
    refused = dict(module.migrate(given).refused)
    assert "marl publish RUN --to FOLDER --push-to-hub OWNER/NAME" in refused["push_to_hub"]
    assert refused["hub_model_id"] == refused["push_to_hub"]


def dataset(rows: list[dict[str, Any]], **entry: Any) -> None:
    Path("data").mkdir(exist_ok=True)
    Path("data/rows.json").write_text(json.dumps(rows), encoding="utf-8")
    Path("data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}), "utf-8")


def test_the_input_column_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {**BASE, "dataset": "mine"}
    dataset([{"instruction": "a", "input": "b"}] * 2)
    config, refused = carried(llamafactory, given)
    assert config["data"]["prompt_template"] == "{instruction}\n{input}"
    assert '"{instruction}\\n{input}"' in render(config, {})
    assert "dataset" not in refused
    dataset([{"instruction": "a", "input": "b"}, {"instruction": "a", "input": ""}])
    assert "1 of 2 rows have text in 'input'" in carried(llamafactory, given)[1]["dataset"]
    dataset([{"instruction": "a", "input": ""}])
    assert carried(llamafactory, given)[0]["data"]["field"] == "instruction"
    Path("data/rows.json").unlink()
    assert "data.prompt_template" in carried(llamafactory, given)[1]["dataset"]


def test_sharegpt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset([{"conversations": [{"from": "human", "value": "a"}]}], formatting="sharegpt")
    config, refused = carried(llamafactory, {**BASE, "dataset": "mine"})
    assert config["data"]["field"] == "conversations"
    assert "the last answer cut off" in refused["dataset"]


def test_the_template_becomes_a_chat() -> None:
    config, refused = carried(llamafactory, {**BASE, "template": "llama3"})
    assert config["data"]["chat"] is True
    assert "data.chat" in refused["template"]
    assert "chat" not in carried(llamafactory, {**BASE, "template": "default"})[0]["data"]


def test_what_changes_nothing_stands_last_and_a_lost_warm_up_is_said() -> None:
    given = {**BASE, "do_train": True, "frobnicate": 1, "max_steps": 10, "warmup_ratio": 0.01}
    refused = llamafactory.migrate(given).refused
    assert refused[-1][0] == "do_train"
    assert "rounds to 0" in dict(refused)["warmup_ratio"]


def test_no_importer_chooses_what_becomes_of_long_prompts() -> None:
    """LLaMA-Factory cuts the end off, TRL nothing: neither is cutting the beginning."""
    factory = llamafactory.migrate({"model_name_or_path": "x", "reward_model": "y", "cutoff_len": 64})
    assert factory.config["data"]["max_prompt_tokens"] == 64
    assert "on_long" not in factory.config["data"]
    assert any(key == "cutoff_len" and "refuses such a prompt" in why for key, why in factory.refused)
    script = trl.migrate({"model_name_or_path": "x", "reward_model_path": "y", "dataset_name": "z"})
    assert "on_long" not in script.config["data"]


def test_names_stand_in_a_list_or_in_a_text() -> None:
    """YAML has both."""
    listed = {"lora_target": ["q_proj", "v_proj"], "dataset": ["one", "two"]}
    found = llamafactory.migrate({**BASE, **listed})
    config = found.config
    assert config["policy"]["targets"] == ["q_proj", "v_proj"]
    assert config["data"]["prompts"] == "one"
    assert any(key == "dataset" and "join two to it" in why for key, why in found.refused)
    same, _ = carried(llamafactory, {**BASE, "lora_target": "q_proj, v_proj", "dataset": "one,two"})
    assert same == config


def test_no_tracker_and_one_that_marl_has_not() -> None:
    """YAML reads a bare no as false."""
    config, refused = carried(llamafactory, {**BASE, "report_to": False})
    assert "observers" not in config  # who always watches needs no line
    assert "report_to" not in refused
    config, refused = carried(llamafactory, {**BASE, "report_to": ["wandb", "comet_ml"]})
    assert config["observers"][-1] == {"use": "trackers", "to": ["wandb"]}
    assert "no tracker comet_ml" in refused["report_to"]


@pytest.mark.parametrize("text", ["1: a\nstage: ppo\n", "no: a\n", "? [a, b]\n: c\n", "2024-01-01: a\n"])
def test_keys_are_names(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    for command in (["llamafactory", str(file)], ["trl-args", "--config", str(file)]):
        assert main(["import", *command]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "theirs.yaml" in said


@pytest.mark.parametrize("size", [0, -1, 2.5, float("inf"), float("nan"), 10**400, False, [1]])
@pytest.mark.parametrize("key", ["per_device_train_batch_size", "ppo_buffer_size", "lora_rank", "max_samples"])
def test_sizes_are_counts(key: str, size: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .* (is no count|is not a number)"):
        llamafactory.migrate({**BASE, key: size})


def test_notes_of_several_lines_leave_the_file_whole(tmp_path: Path) -> None:
    """A note holds what others wrote: a file's name, a key, a column."""
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    written = {**BASE, "ref_model": "owner/base", "ref_model_adapters": "a\nmodel: other, b", "my\nkey: x": 1}
    theirs.write_text(json.dumps(written), encoding="utf-8")
    assert main(["import", "llamafactory", str(theirs), "--to", str(ours)]) == 0
    assert load_config(ours).model.path == "owner/base"
    outside = [line for line in ours.read_text(encoding="utf-8").splitlines() if "other" in line or "key" in line]
    assert outside
    assert all(line.startswith("#") for line in outside)
