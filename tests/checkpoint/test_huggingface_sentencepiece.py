"""Exports of models with a SentencePiece vocabulary: AutoTokenizer gives our ids for any text."""

import json
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import CheckpointError
from megatron_lite.checkpoint.huggingface import check_export, export_huggingface, spm, tokenizer_of
from megatron_lite.tokenizers import load_tokenizer
from megatron_lite.tokenizers.train_sentencepiece import train_sentencepiece
from tests.checkpoint.huggingface_models import ours, transformers
from tests.command_line import ROOT

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
    *(
        "",
        " ",
        "  ",
        " leading",
        "trailing ",
        "Hello  world",
        "a   b    c",
        "\n",
        "x\n\n y\n",
        "\tif x:\r\n    pass",
    ),
    *(
        "🙂👩‍👧 ok ©️",
        "naïve café, ½ ﬁ, Привет, 東京～都",
        "e\u0301 a\u0302 \u1100\u1161\u11a8",
        "▁a ▁ b▁",
    ),
    *("=" * count for count in (2, 3, 7, 20)),
    *("a" + " " * count + "b" for count in range(12)),
]
LETTERS = "abcdehilnorstTHE   \n\t.,;-='\"(){}0123éüß½ﬁ東京🙂\u0301\u200d\u00a0\u3000▁"
TEXT = st.one_of(st.text(), st.text(LETTERS, max_size=60))


def train(path, kind):
    """Models as of Llama 2 (BPE), as the library makes them by itself, and as tools/train_tokenizer.py does."""
    text = (ROOT / "LICENSE").read_text()
    if kind.startswith("own"):
        texts = [text, "\n".join(f"x{' ' * n}y" for n in range(9)), "0 < x > A\n" * 50]
        train_sentencepiece(texts, kind[4:], 600, path, ["<|im_start|>"])
        return
    llama = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=file,
            vocab_size=600 if kind == "llama" else 300,
            model_type="bpe" if kind == "llama" else kind,
            minloglevel=9,
            **(llama if kind == "llama" else {}),
        )


KINDS = ["llama", "bpe", "unigram", "own bpe", "own unigram"]
REAL = ["mistral-v1-32000", "botchan_en_bpe_1000", "botchan_en_unigram_1000"]


@pytest.fixture(scope="module", params=[*KINDS, *REAL])
def exported(request, tmp_path_factory):
    """(our tokenizer, the export, its step folder, what was said of the tokenizer, the model)"""
    folder = tmp_path_factory.mktemp("spm")
    path = folder / "made.model"
    if request.param in KINDS:
        train(path, request.param)
    else:
        path = request.getfixturevalue("real_data") / f"tokenizers/{request.param}.model"
    tokenizer = load_tokenizer(f"sentencepiece:{path}")
    _, step = ours("llama-gqa", folder / "run", tokenizer.name, vocab_size=tokenizer.vocab_size, num_layers=1)
    note = export_huggingface(step, folder / "hf").tokenizer
    return tokenizer, folder / "hf", step, note, spm.read_model(path.read_bytes())


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoTokenizer.from_pretrained(exported[1])


def test_what_reads_other_ids_is_said(exported):
    *_, note, model = exported
    for line in ("equally likely divisions", "llama.cpp divides texts as with a BPE model"):
        assert (line in note) == (model.algorithm == spm.UNIGRAM)
    assert ("two accents" in note) == bool(model.table)


def test_any_text_has_the_same_ids(exported, theirs):
    tokenizer, *_, model = exported
    theirs.model_max_length = 1 << 30

    @settings(max_examples=400)
    @given(TEXT)
    def check(text):
        if model.table:  # as the note says
            text = unicodedata.normalize("NFC", text)
        ids, others = tokenizer.encode(text), theirs(text).input_ids
        if model.algorithm == spm.UNIGRAM:
            assert sorted(others) == sorted(ids)
        else:
            assert others == ids

    known = {piece.text for piece in model.pieces}
    for text in [*TEXTS, *(["<0x0A> <0x41>"] if "<" in known else [])]:
        check = example(text)(check)
        if model.algorithm != spm.UNIGRAM:
            assert theirs(text).input_ids == tokenizer.encode(text), text
    check()


def test_every_character_is_normalised_as_the_library_does(exported, theirs):
    library = sentencepiece.SentencePieceProcessor(model_file=exported[0].name.partition(":")[2])
    points = [*range(0x3100), *range(0x3100, 0xD800, 7), *range(0xE000, 0x110000, 7)]
    texts = [text.format(chr(p)) for p in points if p != 0xFDD0 for text in ("a{0}b", " {0}", "½{0}c ")]
    # Composed of two and of three, as macOS and Vietnamese keyboards have them.
    texts += ["e\u0301", "e\u0323\u0302", "\u1100\u1161\u11a8", "\u30ab\u3099"]
    for text in [*texts, *TEXTS]:
        ours = theirs.backend_tokenizer.normalizer.normalize_str(text)
        assert ours == library.normalize(text), ascii(text)


def test_text_comes_back_as_ours_does(exported, theirs):
    tokenizer = exported[0]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if tokenizer.unknown_id not in ids:
            assert theirs.decode(ids) == tokenizer.decode(ids), text


