"""The command line: what it prints, and what it refuses."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import Piece, Reader, resolve
from megatron_lite.checkpoint import reader as reader_module
from megatron_lite.checkpoint import save as save_pieces
from megatron_lite.checkpoint.store import save_files
from megatron_lite.config import build_config
from megatron_lite.inference import generate as library
from megatron_lite.tokenizers import ByteTokenizer, CharTokenizer
from tests.distributed import run_ranks
from tests.inference.case import make_config, make_model, save_model
from tools import generate as tool

TEXT = "abcdefghijklmnopqrstuvwxyz .,\n"
PROMPTS = ["once upon", "a", "the quick brown fox"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with a character tokenizer of 32 ids, in a model of 61."""
    folder = tmp_path_factory.mktemp("run")
    CharTokenizer.train([TEXT]).save(folder / "tokenizer.json")
    return save(folder, f"char:{folder / 'tokenizer.json'}")


def save(folder: Path, tokenizer: str | None, style: str = "llama") -> Path:
    tree = make_config(style).model_dump(mode="json")
    tree["data"]["tokenizer"] = tokenizer
    config = build_config(tree)
    save_model(make_model(config), config, folder)
    return folder


Outcome = tuple[int, str, str]


def call(*arguments: object) -> Outcome:
    """(exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = tool.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def expected(run: Path, prompts: list[str], count: int, **options: float) -> list[str]:
    tokenizer = CharTokenizer.load(run / "tokenizer.json")
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    limits = {"eod_id": tokenizer.eod_id, "vocab_size": tokenizer.vocab_size}
    new = library(make_model(make_config("llama")), rows, count, **limits, **options)  # type: ignore[arg-type]
    return [tokenizer.decode(row + more) for row, more in zip(rows, new, strict=True)]


def joined(texts: list[str]) -> str:
    return f"{tool.SEPARATOR}\n".join(f"{text}\n" for text in texts)


def flags(prompts: list[str]) -> list[str]:
    return [item for prompt in prompts for item in ("--prompt", prompt)]


def test_greedy_text_of_one_prompt_and_of_several(run: Path) -> None:
    settings = ("--load", run, "--temperature", 0, "--max-new-tokens", 20)
    for prompts in (PROMPTS[:1], PROMPTS):
        result = call(*settings, *flags(prompts))
        assert result[:2] == (0, joined(expected(run, prompts, 20, temperature=0)))


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000003"])
def test_any_folder_of_the_run_will_do(run: Path, where: str) -> None:
    arguments = ("--prompt", "a", "--temperature", 0, "--max-new-tokens", 9)
    assert call("--load", run / where, *arguments)[:2] == (0, joined(expected(run, ["a"], 9, temperature=0)))


@pytest.mark.parametrize("where", ["weights", "weights/step_00000002"])
def test_weights_alone_in_bf16_will_do(run: Path, tmp_path: Path, where: str) -> None:
    """What `checkpoint.weights_interval` saves, beside a newer checkpoint of other weights."""
    with Reader(resolve(run)) as reader:
        metadata = reader.metadata
        halves = {name: (reader.read(name) / 2).bfloat16() for name in reader.names()}
    save_pieces(
        tmp_path / "weights", 2, [Piece.whole(n, "weight", half) for n, half in halves.items()], metadata
    )
    save_model(make_model(make_config("llama")), make_config("llama"), tmp_path)
    rounded = make_model(make_config("llama"))
    for name, parameter in rounded.named_parameters():
        parameter.data = halves[name].float()
    tokenizer = CharTokenizer.load(run / "tokenizer.json")
    prompt = tokenizer.encode("once")
    limits = {"eod_id": tokenizer.eod_id, "vocab_size": tokenizer.vocab_size}
    (new,) = library(rounded, [prompt], 20, temperature=0, **limits)  # type: ignore[arg-type]
    text = tokenizer.decode(prompt + new) + "\n"
    assert text != joined(expected(run, ["once"], 20, temperature=0)), "they can be told apart"
    settings = ("--prompt", "once", "--temperature", 0, "--max-new-tokens", 20)
    assert call("--load", tmp_path / where, *settings)[:2] == (0, text)


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    """Steps 3 and 4 of a run, of other weights, in two files each; the second of step 4 has a bit that flipped."""
    (tmp_path / "checkpoints").mkdir()
    with Reader(resolve(run)) as reader:
        pieces = {name: reader.read(name) for name in reader.names()}
        for step, factor in ((3, 1), (4, -1)):
            halves = [
                [Piece.whole(n, "weight", pieces[n] * factor) for n in reader.names()[i::2]] for i in (0, 1)
            ]
            folder = save_files(tmp_path / str(step), step, halves, reader.metadata)
            folder.rename(tmp_path / "checkpoints" / folder.name)
    file = tmp_path / "checkpoints/step_00000004/rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)
    return tmp_path


ASK = ("--prompt", "once", "--temperature", 0, "--max-new-tokens", 12)


def test_damage_is_not_used_unless_asked_for(
    run: Path, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = joined(expected(run, ["once"], 12, temperature=0))
    assert call("--load", damaged, *ASK)[:2] == (0, text)
    assert (
        "step_00000004 cannot be used: " in caplog.text and "rank_00001.safetensors is damaged" in caplog.text
    )
    assert f"falling back to checkpoint {damaged}/checkpoints/step_00000003" in caplog.text
    refuse("rank_00001.safetensors is damaged", "--load", damaged / "checkpoints/step_00000004", *ASK)
    status, out, _ = call("--load", damaged, *ASK, "--no-check")
    assert status == 0 and out != text


def test_two_ranks_share_the_check_and_fall_back_together(run: Path, damaged: Path) -> None:
    text = joined(expected(run, ["once"], 12, temperature=0))
    step, read = damaged / "checkpoints/step_00000004", []

    def recorded() -> tuple[Outcome, list[str]]:
        original = reader_module.crc_of_range

        def noted(path: Path, begin: int, size: int) -> int:
            read.append(f"{path.parent.name} {path.name} {begin}")
            return original(path, begin, size)

        reader_module.crc_of_range = noted
        return call("--load", damaged, *ASK, "--tensor", 2), read

    results = run_ranks(2, recorded)
    assert [result[:2] for result, _ in results] == [(0, text), (0, "")]
    (_, mine), (_, theirs) = results
    for number in (4, 3):
        parts = [{one for one in both if f"step_0000000{number}" in one} for both in (mine, theirs)]
        with Reader(damaged / f"checkpoints/step_0000000{number}") as reader:
            weights = sum(
                len([p for p in e.pieces.values() if p.kind == "weight"]) for e in reader._files.values()
            )
            assert len(parts[0]) > 2 and len(parts[1]) > 2 and not parts[0] & parts[1], "each a share"
            assert len(parts[0] | parts[1]) == weights + len(reader.files), "all of the weights"
    first, second = on_ranks(lambda: call("--load", step, *ASK, "--tensor", 2))
    assert first[:2] == (2, "") and second == (2, "", "")
    assert "rank_00001.safetensors is damaged" in first[2]


def test_a_tokenizer_of_more_ids_than_the_model_is_told(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert call("--load", run, "--prompt", "a", "--max-new-tokens", 1)[0] == 0
    assert "is it the one" not in caplog.text
    CharTokenizer.train([TEXT + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]).save(tmp_path / "more.json")
    more = ("--tokenizer", f"char:{tmp_path}/more.json", "--max-new-tokens", 1)
    assert call("--load", run, "--prompt", "A", *more)[0] == 0
    assert "more.json has 68 ids and the model 61: is it the one the model was trained with?" in caplog.text


def test_samples_follow_the_settings_and_not_the_batch_size(run: Path) -> None:
    drawn = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "seed": 3}
    settings = [item for name, value in drawn.items() for item in (f"--{name.replace('_', '-')}", value)]
    texts = expected(run, [p for p in PROMPTS for _ in range(3)], 15, **drawn)
    assert len(set(texts)) == 9
    for size in (1, 4, 16):
        batch = ("--num-samples", 3, "--batch-size", size, "--max-new-tokens", 15)
        assert call("--load", run, *settings, *batch, *flags(PROMPTS))[:2] == (0, joined(texts))


def test_prompts_from_a_file_and_from_standard_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = expected(run, PROMPTS, 8, temperature=0)
    settings = ("--load", run, "--temperature", 0, "--max-new-tokens", 8)
    (tmp_path / "prompts").write_text("\n\n".join(PROMPTS) + "\n")
    assert call(*settings, "--prompt-file", tmp_path / "prompts")[:2] == (0, joined(texts))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert call(*settings)[:2] == (0, "".join(f"{text}\n" for text in texts))


def test_an_empty_prompt_starts_a_document(run: Path) -> None:
    tokenizer = CharTokenizer.load(run / "tokenizer.json")
    new = library(make_model(make_config("llama")), [[tokenizer.eod_id]], 9, temperature=0, vocab_size=32)[0]
    new = new[: new.index(tokenizer.eod_id)] if tokenizer.eod_id in new else new
    arguments = ("--prompt", "", "--temperature", 0, "--max-new-tokens", 9)
    assert call("--load", run, *arguments)[:2] == (0, tokenizer.decode(new) + "\n")


def test_streamed_text_is_the_text() -> None:
    """Bytes of one character come one by one; what is printed at once is never taken back."""
    tokenizer, shown = ByteTokenizer(), []

    class Fake:
        def text(self, tokens: list[int]) -> str:
            return tokenizer.decode(tokens)

        def print(self, text: str) -> None:
            shown.append(text)

    printer = tool.Printer(Fake(), tokenizer.encode("é"))  # type: ignore[arg-type]
    tokens = [*"ü€x🦆".encode(), 0xE2, 0x82]  # ends in the middle of a character
    for token in tokens:
        printer.add(0, token)
    assert "".join(shown) == "éü€x🦆"
    assert len([text for text in shown if text]) == 5
    printer.end()
    assert "".join(shown) == "éü€x🦆\ufffd\n"


def test_another_type_and_tokenizer(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "generate")
    CharTokenizer.train(["xyz"]).save(tmp_path / "other.json")
    arguments = ("--load", run, "--prompt", "x", "--dtype", "bf16", "--max-new-tokens", 20, "--device", "cpu")
    status, out, _ = call(*arguments, "--tokenizer", f"char:{tmp_path / 'other.json'}")
    assert status == 0 and "bf16 on cpu" in caplog.text
    assert set(out.strip()) <= set("xyz\ufffd")


def refuse(message: str, *arguments: object) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err, err
    assert err.count("error:") == 1


def test_bad_input_is_told_in_one_message(run: Path, tmp_path: Path) -> None:
    ask = ("--prompt", "a", "--max-new-tokens", 3)
    refuse("no checkpoint there", "--load", tmp_path / "nothing", *ask)
    refuse("1 rank was started, and --tensor is 2", "--load", run, *ask, "--tensor", 2)
    refuse("missing.json: cannot be read", "--load", run, *ask, "--tokenizer", "char:missing.json")
    refuse('unknown tokenizer "nonsense"', "--load", run, *ask, "--tokenizer", "nonsense")
    refuse("holds id 97", "--load", run, *ask, "--tokenizer", "byte")
    refuse("No such file", "--load", run, "--prompt-file", tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n \n")
    refuse("empty: no prompts in it", "--load", run, "--prompt-file", tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    refuse("latin: not UTF-8 text", "--load", run, "--prompt-file", tmp_path / "latin")
    for flag in ("--max-new-tokens", "--num-samples", "--batch-size", "--tensor"):
        refuse(f"{flag} is at least 1", "--load", run, "--prompt", "a", flag, 0)
    refuse("--temperature is 0 or more", "--load", run, *ask, "--temperature", "nan")
    refuse("--top-k is 0 or more", "--load", run, *ask, "--top-k", -1)
    refuse("--top-p is more than 0", "--load", run, *ask, "--top-p", 0)
    refuse("not allowed with", "--load", run, *ask, "--prompt-file", "x")
    if not torch.cuda.is_available():
        refuse("have 0 GPUs", "--load", run, *ask, "--device", "cuda")


def test_a_tokenizer_that_was_moved(run: Path, tmp_path: Path) -> None:
    gone = f"char:{tmp_path}/gone.json"
    save(tmp_path, gone)
    message = (
        f"the model's tokenizer, {gone}: {tmp_path}/gone.json: cannot be read: No such file or directory; "
    )
    refuse(message + "say where it is now with --tokenizer SPEC", "--load", tmp_path, "--prompt", "a")
    moved = ("--tokenizer", f"char:{run}/tokenizer.json")
    assert call("--load", tmp_path, *ASK, *moved)[:2] == call("--load", run, *ASK)[:2]


def test_a_run_without_tokenizer_needs_one_named(tmp_path: Path) -> None:
    save(tmp_path, None)
    refuse("give --tokenizer", "--load", tmp_path, "--prompt", "a")


def test_a_prompt_too_long_is_refused_but_does_not_end_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CharTokenizer.train([TEXT]).save(tmp_path / "tokenizer.json")
    save(tmp_path, f"char:{tmp_path / 'tokenizer.json'}", style="gpt2")
    refuse("at most 31", "--load", tmp_path, "--prompt", "a" * 32)
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 32 + "\nab\n"))
    status, out, err = call("--load", tmp_path, "--max-new-tokens", 4)
    assert status == 0 and out.startswith("ab") and "at most 31" in err


def test_a_prompt_of_other_bytes_is_refused_but_does_not_end_a_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(r"error: the prompt 'caf\udce9' is not UTF-8 text", "--load", run, "--prompt", "caf\udce9")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nab\n"), encoding="utf-8"))
    status, out, err = call("--load", run, "--max-new-tokens", 4)
    assert status == 0 and out.startswith("ab")
    assert err == "error: the prompt 'caf\\udce9' is not UTF-8 text\n"


def on_ranks(function: Callable[[], Outcome]) -> list[Outcome]:
    return run_ranks(2, function)


def test_two_ranks_speak_with_one_voice(run: Path) -> None:
    settings = ("--load", run, "--temperature", 0, "--max-new-tokens", 10)
    first, second = on_ranks(lambda: call(*settings, "--tensor", 2, *flags(PROMPTS)))
    assert first[:2] == (0, joined(expected(run, PROMPTS, 10, temperature=0)))
    assert second == (0, "", "")


def test_two_ranks_converse(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = expected(run, PROMPTS, 8, temperature=0)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    settings = ("--load", run, "--temperature", 0, "--max-new-tokens", 8, "--tensor", 2)
    first, second = on_ranks(lambda: call(*settings))
    assert first[:2] == (0, "".join(f"{text}\n" for text in texts))
    assert second == (0, "", "")


def test_two_ranks_refuse_with_one_voice(run: Path, tmp_path: Path) -> None:
    first, second = on_ranks(lambda: call("--load", run, "--prompt", "a"))
    assert first[0] == second[0] == 2
    assert first[2] == "error: 2 ranks were started, and --tensor is 1: give --tensor 2, or start 1\n"
    assert second[2] == ""

    def one_cannot_see_the_files(*arguments: str) -> Outcome:
        if dist.get_rank() == 1:
            tool.Reader = lambda folder: Reader(tmp_path / "not mounted here")  # type: ignore[misc, assignment]
        return call("--load", resolve(run), "--prompt", "a", "--tensor", 2, *arguments)

    for arguments in ((), ("--no-check",)):
        first, second = on_ranks(lambda: one_cannot_see_the_files(*arguments))  # noqa: B023
        assert first[:2] == second[:2] == (2, "")
        assert "not mounted here/index.json is not there" in first[2]
        assert second[2] == ""

    def no_gpu_on_one() -> Outcome:
        def choose(setting: str, launch: tool.Launch) -> torch.device:
            if launch.local_rank:
                raise ValueError("no GPU here")
            return torch.device("cpu")

        tool.choose_device = choose  # type: ignore[assignment]
        if dist.get_rank() == 1:
            return call("--load", run, "--prompt", "a", "--tensor", 2)
        return 0, "", ""  # it would wait for the other one until the launcher ends it

    assert on_ranks(no_gpu_on_one)[1] == (2, "", "error: rank 1: no GPU here\n")
