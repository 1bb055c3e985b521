"""Keys of other projects and of older versions, and what they are called here.

Read in the projects' own configs: huggingface/alignment-handbook, hiyouga/LLaMA-Factory, axolotl-ai-cloud/axolotl,
allenai/open-instruct, OpenRLHF/OpenRLHF, ContextualAI/HALOs, and TRL and transformers since 2023.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

HANDBOOK = "the alignment-handbook or an older TRL"

# of files that are translated: old key → the fields that it sets now
RENAMED: Mapping[str, str] = {
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation",
    "dataset_mixer": "dataset_name, dataset_train_split, dataset_test_split, datasets, mixture_weights",
    "dataset_splits": "dataset_train_split, dataset_test_split",
    "dataset_configs": "dataset_config",
    "dataset_mixture": "datasets, mixture_weights, mixture_seed, test_split_size, dataset_name",
    "preprocessing_num_workers": "dataset_num_proc",
    "max_seq_length": "max_length",
    "max_target_length": "max_completion_length",
    "trainer_type": "method, base",
    "loss_type": "method, base, loss_type",
    "length_norm": "loss_type, reward",
    "gamma_beta_ratio": "gamma_beta_ratio",
    "gamma": "simpo_gamma",
    "tau": "gamma_po_tau",
    "sft_weight": "cpo_alpha",
    "rpo_alpha": "loss_type, loss_weights",
    "ln": "reward",
    "flip": "noise",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "eval_strategy": "eval_strategy",
    "save_strategy": "save_strategy",
    "logging_strategy": "logging_strategy",
    "group_by_length": "train_sampling_strategy",
    "use_liger_loss": "use_liger_kernel",
    "hub_model_revision": "hub_revision",
    "push_to_hub_revision": "push_to_hub",
}
# old key → why it has no effect any more
DROPPED: Mapping[str, str] = {
    "model_code_revision": "transformers loads code and weights at one model_revision",
    "base_model_revision": "an adapter's base is loaded at its main revision",
    "ref_model_init_kwargs": "the reference model is loaded like the policy",
    "auto_insert_empty_system_msg": "rows are used as they are, without an empty system message",
    "text_column": "only pretraining on plain text read it",
    "decontaminate": "rows are used as they are: decontaminate the data set first",
    "max_prompt_length": "TRL no longer cuts prompts; max_length cuts the end of prompt and completion together, and "
    "a pair whose prompt fills it is dropped",
    "truncation_mode": "it said which end of a prompt to keep, and TRL no longer cuts prompts",
    "truncation_side": "max_length cuts the end of prompt and completion",
    "label_pad_token_id": "TRL masks with -100",
    "padding_value": "TRL pads with the tokenizer's padding token",
    "margin_norm": "AMaPO's trainer never reads it",
    "mode_weight": "AMaPO's trainer never reads it",
    "base_model_attribute_name": "TRL finds the base model by itself",
    "save_safetensors": "transformers saves nothing else",
    "logging_dir": "transformers 5 reads the environment variable TENSORBOARD_LOGGING_DIR",
}


def _table(text: str) -> dict[str, str]:
    """`key = what it is here; key = …`; a key alone has no counterpart."""
    pairs = (entry.partition("=") for entry in " ".join(text.split()).split(";"))
    return {key.strip(): here.strip() for key, _, here in pairs}


# what only TRL's DPOConfig has, and what it had
_DPO = _table(
    """activation_offloading; discopop_tau; f_alpha_divergence_coef; f_divergence_type; ld_alpha; loss_weights;
    pad_to_multiple_of; pad_token; padding_free; precompute_ref_batch_size; precompute_ref_log_probs;
    ref_model_mixup_alpha; ref_model_sync_steps; router_aux_loss_coef; sync_ref_model; use_weighting"""
)
_OLD_DPO = _table(
    """rpo_alpha; reference_free; beta_dpo; model_adapter_name; ref_adapter_name; force_use_ref_model;
    use_logits_to_keep; use_num_logits_to_keep; ref_model_init_kwargs"""
)
# keys by which a file is for one of TRL's two trainers; `simpo_gamma` is ours too, and its default loss reads none
OF_TRL = {"cpo": ("cpo_alpha",), "dpo": (*_DPO, *_OLD_DPO)}
_CPO = _table("cpo_alpha; generate_during_eval; is_encoder_decoder; max_completion_length; tokenization")
ONE_BASE = {**dict.fromkeys(_CPO, "cpo"), **dict.fromkeys(_DPO, "dpo")}  # option of one base → that base

_SFT = "loss_type: [sigmoid, sft] and loss_weights: [1.0, WEIGHT] with base: dpo and method: none"
_LORA = "use_peft: true"
_FLASH = "attn_implementation: flash_attention_2"
OLDER = "an older TRL or transformers"
# of files that are refused: project → key → what it is called here, "" for nothing
FOREIGN: Mapping[str, Mapping[str, str]] = {
    OLDER: _table(
        f"""rpo_alpha = {_SFT}; reference_free = base: cpo with method: none and cpo_alpha: 0.0; beta_dpo = beta;
        use_weighting = use_weighting: true with base: dpo and method: none; max_completion_length = max_length;
        use_logits_to_keep; use_num_logits_to_keep; generate_during_eval; is_encoder_decoder; model_adapter_name;
        ref_adapter_name; force_use_ref_model; peft_lora_r = lora_r; peft_lora_alpha = lora_alpha;
        model_name = model_name_or_path; no_cuda = use_cpu: true; use_mps_device;
        gradient_checkpointing_use_reentrant = gradient_checkpointing_kwargs;
        per_gpu_train_batch_size = per_device_train_batch_size; per_gpu_eval_batch_size = per_device_eval_batch_size;
        adafactor = optim: adafactor; include_inputs_for_metrics = include_for_metrics; fp16_backend; fp16_opt_level;
        half_precision_backend; push_to_hub_model_id = hub_model_id; push_to_hub_token = hub_token;
        push_to_hub_organization = hub_model_id; dispatch_batches = accelerator_config;
        split_batches = accelerator_config; include_tokens_per_second = include_num_input_tokens_seen; tpu_num_cores;
        fsdp_min_num_params = fsdp_config; fsdp_transformer_layer_cls_to_wrap = fsdp_config;
        torchdynamo = torch_compile_backend; betas = adam_beta1 and adam_beta2"""
    ),
    "LLaMA-Factory": _table(
        f"""stage = method and base; finetuning_type = use_peft; lora_rank = lora_r;
        lora_target = lora_target_modules; additional_target = lora_modules_to_save;
        adapter_name_or_path = model_name_or_path; quantization_bit = load_in_4bit: true with {_LORA};
        quantization_type = bnb_4bit_quant_type; double_quantization = use_bnb_nested_quant; quantization_method;
        pref_beta = beta; pref_loss = loss_type; pref_ftx = {_SFT}; dpo_beta = beta; dpo_loss = loss_type;
        dpo_ftx = {_SFT}; dpo_label_smoothing = label_smoothing; kto_chosen_weight; kto_rejected_weight; ref_model;
        ref_model_adapters; reward_model; dataset = dataset_name; eval_dataset = eval_dataset_name; dataset_dir;
        template = chat_template; cutoff_len = max_length; max_samples; val_size = eval_dataset_name; train_on_prompt;
        mask_history; mix_strategy; interleave_probs = mixture_weights; overwrite_cache; neat_packing; tokenized_path;
        plot_loss; flash_attn = attn_implementation; enable_liger_kernel = use_liger_kernel; use_unsloth;
        disable_gradient_checkpointing = gradient_checkpointing: false; pure_bf16 = dtype: bfloat16;
        compute_dtype = dtype; resize_vocab; rope_scaling; use_fast_tokenizer;
        moe_aux_loss_coef = router_aux_loss_coef with base: dpo; loraplus_lr_ratio; pissa_init; create_new_adapter;
        freeze_trainable_layers; freeze_trainable_modules = train_only; predict_with_generate; use_swanlab"""
    ),
    "axolotl": _table(
        f"""base_model = model_name_or_path; base_model_config; revision_of_model = model_revision;
        tokenizer_config = tokenizer_name_or_path; model_type; tokenizer_type; rl = method and base; rl_beta = beta;
        dpo_beta = beta; dpo_label_smoothing = label_smoothing; dpo_use_weighting = use_weighting: true with base: dpo
        and method: none; orpo_alpha = beta; kto_desirable_weight; kto_undesirable_weight; adapter = {_LORA};
        lora_target_linear = lora_target_modules: all-linear; lora_fan_in_fan_out;
        lora_model_dir = model_name_or_path; peft_use_rslora = use_rslora: true; peft_use_dora = use_dora: true;
        sequence_len = max_length; sample_packing; eval_sample_packing; pad_to_sequence_len;
        micro_batch_size = per_device_train_batch_size; eval_batch_size = per_device_eval_batch_size;
        num_epochs = num_train_epochs; optimizer = optim; lr_scheduler = lr_scheduler_type; train_on_inputs;
        flash_attention = {_FLASH}; sdp_attention = attn_implementation: sdpa; xformers_attention;
        val_set_size = eval_dataset_name; test_datasets = eval_dataset_name; dataset_prepared_path;
        dataset_processes = dataset_num_proc; shuffle_merged_datasets; dataset_exact_deduplication; evals_per_epoch;
        saves_per_epoch; eval_table_size; eval_max_new_tokens; early_stopping_patience; special_tokens; tokens;
        strict; wandb_project = report_to: wandb; wandb_entity; wandb_watch; wandb_name = run_name; wandb_log_model;
        unfrozen_parameters = train_only; noisy_embedding_alpha = neftune_noise_alpha; plugins; type; ds_type;
        default_system_message; chat_template_jinja = chat_template"""
    ),
    "open-instruct": _table(
        f"""tokenizer_name = tokenizer_name_or_path; tokenizer_revision; use_flash_attn = {_FLASH};
        use_slow_tokenizer; chat_template_name = chat_template; add_bos; config_name;
        additional_model_arguments = model_init_kwargs; low_cpu_mem_usage; dataset_mixer_list = datasets;
        dataset_mixer_list_splits; dataset_mix_dir; dataset_config_name = dataset_config; train_file = dataset_name;
        max_train_samples; dataset_transform_fn; dpo_beta = beta; dpo_loss_type = loss_type;
        dpo_gamma_beta_ratio = gamma_beta_ratio; dpo_label_smoothing = label_smoothing;
        dpo_use_paged_optimizer = optim: paged_adamw_32bit; use_lora = {_LORA}; use_qlora = {_LORA} with load_in_4bit:
        true; lora_rank = lora_r; use_8bit_optimizer = optim: adamw_bnb_8bit; fused_optimizer = optim:
        adamw_torch_fused; clip_grad_norm = max_grad_norm; max_train_steps = max_steps;
        checkpointing_steps = save_steps; keep_last_n_checkpoints = save_total_limit; with_tracking = report_to;
        exp_name = run_name; hf_entity; hf_repo_id = hub_model_id; hf_repo_revision = hub_revision; wandb_entity;
        wandb_project_name; timeout = ddp_timeout; reduce_loss; load_balancing_loss; load_balancing_weight;
        concatenated_forward; zero_stage = deepspeed; try_launch_beaker_eval_jobs"""
    ),
    "OpenRLHF": _table(
        f"""pretrain = model_name_or_path; ref_pretrain; dataset = dataset_name; eval_dataset = eval_dataset_name;
        dataset_probs = mixture_weights; train_split = dataset_train_split; eval_split = dataset_test_split;
        prompt_key = prompt_column; chosen_key; rejected_key; input_template; apply_chat_template;
        tokenizer_chat_template = chat_template; max_samples; max_len = max_length; max_epochs = num_train_epochs;
        train_batch_size = gradient_accumulation_steps times per_device_train_batch_size;
        micro_train_batch_size = per_device_train_batch_size; l2 = weight_decay; ipo = loss_type: ipo with base: dpo
        and method: none; nll_loss_coef = {_SFT}; aux_loss_coef = router_aux_loss_coef with base: dpo;
        zero_stage = deepspeed; flash_attn = {_FLASH}; lora_rank = lora_r; target_modules = lora_target_modules;
        adam_betas = adam_beta1 and adam_beta2; max_norm = max_grad_norm; lr_warmup_ratio = warmup_steps;
        lr_scheduler = lr_scheduler_type; save_path = output_dir; ckpt_path; load_checkpoint = resume_from_checkpoint;
        max_ckpt_num = save_total_limit; max_ckpt_mem; disable_fast_tokenizer; ref_offload; adam_offload;
        packing_samples; ring_attn_size; ds_tensor_parallel_size; use_wandb = report_to: wandb; wandb_org;
        wandb_group; wandb_run_name = run_name; gradient_checkpointing_use_reentrant = gradient_checkpointing_kwargs;
        use_tensorboard = report_to: tensorboard"""
    ),
    "NeMo-Aligner or NeMo RL": _table(
        """ref_policy_kl_penalty = beta; reference_policy_kl_penalty = beta; preference_loss = method and loss_type;
        preference_average_log_probs = reward; gt_reward_scale = reward_aware_eta;
        preference_loss_weight = loss_weights; sft_loss_weight = loss_weights; sft_average_log_probs"""
    ),
    "HALOs, or DPO's own code": _table(
        """lr = learning_rate; n_epochs = num_train_epochs; n_examples; n_eval_examples; eval_every;
        do_first_eval = eval_on_start; optimizer = optim; exp_name = run_name; loss = method and base;
        model = model_name_or_path; trainer; dataloader; defaults; local_run_dir = output_dir; local_dirs; cache_dir;
        batch_size = gradient_accumulation_steps times per_device_train_batch_size;
        eval_batch_size = per_device_eval_batch_size; wandb = report_to: wandb; fsdp_port; sample_during_eval;
        n_eval_model_samples; minimum_log_interval_secs; cache_reference_logprobs = precompute_ref_log_probs: true
        with base: dpo; humanline; frac_unique_desirable; frac_unique_undesirable"""
    ),
}


# keys that autotrain, torchtune and ms-swift have too, and those of several of the tables
_SHARED = {
    *_table(
        """base_model; model; model_type; template; dataset; loss; lr; optimizer; lr_scheduler; num_epochs; batch_size;
        eval_batch_size; trainer; cache_dir; max_samples; target_modules"""
    ),
    *(key for key, count in Counter(key for table in FOREIGN.values() for key in table).items() if count > 1),
}


def foreign(names: Iterable[str], known: Collection[str]) -> dict[str, dict[str, str]]:
    """Project → those of the names that are its keys, each with what it is called here.

    A name counts for one project, the one that has most of them, which is only named where one of them is its alone.
    An entry of the tables that leads to no key of this command says nothing here.

    Args:
        known: the command's own keys; none for every command.
    """
    renamed = {key: here for key, here in RENAMED.items() if key not in FOREIGN[OLDER]}
    tables = {**FOREIGN, HANDBOOK: {**dict.fromkeys(DROPPED, ""), **renamed}}
    left = list(dict.fromkeys(names))
    found: dict[str, dict[str, str]] = {}
    while left:
        theirs = {
            project: {name: table[name] for name in left if name in table and _leads_to(table[name], known)}
            for project, table in tables.items()
        }
        project = max(theirs, key=lambda each: len(theirs[each]))
        if not theirs[project]:
            break
        named = project if theirs[project].keys() - _SHARED else "another project"
        found[named] = found.get(named, {}) | theirs[project]
        left = [name for name in left if name not in theirs[project]]
    return found


def _leads_to(here: str, known: Collection[str]) -> bool:
    return not (here and known) or any(word in known for word in re.findall(r"\w+", here))


def said(name: str, here: str, as_flag: bool = False) -> str:
    """A key of another project, and what it is here, for an error."""
    told = f"here {here}" if here else f"not here: {DROPPED[name]}" if name in DROPPED else "not here"
    if not as_flag:
        return f"{name} ({told})"
    if here:  # `key: [b, c] and other` → `--key b c and --other`
        told = "here " + re.sub(r"\b(?!and\b|with\b|times\b)(\w+)(?:: (\[.*?\]|\S+))?", _flag, here)
    return f"--{name} ({told})"


def _flag(setting: re.Match[str]) -> str:
    key, value = setting.groups()
    return f"--{key}" + (f" {value.strip('[]').replace(',', '')}" if value else "")
