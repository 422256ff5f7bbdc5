"""Run as a script: DeepSpeed trains a model under Megatron-DeepSpeed's names, saves, and makes that universal.

    python tests/checkpoint/universal_models.py FOLDER

Leaves FOLDER/zero1 and FOLDER/zero3, each with `universal` and `answers.pt`: {(kind, name): tensor}.
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

SETTINGS = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "ffn_hidden_size": 32,
    "seq_length": 4,
    "max_position_embeddings": 4,
    "vocab_size": 21,
    "make_vocab_size_divisible_by": 8,
    "tensor_model_parallel_size": 1,
    "normalization": "layernorm",
}
STEPS = 2


def build():
    """The parameters of a GPT of Megatron-DeepSpeed, in modules of the same names; what it computes is no matter."""
    layer = nn.Module()
    layer.input_layernorm, layer.post_attention_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)
    layer.self_attention, layer.mlp = nn.Module(), nn.Module()
    layer.self_attention.query_key_value, layer.self_attention.dense = nn.Linear(8, 24), nn.Linear(8, 8)
    layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h = nn.Linear(8, 32), nn.Linear(32, 8)
    language = nn.Module()
    language.embedding, language.encoder = nn.Module(), nn.Module()
    language.embedding.word_embeddings = nn.Embedding(24, 8)
    language.embedding.position_embeddings = nn.Embedding(4, 8)
    language.encoder.layers = nn.ModuleList([layer])
    language.encoder.final_layernorm = nn.LayerNorm(8)
    return Model(language)


class Model(nn.Module):
    def __init__(self, language):
        super().__init__()
        self.language_model = language

    def forward(self, tokens):
        part = self.language_model
        layer = part.encoder.layers[0]
        hidden = part.embedding.word_embeddings(tokens) + part.embedding.position_embeddings(torch.arange(4))
        hidden = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attention.dense(layer.self_attention.query_key_value(hidden)[..., :8])
        hidden = layer.mlp.dense_4h_to_h(layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(hidden)))
        return part.encoder.final_layernorm(hidden).square().mean()


def train(folder, stage):
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    for _ in range(STEPS):
        engine.backward(engine(torch.randint(21, (2, 4))))
        engine.step()
    state = {
        "args": argparse.Namespace(**SETTINGS),
        "iteration": STEPS,
        "checkpoint_version": 3.0,
        "universal_checkpoint_info": {},
    }
    engine.save_checkpoint(str(folder), tag="native", client_state=state)
    answers = {}
    for name, parameter in model.named_parameters():
        answers["weight", name] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            answers[kind, name] = safe_get_full_optimizer_state(parameter, kind).clone()
    torch.save(answers, folder / "answers.pt")
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / "native"),
            output_folder=str(folder / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=False,
            inject_missing_state=False,
        )
    )


if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for stage in (1, 3):
        train(Path(sys.argv[1]) / f"zero{stage}", stage)
