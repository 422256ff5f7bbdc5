"""Megatron-LM's torch_dist checkpoints: Megatron-core's own models come in and compute the same."""

import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_lite.checkpoint import KINDS, CheckpointError, Reader
from megatron_lite.checkpoint.foreign import find_foreign, import_foreign, names
from megatron_lite.checkpoint.foreign.arguments import model_of
from megatron_lite.checkpoint.foreign.pickles import Opaque, read_pickle, read_saved
from megatron_lite.checkpoint.foreign.torch_dist import TorchDist, _unflatten
from megatron_lite.checkpoint.huggingface import build_model
from megatron_lite.config import build_config
from tests.checkpoint.megatron_models import SETTINGS
from tests.checkpoint.torch_dist import PLAIN, ROWS, SHAPES, plain, write_torch_dist


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Folders of Megatron-core's own making, "gpt" (stacked layers) and "llama", and NAME.pt with the answers."""
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("megatron")
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    script = str(root / "tests" / "checkpoint" / "megatron_models.py")
    run = subprocess.run(
        [sys.executable, script, str(folder)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_megatron_core_models_compute_the_same(megatron, tmp_path, name):
    source = find_foreign(megatron / name)
    assert source == megatron / name / "iter_0000028"
    imported = import_foreign(source, tmp_path)
    answers = torch.load(megatron / f"{name}.pt")
    assert imported.lost is None and imported.step == 28
    with Reader(imported.folder) as reader:
        reader.verify()
        assert reader.kinds == list(KINDS)
        assert reader.metadata["engine"]["optimizer_steps"] == 27
        progress = {"step": 28, "consumed_samples": 280, "consumed_tokens": 280 * 16, "data": None}
        assert reader.metadata["progress"] == progress
        with torch.no_grad():
            found = build_model(reader)(answers["ids"])
        assert (found - answers["logits"]).abs().max() < 4e-6 * answers["logits"].abs().max()
        for parameter in reader.names():
            master = reader.read(parameter)
            assert master.dtype == torch.float32
            assert torch.equal(reader.read(parameter, "exp_avg"), master * 2)
            assert torch.equal(reader.read(parameter, "exp_avg_sq"), master * 3)


def test_weights_only_keeps_their_type(megatron, tmp_path):
    imported = import_foreign(find_foreign(megatron / "gpt"), tmp_path, weights_only=True)
    answers = torch.load(megatron / "gpt.pt")["weights"]
    with Reader(imported.folder) as reader:
        assert reader.kinds == ["weight"] and reader.dtype("embed.weight") == torch.bfloat16
        found = reader.read("blocks.1.attention.linear_qkv.weight")
        assert torch.equal(found, answers["decoder.layers.1.self_attention.linear_qkv.weight"].bfloat16())
        assert reader.metadata["config"]["train"]["precision"] == "bf16"


@pytest.mark.parametrize("rows", [21, 22, 24, 40])
def test_padding_of_the_vocabulary(tmp_path, rows):
    tensors = plain(rows)
    imported = import_foreign(write_torch_dist(tmp_path / "source", tensors, PLAIN), tmp_path / "target")
    assert imported.lost == (
        "exp_avg of decoder.final_layernorm.weight (8 of 8 parameters) is not there as a tensor of its own"
    )
    with Reader(imported.folder) as reader:
        found, source = reader.read("embed.weight"), tensors["embedding.word_embeddings.weight"]
        assert imported.model.vocab_size == 21 and found.shape == (24, 8)
        assert torch.equal(found[:rows], source[:24]) and not found[rows:].any()


def test_a_vocabulary_that_the_settings_leave_open(tmp_path):
    imported = import_foreign(
        write_torch_dist(tmp_path / "source", plain(), PLAIN | {"vocab_size": None}), tmp_path / "target"
    )
    assert imported.model.vocab_size == ROWS


def with_args(**changed):
    return PLAIN | changed


@pytest.mark.parametrize(
    ("change", "args", "says"),
    [
        (
            lambda t: t.pop("decoder.final_layernorm.weight"),
            PLAIN,
            r"norm.weight is missing \(1 parameters\)",
        ),
        (
            lambda t: t.update({"decoder.layers.0.mlp.router.weight": torch.ones(2)}),
            PLAIN,
            "no parameter of ours is d",
        ),
        (
            lambda t: t.update({"output_layer.bias": torch.ones(2)}),
            PLAIN,
            "no parameter of ours is output_layer.bias",
        ),
        (
            lambda t: t.update({"decoder.layers.0.mlp.linear_fc2.bias": torch.ones(8)}),
            PLAIN,
            "make a model without decoder.layers.0.mlp.linear_fc2.bias",
        ),
        (
            lambda t: t.update({"decoder.layers.0.mlp.linear_fc2.weight": torch.ones(12, 8)}),
            PLAIN,
            r"linear_fc2.weight is \(12, 8\), its settings say \(8, 12\)",
        ),
        (
            lambda t: t.update({"decoder.layers.0.input_layernorm.weight": torch.ones(8)}),
            PLAIN,
            "are both blocks.0.input_layernorm.weight",
        ),
        (lambda t: None, with_args(vocab_size=30), None),
        (lambda t: None, with_args(num_experts=8), "num_experts is 8, which is not supported"),
        (lambda t: None, with_args(apply_layernorm_1p=True), "apply_layernorm_1p is True"),
        (
            lambda t: None,
            with_args(position_embedding_type="yarn"),
            "position_embedding_type yarn is not supported",
        ),
        (lambda t: None, None, "does not say how its model is made; give that with --config"),
        (lambda t: None, {"hidden_size": 8}, "settings do not say 'num_attention_heads'"),
    ],
)
def test_what_is_not_a_model_of_ours_is_refused(tmp_path, change, args, says):
    tensors = plain()
    change(tensors)
    source = write_torch_dist(tmp_path / "source", tensors, args)
    if says is None:
        assert import_foreign(source, tmp_path / "target").model.vocab_size == ROWS, "more tokens than rows"
        return
    with pytest.raises(CheckpointError, match=says):
        import_foreign(source, tmp_path / "target")
    assert not (tmp_path / "target").exists(), "refused before anything was written"


def test_damage_is_named(tmp_path):
    source = write_torch_dist(tmp_path / "source", plain(), PLAIN)
    (file,) = source.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp (cannot be read as tensors|: what is at)"):
        import_foreign(source, tmp_path / "target")
    assert not (tmp_path / "target" / "checkpoints").exists()
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        import_foreign(source, tmp_path / "target")
    (source / ".metadata").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(CheckpointError, match=r".metadata cannot be read"):
        import_foreign(source, tmp_path / "target")
    (source / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="is no table of contents"):
        import_foreign(source, tmp_path / "target")


class Harmful:
    def __reduce__(self):
        return os.mkdir, (self.where,)

    def __init__(self, where):
        self.where = str(where)


def test_no_pickled_code_runs(tmp_path):
    (tmp_path / "bare").write_bytes(pickle.dumps([Harmful(tmp_path / "hit"), 7]))
    opaque, seven = read_pickle(tmp_path / "bare")
    assert isinstance(opaque, Opaque) and opaque.arguments == (str(tmp_path / "hit"),) and seven == 7
    torch.save({"args": Harmful(tmp_path / "hit"), "iteration": 3, "t": torch.ones(2)}, tmp_path / "saved.pt")
    assert read_saved(tmp_path / "saved.pt")["iteration"] == 3
    source = write_torch_dist(tmp_path / "source", plain(), PLAIN)
    place = next(iter(pickle.loads((source / ".metadata").read_bytes()).storage_data.values()))
    (file,) = source.glob("*.distcp")
    payload = io.BytesIO()
    torch.save(Harmful(tmp_path / "hit"), payload)
    data = bytearray(file.read_bytes())
    padded = payload.getvalue()
    assert len(padded) <= place.length or len(padded) <= len(data)
    data[place.offset : place.offset + len(padded)] = padded
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        import_foreign(source, tmp_path / "target")
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_damaged_pickles_are_read_or_refused(tmp_path, file):
    path = write_torch_dist(tmp_path / "source", plain(), PLAIN) / file
    good, draw = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 3))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            names.ours(TorchDist(path.parent).names())
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_files_of_other_folders_are_not_read(tmp_path):
    source = write_torch_dist(tmp_path / "source", plain(), PLAIN)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere.distcp"
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="which is not in its folder; do not load it"):
        TorchDist(source)


