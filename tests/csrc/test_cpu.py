"""The CPU kernels, built once per process, in every build that this machine runs, against float64."""

import ctypes
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csrc import build
from tests.csrc import checks
from tests.csrc.emulation import (
    DTYPES,
    GUARD,
    Library,
    _argument,
    _bytes,
    _guarded,
    new_folder,
    signatures,
)

ISAS = build.isas()
DTYPE = st.sampled_from([torch.float32, torch.bfloat16])
KINDS = ["gelu", "gelu_tanh", "swiglu"]
COLS = st.one_of(st.integers(1, 80), st.sampled_from([256, 768, 1281, 2048 + 5]))


@cache
def _built() -> ctypes.CDLL:
    """The package's objects, which are made again only where sources changed."""
    library = new_folder() / "library.so"
    build.link(build.compile_units(build.cpu_units(), build.OBJECTS, jobs=2), library)
    return ctypes.CDLL(str(library))


class CpuLibrary(Library):
    """mlite_cpu_NAME, or of one build mlite_cpu_NAME_ISA, on guarded copies of tensors."""

    def __init__(self, isa: str | None) -> None:
        self._library, self._suffix = _built(), "" if isa is None else f"_{isa}"

    def __repr__(self) -> str:
        return f"CpuLibrary({self._suffix!r})"

    def call(self, name: str, *arguments: Any, schedules: Any = ()) -> None:
        function = getattr(self._library, f"mlite_cpu_{name}{self._suffix}")
        function.argtypes = signatures()[name]
        originals = {a.untyped_storage().data_ptr(): a for a in arguments if isinstance(a, Tensor)}
        guarded = {key: _guarded(tensor, "cpu") for key, tensor in originals.items()}
        assert function(*(_argument(a, guarded) for a in arguments)) == 0
        for key, buffer in guarded.items():
            assert (buffer[:GUARD] == 255).all() and (buffer[-GUARD:] == 255).all(), (
                f"{name}: beyond a tensor"
            )
            _bytes(originals[key]).copy_(buffer[GUARD:-GUARD])


def _supported() -> list[str]:
    return ISAS[: _built().mlite_cpu_instruction_set() + 1]


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    if request.param not in _supported():
        pytest.skip(f"this machine has no {request.param}")
    return CpuLibrary(request.param)


LIBRARY = st.deferred(lambda: st.sampled_from([CpuLibrary(isa) for isa in _supported()]))


few = settings(max_examples=40, deadline=None)


