"""Checkpoints that know nothing of layouts, and their Hugging Face equivalents.

`save` writes what each rank holds; `Reader` gives any slice back to any other layout; no pickle is involved.
"""

from megatron_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megatron_lite.checkpoint.files import Deferred
from megatron_lite.checkpoint.host import HostCopy, available_bytes
from megatron_lite.checkpoint.index import TOKENIZER
from megatron_lite.checkpoint.latest import find_latest, resolve, search, search_output
from megatron_lite.checkpoint.layout import KINDS, Piece
from megatron_lite.checkpoint.reader import Reader, side_by_side
from megatron_lite.checkpoint.store import save

__all__ = [
    "KINDS",
    "TOKENIZER",
    "CheckpointError",
    "DamagedCheckpoint",
    "Deferred",
    "HostCopy",
    "Piece",
    "Reader",
    "available_bytes",
    "find_latest",
    "resolve",
    "save",
    "search",
    "search_output",
    "side_by_side",
]
