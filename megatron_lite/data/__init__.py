"""Tokenized datasets: files, sample order, blends and the loader. No torch: arrays are numpy's."""

from megatron_lite.data.blend import BlendedDataset
from megatron_lite.data.build import build_dataset, build_datasets
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import GPTDataset, SampleDataset
from megatron_lite.data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from megatron_lite.data.loader import Batch, DataLoader, make_loader

__all__ = [
    "Batch",
    "BlendedDataset",
    "DataLoader",
    "DatasetError",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "SampleDataset",
    "build_dataset",
    "build_datasets",
    "make_loader",
    "token_dtype",
]
