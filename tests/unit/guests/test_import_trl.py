"""A TRL PPO script converted: defaults by release, values set inside the script, rewards, prompts, and all weights trained."""

from __future__ import annotations

import ast
import json
import runpy
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml

from marl_core import Catalog, ConfigError
from marl_core.cli.app import main
from marl_core.config.load import parse_config
from marl_plugins.migrate import trl, trl_defaults
from marl_plugins.migrate.foreign_config import UNKNOWN, Carried
from marl_plugins.migrate.trl_prompts import prompts_script
from marl_plugins.migrate.trl_script import PromptRecipe

MULTI_ADAPTER = """
from dataclasses import dataclass, field
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler

shortest = 3
longest = 5

@dataclass
class ScriptArguments:
    model_name: str = field(default="some/llama", metadata={"help": "model"})
    dataset_name: str = field(default="some/data")
    rm_adapter: str = field(default="some/rm")
    seed: int = field(default=0)
    use_score_scaling: bool = field(default=False)

script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]

def prompts(tokenizer):
    dataset = load_dataset(script_args.dataset_name, split="train[:50%]")
    dataset = dataset.rename_column("chosen", "text").filter(lambda x: len(x["text"]) > 10)
    size = LengthSampler(shortest, longest)
    def tokenize(example):
        example["input_ids"] = tokenizer.encode(example["text"])[: size()]
        return example
    return dataset.map(tokenize)

lora_config = LoraConfig(r=4, lora_alpha=8, bias="none", task_type="CAUSAL_LM", target_modules=["q_proj"])
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    script_args.model_name, peft_config=lora_config, quantization_config=four_bits, reward_adapter=script_args.rm_adapter
)
config = PPOConfig(
    model_name=script_args.model_name, learning_rate=2e-5, batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2,
    seed=script_args.seed, early_stopping=True, target_kl=0.1, ppo_epochs=epochs(),
)
trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)
generation_kwargs = {"top_k": 0.0, "top_p": 0.9, "do_sample": True, "max_new_tokens": 24}
rewards = [raw_rewards[i, -1, 1] for i in range(8)]
"""

SENTIMENT = """
from trl import PPOConfig, PPOTrainer, AutoModelForCausalLMWithValueHead

@dataclass
class ScriptArguments:
    use_peft: bool = field(default=False)
    lora_r: int = field(default=16)

args, ppo_config = HfArgumentParser((ScriptArguments, PPOConfig)).parse_args_into_dataclasses()
if args.use_peft:
    peft_config = LoraConfig(r=args.lora_r, lora_alpha=16)
task, name = ppo_config.reward_model.split(":")
pipe = pipeline(task, model=name)
sent_kwargs = {"function_to_apply": "none"}
rewards = [torch.tensor(output[1]["score"]) for output in pipe(texts, **sent_kwargs)]
trainer = PPOTrainer(ppo_config, model, ref_model, tokenizer)
"""

LAST = """
from trl import PPOConfig, PPOTrainer, ModelConfig, get_peft_config

script_args, training_args, model_args = parser.parse_args_into_dataclasses()
reward_model = AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path)
dataset = load_dataset(script_args.dataset_name)
eval_dataset = dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None
def tokenize(element):
    return tokenizer.apply_chat_template(element["messages"][:1], add_generation_prompt=True)
train_dataset = dataset.map(tokenize).filter(lambda x: x["lengths"] <= 512)
trainer = PPOTrainer(args=training_args, model=policy, reward_model=reward_model, peft_config=get_peft_config(model_args))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and no TRL that decides which release counts."""
    monkeypatch.chdir(tmp_path)

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trl_defaults, "version", nothing)
    return tmp_path


def script(text: str, arguments: str = "", **options: Any) -> Carried:
    """A script with its arguments converted; the config is checked to be one."""
    Path("script.py").write_text(text, encoding="utf-8")
    found = trl.migrate(trl.read_arguments(arguments.split()), Path("script.py"), **options)
    parse_config(found.config, "carried", Catalog.installed())
    return found


def arguments(text: str, **options: Any) -> Carried:
    """Arguments alone converted."""
    found = trl.migrate(trl.read_arguments(text.split()), **options)
    parse_config(found.config, "carried", Catalog.installed())
    return found


