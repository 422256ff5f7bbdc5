"""What vLLM and llama.cpp read of a model folder, by their documentation and, where it is silent, their code.

vLLM: docs/design/huggingface_integration.md and docs/models/supported_models.md of release 0.18. llama.cpp:
docs/development/HOWTO-add-model.md ("convert the model to GGUF": configuration, tokenizer, tensor names and data) and
convert_hf_to_gguf.py with gguf-py of 2025. Neither is run here.
"""

import json
import re

import pytest
import safetensors
import torch

from megatron_lite.checkpoint.huggingface import export_huggingface
from tests.checkpoint.huggingface_models import OURS, ours, transformers

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# gguf-py/gguf/tensor_mapping.py: the names, without ".weight" and ".bias", that have a place in GGUF.
LLAMA_NAMES = (
    r"model\.embed_tokens|model\.norm|lm_head|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm|"
    r"self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj)"
)
GPT2_NAMES = (
    r"transformer\.(wte|wpe|ln_f)|lm_head|transformer\.h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))"
)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=OURS)
def folder(request, tmp_path_factory):
    """An export of every family, in several files."""
    path = tmp_path_factory.mktemp(request.param)
    _, step = ours(request.param, path / "run")
    export_huggingface(step, path / "hf", shard_bytes=30_000, dtype=torch.bfloat16)
    return path / "hf"


@pytest.fixture
def config(folder):
    return read(folder / "config.json")


def test_vllm_finds_the_model_class(folder, config):
    """huggingface_integration, 1 to 5: config.json in the folder; `model_type` names transformers' configuration,
    without `auto_map` (it would need --trust-remote-code); `architectures` names a class of supported_models."""
    assert config["architectures"] == [ARCHITECTURES[config["model_type"]]] and "auto_map" not in config
    assert type(transformers.AutoConfig.from_pretrained(folder)).model_type == config["model_type"]


def test_vllm_patches_the_rotary_embedding(config):
    """huggingface_integration, 4 (`patch_rope_parameters`): with transformers 4 it takes `rope_theta` and
    `rope_scaling`, which has a `rope_type`, and refuses it where a legacy `type` says otherwise."""
    if config["model_type"] == "gpt2":
        return
    assert config["rope_theta"] == 10000.0
    scaling = config["rope_scaling"]
    assert scaling is None or (scaling["rope_type"] == "llama3" and "type" not in scaling)


def test_vllm_loads_the_weights(folder, config):
    """huggingface_integration, "Model weight", and `filter_duplicate_safetensors_files`: *.safetensors, of which the
    index names those that count. None is left out, no tensor is there twice, and none is pickled."""
    index = read(folder / "model.safetensors.index.json")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    size = 0
    held = []
    for file in files:
        with safetensors.safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}, "transformers 4 refuses a file that does not say it"
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_tensor(name)
                held.append(name)
                size += tensor.nbytes
                assert index["weight_map"][name] == file
                assert str(tensor.dtype) == "torch." + config["torch_dtype"]
    assert sorted(held) == sorted(index["weight_map"]) and index["metadata"]["total_size"] == size


def test_vllm_and_llama_cpp_make_the_tied_head(folder, config):
    """Both take the embedding for the head where `tie_word_embeddings` is true (vLLM skips `lm_head.` then; llama.cpp
    does where there is no `output.weight`)."""
    names = read(folder / "model.safetensors.index.json")["weight_map"]
    assert ("lm_head.weight" in names) != config["tie_word_embeddings"]


def test_vllm_takes_no_sampling_from_the_folder(folder):
    """generative_models.md: generation_config.json gives the default sampling parameters. We have none to recommend; it
    names the ends of a text."""
    assert read(folder / "generation_config.json") == {"bos_token_id": 256, "eos_token_id": 256}


def test_vllm_loads_the_tokenizer(folder):
    """huggingface_integration, "Tokenizer": AutoTokenizer.from_pretrained on the folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("naïve <x>").input_ids) == "naïve <x>"
    assert tokenizer.eos_token == "<|endoftext|>"


def test_vllm_refuses_gpt2_that_scales_attention_otherwise(folder):
    """models/gpt2.py asserts three switches of GPT2Config to be off."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for key in ("add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        assert not getattr(config, key, False)


