"""An export judged by its readers: our own import, bit by bit, and transformers, logit by logit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.host import available_bytes
from megatron_lite.checkpoint.huggingface.config import from_huggingface
from megatron_lite.checkpoint.huggingface.exporting import model_config, rounded
from megatron_lite.checkpoint.huggingface.folder import CONFIG, Folder, read_json
from megatron_lite.checkpoint.huggingface.tokenizer import FAST, tokenizer_of, tokenizer_spec
from megatron_lite.checkpoint.huggingface.weights import Rule, rules
from megatron_lite.checkpoint.reader import Reader
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.tokenizers import Tokenizer, load_tokenizer

TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order, through many layers
MEMORY_FACTOR = 1.25  # of the weights in fp32: what else a forward pass takes, and a parameter on its way
# What tokenizers disagree about: spaces, numbers, capitals, accents, scripts without spaces, emoji.
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 12,345.67 o'clock, isn't it?",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}  # two  spaces\r\n\n\n",
    " naïve café, ÅNGSTRÖM ½ ﬁ, Привет, мир! 東京は日本の首都です。 🙂👩‍👧",
)


def check_export(source: Path, exported: Path, tokenizer: str | None = None) -> list[str]:
    """Judge the export of a step folder; lines that say what was compared, and what could not be.

    tokenizer: the specification that the export was given, where it was

    Raises CheckpointError where the export is wrong.
    """
    lines = [check_round_trip(source, exported)]
    with Reader(source) as reader:
        needed = round(MEMORY_FACTOR * 4 * model_config(reader).parameter_count())
    available = available_bytes()
    if importlib.util.find_spec("transformers") is None:
        lines.append("not checked: transformers is not installed (pip install 'megatron_lite[hf]')")
    elif available is not None and needed > available:
        room = (
            f"the model in fp32 needs {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free"
        )
        lines.append(f"not checked: transformers' logits, since {room}")
    else:
        difference = compare_logits(source, exported)
        lines.append(
            f"checked: transformers' logits differ from ours by at most {difference:.1e} of the largest"
        )
    if tokenizer_of(exported) is not None and importlib.util.find_spec("transformers") is not None:
        lines.append(check_tokenizer(source, exported, tokenizer))
    return lines + [f"note: {note}" for note in reader_notes(read_json(exported / CONFIG))]


def reader_notes(config: dict[str, Any]) -> list[str]:
    """What vLLM and llama.cpp would compute otherwise than transformers and we do, by their code of 2025 and 2026."""
    notes = []
    if config["model_type"] == "gpt2":
        if config["n_inner"] != 4 * config["n_embd"]:
            notes.append("llama.cpp reads only a GPT-2 whose feed-forward part is 4 x n_embd wide")
        if config["activation_function"] == "gelu":
            notes.append(
                "llama.cpp computes gelu by its tanh approximation, so that logits differ from the 3rd digit on"
            )
        return notes
    width = config["head_dim"] * config["num_attention_heads"]
    if config["model_type"] == "qwen2" and width != config["hidden_size"]:
        notes.append(
            "vLLM takes hidden_size / num_attention_heads for Qwen2's head_dim, which is another here"
        )
    kind = (config["rope_scaling"] or {}).get("rope_type")
    if kind == "llama3" and config["model_type"] in ("qwen2", "qwen3"):
        notes.append("llama.cpp knows rotary scaling of type llama3 in Llama and Mistral models only")
    return notes


def check_round_trip(source: Path, exported: Path) -> str:
    """Read an export back as an import would: every parameter has the bits of the step folder `source`.

    One parameter is in memory at a time. What was rounded has the bits of the rounded ones; rows of the vocabulary's
    padding come back as zeros, and so do biases that ours lacks. Raises CheckpointError where a bit differs.
    """
    imported = from_huggingface(read_json(exported / CONFIG))
    count = elements = 0
    dtypes = set()
    with Reader(source) as reader:
        model = model_config(reader)
        folder = Folder(exported, model)
        ours = rules(model)
        folder.check(ours)
        theirs = {rule.name for rule in rules(imported) if rule.held}
        if missing := sorted({rule.name for rule in ours if rule.held} - theirs):
            raise _wrong(exported, f"an import would not have {', '.join(missing[:3])}")
        for rule in ours:
            back = folder.parameter(rule)
            dtypes.add(str(back.dtype).removeprefix("torch."))
            count, elements = count + 1, elements + back.numel()
            if not _same_bits(back, _expected(reader, rule, model.vocab_size, back.dtype)):
                raise _wrong(exported, f"{rule.name} comes back with other bits")
    kinds = " and ".join(sorted(dtypes))
    return f"round trip: {count} parameters, {elements:,} numbers in {kinds}, come back bit by bit"


def _expected(reader: Reader, rule: Rule, vocabulary: int | None, dtype: torch.dtype) -> torch.Tensor:
    if not rule.held:
        return torch.zeros(rule.shape, dtype=dtype)
    weight = rounded(reader.read(rule.name), dtype, rule.name)
    if rule.name in ("embed.weight", "head.weight"):
        weight[vocabulary:] = 0
    return weight


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same where NaN is like itself, and 0 unlike -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def build_model(reader: Reader, dtypes: dict[str, torch.dtype] | None = None) -> GPT:
    """The checkpoint's model in one process, fp32 on the CPU, in evaluation mode.

    dtypes: that parameters are rounded to before they are fp32 again, by their names
    """
    model = GPT(model_config(reader), Runtime())

    def load(name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        weight = reader.read(name, dim=dim, start=start, stop=stop)
        return weight.to((dtypes or {}).get(name, weight.dtype))

    model.load_weights(load)
    return model.eval()


@torch.no_grad()
def compare_logits(source: Path, exported: Path, *, tokens: int = 64) -> float | None:
    """The largest difference between the logits of a step folder and of its export.

    Relative to the largest logit; both models run in fp32 on random tokens, ours with its weights rounded as the
    export's are. None where transformers is not installed. Raises CheckpointError where the difference is more than
    rounding.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with Reader(source) as reader:
        model = model_config(reader)
        folder = Folder(exported, model)
        dtypes = {rule.name: folder.get(rule.huggingface[0]).dtype for rule in rules(model)}
        ours = build_model(reader, dtypes)
    vocabulary = ours.config.vocab_size
    assert vocabulary is not None, "what is exported has a vocabulary"
    length = min(tokens, ours.config.max_positions)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    mine = ours(ids)[..., :vocabulary]
    del ours
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    difference = float((mine - theirs(ids).logits).abs().max() / mine.abs().max())
    if not difference <= TOLERANCE:
        raise _wrong(
            exported, f"its logits differ by {difference:.1e} of the largest, more than {TOLERANCE:.0e}"
        )
    return difference


