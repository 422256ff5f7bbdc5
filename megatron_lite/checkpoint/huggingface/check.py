"""An export judged by its reader: transformers and our own model, the same tokens, the same logits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.convert import model_config
from megatron_lite.checkpoint.reader import Reader
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime

TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order, through many layers


def build_model(reader: Reader) -> GPT:
    """The checkpoint's model in one process, fp32 on the CPU, in evaluation mode."""
    model = GPT(model_config(reader), Runtime())
    model.load_weights(lambda name, dim, start, stop: reader.read(name, dim=dim, start=start, stop=stop))
    return model.eval()


@torch.no_grad()
def compare_logits(source: Path, exported: Path, *, tokens: int = 64) -> float | None:
    """The largest difference between the logits of a step folder and of its export.

    Relative to the largest logit; both models run in fp32 on random tokens. None where transformers is not
    installed. Raises CheckpointError where the difference is more than rounding.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM

    with Reader(source) as reader:
        ours = build_model(reader)
    vocabulary = ours.config.vocab_size
    assert vocabulary is not None, "what is exported has a vocabulary"
    length = min(tokens, ours.config.max_positions)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    mine = ours(ids)[..., :vocabulary]
    del ours
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    difference = float((mine - theirs(ids).logits).abs().max() / mine.abs().max())
    if not difference <= TOLERANCE:
        fault = f"its logits differ by {difference:.1e} of the largest, more than {TOLERANCE:.0e}"
        raise CheckpointError(f"{exported}: the export is wrong: {fault}; do not use it")
    return difference