@few
@given(
    library=LIBRARY,
    rows=st.integers(0, 12),
    cols=COLS,
    dtype=DTYPE,
    rms=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    workspace_rows=st.integers(1, 9),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norm(library: CpuLibrary, rows: int, cols: int, dtype: torch.dtype, **options: Any) -> None:
    checks.check_norm(library, rows, cols, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_may_overwrite_its_input(library: CpuLibrary, dtype: torch.dtype) -> None:
    rows, cols, g = 3, 77, torch.Generator().manual_seed(0)
    x, dy, weight = (
        checks.numbers(g, *shape, dtype=dtype) for shape in ((rows, cols), (rows, cols), (cols,))
    )
    mean, rstd, dweight, workspace = (
        torch.zeros(rows),
        torch.zeros(rows),
        torch.zeros(cols),
        torch.zeros(2, cols),
    )

    def run(y: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        kept = x.clone()
        library.call(
            "norm_forward", dtype, False, rows, cols, 1e-5, x, None, weight, None, y, None, mean, rstd
        )
        library.call(
            "norm_backward", dtype, False, rows, cols, dy, None, kept, weight, mean, rstd, dx, dweight, None,
            workspace, 2,
        )  # fmt: skip
        return y, dx

    apart = run(torch.zeros_like(x), torch.zeros_like(dy))
    assert all(torch.equal(a, b) for a, b in zip(run(x, dy), apart, strict=True))


@few
@given(
    library=LIBRARY,
    kind=st.sampled_from(KINDS),
    rows=st.one_of(st.integers(0, 12), st.just(300)),
    cols=COLS,
    dtype=DTYPE,
    bias=st.booleans(),
    workspace_rows=st.integers(1, 9),
    offset=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
def test_activation(
    library: CpuLibrary, kind: str, rows: int, cols: int, dtype: torch.dtype, **options: Any
) -> None:
    checks.check_activation(library, kind, rows, cols, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_larger_than_the_caches(library: CpuLibrary, dtype: torch.dtype) -> None:
    """It is written past them; in parts that are not, the same bits."""
    rows, cols, parts = 8448, 1024, 5
    x = torch.rand(rows, 2 * cols, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, dx = torch.full_like(x[:, :cols], math.nan).contiguous(), torch.full_like(x, math.nan)
        library.call("swiglu_forward", dtype, len(x), cols, x, None, y)
        library.call("swiglu_backward", dtype, len(x), cols, y, x, None, dx, None, None, 0)
        return y, dx

    pieces = [run(part.clone()) for part in x.chunk(parts)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(run(x), zip(*pieces, strict=True), strict=True))


@few
@given(
    library=LIBRARY,
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 9), COLS),
    dtype=DTYPE,
    causal=st.booleans(),
    masked=st.sampled_from([None, "one", "all"]),
    segments=st.booleans(),
    offset=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
def test_softmax(
    library: CpuLibrary,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    masked: str | None,
    **options: Any,
) -> None:
    mask_heads = {None: None, "one": 1, "all": shape[1]}[masked]
    checks.check_softmax(library, shape, dtype, mask_heads=mask_heads, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_of_rows_too_long_to_be_kept(library: CpuLibrary, dtype: torch.dtype) -> None:
    for keys in (4096, 4097, 5000):
        checks.check_softmax(library, (1, 1, 2, keys), dtype, segments=True)


@few
@given(
    library=LIBRARY,
    rows=st.integers(0, 9),
    cols=st.one_of(st.integers(2, 80), st.sampled_from([1281, 4100])),
    dtype=DTYPE,
    slices=st.integers(1, 3),
    share=st.floats(0, 1),
    z_loss=st.sampled_from([0.0, 1e-2]),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cross_entropy(
    library: CpuLibrary, rows: int, cols: int, dtype: torch.dtype, slices: int, share: float, **options: Any
) -> None:
    padding = int(share * (slices * cols - 1))  # the last slices may be all padding
    checks.check_cross_entropy(library, rows, cols, dtype, slices=slices, padding=padding, **options)


@few
@given(
    library=LIBRARY,
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 9), st.integers(0, 5)),
    head_dim=st.sampled_from([2, 6, 16, 40, 64, 128]),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dtype=DTYPE,
    tables=st.booleans(),
    in_place=st.booleans(),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotary(
    library: CpuLibrary,
    sizes: tuple[int, int, int, int],
    head_dim: int,
    share: float,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    rotary_dim = int(head_dim * share) // 2 * 2
    checks.check_rotary(library, sizes, head_dim, rotary_dim, dtype, **options)


@few
@given(
    library=LIBRARY,
    rows=st.integers(0, 7),
    cols=st.one_of(st.integers(1, 40), st.just(600)),
    dtype=DTYPE,
    p=st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]),
    row_stride=st.sampled_from([None, 600, 601]),
    start=st.sampled_from([0, 3, 8, 2**34 - 5, 2**40 + 4]),
    dropout_seed=st.integers(0, 2**64 - 1),
    offset=st.booleans(),
)
def test_dropout(library: CpuLibrary, rows: int, cols: int, dtype: torch.dtype, **options: Any) -> None:
    checks.check_dropout(library, rows, cols, dtype, **options)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_numbers_pass_through(library: CpuLibrary, spoil: float, dtype: torch.dtype) -> None:
    for rms in (False, True):
        checks.check_norm(library, 3, 40, dtype, rms=rms, bias=not rms, spoil=spoil)
    checks.check_softmax(library, (1, 2, 3, 5), dtype, spoil=spoil)
    checks.check_softmax(library, (1, 2, 3, 1), dtype, spoil=spoil)
    for whole_row in (False, True):
        checks.check_cross_entropy(
            library, 3, 40, dtype, slices=2, padding=5, spoil=spoil, whole_row=whole_row
        )
    if spoil > -math.inf:  # of which GELU is -0 by one formula and NaN by another
        for kind in KINDS:
            checks.check_activation(library, kind, 3, 24, dtype, bias=False, spoil=spoil)


def test_every_bf16_number_passes_unchanged(library: CpuLibrary) -> None:
    """Denormals too; a NaN stays one."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = torch.zeros_like(x)
    library.call("dropout", torch.bfloat16, 1, x.numel(), x.numel(), 0, 0.0, 0, x, y)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.view(torch.int16)[~x.isnan()], x.view(torch.int16)[~x.isnan()])


def test_rounding_to_bf16_keeps_any_nan(library: CpuLibrary) -> None:
    """One whose bits are all ones, too, which rounding up alone would turn into -0."""
    grad = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    y, none = torch.ones(1, 24, dtype=torch.bfloat16), torch.tensor([-1])
    library.call(
        "cross_entropy_grad", torch.bfloat16, 1, 24, 24, 0, y, none, torch.ones(1), torch.ones(1), grad, 0.0
    )
    assert y.isnan().all()


def test_exp_is_within_two_units_in_the_last_place(library: CpuLibrary) -> None:
    """Seen through the gradient of cross entropy where maximum, sum and factor are 0, 1 and 1."""
    x = torch.cat([torch.linspace(-110, 95, 100_003), torch.tensor([-1e30, -200.0, 200.0, 1e30, 0.0])])
    y, none = x.clone(), torch.tensor([-1])
    library.call(
        "cross_entropy_grad", torch.float32, 1, y.numel(), y.numel(), 0, y, none, torch.zeros(1), torch.ones(1),
        torch.ones(1), 0.0,
    )  # fmt: skip
    exact = x.double().exp()
    overflow = exact >= torch.finfo(torch.float32).max
    assert y[overflow].isinf().all()
    spacing = torch.exp2(exact.log2().floor().clamp(min=-126) - 23)
    assert ((y - exact).abs() / spacing)[~overflow].max() <= 2
    assert y[-1] == 1 and (y[x < -104] == 0).all()


def test_the_tail_of_gelu_keeps_its_digits(library: CpuLibrary) -> None:
    x = torch.linspace(-12, -1, 5001)
    y = torch.zeros_like(x)
    library.call("bias_gelu_forward", torch.float32, False, 1, x.numel(), x, None, y)
    exact = x.double() * 0.5 * torch.special.erfc(-x.double() / math.sqrt(2))
    assert ((y - exact) / exact).abs().max() < 2e-5  # 1 + erf would have lost all of them below -6


def _everything(library: CpuLibrary, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and sums of enough rows that the work is divided among threads."""
    g = torch.Generator().manual_seed(0)
    rows, cols = 130, 515
    x, dy = (checks.numbers(g, rows, cols, dtype=dtype) for _ in range(2))
    gates = checks.numbers(g, rows, 2 * cols, dtype=dtype)
    weight, shift = (checks.numbers(g, 2 * cols, dtype=dtype) for _ in range(2))
    y, dx, dgates = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(gates)
    mean, rstd, blocks = torch.zeros(rows), torch.zeros(rows), 5
    dweight, dbias, dshift, dgelu = (torch.zeros(width) for width in (cols, cols, 2 * cols, cols))
    workspace, scores = torch.zeros(blocks, 2 * cols), torch.zeros_like(x)
    library.call("norm_forward", dtype, False, rows, cols, 1e-5, x, None, weight, shift, y, None, mean, rstd)
    library.call(
        "norm_backward", dtype, False, rows, cols, dy, None, x, weight, mean, rstd, dx, dweight, dbias, workspace,
        blocks,
    )  # fmt: skip
    library.call("swiglu_backward", dtype, rows, cols, dy, gates, shift, dgates, dshift, workspace, blocks)
    gelu = dx.clone()
    library.call("bias_gelu_backward", dtype, False, rows, cols, dy, x, shift, gelu, dgelu, workspace, blocks)
    none = [None, 0, 0, 0, 0, None, None]
    library.call("softmax_forward", dtype, 1, 1, rows, cols, 1.0, x, *none, True, scores)
    return [y, dx, dgates, gelu, mean, rstd, dweight, dbias, dshift, dgelu, scores]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    library, threads = CpuLibrary(None), _built().omp_get_max_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            _built().omp_set_num_threads(count)
            results.append(_everything(library, dtype))
    finally:
        _built().omp_set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_names_are_the_best_build(dtype: torch.dtype) -> None:
    best = _supported()[-1]
    for plain, chosen in zip(
        _everything(CpuLibrary(None), dtype), _everything(CpuLibrary(best), dtype), strict=True
    ):
        assert torch.equal(plain, chosen)


def test_a_good_number_of_partial_sums() -> None:
    count = _built().mlite_cpu_workspace_rows
    count.argtypes, count.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    assert [count(rows, 768) for rows in (0, 1, 32, 33, 10**6)] == [1, 1, 1, 2, 256]


def test_float16_is_refused() -> None:
    x = torch.zeros(1, 8, dtype=torch.float16)
    function = _built().mlite_cpu_swiglu_forward
    function.argtypes = signatures()["swiglu_forward"]
    assert function(DTYPES[torch.float16], 1, 4, x.data_ptr(), None, x.data_ptr()) == 1
