"""The names of the other trainers' keys: what tells a slip of the pen from a key that marl has no counterpart of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from marl_core import ConfigError, near_match

NEAR = 0.85
"""How alike two names must be for one to be a slip of the pen: a letter or two in a name of usual length."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRANSFORMERS_FLAGS = _names(
    """
    activation_checkpointing auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval
    dataloader_drop_last dataloader_in_order dataloader_persistent_workers dataloader_pin_memory ddp_broadcast_buffers
    ddp_find_unused_parameters ddp_static_graph debug disable_tqdm dispatch_batches do_eval do_predict do_train
    enable_jit_checkpoint eval_do_concat_batches eval_on_start eval_use_gather_object fp16 fp16_full_eval fsdp full_determinism
    gradient_checkpointing greater_is_better group_by_length hub_always_push hub_private_repo ignore_data_skip
    include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second jit_mode_eval liger_kernel_config
    load_best_model_at_end log_on_each_node logging_first_step logging_nan_inf_filter no_cuda overwrite_output_dir
    predict_with_generate prediction_loss_only push_to_hub remove_unused_columns restore_callback_states_from_checkpoint
    resume_from_checkpoint save_on_each_node save_only_model save_safetensors skip_memory_metrics sortish_sampler split_batches
    tf32 torch_compile torchdynamo use_cache use_cpu use_ipex use_legacy_prediction_loop use_liger_kernel use_mps_device
    """
)
"""Of TrainingArguments, old and new: true or false, or a word alone."""
TRANSFORMERS_VALUES = _names(
    """
    accelerator_config activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon data_seed
    dataloader_multiprocessing_context dataloader_num_workers dataloader_prefetch_factor ddp_backend ddp_bucket_cap_mb ddp_timeout
    deepspeed eval_accumulation_steps eval_delay eval_steps eval_strategy evaluation_strategy fp16_backend fp16_opt_level
    fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap generation_config generation_max_length
    generation_num_beams gradient_accumulation_steps gradient_checkpointing_kwargs half_precision_backend hub_model_id
    hub_revision hub_strategy hub_token include_for_metrics label_names label_smoothing_factor learning_rate length_column_name
    local_rank log_level log_level_replica logging_dir logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type
    max_grad_norm max_steps metric_for_best_model mp_parameters neftune_noise_alpha num_train_epochs optim optim_args
    optim_target_modules output_dir parallelism_config past_index per_device_eval_batch_size per_device_train_batch_size
    per_gpu_eval_batch_size per_gpu_train_batch_size project push_to_hub_model_id push_to_hub_organization push_to_hub_token
    ray_scope report_to run_name save_steps save_strategy save_total_limit seed sharded_ddp torch_compile_backend
    torch_compile_mode torch_empty_cache_steps tpu_num_cores trackio_bucket_id trackio_space_id trackio_static_space_id
    train_sampling_strategy warmup_ratio warmup_steps weight_decay xpu_backend
    """
)
"""Of TrainingArguments: these need a value."""
TRL_FLAGS = _names(
    """
    adap_kl_ctrl dataset_streaming do_sample ds3_gather_for_generation early_stopping gradient_checkpointing_use_reentrant
    load_in_4bit load_in_8bit non_eos_penalty optimize_cuda_cache optimize_device_cache sanity_check trust_remote_code
    use_bnb_nested_quant use_dora use_peft use_rslora use_safetensors use_score_norm use_score_scaling use_seq2seq whiten_rewards
    """
)
"""Of TRL's PPO configs, ModelConfig and own scripts, release by release."""
TRL_VALUES = _names(
    """
    accelerator_kwargs attn_implementation backward_batch_size batch_size bnb_4bit_quant_storage bnb_4bit_quant_type cliprange
    cliprange_value compare_steps dataset_config dataset_name dataset_num_proc dataset_test_split dataset_text_field
    dataset_train_split dtype exp_name forward_batch_size gamma global_backward_batch_size global_batch_size horizon init_kl_coef
    kl_coef kl_estimator kl_penalty lam local_batch_size local_mini_batch_size local_rollout_forward_batch_size log_with
    lora_alpha lora_dropout lora_modules_to_save lora_r lora_target_modules lora_target_parameters lora_task_type max_new_tokens
    max_prompt_length max_prompt_tokens micro_batch_size mini_batch_size missing_eos_penalty model_adapter_name model_name
    model_name_or_path model_revision nproc_per_node num_gpus num_mini_batches num_ppo_epochs num_processes num_sample_generations
    num_total_batches num_updates pad_token_id penalty_reward_value ppo_epochs project_kwargs push_to_hub_if_best_kwargs
    query_dataset ratio_threshold ref_adapter_name repetition_penalty response_length reward_adapter reward_model
    reward_model_name reward_model_path rm_adapter score_clip sft_model_path steps stop_token stop_token_id target target_kl
    task_name temperature top_k top_p torch_dtype total_episodes tracker_kwargs tracker_project_name vf_coef world_size
    """
)
"""The same, with a value."""
LLAMAFACTORY_FLAGS = _names(
    """
    apollo_layerwise apollo_scale_front compute_accuracy create_new_adapter crop_to_patches data_shared_file_system
    disable_gradient_checkpointing disable_shuffling do_sample double_quantization enable_liger_kernel enable_thinking
    enable_torch_profiler eval_on_each_dataset export_legacy_format flash_attn fp8 fp8_enable_fsdp_float8_all_gather
    freeze_language_model freeze_multi_modal_projector freeze_vision_tower galore_layerwise ignore_pad_token_for_loss
    image_do_pan_and_scan include_effective_tokens_per_second kt_use_lora_experts low_cpu_mem_usage mask_history neat_packing
    overwrite_cache packing pissa_convert pissa_init plot_loss ppo_score_norm ppo_whiten_rewards preserve_thinking
    print_param_status profiler_profile_memory profiler_record_shapes profiler_with_stack pure_bf16 resize_vocab shift_attn
    skip_special_tokens split_special_tokens streaming train_from_scratch train_on_prompt trust_remote_code upcast_layernorm
    upcast_lmhead_output use_adam_mini use_apollo use_asft_loss use_audio_in_video use_badam use_dft_loss use_dora use_eaft_loss
    use_fast_tokenizer use_galore use_hyper_parallel use_kt use_kv_cache use_llama_pro use_mca use_megatron_bridge use_muon
    use_reentrant_gc use_rslora use_swanlab use_unsloth use_unsloth_gc use_v1_kernels vllm_enforce_eager
    """
)
"""Of LLaMA-Factory's argument classes."""
LLAMAFACTORY_VALUES = _names(
    """
    adapter_folder adapter_name_or_path add_special_tokens add_tokens additional_target apollo_proj apollo_proj_type apollo_rank
    apollo_scale apollo_scale_type apollo_target apollo_update_interval asft_alpha audio_sampling_rate badam_mask_mode badam_mode
    badam_start_block badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose buffer_size cache_dir cutoff_len
    dataset dataset_dir default_system download_mode dpo_label_smoothing eaft_alpha early_stopping_steps eval_dataset
    eval_num_beams export_device export_dir export_hub_model_id export_quantization_bit export_quantization_dataset
    export_quantization_maxlen export_quantization_nsamples export_size finetuning_type fp8_backend freeze_extra_modules
    freeze_trainable_layers freeze_trainable_modules galore_proj_type galore_rank galore_scale galore_target
    galore_update_interval hf_hub_token hyper_parallel_args hyper_parallel_cp_size image_max_pixels image_min_pixels infer_backend
    infer_dtype init_special_tokens interleave_probs kt_cpu_activation kt_expert_checkpoint_path kt_lora_expert_intermediate_size
    kt_lora_expert_num kt_non_expert_weight_path kt_weight_path kto_chosen_weight kto_rejected_weight ld_alpha length_penalty
    lora_alpha lora_dropout lora_rank lora_target loraplus_lr_embedding loraplus_lr_ratio master_addr master_port max_length
    max_new_tokens max_samples media_dir mix_strategy mixture_of_depths model_name_or_path model_revision module_dropout
    moe_aux_loss_coef ms_hub_token new_special_tokens_config num_beams offload_folder oft_block_size oft_rank oft_target
    om_hub_token pissa_iter ppo_buffer_size ppo_epochs ppo_target pref_bco_weight pref_beta pref_ftx pref_loss
    preprocessing_batch_size preprocessing_num_workers profile_modules profiler_active_steps profiler_output_dir profiler_repeat
    profiler_wait_steps profiler_warmup_steps quantization_bit quantization_device_map quantization_method quantization_type
    ray_init_kwargs ray_num_workers ref_model ref_model_adapters ref_model_quantization_bit repetition_penalty reward_model
    reward_model_adapters reward_model_quantization_bit reward_model_type rope_scaling sglang_config sglang_lora_backend
    sglang_maxlen sglang_mem_fraction sglang_tp_size simpo_gamma stage swanlab_api_key swanlab_lark_secret
    swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name swanlab_workspace temperature template
    tokenized_path tool_format top_k top_p val_size video_fps video_max_pixels video_maxlen video_min_pixels vllm_config
    vllm_gpu_util vllm_max_lora_rank vllm_maxlen
    """
)
"""The same, with a value."""