def check_tokenizer(source: Path, exported: Path, given: str | None = None) -> str:
    """Whether transformers reads ids from the exported tokenizer as training did, on `TEXTS`; a line that says it.

    Raises CheckpointError where tokenizer.json gives other ids. Where it is right, or was not asked for, AutoTokenizer
    may still: for some models it takes rules of its own, whatever the files say. Then the line says so.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with Reader(source) as reader:
        spec = given or tokenizer_spec(reader)
    assert spec is not None, "what was exported has a specification"
    ours = load_tokenizer(spec)
    fast = (exported / FAST).is_file()
    if fast and (text := _differs(ours, PreTrainedTokenizerFast.from_pretrained(exported))):
        raise _wrong(exported, f"{FAST} gives other ids than {spec} for {text[:40]!r}")
    auto = AutoTokenizer.from_pretrained(exported)
    if text := _differs(ours, auto):
        remedy = "take PreTrainedTokenizerFast" if fast else "take the file itself"
        fault = f"transformers' AutoTokenizer gives other ids than {spec} for {text[:40]!r}"
        return f"tokenizer: {fault}, by {type(auto).__name__}'s own rules; {remedy}"
    return f"tokenizer: transformers reads the same ids from it, in {len(TEXTS)} texts"


def _differs(ours: Tokenizer, theirs: Any) -> str | None:
    """The first of `TEXTS` that two tokenizers give different ids for."""
    theirs.model_max_length = 1 << 30  # no warning of long texts
    for text in TEXTS:
        if theirs(text, add_special_tokens=False).input_ids != ours.encode(text):
            return text
    return None


def _wrong(exported: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{exported}: the export is wrong: {fault}; do not use it")
