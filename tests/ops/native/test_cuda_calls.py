"""What the CUDA path does before a kernel runs, as far as that can be seen without a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lite.ops import native
from megatron_lite.ops.native import kernels


@pytest.mark.parametrize("number", [0, 1])
def test_a_kernel_runs_on_the_device_and_stream_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls: list[Any] = []
    current = [0]

    @contextmanager
    def guard(device: torch.device) -> Any:
        current.append(device.index)
        yield
        current.pop()

    def run(*given: Any) -> None:
        calls.append((current[-1], given))

    monkeypatch.setattr(kernels, "_module", SimpleNamespace(cuda_dropout=run, cuda_compiled=True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=70 + current[-1]))
    x: Any = SimpleNamespace(device=torch.device("cuda", number), dtype=torch.float16, is_cuda=True)
    kernels.launch("dropout", x, 3, None, 0.5)
    assert calls == [(number, (2, 3, 0, 0.5, 70 + number))]
    with pytest.raises(ValueError, match=r"tensors on cuda:[01] and cpu"):
        kernels.launch("dropout", x, torch.ones(2))


def test_attention_on_cuda_reads_16_bytes_at_a_time() -> None:
    with FakeTensorMode(), torch.no_grad():
        for head_dim in (16, 20):
            together = torch.empty(2, 6, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16)
            out = native.attention(*(x.transpose(1, 2) for x in together.unbind(2)))
            assert out.shape == (2, 4, 6, head_dim) and out.device.type == "cuda"
            assert out.stride(1) == (16 if head_dim == 16 else 24)


def test_what_does_not_lie_at_multiples_is_copied() -> None:
    wide = torch.empty(2, 4, 6, 24, dtype=torch.bfloat16)
    odd, even, apart = wide[..., 1:17], wide[..., 8:], wide[..., ::2]
    assert kernels.strided(odd, 8).is_contiguous() and kernels.strided(even, 8) is even
    assert kernels.strided(odd) is odd and kernels.strided(apart).is_contiguous()
    shifted = torch.empty(2 * 4 * 6 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 6, 16)
    assert kernels.strided(shifted, 8).storage_offset() == 0 and kernels.strided(shifted) is shifted