CLASSIC = "--model_name m --use_peft --reward_model_path rm"
LAST_ARGUMENTS = "--sft_model_path m --use_peft --reward_model_path rm --total_episodes 64"


@pytest.mark.parametrize(
    ("release", "batch", "minibatch", "rate"),
    [("0.7.4", 256, 1, 1e-5), ("0.7.10", 256, 1, 1e-5), ("0.7.11", 128, 128, 1.41e-5), ("0.11.4", 128, 128, 1.41e-5)],
)
def test_defaults_of_the_classic_releases(release: str, batch: int, minibatch: int, rate: float) -> None:
    found = arguments(CLASSIC, trl_version=release)
    ppo = found.config["ppo"]
    assert (ppo["batch"], ppo["minibatch"], ppo["learning_rate"]) == (batch, minibatch, rate)
    assumed = dict(found.assumed)
    assert assumed["batch_size"] == f"not given; {batch} is TRL {release}'s default"
    assert {"mini_batch_size", "learning_rate", "ppo_epochs", "init_kl_coef", "steps", "max_new_tokens"} <= set(assumed)
    assert ppo["max_grad_norm"] is None
    assert found.config["sampling"]["max_new_tokens"] == 32


@pytest.mark.parametrize(
    ("release", "rate", "dtype"),
    [("0.11.4", 5e-5, "float32"), ("0.22.0", 5e-5, "bfloat16"), ("0.29.1", 3e-6, "bfloat16")],
)
def test_defaults_of_the_later_releases(release: str, rate: float, dtype: str) -> None:
    found = arguments(LAST_ARGUMENTS, trl_version=release)
    assert found.config["ppo"]["learning_rate"] == rate
    assert found.config["model"]["dtype"] == dtype
    assert found.config["ppo"]["batch"] == 8
    assert dict(found.assumed)["response_length"] == f"not given; 53 is TRL {release}'s default"


def test_which_release_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trl_defaults.release("classic", None) == "0.11.4"
    monkeypatch.setattr(trl_defaults, "version", lambda name: "0.8.6")
    assert trl_defaults.release("classic", None) == "0.8.6"
    assert trl_defaults.release("last", None) == "0.29.0"  # the installed one has no such trainer
    assert trl_defaults.release("last", None, trl_defaults.V2_NAMES) == "0.11.4"
    with pytest.raises(ConfigError, match=r"--trl-version: 0\.15\.2 has no such trainer"):
        arguments(CLASSIC, trl_version="0.15.2")
    with pytest.raises(ConfigError, match="'newest' is no release"):
        arguments(CLASSIC, trl_version="newest")


def test_the_multi_adapter_script_by_its_arguments_alone() -> None:
    found = arguments("--model_name m --rm_adapter rm")
    config, assumed = found.config, dict(found.assumed)
    shape = {key: config["ppo"][key] for key in ("batch", "minibatch", "microbatch", "learning_rate")}
    assert shape == {"batch": 8, "minibatch": 4, "microbatch": 2, "learning_rate": 1e-5}
    assert config["quantization"] == {"use": "bnb-4bit", "type": "nf4", "double": True}
    assert config["sampling"] == {"max_new_tokens": 32, "temperature": 1.0, "top_p": 0.9}
    assert (
        assumed["batch_size"] == "not given; 8 is what TRL's ppo_multi_adapter.py sets inside: compare with your script"
    )
    assert "use_peft" not in dict(found.refused)


