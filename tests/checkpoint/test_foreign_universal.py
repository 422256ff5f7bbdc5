"""DeepSpeed's universal checkpoints of Megatron-DeepSpeed's models."""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import KINDS, CheckpointError, Reader
from megatron_lite.checkpoint.foreign import find_foreign, import_foreign
from megatron_lite.checkpoint.foreign.names import ours
from megatron_lite.config import ModelConfig
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.parameter import spec_of

GPT2 = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "vocab_size": 50,
    "make_vocab_size_divisible_by": 32,
    "add_bias_linear": True,
    "normalization": "layernorm",
    "layernorm_epsilon": 1e-5,
    "consumed_train_samples": 400,
    "consumed_train_tokens": 3000,
}
LLAMA = GPT2 | {
    "normalization": "rmsnorm",
    "use_rotary_position_embeddings": True,
    "add_bias_linear": False,
    "swiglu": True,
    "num_key_value_heads": 2,
    "untie_embeddings_and_output_weights": True,
}
OURS = {
    "gpt2": ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        seq_length=8,
        vocab_size=50,
        make_vocab_size_divisible_by=32,
        activation="gelu_tanh",
    ),
    "llama": ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        seq_length=8,
        vocab_size=50,
        make_vocab_size_divisible_by=32,
        activation="swiglu",
        normalization="RMSNorm",
        position_embedding="rope",
        add_bias_linear=False,
        tie_embeddings=False,
    ),
}
ARGS = {"gpt2": GPT2, "llama": LLAMA}
BLOCK = {
    "attention.linear_qkv": "self_attention.query_key_value",
    "attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def module_name(name):
    """In a model that is one module."""
    for mine, theirs in BLOCK.items():
        name = name.replace(mine, theirs)
    name = name.replace("blocks.", "language_model.encoder.layers.").replace(
        "head.", "language_model.output_layer."
    )
    if name.startswith("norm."):
        return f"language_model.encoder.final_layer{name}"
    name = name.replace("embed.", "language_model.embedding.word_embeddings.")
    return name.replace("position.", "language_model.embedding.position_embeddings.")


def pipeline_name(name, tied):
    """In a pipeline module: after a cast and the embedding the blocks begin at 2."""
    for mine, theirs in BLOCK.items():
        name = name.replace(mine, theirs)
    place = "tied_modules.embed" if tied else "1"
    name = name.replace("embed.", f"{place}.word_embeddings.", 1).replace(
        "position.", f"{place}.position_embeddings."
    )
    if name.startswith("norm."):
        return name.replace("norm.", "4.")
    if name.startswith("blocks."):
        _, layer, rest = name.split(".", 2)
        return f"{int(layer) + 2}.{rest}"
    return name.replace("head.", "5.lm_head.")


def state_of(model):
    torch.manual_seed(0)
    specs = [
        spec_of(parameter) for parameter in GPT(model, Runtime(device=torch.device("meta"))).parameters()
    ]
    return {(kind, spec.name): torch.randn(spec.global_shape) for spec in specs for kind in KINDS}


def write(folder, state, rename, args, *, flat=False, vocabulary=50, version=3.0, halves=False):
    for (kind, name), value in state.items():
        if name in ("embed.weight", "head.weight"):
            value = value[:vocabulary]
        if "fc1" in name and value.dim() == (3 if name.endswith("weight") else 2):
            value = value.flatten(0, 1)  # gate and up are rows of one matrix there
        path = folder / "zero" / rename(name)
        path.mkdir(parents=True, exist_ok=True)
        entry = {"param": value.clone(), "cat_dim": 0} | ({"param_n_sub_params": 2} if halves else {})
        torch.save(value.reshape(-1) if flat else entry, path / f"{'fp32' if kind == 'weight' else kind}.pt")
    states = {
        "args": argparse.Namespace(**args),
        "iteration": 40,
        "checkpoint_version": version,
        "module": {"unused": torch.ones(3)},
    }
    torch.save(states, folder / f"{'zero_pp_rank_0_' if flat else ''}mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize(
    ("style", "pipeline", "flat"), list(itertools.product(ARGS, (False, True), (False, True)))
)
def test_parameters_and_moments_come_in(tmp_path, style, pipeline, flat):
    model = OURS[style]
    state = state_of(model)

    def rename(name):
        return pipeline_name(name, model.tie_embeddings) if pipeline else module_name(name)

    folder = write(tmp_path / "run" / "global_step40_universal", state, rename, ARGS[style], flat=flat)
    (tmp_path / "run" / "latest_universal").write_text("global_step40_universal")
    source = find_foreign(tmp_path / "run")
    assert source == folder == find_foreign(folder)
    imported = import_foreign(source, tmp_path / "target")
    assert imported.lost is None and imported.step == 40
    same = imported.model.model_dump() | {"ffn_hidden_size": 64, "kv_channels": None, "add_qkv_bias": None}
    wanted = model.model_dump() | {"ffn_hidden_size": 64}
    if style == "gpt2":
        same["num_query_groups"] = None
    assert same | {"max_position_embeddings": None} == wanted
    with Reader(imported.folder) as reader:
        progress = {"step": 40, "consumed_samples": 400, "consumed_tokens": 3000, "data": None}
        assert reader.metadata["progress"] == progress
        for (kind, name), value in state.items():
            found = reader.read(name, kind)
            rows = 50 if name in ("embed.weight", "head.weight") else None
            assert torch.equal(found[:rows], value[:rows]) and (rows is None or not found[rows:].any())


@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
def test_order_of_queries_keys_and_values(tmp_path, version):
    """Rows numbered by (head, query or key or value, channel), laid out as each version did."""
    state = state_of(OURS["gpt2"])
    name = "blocks.0.attention.linear_qkv.bias"
    ordered = torch.arange(48.0).view(4, 3, 4)
    theirs = {0.0: ordered.transpose(0, 1), 1.0: ordered.transpose(1, 2)}.get(version, ordered)
    shuffled = state | {("weight", name): theirs.reshape(-1)}
    source = write(tmp_path / "source", shuffled, module_name, GPT2, version=version)
    imported = import_foreign(source, tmp_path / "target")
    with Reader(imported.folder) as reader:
        assert torch.equal(reader.read(name), ordered.reshape(-1))


def test_rows_of_gate_and_up_that_were_mixed(tmp_path):
    state = state_of(OURS["llama"])
    two = LLAMA | {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    source = write(tmp_path / "mixed", state, module_name, two)
    with pytest.raises(CheckpointError, match=r"of 2 tensor-parallel ranks was not merged as gate and up"):
        import_foreign(source, tmp_path / "target")
    source = write(tmp_path / "halves", state, module_name, two, halves=True)
    assert import_foreign(source, tmp_path / "target").step == 40


def test_missing_moments_leave_weights(tmp_path):
    source = write(tmp_path / "source", state_of(OURS["gpt2"]), module_name, GPT2)
    (source / "zero" / module_name("norm.bias") / "exp_avg_sq.pt").unlink()
    imported = import_foreign(source, tmp_path / "target")
    assert "exp_avg_sq of" in imported.lost
    with Reader(imported.folder) as reader:
        assert reader.kinds == ["weight"] and reader.step == 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What DeepSpeed itself trained, saved and made universal."""
    folder, root = tmp_path_factory.mktemp("deepspeed"), Path(__file__).parents[2]
    command = [sys.executable, str(root / "tests" / "checkpoint" / "universal_models.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize("stage", [1, 3])
def test_what_deepspeed_converted(trained, tmp_path, stage):
    folder = trained / f"zero{stage}"
    imported = import_foreign(find_foreign(folder), tmp_path)
    assert imported.lost is None and imported.step == 2
    answers = torch.load(folder / "answers.pt")
    theirs = ours({name for _, name in answers})
    with Reader(imported.folder) as reader:
        assert reader.metadata["engine"]["optimizer_steps"] == 2 and len(reader.names()) == 16
        for (kind, name), value in answers.items():
            mine = next(key for key, found in theirs.items() if found == name)
            assert torch.equal(reader.read(mine, kind).flatten(), value.flatten()), (kind, name)
    with pytest.raises(CheckpointError, match="holds checkpoints in DeepSpeed's own format"):
        (folder / "latest_universal").rename(folder / "moved")
        find_foreign(folder)
    (folder / "moved").rename(folder / "latest_universal")
    with pytest.raises(CheckpointError, match=r"is in DeepSpeed's own format.*ds_to_universal"):
        find_foreign(folder / "native")


class Harmful:
    def __init__(self, where):
        self.where = str(where)

    def __reduce__(self):
        return os.mkdir, (self.where,)


def test_no_pickled_code_runs(tmp_path):
    source = write(tmp_path / "source", state_of(OURS["gpt2"]), module_name, GPT2)
    path = source / "zero" / module_name("norm.bias") / "fp32.pt"
    torch.save({"param": torch.ones(16), "more": Harmful(tmp_path / "hit")}, path)
    with pytest.raises(CheckpointError, match=r"fp32.pt cannot be read as tensors"):
        import_foreign(source, tmp_path / "target")
    torch.save({"more": 1}, path)
    with pytest.raises(CheckpointError, match=r"fp32.pt holds no tensor"):
        import_foreign(source, tmp_path / "target")
    assert not (tmp_path / "hit").exists()


def test_a_folder_without_parameters(tmp_path):
    (tmp_path / "zero").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no \*/fp32.pt"):
        import_foreign(find_foreign(tmp_path), tmp_path / "target")
