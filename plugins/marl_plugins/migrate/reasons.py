"""Why a key of another trainer was not converted."""

from __future__ import annotations

HUB = dict.fromkeys(
    ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token"),
    "marl publish RUN --to FOLDER --push-to-hub OWNER/NAME uploads the trained adapter, after the run",
)

FROZEN = "weights of the base, which all roles share, are never trained; what learns is an adapter on policy.targets"

LLAMAFACTORY = {
    **HUB,
    "do_train": "not needed: marl run trains",
    "logging_steps": "not needed: every step is logged",
    "logging_dir": "not needed: trackers write into run.folder",
    "plot_loss": "not needed: report.html is always written, curves.png with the extra [curves]",
    "overwrite_output_dir": "marl never overwrites a run: choose another run.folder",
    "overwrite_cache": "not needed: marl caches no data",
    "preprocessing_num_workers": "not needed: prompts are encoded in one process",
    "dataloader_num_workers": "not needed: prompts are encoded in one process",
    "ddp_timeout": "not needed: this was for several processes",
    "ppo_whiten_rewards": "marl whitens advantages (ppo.whiten), not rewards",
    "reward_model_quantization_bit": "a reward adapter shares the policy's base; a reward model is loaded unquantized",
    "ref_model_quantization_bit": "a reference that is a model of its own is loaded unquantized",
    "do_sample": "PPO samples; without sampling there would be nothing to learn from",
    "num_beams": "PPO samples; log-probs of beams would not be those of the policy",
    "repetition_penalty": "changes what is sampled but not what is scored: ratio and KL would be biased",
    "length_penalty": "belongs to beam search",
    "additional_target": "would train modules of the base, which all roles share",
    "pissa_init": "PiSSA rewrites the base, which all roles share",
    "pissa_iter": "PiSSA rewrites the base, which all roles share",
    "pissa_convert": "PiSSA rewrites the base, which all roles share",
    "freeze_trainable_layers": FROZEN,
    "freeze_trainable_modules": FROZEN,
    "freeze_extra_modules": FROZEN,
    "loraplus_lr_embedding": (
        "LoRA+'s rate of LoRAs on embeddings, which all-linear makes none of; where policy.targets names some, they learn at "
        "ppo.learning_rate"
    ),
    "deepspeed": "marl runs without DeepSpeed",
    "fsdp": "marl runs without FSDP",
    "val_size": "name a file of held-out prompts: eval.prompts",
    "eval_strategy": "LLaMA-Factory's PPO had no evaluation; marl's stands in section eval",
    "eval_steps": "LLaMA-Factory's PPO had no evaluation; where you name eval.prompts, this is eval.every",
    "per_device_eval_batch_size": "LLaMA-Factory's PPO had no evaluation; where you name eval.prompts, eval.limit bounds it",
    "eval_dataset": "LLaMA-Factory's PPO refused it; marl evaluates on eval.prompts",
    "resume_from_checkpoint": "marl run --resume goes on from run.folder",
    "save_only_model": "a checkpoint always holds what resume needs",
}

OFT_ONLY = dict.fromkeys(
    ("oft_rank", "oft_block_size", "oft_target", "module_dropout"),
    "not needed: LLaMA-Factory reads it with finetuning_type: oft alone",
)
LORA_ONLY = dict.fromkeys(
    (
        "lora_rank",
        "lora_alpha",
        "lora_target",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
    ),
    "not needed: LLaMA-Factory reads it with finetuning_type: lora alone",
)
"""Of LLaMA-Factory, too."""

TRL = {
    **HUB,
    "compare_steps": "not needed: TRL's trainer never used it",
    "task_name": "name the run by run.folder",
    "tracker_project_name": "name the run by run.folder",
    "tracker_kwargs": "options of trackers stand with the observer: {use: trackers, to: [...], ...}",
    "non_eos_penalty": "gave a response without EOS penalty_reward_value as score; shaping.missing_eos_penalty subtracts from its score",
    "penalty_reward_value": "see non_eos_penalty: set shaping.missing_eos_penalty",
    "dataset_streaming": "marl reads all prompts at the start",
    "model_name": "not needed: the base is named by model_name_or_path",
    "whiten_rewards": "marl whitens advantages (ppo.whiten), not rewards",
    "ratio_threshold": "marl clips the ratio; ppo.max_kl stops an update that goes too far",
    "optimize_cuda_cache": "not needed: marl holds one base",
    "optimize_device_cache": "not needed: marl holds one base",
    "remove_unused_columns": "not needed: every column reaches reward functions",
    "local_rollout_forward_batch_size": "not needed: rollouts are sampled in one batch",
    "num_sample_generations": "not needed: samples.jsonl has sampled responses of every step",
    "logging_steps": "not needed: every step is logged",
    "dataset_num_proc": "not needed: prompts are encoded in one process",
    "model_adapter_name": "marl names its adapters by their roles",
    "ds3_gather_for_generation": "marl runs without DeepSpeed",
    "deepspeed": "marl runs without DeepSpeed",
    "lora_task_type": "marl sets this itself",
    "use_safetensors": "not needed: marl reads and writes nothing else",
    "reward_shaping_enable_length": "write a reward function, or shaping: in the config",
    "exp_name": "name the run by run.folder",
    "run_name": "name the run by run.folder",
}
