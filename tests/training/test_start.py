"""What keeps ranks from waiting for each other in vain, and a checkpoint from loading into another model."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import Reader
from megatron_lite.model.rotary import Rotary
from megatron_lite.parallel.launch import Launch, choose_device, init_distributed
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.training import loop, saving
from megatron_lite.training.resilience import PeerWatch, _alive
from megatron_lite.training.saver import Saver
from megatron_lite.training.saving import Progress, find_start, load_checkpoint
from tests.distributed import RankFailed, run_ranks
from tests.training_case import Case, import_what_ranks_import, make_engine, train


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    import_what_ranks_import()


def rotary_table(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    engine = make_engine(case.config())
    train(engine, range(1))
    return engine.module.blocks[0].attention.rotary(None, 16, torch.device("cpu"))


def test_rotary_angles_are_fp32_under_zero3() -> None:
    """zero.Init casts what torch.arange gives, so frequencies made under it would be bf16."""
    case = Case(style="llama", zero=3, precision="bf16")
    (cos, sin), *_ = run_ranks(1, rotary_table, case)
    expected = Rotary(case.config().model)(None, 16, torch.device("cpu"))
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])


def watch_while_one_rank_dies() -> None:
    PeerWatch.seconds = 0.2
    with PeerWatch():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # as in a collective that never ends


def test_ranks_end_when_a_peer_is_killed() -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailed, match="died"):
        run_ranks(3, watch_while_one_rank_dies)
    # Not a measurement: without the watch the ranks would sleep on, and the harness would kill them.
    assert time.monotonic() - begin < 50


def ends_alone(died: str) -> int:
    """Rank 0 learns from the store alone, as a rank of another node would."""
    PeerWatch.seconds = 0.2
    watch = PeerWatch()
    watch._peers = {}
    pid = os.fork()
    if pid == 0:
        with watch:
            watch._store.set(PeerWatch._key, died)
            time.sleep(60)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_word_from_another_node_ends_a_rank() -> None:
    assert run_ranks(1, ends_alone, "7") == [1]


def watch_a_good_run() -> str:
    PeerWatch.seconds = 0.05
    with PeerWatch():
        time.sleep(0.3 * dist.get_rank())
    return "ended"


def test_ranks_that_end_well_are_not_taken_for_dead() -> None:
    assert run_ranks(3, watch_a_good_run) == ["ended"] * 3


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    assert _alive(os.getpid())
    while _alive(child.pid):
        time.sleep(0.01)
    child.wait()


def group_timeouts() -> list[timedelta]:
    init_distributed(Launch(dist.get_rank(), dist.get_world_size()), torch.device("cpu"), 3.0)
    mesh = build_mesh(tensor=2)
    groups = [mesh.tensor_group, mesh.data_group, dist.new_group([0, 1])]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_the_timeout_is_that_of_every_group() -> None:
    assert run_ranks(2, group_timeouts) == [[timedelta(minutes=3)] * 3] * 2


@pytest.mark.parametrize("kinds", [["cuda", "cpu"], ["cuda", "cuda"]])
def test_ranks_must_agree_on_the_device(monkeypatch: pytest.MonkeyPatch, kinds: list[str]) -> None:
    monkeypatch.setattr(loop, "gather", lambda kind: kinds)
    if "cpu" in kinds:
        with pytest.raises(ValueError, match=r"ranks \[1\] found no GPU"):
            loop._check_same_device(torch.device("cuda"))
    else:
        loop._check_same_device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("launcher", "gpus", "local_size", "expected"),
    [
        ("torchrun", 8, 8, "cuda:3"),
        ("torchrun", 4, 8, "cpu"),
        ("srun", 1, 8, "cuda:0"),
        ("srun", 4, 8, "cpu"),
        ("python", 0, 1, "cpu"),
    ],
)
def test_device_by_launcher(
    monkeypatch: pytest.MonkeyPatch, launcher: str, gpus: int, local_size: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch = Launch(3, 8, 3, local_size, launcher=launcher)
    assert str(choose_device("auto", launch)) == expected
    if expected == "cpu":  # every rank refuses, not only those beyond the last GPU
        with pytest.raises(ValueError, match=f"have {gpus} GPUs"):
            choose_device("cuda", replace(launch, local_rank=0))


def save_case(case: Case, folder: Path) -> None:
    config = replace(case, settings={**case.settings, "train.output_dir": str(folder)}).config()
    engine = make_engine(config)
    train(engine, range(1))
    Saver(engine).save(Progress(1, 8, 128), last=True)


def load_case(case: Case, folder: Path) -> str:
    config = replace(case, settings={**case.settings, "train.output_dir": str(folder)}).config()
    engine = make_engine(config)
    path = next(find_start(config))
    assert path is not None
    try:
        load_checkpoint(engine, path)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"num_layers": 2}, "blocks.2.attention.linear_proj.bias is not in the model"),
        ({"num_attention_heads": 2}, "model.num_attention_heads was 4 and is 2"),
        ({"activation": "gelu"}, "model.activation was gelu_tanh and is gelu"),
        ({"vocab_size": 70}, "embed.weight is (64, 32), the model's is (72, 32)"),
        # The same 64 rows, and other rows: what makes ids mean other tokens is not left to the padding.
        (
            {"vocab_size": 59},
            "model.vocab_size was 61 and is 59, as with another tokenizer (with the same one",
        ),
        (
            {"vocab_size": 50},
            "model.vocab_size was 61 and is 50, as with another tokenizer (with the same one",
        ),
        ({"hidden_dropout": 0.1}, "loaded"),
        ({"seq_length": 8, "max_position_embeddings": 16}, "loaded"),
        # What learned positions do not use, and what a null means.
        ({"rotary_base": 5e5, "rotary_percent": 0.5}, "loaded"),
        ({"num_query_groups": 4, "kv_channels": 8}, "loaded"),
        ({"position_embedding": "rope"}, "model.position_embedding was learned_absolute and is rope"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, pipeline: int, model: dict[str, object], expected: str
) -> None:
    run_ranks(1, save_case, Case(), tmp_path)
    for message in run_ranks(pipeline, load_case, Case(pipeline=pipeline, model=model), tmp_path):
        assert expected in message


@pytest.mark.parametrize(
    ("style", "model", "expected"),
    [
        ("llama", {"rotary_base": 5e5}, "model.rotary_base was 10000.0 and is 500000.0"),
        (
            "llama",
            {"rotary_scaling": {"type": "linear", "factor": 2.0}},
            "model.rotary_scaling was None and is ",
        ),
        ("llama", {"seq_length": 32}, "loaded"),
        ("gpt2", {"seq_length": 8}, "the model's is (8, 32) (set model.max_position_embeddings to 16)"),
        (
            "gpt2",
            {"seq_length": 32},
            "(set model.max_position_embeddings to 16 and model.seq_length to 16 or less)",
        ),
    ],
)
def test_other_positions_are_refused(
    tmp_path: Path, style: str, model: dict[str, object], expected: str
) -> None:
    run_ranks(1, save_case, Case(style=style), tmp_path)
    (message,) = run_ranks(1, load_case, Case(style=style, model=model), tmp_path)
    assert expected in message


def load_and_warnings(case: Case, folder: Path) -> tuple[list[str], bool, float]:
    """What was warned of, whether the rows of the checkpoint's padding came along, and the loss of a step."""
    messages: list[str] = []

    def note(message: str, *args: object) -> None:
        messages.append(message % args)

    saving.logger.warning = note  # type: ignore[method-assign, assignment]
    engine = make_engine(case.config())
    load_checkpoint(engine, folder)
    with Reader(folder) as reader:
        rows = min(case.config().model.padded_vocab_size, 64)
        mine = dict(engine.named_parameters())["embed.weight"]
        same = torch.equal(mine[:rows], reader.read("embed.weight")[:rows])
    return messages, same, train(engine, range(1, 2))[0][0]


@pytest.mark.parametrize("multiple", [8, 1, 80])
def test_tokens_added_to_a_tokenizer_take_rows_of_padding(tmp_path: Path, multiple: int) -> None:
    run_ranks(1, save_case, Case(), tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000001"
    model = {"vocab_size": 63, "make_vocab_size_divisible_by": multiple}
    (messages, same, loss), (others, _, _) = run_ranks(
        2, load_and_warnings, Case(pipeline=2, model=model), folder
    )
    assert len(messages) == 1 and others == []
    assert messages[0].startswith("model.vocab_size was 61 and is 63: ids from 61 on start untrained")
    assert same and math.isfinite(loss)
    model["vocab_size"] = 61
    assert run_ranks(1, load_and_warnings, Case(model=model), folder)[0][:2] == ([], True)
