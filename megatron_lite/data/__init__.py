"""Tokenized datasets: files, sample order, blends and the loader. No torch: arrays are numpy's."""

from megatron_lite.data.blend import BlendedDataset
from megatron_lite.data.build import build_dataset, build_datasets
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import GPTDataset, SampleDataset
from megatron_lite.data.indexed import IndexedDataset, token_dtype
from megatron_lite.data.loader import Batch, DataLoader, make_loader
from megatron_lite.data.sidecar import Sidecar, check_sidecars, read_sidecar, sidecar_of, write_sidecar
from megatron_lite.data.writer import IndexedDatasetWriter, WriterState

__all__ = [
    "Batch",
    "BlendedDataset",
    "DataLoader",
    "DatasetError",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "SampleDataset",
    "Sidecar",
    "WriterState",
    "build_dataset",
    "build_datasets",
    "check_sidecars",
    "make_loader",
    "read_sidecar",
    "sidecar_of",
    "token_dtype",
    "write_sidecar",
]
