"""Checkpoints of a small model under Megatron-core's names, written by torch.distributed.checkpoint itself."""

import argparse
import warnings

import torch
import torch.distributed.checkpoint as dcp

ROWS = 24
PLAIN = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "seq_length": 6,
    "vocab_size": 21,
    "make_vocab_size_divisible_by": 8,
    "swiglu": True,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "ffn_hidden_size": 12,
}
SHAPES = {
    "embedding.word_embeddings.weight": (ROWS, 8),
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (8,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (24, 8),
    "decoder.layers.0.self_attention.linear_proj.weight": (8, 8),
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (8,),
    "decoder.layers.0.mlp.linear_fc1.weight": (24, 8),
    "decoder.layers.0.mlp.linear_fc2.weight": (8, 12),
    "decoder.final_layernorm.weight": (8,),
}


def write_torch_dist(folder, tensors, args=None):
    """A checkpoint written by torch.distributed.checkpoint itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    if args is not None:
        torch.save({"args": argparse.Namespace(**args), "iteration": 3}, folder / "common.pt")
    return folder


def plain(rows=ROWS):
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tensors["embedding.word_embeddings.weight"] = torch.randn(rows, 8)
    return tensors