def test_values_inside_a_script_are_read() -> None:
    found = script(MULTI_ADAPTER, "--rm_adapter mine --seed 3")
    config, refused = found.config, dict(found.refused)
    assert config["model"] == {"path": "some/llama", "dtype": "bfloat16"}
    assert config["quantization"] == {"use": "bnb-4bit", "type": "nf4", "double": False}
    assert config["policy"] == {"start": "new", "r": 4, "alpha": 8.0, "targets": ["q_proj"]}
    assert config["reward"] == {"use": "adapter", "path": "mine"}
    shape = {key: config["ppo"][key] for key in ("batch", "minibatch", "microbatch", "learning_rate", "max_kl")}
    assert shape == {"batch": 8, "minibatch": 4, "microbatch": 2, "learning_rate": 2e-5, "max_kl": 0.15}
    assert config["sampling"] == {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    assert config["run"]["seed"] == 3
    assert "line 35, computes it (`epochs()`)" in refused["ppo_epochs"]
    assert "reads output 1 of the adapter's head" in refused["rm_adapter"]
    assert "first 3 to 4 tokens of each 'chosen'" in refused["dataset_name"]
    assert "use_peft" not in refused
    assert not {"batch_size", "learning_rate", "lora_r", "max_new_tokens"} & set(dict(found.assumed))


def test_prompts_are_made_as_the_script_made_them(tiny_folder: str, folder: Path) -> None:
    source = folder / "data"
    source.mkdir()
    rows = [{"chosen": "short"}, {"chosen": "a rather long text"}, {"chosen": "another long text"}]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = MULTI_ADAPTER.replace("train[:50%]", "train")
    found = script(text, f"--model_name {tiny_folder} --dataset_name {source}")
    assert found.config["data"] == {"prompts": "prompts.jsonl", "field": "prompt"}
    Path("make_prompts.py").write_text(found.files["make_prompts.py"], encoding="utf-8")
    runpy.run_path("make_prompts.py")
    made = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(made) == 2
    assert all(long["chosen"].startswith(prompt) and prompt for long, prompt in zip(rows[1:], made, strict=True))


def test_a_sentiment_pipeline_becomes_a_classifiers_label() -> None:
    found = script(SENTIMENT, "--use_peft --model_name m")
    assert found.config["reward"] == {
        "use": "model",
        "path": "lvwerra/distilbert-imdb",
        "label": 1,
        "append_eos": False,
    }
    assert "that label's logit" in dict(found.refused)["reward_model"]
    assert "lvwerra/distilbert-imdb" in dict(found.assumed)["reward_model"]
    other = arguments("--model_name m --use_peft --reward_model text-generation:x/y")
    assert other.config["reward"]["use"] == "function"
    assert "no counterpart of such a pipeline" in dict(other.refused)["reward_model"]
    named = SENTIMENT.replace("task, name =", "judge =").replace(
        "pipeline(task, model=name)", 'pipeline("text-classification", model=args.judge)'
    )
    found = script(
        named.replace("lora_r: int", "judge: str = field(default='a')\n    lora_r: int"),
        "--use_peft --model_name m --judge me/b",
    )
    assert (found.config["reward"]["path"], found.config["reward"]["label"]) == ("me/b", 1)
    literal = SENTIMENT.replace("pipeline(task, model=name)", 'pipeline("sentiment-analysis", model="me/judge")')
    softmax = literal.replace('"function_to_apply": "none"', '"top_k": None').replace("output[1]", "output[0]")
    found = script(softmax, "--use_peft --model_name m")
    assert (found.config["reward"]["path"], found.config["reward"]["label"]) == ("me/judge", 0)
    assert "took its probability" in dict(found.refused)["reward_model"]


@pytest.mark.parametrize(
    ("text", "given", "all_weights"),
    [
        (SENTIMENT, "--model_name m", True),
        (SENTIMENT, "--model_name m --use_peft", False),
        (MULTI_ADAPTER, "", False),
        (LAST, "--sft_model_path m --reward_model_path r --learning_rate 3e-6 --total_episodes 80", True),
        (LAST, "--sft_model_path m --reward_model_path r --use_peft --total_episodes 80", False),
        (LAST.replace("get_peft_config", "nothing"), "--sft_model_path m --reward_model_path r --use_peft", True),
        (None, "--model_name_or_path m --reward_model_path r --learning_rate 3e-6", True),
        (None, "--model_name m --reward_model_path r --lora_r 8", False),
        (None, "--model_name m --reward_model_path r", True),
    ],
)
def test_a_script_that_trains_all_weights_is_told_so(text: str | None, given: str, all_weights: bool) -> None:
    found = arguments(given) if text is None else script(text, given)
    refused = dict(found.refused)
    assert ("all weights were trained" in refused.get("use_peft", "")) == all_weights
    if all_weights:
        assert "too small for a LoRA" in refused["learning_rate"]
        assert found.config["ppo"]["learning_rate"] == 3e-4
        assert found.config["policy"] == {"start": "new", "r": 16, "alpha": 32.0, "targets": "all-linear"}


def test_chats_and_held_out_prompts_of_the_last_trainer(folder: Path) -> None:
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        row = {"messages": [{"role": "user", "content": split}, {"role": "assistant", "content": "b"}]}
        (folder / "data" / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    given = (
        f"--sft_model_path m --reward_model_path r --use_peft --dataset_name {folder / 'data'} --eval_strategy steps"
    )
    found = script(LAST, f"{given} --eval_steps 50 --dataset_test_split validation --total_episodes 80")
    assert found.config["data"] == {
        "prompts": "prompts.jsonl",
        "field": "prompt",
        "max_prompt_tokens": 512,
        "on_long": "drop",
    }
    assert found.config["eval"] == {"prompts": "heldout.jsonl", "limit": 8, "every": 50}
    Path("make_prompts.py").write_text(found.files["make_prompts.py"], encoding="utf-8")
    runpy.run_path("make_prompts.py")
    for file, text in (("prompts.jsonl", "train"), ("heldout.jsonl", "validation")):
        assert json.loads(Path(file).read_text(encoding="utf-8"))["prompt"] == [{"role": "user", "content": text}]


def test_no_number_of_a_machine_is_printed() -> None:
    found = arguments("--model_name m --rm_adapter r --early_stopping --target_kl 0.1")
    assert yaml.safe_load(yaml.safe_dump(found.config))["ppo"]["max_kl"] == 0.15
    assert "0.15000" not in yaml.safe_dump(found.config)


def test_a_minibatch_that_was_assumed_fits_the_batch() -> None:
    found = arguments("--model_name m --use_peft --reward_model_path r --batch_size 48")
    assert found.config["ppo"]["minibatch"] == 48
    assert "doesn't divide batch_size 48" in dict(found.assumed)["mini_batch_size"]


def test_arguments_of_tyro_and_a_launcher() -> None:
    words = "accelerate launch --num_processes 4 examples/ppo.py --ppo_config.batch-size 64 --peft_config.r 4"
    command = trl.split_command(words.split())
    assert command.script == Path("examples/ppo.py")
    assert command.processes == 4
    assert trl.read_arguments(command.words) == {"batch_size": 64, "lora_r": 4}


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("", None),
        ("python", 1),
        ("python -u", 1),
        ("python -m some.launcher", None),
        ("/usr/bin/python3.11", 1),
        ("accelerate launch", None),
        ("accelerate launch --num_processes=8 --num_machines 2", 8),
        ("accelerate launch --config_file launch.yaml", 6),
        ("accelerate launch --config_file no.yaml", None),
        ("python -m accelerate.commands.launch --num-processes 2", 2),
        ("torchrun", 1),
        ("torchrun --nproc-per-node 4 --nnodes=2", 8),
        ("torchrun --nproc_per_node gpu", None),
        ("torchrun --nproc_per_node 4 --nnodes 1:2", None),
        ("python -m torch.distributed.run --nproc_per_node=4", 4),
        ("deepspeed", None),
        ("deepspeed --num_gpus 4 --num_nodes 2", 8),
    ],
)
def test_processes_are_read_off_the_launcher(launcher: str, processes: int | None) -> None:
    Path("launch.yaml").write_text("num_processes: 6\n", encoding="utf-8")
    assert trl.split_command([*launcher.split(), "ppo.py", "--seed", "1"]).processes == processes


