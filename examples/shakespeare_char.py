#!/usr/bin/env python3
"""Prepares configs/shakespeare_char.json: nanoGPT's character model of a text.

The text is any UTF-8 file, for the published result (validation loss 1.47) Karpathy's "tiny Shakespeare" of
1,115,394 characters (https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt). Its first nine tenths
are trained on and the rest is for validation, as in nanoGPT.

    python examples/shakespeare_char.py --text input.txt
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from megatron_lite.data import IndexedDatasetWriter, sidecar_of, token_dtype, write_sidecar
from megatron_lite.tokenizers import CharTokenizer

RUN = Path("runs/shakespeare_char")  # where the configuration looks


def prepare(text: str, folder: Path) -> None:
    """Writes `folder`/tokenizer.json and the pairs train_text_document and valid_text_document, a document each."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CharTokenizer.train([text])
    tokenizer.save(folder / "tokenizer.json")
    boundary = int(len(text) * 0.9)
    for name, part in (("train", text[:boundary]), ("valid", text[boundary:])):
        prefix = folder / f"{name}_text_document"
        with IndexedDatasetWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
            writer.add_sequence(np.array(tokenizer.encode(part)))
            writer.end_document()
        write_sidecar(prefix, sidecar_of(tokenizer, writer.dtype, writer.state, writer.checksums))
        print(f"{folder}/{name}_text_document: {len(part):,} characters")
    print(
        f"{folder}/tokenizer.json: {len(tokenizer.tokens)} characters, and ids for others and the end of text"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=RUN, metavar="DIR", help=f"default: {RUN}")
    options = parser.parse_args(arguments)
    try:
        text = Path(options.text).read_text(encoding="utf-8")
        if len(text) < 2:
            raise ValueError(f"{options.text}: {len(text)} characters are too few to train on")
        prepare(text, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = ["python pretrain_gpt.py --config configs/shakespeare_char.json"]
    if options.output != RUN:
        command.append(f"--set data.tokenizer=char:{options.output}/tokenizer.json")
        command += [f"--set data.{name}={options.output}/{name}_text_document" for name in ("train", "valid")]
        command.append(f"--set train.output_dir={options.output}")
    print("\nTrain it with:\n\n    " + " \\\n        ".join(command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
