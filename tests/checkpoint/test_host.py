"""The copy in host memory: the same bits, apart from what they were taken from, in memory that is kept."""

from dataclasses import replace

import pytest
import torch

from megatron_lite.checkpoint import Deferred, HostCopy, Piece


def some_pieces(scale):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) * scale for size in (1, 7, 64, 1000)]
    tensors += [tensors[3].bfloat16(), torch.arange(5), tensors[3].clone().view(10, 100)[:, 3]]
    return [Piece(f"p{at}", "weight", (len(t),), None, 0, 0, at, t) for at, t in enumerate(tensors)]


def test_a_copy_is_the_same_and_stays_so():
    host, pieces = HostCopy(), some_pieces(1)
    for _ in range(2):
        copies = host.take(pieces)
        where = [copy.data.data_ptr() for copy in copies]
        for piece, copy in zip(pieces, copies, strict=True):
            assert (copy.name, copy.flat_start) == (piece.name, piece.flat_start)
            assert copy.data.dtype == piece.data.dtype and torch.equal(copy.data, piece.data)
            expected = piece.data.clone()
            piece.data.add_(1)
            assert torch.equal(copy.data, expected)
    again = host.take(some_pieces(2)[:4])
    assert [copy.data.data_ptr() for copy in again] == where[:4], "memory is kept"
    host.take([*pieces, Piece.whole("large", "weight", torch.ones(100_000))])


def test_a_deferred_tensor_has_no_copy():
    deferred = Deferred(torch.float32, (3,), lambda: torch.ones(3))
    with pytest.raises(AssertionError, match="made in its turn"):
        HostCopy().take([Piece("p", "weight", (3,), None, 0, 0, 0, deferred)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_from_a_gpu():
    host = HostCopy()
    for scale in (1, 2):
        pieces = [replace(piece, data=piece.data.cuda()) for piece in some_pieces(scale)]
        for piece, copy in zip(pieces, host.take(pieces), strict=True):
            assert copy.data.device.type == "cpu" and torch.equal(copy.data, piece.data.cpu())
    assert host._locked
    host.close()