def test_batches_are_those_of_all_processes() -> None:
    """TRL's batch is that of one process; episodes are those of all, the classic trainer's steps those of one."""
    text = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_mini_batches 2"
    words = f"--sft_model_path m --use_peft --reward_model_path r {text} --total_episodes 1280"
    one, eight = arguments(words).config["ppo"], arguments(words, processes=8).config["ppo"]
    shape = ("batch", "minibatch", "microbatch", "steps")
    assert [one[key] for key in shape] == [16, 8, 4, 80]
    assert [eight[key] for key in shape] == [128, 64, 4, 10]
    assert arguments(f"{words} --num-processes 8").config["ppo"] == eight
    classic = "--model_name m --rm_adapter r --batch_size 8 --steps 800"
    one, four = arguments(classic).config["ppo"], arguments(classic, processes=4).config["ppo"]
    assert [one[key] for key in shape] == [8, 4, 2, 100]
    assert [four[key] for key in shape] == [32, 16, 2, 100]
    assumed = dict(arguments(words).assumed)["number of processes"]
    assert assumed.startswith("taken as 1; TRL's batch is that of one process")
    assert "multiply ppo.batch and ppo.minibatch by N, and divide ppo.steps by N" in assumed
    assert "number of processes" not in dict(arguments(words, processes=1).assumed)
    with pytest.raises(ConfigError, match="num_processes: 0 is no count"):
        arguments(f"{words} --num_processes 0")


