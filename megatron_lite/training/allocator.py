"""glibc's allocator, set so that large tensors are reused instead of being mapped afresh."""

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MEGABYTE = 1 << 20


def set_cpu_allocator() -> bool:
    """Keeps freed memory in the process; call before the first large tensor.

    glibc gives blocks over 32 MB back to the system when they are freed, and the page faults of taking them again
    cost more than the arithmetic on them. The price is resident memory that does not shrink.

    Returns:
        False where the C library is not glibc, and nothing was changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MEGABYTE}
    return all(libc.mallopt(parameter, value) for parameter, value in settings.items())
