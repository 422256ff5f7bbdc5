"""Greedy continuations are those of Hugging Face's generate; top-k and top-p keep the tokens its filters keep."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

from megatron_lite.checkpoint import Reader  # noqa: E402
from megatron_lite.checkpoint.huggingface import import_huggingface  # noqa: E402
from megatron_lite.inference import generate, load_model, read_config  # noqa: E402
from megatron_lite.inference.sampling import Sampling  # noqa: E402

PROMPTS = [[5, 17, 3, 70], [44], [76, 0, 9, 9, 21, 8, 33, 2, 14]]
COMMON = {"vocab_size": 77, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "LlamaForCausalLM": transformers.LlamaConfig(
        **COMMON, **LLAMA, num_key_value_heads=2, max_position_embeddings=64
    ),
    "GPT2LMHeadModel": transformers.GPT2Config(
        **COMMON, n_embd=32, n_head=4, n_layer=3, n_positions=64, tie_word_embeddings=False
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_continuations_agree(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    theirs = getattr(transformers, name)(MODELS[name]).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            # Large matrices, or one token wins everywhere.
            small = 0.05 * torch.randn(parameter.shape)
            parameter.copy_(8 * small if parameter.ndim > 1 else small + key.endswith("weight"))
    theirs.save_pretrained(tmp_path / "hf")
    with Reader(import_huggingface(tmp_path / "hf", tmp_path / "run")) as reader:
        ours = load_model(reader, read_config(reader))

    expected = []
    for prompt in PROMPTS:
        row = torch.tensor([prompt])
        options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(row)}
        expected.append(theirs.generate(row, **options)[0, len(prompt) :].tolist())
    assert len({token for row in expected for token in row}) > 12, (
        "the model repeats itself: nothing is tested"
    )
    assert generate(ours, PROMPTS, 24, temperature=0) == expected


@pytest.mark.parametrize("temperature", [0.6, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50])
@pytest.mark.parametrize("top_p", [0.1, 0.7, 0.95, 1.0])
def test_the_same_tokens_are_kept(temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20, 40, generator=generator)
    kept = logits / temperature
    if top_k:
        kept = transformers.TopKLogitsWarper(min(top_k, 40))(torch.empty(0), kept)
    if top_p < 1:
        kept = transformers.TopPLogitsWarper(top_p)(torch.empty(0), kept)
    count = 4000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row, expected in zip(logits, kept.softmax(dim=-1), strict=True):
        chosen = Sampling(temperature, top_k, top_p).choose(row.expand(count, -1), draws)
        shares = torch.bincount(chosen, minlength=40) / count
        torch.testing.assert_close(shares, expected, rtol=0, atol=2 / count)
        assert not shares[expected == 0].any()