@dataclass(frozen=True)
class KnownKeys:
    """The keys of a trainer, all releases together."""

    trainer: str
    flags: frozenset[str]
    values: frozenset[str]
    way_out: str
    """What to do where a key that is refused is right."""

    def unknown(
        self,
        written: Mapping[str, Any],
        declared: Collection[str] = (),
        own_flags: Collection[str] = (),
        dashes: str = "",
    ) -> list[str]:
        """Keys that the trainer doesn't have, apart from those that a script declares itself (`own_flags` of them need no value).

        ConfigError where such a key is nearly one that it has, and where a key that needs a value stands alone.
        `dashes` stand before a key in messages: `--` of an argument.
        """
        known = self.flags | self.values
        found = []
        for key, value in written.items():
            if key in self.values and value is True and key not in own_flags:
                raise ConfigError(
                    f"{dashes}{key}: needs a value, and has none: write it behind the name, or leave the key out."
                )
            if key in known or key in declared:
                continue
            near = near_match(key, known - set(written), NEAR)
            if near:
                raise ConfigError(
                    f"{dashes}{key}: {self.trainer} has no such key. Did you mean {dashes}{near}? {self.way_out}"
                )
            found.append(key)
        return found


TRL_KEYS = KnownKeys(
    "TRL",
    TRANSFORMERS_FLAGS | TRL_FLAGS,
    TRANSFORMERS_VALUES | TRL_VALUES,
    "If your own script declares it, give marl the script, which says so: marl import trl-args SCRIPT.py ...",
)
LLAMAFACTORY_KEYS = KnownKeys(
    "LLaMA-Factory",
    TRANSFORMERS_FLAGS | LLAMAFACTORY_FLAGS,
    TRANSFORMERS_VALUES | LLAMAFACTORY_VALUES,
    "If your release has it, leave it out of the file that marl reads: marl has no counterpart.",
)