def test_rows_are_shared_among_processes(folder: Path) -> None:
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n' * 100, encoding="utf-8")
    classic = "--model_name m --rm_adapter r --batch_size 8 --dataset_name p.jsonl"
    assert arguments(classic, processes=3).config["ppo"]["steps"] == 4
    words = "--sft_model_path m --use_peft --reward_model_path r --dataset_name p.jsonl --num_train_epochs 2"
    found = arguments(words, processes=3)
    assert found.config["ppo"]["steps"] == 9
    assert (
        "2 x 100 prompts / 24 is 8.333 steps; ppo.steps is rounded up to 9" in dict(found.refused)["num_train_epochs"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model_name m --rm_adpter r", "--rm_adpter: TRL has no such key. Did you mean --rm_adapter"),
        ("--model_name --rm_adapter r", "--model_name: needs a value"),
        ("--model_name m --rm_adapter r --batch_size", "--batch_size: needs a value"),
    ],
)
def test_slips_of_the_pen_are_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        arguments(words)
    with pytest.raises(ConfigError, match=said):
        script(MULTI_ADAPTER, words)


def test_arguments_that_nobody_knows_stand_first() -> None:
    found = arguments("--model_name m --rm_adapter r --optimize_cuda_cache --colour blue")
    assert found.refused[0] == (
        "colour",
        UNKNOWN,
    )
    assert found.partly == {"rm_adapter", "dataset_name", "top_p"}
    own = MULTI_ADAPTER.replace("    seed: int", "    rm_adapters: str = field(default='')\n    seed: int")
    assert "rm_adapters" in dict(script(own, "--rm_adapters r").refused)  # the script's own: no slip of the pen
    added = "parser.add_argument('--rm-adapters')\nparser.add_argument('--steps', action='store_true')\n"
    refused = dict(script(MULTI_ADAPTER + added, "--rm_adapters r --steps").refused)
    assert "rm_adapters" in refused
    assert "a flag of the script's own" in refused["steps"]


def test_a_flag_may_be_negated() -> None:
    """As transformers' parser takes it where a flag's default is true."""
    assert "target" not in arguments("--model_name m --rm_adapter r --no_adap_kl_ctrl").config["ppo"]["kl"]


def test_arguments_alone_are_those_of_trls_own_scripts() -> None:
    found = arguments("--model_name m --rm_adapter r")
    refused, assumed = dict(found.refused), dict(found.assumed)
    assert "reads output 1 of the adapter's head" in refused["rm_adapter"]
    assert "Anthropic/hh-rlhf is what TRL's ppo_multi_adapter.py sets inside" in assumed["dataset_name"]
    assert "first 6 to 11 tokens of each 'chosen'" in refused["dataset_name"]
    assert "'Anthropic/hh-rlhf'" in found.files["make_prompts.py"]
    assert "train[:1%]" in found.files["make_prompts.py"]
    other = arguments("--model_name m --use_peft --batch_size 128")
    assert "stanfordnlp/imdb" in dict(other.assumed)["query_dataset"]
    assert "if not (len(row['text']) > 200):" in other.files["make_prompts.py"]
    named = arguments("--model_name m --rm_adapter r --dataset_name mine")
    assert named.config["data"]["prompts"] == "mine"
    assert not named.files


@pytest.mark.parametrize(
    ("text", "words", "last"),
    [
        ("from trl.experimental.ppo import PPOConfig\nmain(PPOConfig)", "", True),
        ("import trl.experimental.ppo as ppo\nmain(ppo)", "", True),
        ("from trl import PPOConfig\nmain(PPOConfig)", "--num_mini_batches 4", True),
        ("from trl import PPOConfig\nmain(PPOConfig(num_ppo_epochs=2))", "", True),
        ("import trl\ntrl.PPOTrainer(args=a, reward_model=b)", "", True),
        ("from trl import PPOConfig\nmain(PPOConfig)", "--mini_batch_size 4", False),
        ("from trl import PPOConfig, AutoModelForCausalLMWithValueHead\nmain(PPOConfig)", "", False),
    ],
)
def test_which_trainer_a_wrapper_is_for(text: str, words: str, last: bool) -> None:
    found = script(text, f"--model_name_or_path m --reward_model_path r --use_peft {words}")
    assert ("response_length" in dict(found.assumed)) == last
    assert (found.config["value"] == {"on": "own"}) == last


