"""Hugging Face's models and ours compute the same, and conversions both ways lose nothing."""

import json
import os

import pytest
import safetensors.torch
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

from megatron_lite.checkpoint import CheckpointError, Piece, Reader, save  # noqa: E402
from megatron_lite.checkpoint.huggingface import (  # noqa: E402
    build_model,
    compare_logits,
    export_huggingface,
    from_huggingface,
    import_huggingface,
    rules,
    to_huggingface,
)
from megatron_lite.config import ModelConfig, build_config  # noqa: E402

VOCABULARY = 77  # padded to 128
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 48,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-gelu": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2-inner": ("GPT2", GPT2 | {"n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "llama": ("Llama", SMALL),
    "llama-gqa": ("Llama", SMALL | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "llama-mqa-wide-heads": ("Llama", SMALL | {"num_key_value_heads": 1, "head_dim": 16}),
    "llama-tied-biased": (
        "Llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ("Llama", SMALL | {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", SMALL | {"rope_parameters": YARN}),
    "llama-linear": ("Llama", SMALL | {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-named-ends": (
        "Mistral",
        SMALL | {"num_key_value_heads": 4, "sliding_window": None, "bos_token_id": 1, "eos_token_id": [2, 5]},
    ),
    "qwen2-untied": ("Qwen2", SMALL | {"num_key_value_heads": 4, "rope_parameters": YARN}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16}),
}


def make(name, folder, dtype=torch.float32):
    """A random transformers model, every parameter away from its initial value, saved in `folder`."""
    family, config = MODELS[name]
    model = getattr(transformers, f"{family}Config")(**config)
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(1)
    model = getattr(transformers, head)(model).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    return model


# What transformers keeps of its own in config.json, which says nothing about the model or means the same unsaid.
UNSAID = {
    "_name_or_path",
    "transformers_version",
    "n_ctx",
    "original_max_position_embeddings",
    "n_inner",
    "head_dim",
}


def settings(folder):
    """config.json as transformers reads it, and generation_config.json."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kept = {key: value for key, value in config.to_dict().items() if key not in UNSAID}
    kept |= {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    }
    if rope := kept.get("rope_parameters"):
        defaults = {"beta_fast": 32.0, "beta_slow": 1.0} if rope["rope_type"] == "yarn" else {}
        kept["rope_parameters"] = defaults | rope
    kept |= {"n_inner": getattr(config, "n_inner", None) or 4 * config.hidden_size}
    generation = transformers.GenerationConfig.from_pretrained(folder).to_dict()
    return type(config), kept, {key: value for key, value in generation.items() if key not in UNSAID}


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_and_a_round_trip_is_bitwise(tmp_path, name):
    theirs = make(name, tmp_path / "hf")
    step = import_huggingface(tmp_path / "hf", tmp_path / "run")
    with Reader(step) as reader:
        reader.verify()
        ours = build_model(reader)
        assert build_config(reader.metadata["config"]).model == ours.config, "any tool can start from it"
    assert {name for name, _ in ours.named_parameters()} == set(reader.names())
    ids = torch.randint(VOCABULARY, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, wanted = ours(ids), theirs(ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(mine[..., :VOCABULARY], wanted, rtol=1e-5, atol=1e-5)

    export_huggingface(step, tmp_path / "back")
    before = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    difference = compare_logits(step, tmp_path / "back")
    assert difference is not None and difference < 1e-5

    assert settings(tmp_path / "hf") == settings(tmp_path / "back")

    again = import_huggingface(tmp_path / "back", tmp_path / "again")
    with Reader(step) as one, Reader(again) as two:
        assert (
            one.metadata["config"]["model"] == two.metadata["config"]["model"] and one.names() == two.names()
        )
        assert all(torch.equal(one.read(key), two.read(key)) for key in one.names())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards_survive(tmp_path, dtype):
    theirs = make("llama-gqa", tmp_path / "hf", dtype)
    step = import_huggingface(tmp_path / "hf", tmp_path / "run")
    export_huggingface(step, tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert all(file.stat().st_size < 23_000 for file in (tmp_path / "back").glob("model-*.safetensors"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == dtype
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)
    again = import_huggingface(tmp_path / "back", tmp_path / "again")
    with Reader(step) as one, Reader(again) as two:
        assert all(torch.equal(one.read(key), two.read(key)) for key in one.names())


def test_what_transformers_divided_is_read(tmp_path):
    theirs = make("qwen3", tmp_path / "whole", torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    files = sorted((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    step = import_huggingface(tmp_path / "hf", tmp_path / "run")
    export_huggingface(step, tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(files[1].name, f"../{files[1].name}"))
    with pytest.raises(CheckpointError, match=r"names \"../model-.*, which is not in its folder"):
        import_huggingface(tmp_path / "hf", tmp_path / "run")
    index.write_text(index.read_text().replace("../", ""))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{files[1].name} cannot be read .*; download it again"):
        import_huggingface(tmp_path / "hf", tmp_path / "run")


def test_parts_of_one_parameter_in_different_types_become_the_wider(tmp_path):
    """Queries in bf16 beside keys and values in fp32, as merging models leaves them: nothing is rounded."""
    make("llama-gqa", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    step = import_huggingface(tmp_path / "hf", tmp_path / "run")
    export_huggingface(step, tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[key], tensor.float()) for key, tensor in tensors.items())


def ours_saved(folder, **changes):
    """A checkpoint of a model of ours, with random weights and nonzero vocabulary padding."""
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 32,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 32,
    }
    model = ModelConfig(**(values | changes))
    torch.manual_seed(2)
    held = [rule for rule in rules(model) if rule.held]
    pieces = [Piece.whole(rule.name, "weight", torch.randn(rule.shape) * 0.15) for rule in held]
    metadata = {"config": {"model": model.model_dump(mode="json")}}
    return model, save(folder, 5, pieces, metadata)


OURS = {
    "gpt2 without biases": {"add_bias_linear": False},
    "gpt2 with biases in qkv alone": {
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "activation": "gelu_tanh",
    },
    "llama without qkv biases": {"add_bias_linear": True, "add_qkv_bias": False},
    "llama with default ffn": {"add_bias_linear": False, "tie_embeddings": False},
}


@pytest.mark.parametrize("name", OURS)
def test_what_ours_lacks_is_exported_as_zeros(tmp_path, name):
    llama = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu"}
    model, step = ours_saved(tmp_path / "run", **(llama if "llama" in name else {}) | OURS[name])
    export_huggingface(step, tmp_path / "hf")
    assert compare_logits(step, tmp_path / "hf") < 1e-5
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == VOCABULARY == model.vocab_size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.get_input_embeddings().weight.shape == (VOCABULARY, 32)
    ids = torch.randint(VOCABULARY, (1, 8))
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_the_check_finds_a_wrong_export(tmp_path):
    _, step = ours_saved(tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["transformer.h.1.attn.c_attn.bias"] = tensors["transformer.h.1.attn.c_attn.bias"].flip(0)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the export is wrong: its logits differ by"):
        compare_logits(step, tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalization": "RMSNorm"}, "model.normalization is RMSNorm, and its GPT-2 models have LayerNorm"),
        ({"position_embedding": "none"}, "model.position_embedding is none"),
        ({"num_query_groups": 2}, "model.num_query_groups is 2"),
        ({"kv_channels": 16}, "model.kv_channels is 64, and .* 32"),
        ({"activation": "swiglu"}, "model.activation is swiglu"),
        (
            {"position_embedding": "rope"},
            "model.normalization is LayerNorm, and its Llama models have RMSNorm",
        ),
        (
            {
                "position_embedding": "rope",
                "normalization": "RMSNorm",
                "activation": "swiglu",
                "rotary_percent": 0.5,
            },
            "model.rotary_percent is 0.5",
        ),
    ],
)
def test_a_model_that_hugging_face_lacks_is_refused(changes, says):
    values = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 8, "vocab_size": 9}
    with pytest.raises(CheckpointError, match=says):
        to_huggingface(ModelConfig(**values, **changes), "float32")


LLAMA_JSON = {"model_type": "llama"} | SMALL


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not one of gpt2, llama"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is a mixture of experts, and only dense models"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is a mixture of experts"),
        (LLAMA_JSON | {"num_local_experts": 8}, "llama with experts is not supported"),
        (
            LLAMA_JSON | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config: gptq is quantized, which is not read; take the model it was made from",
        ),
        (LLAMA_JSON | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "that differ by layer"),
        ({"model_type": "gpt2"}, "'n_layer' is missing"),
        (LLAMA_JSON | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        (LLAMA_JSON | {"attention_bias": True}, "attention_bias True is not supported"),
        (LLAMA_JSON | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        (LLAMA_JSON | {"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor 2.0"),
        (LLAMA_JSON | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True} | GPT2, "scale_attn_by_inverse"),
        ({"model_type": "gpt2", "activation_function": "relu"} | GPT2, "activation_function 'relu'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not one of"),
        (LLAMA_JSON | {"num_experts": "8"}, "a value of another kind than it should be"),
        (LLAMA_JSON | {"rope_scaling": [1]}, "a value of another kind than it should be"),
        (LLAMA_JSON | {"rope_scaling": {"rope_type": ["yarn"]}}, "a value of another kind than it should be"),
        (LLAMA_JSON | {"rope_theta": "x"}, "a value of another kind than it should be .*float: 'x'"),
        (LLAMA_JSON | {"head_dim": None, "num_attention_heads": 0}, "of another kind .*by zero"),
        (
            LLAMA_JSON | {"num_hidden_layers": "2"},
            "makes no model of ours: num_layers: Input should be a valid int",
        ),
        (LLAMA_JSON | {"rms_norm_eps": None}, "makes no model of ours: norm_epsilon: "),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(config, says):
    with pytest.raises(CheckpointError, match=says):
        from_huggingface(config)


def test_configs_as_the_hub_has_them():
    llama31 = LLAMA_JSON | {
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        "num_key_value_heads": 2,
        "torch_dtype": "bfloat16",
    }
    model = from_huggingface(llama31)
    assert model.rotary_base == 500000.0 and model.rotary_scaling.type == "llama3"
    assert model.rotary_scaling.original_max_position_embeddings == 16 and not model.tie_embeddings
    qwen2 = SMALL | {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}
    assert from_huggingface(qwen2).max_positions == 96 and from_huggingface(qwen2).qkv_bias
    assert from_huggingface(GPT2 | {"model_type": "gpt2"}).tie_embeddings


def test_a_sliding_window_limits_the_context(caplog):
    model = from_huggingface(SMALL | {"model_type": "mistral", "sliding_window": 32})
    assert model.max_positions == model.seq_length == 32
    assert "slides over a window of 32 tokens" in caplog.text


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_the_window_is_as_many_tokens_as_are_imported(tmp_path, family, caplog, monkeypatch):
    """The same logits for as long as nothing has left the window, and not for one token more."""
    more = {} if family == "Mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    monkeypatch.setitem(
        MODELS, "window", (family, SMALL | {"num_key_value_heads": 4, "sliding_window": 24} | more)
    )
    theirs = make("window", tmp_path / "hf")
    with Reader(import_huggingface(tmp_path / "hf", tmp_path / "run")) as reader:
        ours = build_model(reader)
    assert ours.config.max_positions == 24 and "slides over a window of 24 tokens" in caplog.text
    ids = torch.randint(VOCABULARY, (3, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, wanted = ours(ids)[..., :VOCABULARY], theirs(ids).logits
    torch.testing.assert_close(mine[:, :24], wanted[:, :24], rtol=1e-5, atol=1e-5)
    assert (mine[:, 24] - wanted[:, 24]).abs().max() > 1e-3


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def test_folders_that_do_not_fit_are_refused_and_old_forms_are_read(tmp_path):
    make("gpt2", tmp_path / "hf")
    run = tmp_path / "run"

    def as_on_the_hub(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)

    edit(tmp_path / "hf", as_on_the_hub)
    with Reader(import_huggingface(tmp_path / "hf", run)) as reader:
        assert reader.shape("embed.weight") == (128, 32)
        assert not reader.read("embed.weight")[VOCABULARY:].any()

    edit(tmp_path / "hf", lambda t: t.update(extra=torch.ones(1)))
    with pytest.raises(CheckpointError, match="no parameter of ours is extra"):
        import_huggingface(tmp_path / "hf", run)
    edit(tmp_path / "hf", lambda t: (t.pop("extra"), t.update({"wpe.weight": torch.ones(47, 32)})))
    with pytest.raises(CheckpointError, match=r"transformer.wpe.weight is \(47, 32\), .* says \(48, 32\)"):
        import_huggingface(tmp_path / "hf", run)
    edit(tmp_path / "hf", lambda t: t.update({"wpe.weight": torch.ones(48, 32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"wpe.weight is torch.int8: quantized weights are not read"):
        import_huggingface(tmp_path / "hf", run)
    edit(tmp_path / "hf", lambda t: t.pop("wpe.weight"))
    with pytest.raises(CheckpointError, match=r"tensor transformer.wpe.weight is missing"):
        import_huggingface(tmp_path / "hf", run)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"consolidated.safetensors is another layout"):
        import_huggingface(tmp_path / "hf", run)
    (tmp_path / "hf" / "consolidated.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled .bin files are not read"):
        import_huggingface(tmp_path / "hf", run)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        import_huggingface(tmp_path / "nothing", run)


def test_an_export_does_not_overwrite(tmp_path):
    _, step = ours_saved(tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="holds safetensors files already"):
        export_huggingface(step, tmp_path / "hf")