def test_no_window_is_read_into_the_models_that_have_one(folder, config):
    """MistralConfig takes 4096 where `sliding_window` is not there, and vLLM slides over what it finds."""
    if config["model_type"] in ("qwen2", "qwen3"):
        assert config["sliding_window"] is None and config["use_sliding_window"] is False
    assert getattr(transformers.AutoConfig.from_pretrained(folder), "sliding_window", None) is None


def test_mistral_says_that_it_has_no_window(tmp_path):
    _, step = ours("llama-gqa", tmp_path / "run")
    exported = export_huggingface(step, tmp_path / "hf", family="mistral")
    assert (
        exported.config["architectures"] == ["MistralForCausalLM"]
        and exported.config["sliding_window"] is None
    )
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").sliding_window is None


def test_llama_cpp_finds_the_files(folder):
    """`get_model_part_names` takes "model*.safetensors"; `index_tensors` wants each tensor of the index in them."""
    for file in set(read(folder / "model.safetensors.index.json")["weight_map"].values()):
        assert re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file) and (folder / file).is_file()


def test_llama_cpp_knows_every_tensor(folder, config):
    """`map_tensor_name` raises "Can not map tensor" for a name that is not in its table."""
    known = re.compile(f"({GPT2_NAMES if config['model_type'] == 'gpt2' else LLAMA_NAMES})\\.(weight|bias)")
    for name in read(folder / "model.safetensors.index.json")["weight_map"]:
        assert known.fullmatch(name), name


def test_llama_cpp_finds_the_settings(config):
    """`GPT2Model.set_gguf_parameters`, and `TextModel`'s and `LlamaModel`'s: the keys they index, or silently lack."""
    if config["model_type"] == "gpt2":
        for key in ("n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon", "vocab_size"):
            assert config[key], key
        assert config["n_ctx"] == config["n_positions"] == 64 and config["n_inner"] == 4 * config["n_embd"]
        return
    keys = "num_hidden_layers max_position_embeddings hidden_size intermediate_size num_attention_heads "
    keys += "num_key_value_heads rope_theta rms_norm_eps head_dim vocab_size"
    for key in keys.split():
        assert config[key], key


def test_llama_cpp_finds_the_context_of_scaled_rotary_embeddings(tmp_path):
    """`LlamaModel.generate_extra_tensors` reads the original context of "llama3" from the top of config.json, where
    most folders have none, and takes 8192 otherwise."""
    _, step = ours("llama3-tied", tmp_path / "run")
    config = export_huggingface(step, tmp_path / "hf").config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    assert config["original_max_position_embeddings"] == 16


def test_llama_cpp_finds_the_special_tokens(folder, config):
    """gguf-py's `SpecialVocab`: tokens that tokenizer_config.json names, among those added in tokenizer.json, then ids
    in config.json; `add_bos_token` as a boolean, without which SentencePiece texts get a <s> in front."""
    settings = read(folder / "tokenizer_config.json")
    added = {token["content"]: token["id"] for token in read(folder / "tokenizer.json")["added_tokens"]}
    for kind in ("bos", "eos"):
        assert added[settings[f"{kind}_token"]] == config[f"{kind}_token_id"] == 256
        assert settings[f"add_{kind}_token"] is False


def test_llama_cpp_has_a_row_for_every_token(folder, config):
    """`get_vocab_base` asserts that the largest id is below `vocab_size`, and names the rest [PAD...]."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert max(tokenizer.get_vocab().values()) < config["vocab_size"] == 259


def test_llama_cpp_reads_a_sentencepiece_model(tmp_path):
    """`_create_vocab_sentencepiece` takes tokenizer.model, and that name alone, for Llama and Qwen2 before all else."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = iter(["the quick brown fox jumps over the lazy dog"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=str(tmp_path / "sp"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=9,
    )
    _, step = ours("llama-gqa", tmp_path / "run", f"sentencepiece:{tmp_path / 'sp.model'}")
    export_huggingface(step, tmp_path / "hf")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf" / "tokenizer.model"))
    config = read(tmp_path / "hf" / "config.json")
    assert model.vocab_size() == 40 < config["vocab_size"]
    assert (
        config["eos_token_id"] == model.eos_id()
        and read(tmp_path / "hf" / "tokenizer_config.json")["add_bos_token"] is False
    )
