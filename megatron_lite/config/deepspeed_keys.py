"""The keys DeepSpeed 0.19.8 reads, embedded so that reading a configuration does not import DeepSpeed.

Taken from `deepspeed/runtime/config.py` (what `DeepSpeedConfig` looks up) and
`deepspeed/runtime/zero/config.py` (`DeepSpeedZeroConfig`); a test compares them with the installed DeepSpeed.
"""

from __future__ import annotations

TOP_LEVEL_KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)

# Once DeepSpeed's; 0.19.8 refuses them.
REMOVED_KEYS = frozenset(
    [
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    ]
)
REMOVED_ZERO_KEYS = frozenset(
    [
        "mics_hierarchical_params_gather",
        "mics_shard_size",
        "zeropp_loco_param",
    ]
)

_ZERO_FLAGS = [
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "legacy_stage1",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "overlap_comm",
    "override_module_apply",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "reduce_scatter",
    "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
]
_ZERO_NUMBERS = [
    "allgather_bucket_size",
    "reduce_bucket_size",
    "stage",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "zero_hpz_partition_size",
]
_ZERO_OBJECTS = [
    "leaf_module",
    "offload_optimizer",
    "offload_param",
    "zenflow",
]

# Key of zero_optimization -> what its value must be.
ZERO_KEYS: dict[str, str] = (
    dict.fromkeys(_ZERO_FLAGS, "true or false")
    | dict.fromkeys(_ZERO_NUMBERS, "a whole number")
    | dict.fromkeys(_ZERO_OBJECTS, "an object")
)

_BF16 = (
    "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
)
_FP16 = (
    "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads"
)
_PIPELINE = (
    "stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned "
    "use_reentrant"
)
_OFFLOAD_PARAM = "device nvme_path buffer_count buffer_size max_in_cpu pin_memory"
_OFFLOAD_OPTIMIZER = (
    "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
    "cpuadam_cores_perc"
)

# Keys of the objects inside; DeepSpeed ignores unknown ones in pipeline and data_types.
NESTED_KEYS: dict[str, frozenset[str]] = {
    "bf16": frozenset(_BF16.split()),
    "bfloat16": frozenset(_BF16.split()),
    "fp16": frozenset(_FP16.split()),
    "pipeline": frozenset(_PIPELINE.split()),
    "data_types": frozenset(["grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"]),
    "zero_optimization.offload_param": frozenset(_OFFLOAD_PARAM.split()),
    "zero_optimization.offload_optimizer": frozenset(_OFFLOAD_OPTIMIZER.split()),
}