def test_a_chunk_that_is_not_there(tmp_path):
    source = write_torch_dist(tmp_path / "source", plain(), PLAIN)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"decoder.final_layernorm.weight has 0 of its 8 elements"):
        import_foreign(source, tmp_path / "target")


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
    source = write_torch_dist(tmp_path / "source", plain())
    train = {"micro_batch_size": 1, "global_batch_size": 1, "steps": 1, "output_dir": "x"}
    model = model_of(PLAIN, ROWS).model_dump(mode="json") | {"vocab_size": ROWS + 1}
    tree = {"model": model, "train": train, "optimizer": {"lr": 0.1, "schedule": "constant"}}
    with pytest.raises(
        CheckpointError, match=r"word_embeddings.weight is \(24, 8\), its settings say \(32, 8\)"
    ):
        import_foreign(source, tmp_path / "target", config=build_config(tree))


def test_shards_along_any_dimension(tmp_path):
    """As two tensor-parallel and two pipeline ranks would leave a row-parallel weight: a grid of chunks."""
    tensors, name = plain(), "decoder.layers.0.mlp.linear_fc2.weight"
    source = write_torch_dist(tmp_path / "source", tensors, PLAIN)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    entry, (whole,) = metadata.state_dict_metadata[name], metadata.state_dict_metadata[name].chunks
    place = metadata.storage_data.pop(MetadataIndex(name, whole.offsets))
    entry.chunks.clear()
    data = b""
    for top, left in ((4, 6), (0, 0), (4, 0), (0, 6)):
        saved = io.BytesIO()
        torch.save(tensors[name][top : top + 4, left : left + 6].clone(), saved)
        entry.chunks.append(type(whole)(torch.Size((top, left)), torch.Size((4, 6))))
        index = MetadataIndex(name, torch.Size((top, left)))
        metadata.storage_data[index] = type(place)("__1_0.distcp", len(data), len(saved.getvalue()))
        data += saved.getvalue()
    (source / "__1_0.distcp").write_bytes(data)
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    imported = import_foreign(source, tmp_path / "target")
    with Reader(imported.folder) as reader:
        assert torch.equal(reader.read("blocks.0.mlp.linear_fc2.weight"), tensors[name])


