"""Every layout trains as one process does: ten steps, clipping on, every rank's loss and gradient norm."""

from dataclasses import replace

import pytest

from tests.parity import assert_parity, assert_same_training, one_process, reference
from tests.training_case import Case, run

GRID = [
    # Data parallel, and the four stages of ZeRO
    Case(data=2, zero=0),
    Case(data=2, zero=1, style="llama", tied=False),
    Case(data=2, zero=2, recompute="full"),
    Case(data=2, zero=3, style="llama", tied=False, recompute="selective"),
    Case(data=4, zero=3),
    # Tensor parallel
    Case(tensor=2, zero=0),
    Case(tensor=2, zero=0, sequence=True, style="llama", tied=False),
    Case(tensor=4, zero=1, sequence=True, tied=False),
    Case(tensor=4, zero=3, style="llama"),
    # Tensor and data parallel
    Case(tensor=2, data=2, zero=1, sequence=True, recompute="selective"),
    Case(tensor=2, data=2, zero=2, style="llama"),
    Case(tensor=2, data=2, zero=3),
    Case(tensor=2, data=2, zero=3, sequence=True, style="llama", tied=False, recompute="full"),
    Case(tensor=4, data=2, zero=0, style="llama", tied=False),
    Case(tensor=4, data=2, zero=2, sequence=True, recompute="full"),
    # Pipeline
    Case(pipeline=2, zero=0),
    Case(pipeline=2, zero=1, style="llama", tied=False),
    Case(pipeline=4, zero=1),
    Case(pipeline=4, zero=0, style="llama", tied=False),
    # Pipeline and data parallel
    Case(pipeline=2, data=2, zero=1, recompute="full"),
    Case(pipeline=2, data=2, zero=0, style="llama", recompute="selective"),
    Case(pipeline=4, data=2, zero=1, style="llama", recompute="full"),
    # Tensor and pipeline
    Case(tensor=2, pipeline=2, zero=0, sequence=True),
    Case(tensor=2, pipeline=2, zero=1, sequence=True, style="llama", tied=False, recompute="selective"),
    Case(tensor=2, pipeline=4, zero=1, sequence=True, tied=False),
    Case(tensor=4, pipeline=2, zero=1, style="llama"),
    Case(tensor=4, pipeline=2, zero=0, sequence=True, tied=False, recompute="full"),
    # All three
    Case(tensor=2, pipeline=2, data=2, zero=1),
    Case(tensor=2, pipeline=2, data=2, zero=0, sequence=True, style="llama", recompute="full"),
    Case(tensor=2, pipeline=2, data=2, zero=1, style="llama", tied=False),
    Case(tensor=4, pipeline=4, zero=1, sequence=True),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_fp32(case: Case) -> None:
    assert_parity(case)


BF16 = [
    Case(data=2, zero=0),
    Case(data=2, zero=2),
    Case(data=2, zero=3, style="llama", tied=False),
    Case(tensor=2, data=2, zero=1, sequence=True, style="llama", tied=False),
    Case(tensor=2, data=2, zero=3),
    Case(pipeline=4, zero=1, style="llama", tied=False),
    Case(tensor=2, pipeline=2, zero=1),
    Case(tensor=2, pipeline=2, data=2, zero=1, sequence=True),
]


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16(case: Case) -> None:
    assert_parity(replace(case, precision="bf16"))


LLAMA3 = {
    "type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
MASKING = {
    "data.tokenizer": "char:unused",
    "data.reset_position_ids": True,
    "data.reset_attention_mask": True,
}
TOKEN_WEIGHTS = {"data.tokenizer": "char:unused", "data.eod_mask_loss": True}
OFFLOAD = {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}}

OPTIONS = {
    "qk_layernorm": Case(2, 1, 2, sequence=True, style="llama", model={"qk_layernorm": True}),
    "qk_layernorm, pipeline": Case(2, 2, model={"qk_layernorm": True}),
    "one query group a rank": Case(2, 2, style="llama", model={"num_query_groups": 2}),
    "rope in part": Case(2, 1, 2, zero=3, style="llama", model={"rotary_percent": 0.5}),
    "llama3 scaling": Case(2, 2, style="llama", tied=False, model={"rotary_scaling": LLAMA3}),
    "yarn scaling": Case(2, sequence=True, style="llama", tied=False, model={"rotary_scaling": YARN}),
    "no positions": Case(2, 2, model={"position_embedding": "none"}),
    "heads of their own width": Case(2, 2, model={"kv_channels": 6}),
    "padded vocabulary": Case(4, 2, model={"vocab_size": 33, "make_vocab_size_divisible_by": 64}),
    "dropout, data": Case(1, 1, 2, zero=2, model=DROPOUT),
    "dropout, tensor": Case(4, model=DROPOUT),
    "dropout, sequence": Case(2, 1, 2, zero=3, sequence=True, recompute="full", model=DROPOUT),
    "dropout, pipeline": Case(1, 2, 2, model=DROPOUT, recompute="selective"),
    "dropout, all": Case(2, 2, 2, sequence=True, model=DROPOUT),
    "documents": Case(2, 1, 2, zero=2, sequence=True, settings=MASKING),
    "documents, pipeline": Case(2, 2, style="llama", settings=MASKING),
    "documents, long pipeline": Case(1, 4, 2, recompute="full", settings=MASKING),
    "token weights": Case(2, 1, 2, zero=3, settings=TOKEN_WEIGHTS),
    "token weights, pipeline": Case(2, 2, 2, style="llama", tied=False, settings=TOKEN_WEIGHTS),
    "micro batch 1": Case(2, 2, 2, settings={"train.micro_batch_size": 1}),
    "micro batch 4": Case(1, 1, 2, zero=3, settings={"train.micro_batch_size": 4}),
    "no accumulation": Case(2, 2, settings={"train.micro_batch_size": 8}),
    "own partition": Case(1, 2, 2, settings={"parallel.pipeline_partition": [1, 3]}),
    "offload": Case(1, 1, 2, zero=2, settings=OFFLOAD),
    "offload, tensor": Case(2, 1, 2, zero=3, style="llama", tied=False, settings=OFFLOAD),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_option(case: Case) -> None:
    assert_parity(case)
    alone = one_process(case)
    if alone.model or alone.settings:
        plain = replace(alone, model={}, settings={})
        assert reference(alone) != reference(plain), "the option changes nothing"


@pytest.mark.parametrize(
    "case", [Case(1, 1, 2, zero=3), Case(2, 2, zero=0), Case(2, 2, 2, zero=1, sequence=True)], ids=str
)
def test_without_clipping(case: Case) -> None:
    case = replace(case, settings={"optimizer.grad_clip": 0.0})
    expected = reference(one_process(case))
    assert expected != reference(one_process(replace(case, settings={})))
    for rank, steps in enumerate(run(case)):
        assert_same_training(steps, expected, f"rank {rank}")