def test_what_has_no_effect_is_said() -> None:
    found = arguments("--model_name m --rm_adapter r --use_score_norm True")
    assert "has no effect without use_score_scaling" in dict(found.refused)["use_score_norm"]
    assert "use_score_norm" not in found.partly
    unused = dict(arguments(f"{LAST_ARGUMENTS} --eval_strategy no --eval_steps 5").refused)
    assert "set eval.every" in unused["eval_steps"]


def test_prompts_that_can_not_be_made_are_told_in_a_sentence() -> None:
    found = script(MULTI_ADAPTER, "--rm_adapter r --model_name ./none --dataset_name ./none")
    Path("make_prompts.py").write_text(found.files["make_prompts.py"], encoding="utf-8")
    with pytest.raises(SystemExit, match=r"The tokenizer of \./none can't be read: (.|\n)*name a local copy"):
        runpy.run_path("make_prompts.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def (", "no Python that can be parsed"),
        ("print(1)", "no PPO script of TRL's"),
    ],
)
def test_what_is_no_script(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        script(text, "--model_name m")


def test_values_that_are_passed_on_are_named() -> None:
    text = MULTI_ADAPTER.replace("learning_rate=2e-5", "**settings")
    assert "line 33, passes `**settings` on" in dict(script(text).refused)["PPOConfig"]


def test_a_default_of_trls_counts_only_where_the_script_reads_it() -> None:
    """A script with a reward and data of its own isn't given the sentiment pipeline and IMDB."""
    text = SENTIMENT.replace('ppo_config.reward_model.split(":")', "mine()") + "data = load_dataset('my/data')\n"
    found = script(text, "--use_peft --model_name m")
    assert found.config["reward"]["use"] == "function"
    assert "is missing: name a reward" in dict(found.refused)["reward_model_path"]
    assert found.config["data"]["prompts"] == "my/data"
    assert not {"reward_model", "query_dataset"} & set(dict(found.assumed))


def test_lengths_and_names_found_on_the_way() -> None:
    """A length that is drawn, a limit in tokens, values passed through functions and names, Python's own filter."""
    text = (
        SENTIMENT
        + """
def build(config, name="my/data", most=256):
    ds = load_dataset(name, split="train")
    return ds.filter(lambda x: len(x["input_ids"]) < most)

dataset = build(ppo_config, most=128)
parameters = filter(lambda p: p.requires_grad, model.parameters())
longest = args.longest
output_length_sampler = LengthSampler(4, 17)
config = PPOConfig(batch_size=args.other_name, mini_batch_size=half)
first = second
second = first
other = PPOConfig(seed=first)
"""
    )
    found = script(text, "--use_peft --model_name m")
    refused = dict(found.refused)
    assert found.config["data"] == {
        "prompts": "my/data",
        "split": "train",
        "field": "prompt",
        "max_prompt_tokens": 127,
        "on_long": "drop",
    }
    assert found.config["sampling"]["max_new_tokens"] == 16
    assert "from 4 to 16" in refused["max_new_tokens"]
    assert "computes it (`args.other_name`)" in refused["batch_size"]
    assert "computes it (`half`)" in refused["mini_batch_size"]
    assert "seed" in refused
    assert "requires_grad" not in str(refused)


def test_a_script_is_never_run() -> None:
    script("open('ran', 'w')\n" + SENTIMENT, "--model_name m")
    assert not Path("ran").exists()


def test_the_command_writes_all_files_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ppo.py").write_text(MULTI_ADAPTER, encoding="utf-8")
    command = ["import", "trl-args", "ppo.py", "--rm_adapter", "rm", "--to", "run.yaml"]
    Path("make_prompts.py").write_text("mine", encoding="utf-8")
    assert main(command) == 2
    assert "make_prompts.py: there is such a file already" in capsys.readouterr().err
    assert not Path("run.yaml").exists()
    assert main([*command, "--force"]) == 0
    assert "load_dataset" in Path("make_prompts.py").read_text(encoding="utf-8")
    launched = ["import", "trl-args", "torchrun", "--nproc-per-node=2", *command[2:], "--force"]
    assert main(launched) == 0
    assert yaml.safe_load(Path("run.yaml").read_text(encoding="utf-8"))["ppo"]["batch"] == 16
    assert "ppo.py (TRL) and its arguments" in Path("run.yaml").read_text(encoding="utf-8")
    assert main(["import", "trl-args", "no.py", "--to", "x.yaml"]) == 2
    assert "no.py: can't be read" in capsys.readouterr().err
    assert main(["import", "trl-args"]) == 2
    assert "nothing to convert" in capsys.readouterr().err


def test_conditions_on_rows_are_copied_only_whole(folder: Path) -> None:
    """Names of the script's are filled in; a condition that asks what only the script has is named, and not copied."""
    kept = '.filter(lambda x: len(x["text"]) > 10)'
    filters = {
        '.filter(lambda x: len(x["text"]) > shortest * 2)': "len(row['chosen']) > 3 * 2",
        '.filter(lambda x: len(x["text"]) > script_args.seed)': "len(row['chosen']) > 0",
        '.filter(lambda x, /: any(word in x["text"] for word in ["a", "b"]))': (
            "any((word in row['chosen'] for word in ['a', 'b']))"
        ),
    }
    for written, condition in filters.items():
        found = script(MULTI_ADAPTER.replace(kept, written))
        assert f"if not ({condition}):" in found.files["make_prompts.py"], written
        compile(found.files["make_prompts.py"], "make_prompts.py", "exec")
    refused = {
        '.filter(lambda x: detector(x["text"]) == "en")': "asks `detector`",
        ".filter(lambda x, i: i % 2, with_indices=True)": "asks `i`",
        ".filter(is_good)": "with `is_good`",
        ".filter(function=is_good)": "with `is_good`",
    }
    for written, said in refused.items():
        found = script(MULTI_ADAPTER.replace(kept, written))
        assert "if not (" not in found.files["make_prompts.py"], written
        notes = [why for key, why in found.refused if key == "dataset_name"]
        assert any(said in why and "can't be copied" in why for why in notes), (written, notes)


@pytest.mark.parametrize("name", ["C:\\Users\\me\\data", 'a"""b\\', "a\nimport os", "a\r\x0c\0\u2028b", "{split}"])
def test_prompts_are_made_by_python_that_compiles(name: str) -> None:
    """Whatever the data set and the script are called."""
    recipe = PromptRecipe("chosen", tokens=(6, 12))
    text = prompts_script(f"{name}.py", recipe, [], name, name, {"prompts.jsonl": name}, name)
    tree = ast.parse(text)
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "data"]
    assert [ast.literal_eval(node.value) for node in assigned] == [name]
    assert not any(
        alias.name == "os" for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    )