def test_flattened_states_of_old_releases():
    """[X/x, Y/y, x*y], as Megatron-core before 0.14 has them for [X, Y] in chunks of [x, y]."""
    whole = torch.arange(24).view(4, 6)
    flat = torch.stack(
        [torch.stack([part.reshape(-1) for part in row.chunk(3, 1)]) for row in whole.chunk(2, 0)]
    )
    assert flat.shape == (2, 3, 4)
    assert torch.equal(_unflatten(flat, (4, 6)), whole)
    assert torch.equal(_unflatten(torch.arange(6).view(2, 3), (6,)), torch.arange(6))
    with pytest.raises(CheckpointError, match="is not one of a parameter"):
        _unflatten(flat, (24,))


@pytest.mark.parametrize(
    ("changed", "key", "value"),
    [
        ({"num_query_groups": 1}, "query_groups", 2),
        ({"num_query_groups": 1, "group_query_attention": True}, "query_groups", 1),
        ({"num_key_value_heads": 1}, "query_groups", 1),
        ({"swiglu": False, "add_bias_linear": True}, "activation", "gelu_tanh"),
        ({"swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": False}, "activation", "gelu"),
        ({"swiglu": False}, "activation", "gelu"),
        ({"swiglu": False, "openai_gelu": True}, "activation", "gelu_tanh"),
        ({"add_qkv_bias": True}, "qkv_bias", True),
        ({"normalization": "layernorm"}, "normalization", "LayerNorm"),
        ({"rope_theta": 500.0}, "rotary_base", 500.0),
        ({"position_embedding_type": None}, "position_embedding", "learned_absolute"),
        (
            {"position_embedding_type": None, "use_rotary_position_embeddings": True},
            "position_embedding",
            "rope",
        ),
        ({"position_embedding_type": None, "add_position_embedding": False}, "position_embedding", "none"),
        ({"untie_embeddings_and_output_weights": True}, "tie_embeddings", False),
        ({"num_experts": [1]}, "vocab_size", 21),
    ],
)
def test_settings(changed, key, value):
    assert getattr(model_of(PLAIN | changed, ROWS), key) == value


def test_scaled_rotary_positions():
    assert model_of(PLAIN, ROWS).rotary_scaling is None
    scaling = model_of(PLAIN | {"use_rope_scaling": True, "rope_scaling_factor": 4.0}, ROWS).rotary_scaling
    assert (scaling.type, scaling.factor, scaling.original_max_position_embeddings) == ("llama3", 4.0, 8192)
    scaling = model_of(PLAIN | {"rotary_seq_len_interpolation_factor": 2}, ROWS).rotary_scaling
    assert (scaling.type, scaling.factor) == ("linear", 2.0)


def test_prefixes_of_wrapped_models():
    wrapped = [f"model.{name}" for name in SHAPES]
    assert names.ours(wrapped).keys() == names.ours(SHAPES).keys()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("mp_rank_00/model_optim_rng.pt", "old format.*save it with --ckpt-format torch_dist"),
        ("decoder.final_layernorm.weight/.zarray", "zarr format"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed's own format.*ds_to_universal"),
        ("global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed's own format.*ds_to_universal"),
    ],
)
def test_formats_that_are_refused_with_a_reason(tmp_path, file, says):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=says):
        find_foreign(tmp_path)


def test_nothing_there(tmp_path):
    assert find_foreign(tmp_path) is None and find_foreign(tmp_path / "none") is None
