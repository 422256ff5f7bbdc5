"""Run as a script: Megatron-core's own models saved by its own dist_checkpointing, with their logits, on the CPU.

python tests/checkpoint/megatron_models.py FOLDER
"""

import argparse
import contextlib
import enum
import sys
from pathlib import Path

import torch
import torch.distributed as dist

COMMON = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "make_vocab_size_divisible_by": 32,
    "consumed_train_samples": 280,
    "num_experts": None,
}
SETTINGS = {
    "gpt": COMMON
    | {
        "vocab_size": 125,
        "padded_vocab_size": 128,
        "ffn_hidden_size": 128,
        "position_embedding_type": "learned_absolute",
        "bias_gelu_fusion": False,
        "untie_embeddings_and_output_weights": False,
        "num_query_groups": 1,  # the default, which means nothing without group_query_attention
        "bf16": True,
    },
    "llama": COMMON
    | {
        "vocab_size": None,
        "padded_vocab_size": 96,
        "ffn_hidden_size": 48,
        "kv_channels": 16,
        "group_query_attention": True,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "position_embedding_type": "rope",
        "rotary_base": 5000,
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": True,
    },
}


class Backend(enum.Enum):
    """A class of the system that saved, which the reader does not have."""

    AUTO = 1


def build(settings):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    swiglu, norm = settings.get("swiglu", False), settings.get("normalization", "LayerNorm")
    config = TransformerConfig(
        num_layers=settings["num_layers"],
        hidden_size=settings["hidden_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_query_groups=settings["num_query_groups"] if settings.get("group_query_attention") else None,
        kv_channels=settings.get("kv_channels"),
        ffn_hidden_size=settings["ffn_hidden_size"],
        use_cpu_initialization=True,
        gated_linear_unit=swiglu,
        activation_func=torch.nn.functional.silu if swiglu else torch.nn.functional.gelu,
        add_bias_linear=settings.get("add_bias_linear", True),
        normalization=norm,
        layernorm_epsilon=settings.get("norm_epsilon", 1e-5),
        qk_layernorm=settings.get("qk_layernorm", False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=norm, qk_layernorm=settings.get("qk_layernorm", False)),
        vocab_size=settings["padded_vocab_size"],
        max_sequence_length=settings["max_position_embeddings"],
        position_embedding_type=settings["position_embedding_type"],
        share_embeddings_and_output_weights=not settings["untie_embeddings_and_output_weights"],
        rotary_base=settings.get("rotary_base", 10000),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if "layernorm.weight" in name else 0))
    return model.eval()


def logits(model, ids):
    length = ids.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    with torch.no_grad():
        return model(ids, torch.arange(length).expand_as(ids), mask)


def save(model, settings, folder, metadata):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    state = dict(model.sharded_state_dict(metadata=metadata))
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor | ShardedTensorFactory)]
    optimizer = {}
    for number, part in enumerate(parts):
        for factor, kind in ((1.0, "fp32_param"), (2.0, "exp_avg"), (3.0, "exp_avg_sq")):
            # The weights themselves are rounded, as in training in bf16 with fp32 masters.
            optimizer[f"{kind}.{number}"] = make_sharded_optimizer_tensor(
                part, part.data.detach() * factor, prefix=f"optimizer.state.{kind}"
            )
    if settings.get("bf16"):
        for part in parts:
            part.data = part.data.bfloat16()
            if isinstance(part, ShardedTensor):
                part.dtype = torch.bfloat16
    common = {
        "args": argparse.Namespace(**settings, attention_backend=Backend.AUTO, params_dtype=torch.bfloat16),
        "iteration": 28,
        "checkpoint_version": 3.0,
        "optimizer": {"optimizer": {"param_groups": [{"step": 27, "lr": 1e-4}]}},
    }
    step = folder / "iter_0000028"
    step.mkdir(parents=True)
    dist_checkpointing.save({"model": state, "optimizer_state": optimizer, **common}, str(step))
    (folder / "latest_checkpointed_iteration.txt").write_text("28")


def main(folder):
    from megatron.core import parallel_state, tensor_parallel

    # What megatron-core calls on GPUs only, and asks of one in any case.
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    tensor_parallel.get_cuda_rng_tracker().fork = contextlib.nullcontext
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    layouts = {"gpt": None, "llama": {"non_homogeneous_layers": True, "singleton_local_shards": True}}
    for name, settings in SETTINGS.items():
        model = build(settings)
        ids = torch.randint(90, (2, 16))
        answers = {"ids": ids, "logits": logits(model, ids), "weights": dict(model.state_dict())}
        save(model, settings, folder / name, layouts[name])
        answers["weights"] = {k: v for k, v in answers["weights"].items() if isinstance(v, torch.Tensor)}
        torch.save(answers, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