def test_the_export_says_so_and_names_the_models_own_tokens(exported, theirs):
    tokenizer, folder, step, note, model = exported
    assert note.startswith(f"{tokenizer.name} as tokenizer.json, tokenizer.model, tokenizer_config.json")
    assert ("equally likely" in note) == (model.algorithm == spm.UNIGRAM)
    assert ("two accents" in note) == bool(model.table)
    assert "tokenizer: transformers reads the same ids from it" in check_export(step, folder)[-1]
    assert tokenizer_of(folder) == f"hf:{folder}"
    assert load_tokenizer(f"hf:{folder}").eod_id == tokenizer.eod_id
    first, last = (model.first or model.last, model.last)
    assert [theirs.bos_token, theirs.eos_token, theirs.unk_token] == [first, last, "<unk>"]
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["bos_token_id"] == theirs.bos_token_id == [piece.text for piece in model.pieces].index(first)
    )
    assert config["eos_token_id"] == theirs.eos_token_id == tokenizer.eod_id
    assert first == ("<|endoftext|>" if "im_start" in str(model.special_ids) else "<s>")


def test_what_is_read_of_a_model_is_what_the_library_reads(exported):
    tokenizer, *_, model = exported
    library = sentencepiece.SentencePieceProcessor(model_file=tokenizer.name.partition(":")[2])
    numbers = range(library.vocab_size())
    assert [piece.text for piece in model.pieces] == [library.id_to_piece(number) for number in numbers]
    assert [piece.score for piece in model.pieces] == [library.get_score(number) for number in numbers]
    assert list(model.special_ids.values()) == [n for n in numbers if library.is_control(n)]
    assert [piece.kind == 6 for piece in model.pieces] == [library.is_byte(number) for number in numbers]


def spec_of(tmp_path, **options):
    with (tmp_path / "other.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
            model_writer=file,
            minloglevel=9,
            **({"vocab_size": 300, "model_type": "bpe"} | options),
        )
    return f"sentencepiece:{tmp_path}/other.model"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "char", "hard_vocab_limit": False}, "it is neither BPE nor unigram"),
        ({"treat_whitespace_as_suffix": True}, "spaces belong to the word before them"),
        ({"user_defined_symbols": ["<sep>"]}, "it has symbols of the user, and puts or takes away spaces"),
    ],
)
def test_what_cannot_be_said_in_a_tokenizer_json_is_left_out(tmp_path, options, reason):
    spec = spec_of(tmp_path, **options)
    _, step = ours("llama-gqa", tmp_path / "run", spec, vocab_size=300)
    note = export_huggingface(step, tmp_path / "hf").tokenizer
    assert note.startswith(f"none: {spec} has no tokenizer.json that gives its ids: ") and reason in note
    assert not [*(tmp_path / "hf").glob("tokenizer*")] and tokenizer_of(tmp_path / "hf") is None
    with pytest.raises(CheckpointError, match=reason):
        export_huggingface(step, tmp_path / "hf2", tokenizer=spec)


def test_other_ids_are_never_exported(tmp_path, monkeypatch):
    """Whatever is wrong with our own making of it."""
    right = spm.of_sentencepiece

    def wrong(model):
        content = right(model)
        content["model"]["merges"].reverse()
        return content

    monkeypatch.setattr("megatron_lite.checkpoint.huggingface.tokenizer.of_sentencepiece", wrong)
    _, step = ours("llama-gqa", tmp_path / "run", spec_of(tmp_path), vocab_size=300)
    assert "it has others for " in export_huggingface(step, tmp_path / "hf").tokenizer


def test_symbols_of_the_user_where_nothing_is_done_to_spaces(tmp_path):
    """As in Gemma's vocabulary: runs of spaces, read before anything else."""
    plain = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    spec = spec_of(
        tmp_path, user_defined_symbols=["▁▁", "▁▁▁", "<sep>"], byte_fallback=True, vocab_size=600, **plain
    )
    _, step = ours("llama-gqa", tmp_path / "run", spec, vocab_size=600)
    assert "as tokenizer.json" in export_huggingface(step, tmp_path / "hf").tokenizer
    tokenizer, theirs = load_tokenizer(spec), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for one, other in pairwise([*TEXTS, "the<sep> or", "<sep><sep>"]):
        assert theirs(one + other).input_ids == tokenizer.encode(one + other)


def test_a_folder_of_the_hub_that_names_llamas_own_class(exported, tmp_path):
    """Trained with its tokenizer.json, which that class does not follow for spaces; what else it says stays."""
    tokenizer, made, *_ = exported
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    said = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "bos_token": "<s>",
        "chat_template": "{{ x }}",
    }
    (hub / "tokenizer_config.json").write_text(json.dumps(said))
    _, step = ours("llama-gqa", tmp_path / "run", f"hf:{hub}", vocab_size=tokenizer.vocab_size, num_layers=1)
    export_huggingface(step, tmp_path / "hf")
    assert "the same ids" in check_export(step, tmp_path / "hf")[-1]
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    inputs = ["input_ids", "attention_mask"]
    assert settings == said | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    export_huggingface(step, hub)
    assert json.loads((hub / "tokenizer_config.json").read_text()) == said, "its own folder is left as it was"
