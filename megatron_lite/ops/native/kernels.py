"""The compiled module: whether it serves here, and calls with tensors where the kernels take addresses."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_lite.ops.arguments import Documents

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types by their numbers in csrc/include/kernels.h."""

_module: ModuleType | None = None
_missing = ""
try:
    _module = importlib.import_module("megatron_lite.ops._kernels")
except (ImportError, OSError) as error:
    _missing = f"the kernels are not built ({error}); `make setup` or `pip install .` builds them"


def serves(device_type: str, dtype: torch.dtype, operation: str | None = None) -> str | None:
    """None where the kernels serve this type on this kind of device, else why they do not.

    Args:
        operation: the name of one of them; without it, what holds for all.
    """
    if _module is None:
        return _missing
    if device_type not in ("cpu", "cuda"):
        return f"there are kernels for cpu and cuda, none for {device_type}"
    name = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES or (device_type == "cpu" and dtype == torch.float16):
        known = "float32 and bfloat16" if device_type == "cpu" else "float32, bfloat16 and float16"
        return f"on {device_type} the kernels take {known}, not {name}"
    if device_type == "cuda":
        if not _module.cuda_compiled:
            return "the kernels were built without CUDA; install the CUDA toolkit (nvcc) and build them again"
        if operation == "attention" and dtype == torch.float32:
            return "attention on cuda runs on tensor cores: bfloat16 and float16, not float32"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return f"the kernels need compute capability 8.0 or more; {torch.cuda.get_device_name()} has less"
    if operation == "attention" and not hasattr(_module, f"{device_type}_attention_forward"):
        return f"the kernels were built without attention on {device_type}; build them again"
    return None


def launch(name: str, x: Tensor, *arguments: Any) -> None:
    """Runs a kernel of x's device and type: `name`, and what it takes after the type, as csrc/include declares it.

    Tensors go by their address, None as none; on CUDA the kernel is put on the current stream of x's device. Fake
    tensors have no memory: with them nothing happens, so that a function that allocates its results and then launches
    is its own fake implementation.

    Raises:
        TypeError: no kernel serves the type or the device.
        ValueError: a tensor lies on another device than x.
    """
    if isinstance(x, FakeTensor):
        return
    device, dtype = x.device, x.dtype
    kernel = getattr(_module, f"{device.type}_{name}", None)
    if kernel is None or dtype not in DTYPES or (dtype == torch.float16 and not x.is_cuda):
        reason = serves(device.type, dtype, name.removesuffix("_forward").removesuffix("_backward"))
        raise TypeError(f"no native {name}: {reason}; megatron_lite.ops.reference takes any type and device")
    given = [DTYPES[dtype]]
    for argument in arguments:
        if argument is None:
            given.append(0)
        elif isinstance(argument, Tensor):
            if argument.device != device:
                raise ValueError(
                    f"{name}: tensors on {device} and {argument.device}; move them to one device"
                )
            given.append(argument.data_ptr())
        else:
            given.append(argument)
    if not x.is_cuda:
        kernel(*given)
    elif device.index == torch.cuda.current_device():
        kernel(*given, torch.cuda.current_stream().cuda_stream)
    else:
        with torch.cuda.device(device):
            kernel(*given, torch.cuda.current_stream().cuda_stream)


def workspace(x: Tensor, rows: int, cols: int, width: int) -> tuple[Tensor, int]:
    """Room for partial sums over the rows of x [rows, cols], `width` of them for each part, and the number of parts."""
    if isinstance(x, FakeTensor):
        return x, 0
    parts: int = getattr(_module, f"{x.device.type}_workspace_rows")(rows, cols)
    return torch.empty(parts * width, dtype=torch.float32, device=x.device), parts


def attention_workspace(q: Tensor) -> Tensor:
    """Room for the backward pass of attention with these queries."""
    if isinstance(q, FakeTensor):
        return q
    size = getattr(_module, f"{q.device.type}_attention_workspace")(*q.shape)
    return torch.empty(size, dtype=torch.uint8, device=q.device)


def strided(x: Tensor, unit: int = 1) -> Tensor:
    """x [b, heads, s, d] as kernels with strides take it: features contiguous. Copied only if it is not.

    Args:
        unit: number of elements at whose multiples rows must lie.
    """
    if x.stride(3) == 1 and (unit == 1 or not any(n % unit for n in (*x.stride()[:3], x.storage_offset()))):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # `contiguous` would leave one that starts anywhere


def signed(seed: int) -> int:
    """A 64-bit seed as operators of torch.library take integers; `unsigned` is its inverse."""
    return seed if seed < 2**63 else seed - 2**64


def unsigned(seed: int) -> int:
    """A 64-bit seed as kernels take it."""
    return seed if seed >= 0 else seed + 2**64


def rows_of(x: Tensor) -> int:
    """The number of rows of x seen as a matrix of its last dimension; 0 where that is empty."""
    cols = x.size(-1)
    return x.numel() // cols if cols else 0


def check_vector(name: str, vector: Tensor, x: Tensor, size: int) -> Tensor:
    """A weight or bias as kernels take it: [size], contiguous, of the type of x.

    Raises:
        ValueError: it has another shape or type.
    """
    if vector.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; x of {tuple(x.shape)} needs ({size},)")
    if vector.dtype != x.dtype:
        raise ValueError(
            f"{name} is {vector.dtype}, but x is {x.dtype}; native kernels take one type: cast one of them"
        )
    return vector.contiguous()


def check_documents(
    documents: Documents | None, batch: int, queries: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The numbers of the queries' and of the keys' documents, as kernels take them.

    Raises:
        ValueError: they are not int32, contiguous, [batch, queries] and [batch, keys].
    """
    if documents is None:
        return None, None
    for name, numbers, size in (("queries", documents.queries, queries), ("keys", documents.keys, keys)):
        if numbers.shape != (batch, size) or numbers.dtype != torch.int32 or not numbers.is_contiguous():
            given = f"{numbers.dtype} {tuple(numbers.shape)}"
            raise ValueError(f"documents.{name} is {given}; it must be contiguous int32 ({batch}, {size})")
    return documents.queries, documents.keys