def test_scripts_that_are_written_otherwise() -> None:
    """A byte order mark, parameters before a slash, a sign before what isn't known."""
    Path("script.py").write_text(MULTI_ADAPTER, encoding="utf-8-sig")
    assert trl.migrate({}, Path("script.py")).config["ppo"]["batch"] == 8
    found = script(MULTI_ADAPTER + "\ndef more(a=1, /, b=2, *, batch=3):\n    return a\n")
    assert found.config["ppo"]["batch"] == 8
    found = script(MULTI_ADAPTER.replace("learning_rate=2e-5", "learning_rate=-script_args.rate"))
    assert "computes it" in dict(found.refused)["learning_rate"]


def test_a_config_needs_its_file() -> None:
    with pytest.raises(ConfigError, match="--config: needs one file behind it"):
        arguments("--model_name m --config")
    with pytest.raises(ConfigError, match="--config: needs one file behind it"):
        arguments("--config a.yaml b.yaml --model_name m")


@pytest.mark.parametrize("size", ["0", "-1", "2.5", "inf", "nan", "1e999", "no"])
@pytest.mark.parametrize("key", ["batch_size", "mini_batch_size", "gradient_accumulation_steps"])
def test_sizes_are_counts(key: str, size: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .* (is no count|is not a number)"):
        arguments(f"{CLASSIC} --{key} {size}")
