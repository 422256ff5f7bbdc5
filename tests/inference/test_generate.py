"""Generation: the cache, batches of uneven rows, where rows end, and tensor parallelism change nothing."""

from typing import Any

import pytest
import torch

from megatron_lite.inference import generate
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.mesh import build_mesh
from tests.distributed import run_ranks
from tests.inference.case import PROMPTS, STYLES, make_config, make_model, recompute_greedy

SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5}


@pytest.fixture(params=STYLES)
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(make_config(request.param))


def greedy(model: GPT, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    return generate(model, prompts, count, temperature=0, **options)


def test_a_cached_row_is_what_recomputing_everything_gives(model: GPT) -> None:
    for prompt in PROMPTS:
        expected = recompute_greedy(model, prompt, 12)
        assert len(set(expected)) > 4, "the model repeats itself: nothing is tested"
        assert greedy(model, [prompt], 12) == [expected]


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_other_position_schemes(positions: str) -> None:
    extra = {"qk_layernorm": True} if positions == "rope" else {"num_query_groups": 2}
    model = make_model(make_config("llama", position_embedding=positions, **extra))
    # Beyond the length it was trained on (32): there is no table to run out of.
    assert greedy(model, PROMPTS, 40) == [recompute_greedy(model, prompt, 40) for prompt in PROMPTS]


def test_padding_changes_no_row(model: GPT) -> None:
    assert greedy(model, PROMPTS, 12) == [greedy(model, [prompt], 12)[0] for prompt in PROMPTS]


def test_padding_changes_no_logits(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stricter than tokens: every step's logits of each row are those of the row alone."""
    seen: list[torch.Tensor] = []
    choose = "megatron_lite.inference.sampling.Sampling.choose"

    def keep(_: Any, logits: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.argmax(dim=-1)

    monkeypatch.setattr(choose, keep)
    generate(model, PROMPTS, 8)
    together = torch.stack(seen)
    for row, prompt in enumerate(PROMPTS):
        seen.clear()
        generate(model, [prompt], 8)
        torch.testing.assert_close(together[:, row], torch.stack(seen)[:, 0], rtol=1e-5, atol=1e-5)


def test_a_sampled_row_depends_on_seed_and_number_only(model: GPT) -> None:
    together = generate(model, PROMPTS, 12, **SAMPLED)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 12, first_row=row, **SAMPLED) == [together[row]]
    assert generate(model, PROMPTS, 6, **SAMPLED) == [row[:6] for row in together]
    assert generate(model, PROMPTS, 12, **SAMPLED | {"seed": 6}) != together
    first, second = generate(model, [PROMPTS[0]] * 2, 12, **SAMPLED)
    assert first != second


def test_rows_end_at_eod_each_by_itself(model: GPT) -> None:
    free = greedy(model, PROMPTS, 12)
    eod = free[0][4]
    told: list[tuple[int, int]] = []
    rows = greedy(model, PROMPTS, 12, eod_id=eod, on_token=lambda row, token: told.append((row, token)))
    assert rows == [row[: row.index(eod)] if eod in row else row for row in free]
    assert len({len(row) for row in rows}) > 1
    for number, row in enumerate(rows):
        assert [token for told_row, token in told if told_row == number] == row


def test_learned_positions_end_each_row_at_the_table() -> None:
    model = make_model(make_config("gpt2"))
    prompts = [list(range(30)), [1, 2], list(range(31))]
    rows = greedy(model, prompts, 100)
    assert [len(row) for row in rows] == [2, 30, 1]
    assert rows == [recompute_greedy(model, p, 32 - len(p)) for p in prompts]
    with pytest.raises(
        ValueError, match=r"prompt 1 has 32 tokens, but the model has 32 learned .* at most 31"
    ):
        greedy(model, [[1], [0] * 32], 5)


def test_padded_vocabulary_is_never_drawn() -> None:
    model = make_model(make_config("llama"))
    with torch.no_grad():
        model.head.weight[61:] = 0.0  # padding of logit 0 would often win over the negative ones
        model.head.weight[:61] *= 0.01
    rows = generate(model, [[1]] * 16, 40, temperature=1.0)
    assert max(map(max, rows)) == 60
    assert max(map(max, generate(model, [[1]] * 16, 40, vocab_size=50))) == 49


def test_bad_input_is_told() -> None:
    model = make_model(make_config("llama"))
    for prompts, message in (
        ([[1], []], "prompt 1 is empty"),
        ([[1], [61]], "prompt 1 holds id 61, and the model knows 0 to 60"),
        ([[-1]], "prompt 0 holds id -1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, 3)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, [[1]], 0)
    assert generate(model, [], 3) == []
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(model, [[1]], 3)


def test_a_training_model_samples_without_dropout_and_goes_on_training() -> None:
    model = make_model(make_config("gpt2", hidden_dropout=0.5, attention_dropout=0.5))
    expected = greedy(model, PROMPTS, 8)
    model.train()
    assert greedy(model, PROMPTS, 8) == expected
    assert model.training
    # The rest of the model is as it was: all positions have logits again.
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 64)


def test_only_the_last_position_reaches_the_head(model: GPT) -> None:
    shapes: list[torch.Size] = []
    model.head.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    greedy(model, [list(range(20)), list(range(9))], 3)
    assert shapes == [(2, 1, 32)] * 3


def tensor_parallel(style: str) -> tuple[list[list[int]], list[list[int]]]:
    model = make_model(make_config(style), build_mesh(tensor=torch.distributed.get_world_size()))
    return greedy(model, PROMPTS, 12), generate(model, PROMPTS, 12, **SAMPLED)


@pytest.mark.parametrize("style", STYLES)
def test_tensor_parallel_ranks_continue_as_one_process(style: str) -> None:
    model = make_model(make_config(style))
    expected = greedy(model, PROMPTS, 12), generate(model, PROMPTS, 12, **SAMPLED)
    assert run_ranks(2, tensor_parallel, style) == [expected] * 2


def ranks_of_different_mind() -> list[list[int]]:
    """A rank that would choose otherwise, as one whose sums round otherwise might."""
    from megatron_lite.inference.sampling import Sampling

    rank, choose = torch.distributed.get_rank(), Sampling.choose
    Sampling.choose = lambda *args: (choose(*args) + rank) % 61  # type: ignore[method-assign]
    return greedy(make_model(make_config("llama"), build_mesh(tensor=2)), PROMPTS, 6)


def test_tensor_ranks_follow_the_first() -> None:
    expected = greedy(make_model(make_config("llama")), PROMPTS, 6)
    assert run_ranks(2, ranks_of_different_mind) == [expected] * 2


def test_sequence_parallel_meshes_are_refused() -> None:
    with pytest.raises(AssertionError, match="load the model without sequence_parallel"):
        run_ranks(2, sequence_parallel)


def sequence_parallel() -> None:
    generate(make_model(make_config("llama"), build_mesh(2, sequence_parallel=True)), PROMPTS, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
def test_a_gpu_continues_as_a_cpu(style: str) -> None:
    config, device = make_config(style), torch.device("cuda")
    model = make_model(config)
    on_gpu = GPT(config.model, Runtime(device=device))
    on_gpu.load_state_dict(model.state_dict())
    assert greedy(on_gpu, PROMPTS, 12) == greedy(model, PROMPTS, 12)
    assert generate(on_gpu, PROMPTS, 12, **SAMPLED) == generate(model, PROMPTS, 12, **SAMPLED)
