"""What all tests share: one thread, no network, GPU tests skipped where there is none, optional real data."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.parity")

# Before torch is imported: tests fork their ranks, and a child of a process with an OpenMP pool hangs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# torch.compile imports it, and it refuses to be imported once anything has imported the standard library's distutils.
with suppress(ImportError):
    import setuptools  # noqa: F401

# Of property tests the same examples in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=explore draws
# new ones. Machines with torch alone run the GPU tests without hypothesis.
with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("explore", deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text and tokenizer files outside the repository; skips where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEGATRON_LITE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is no directory (set MEGATRON_LITE_TEST_DATA)")
    return folder
