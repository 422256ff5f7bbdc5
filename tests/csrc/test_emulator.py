"""The emulator itself: what it computes, and what it refuses, on kernels of a few lines."""

import ctypes
import subprocess
from functools import cache

import numpy as np
import pytest

from tests.csrc.emulation import CSRC, SCHEDULES, new_folder

KERNELS = r"""
#include "common.cuh"
using namespace mlite;

// Kernels of one block over int out[threads].
__global__ void shuffles(int, int* out) {
  const int lane = threadIdx.x % 32, half = threadIdx.x % 16;
  int bad = __shfl_sync(kAllLanes, lane, 5) != 5;
  bad |= (__shfl_sync(kAllLanes, lane, half, 16) != lane) << 1;
  bad |= (__shfl_up_sync(kAllLanes, lane, 3) != (lane < 3 ? lane : lane - 3)) << 2;
  bad |= (__shfl_down_sync(kAllLanes, lane, 3, 8) != (lane % 8 > 4 ? lane : lane + 3)) << 3;
  bad |= (__shfl_xor_sync(kAllLanes, lane, 17) != (lane ^ 17)) << 4;
  bad |= (__ballot_sync(kAllLanes, lane < 3) != 7u) << 5;
  bad |= (!__any_sync(kAllLanes, lane == 3) || __all_sync(kAllLanes, lane == 3)) << 6;
  bad |= (__reduce_min_sync(kAllLanes, 7 - lane) != -24 || __reduce_max_sync(kAllLanes, 7 - lane) != 7) << 8;
  if (lane < 8) bad |= (__shfl_xor_sync(0xffu, lane, 1) != (lane ^ 1)) << 7;
  out[threadIdx.x] = bad;
}
__global__ void barrier_missing(int, int* out) {
  MLITE_SHARED_ARRAY(int, box, 1024);
  box[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = box[blockDim.x - 1 - threadIdx.x];
}
__global__ void warp_in_step(int, int* out) {  // counts on the lanes of a warp running in step
  MLITE_SHARED_ARRAY(int, box, 1024);
  box[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = box[threadIdx.x ^ 1];
}
__global__ void synchronised(int, int* out) {
  MLITE_SHARED_ARRAY(int, box, 1024);
  box[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = box[blockDim.x - 1 - threadIdx.x];
}
__global__ void some_end_early(int, int* out) {
  if (threadIdx.x % 3 == 0) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void stuck(int, int* out) {
  if (threadIdx.x < 40) __syncthreads();
  else out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}
__global__ void lane_gone(int, int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}
__global__ void not_in_mask(int, int* out) { out[threadIdx.x] = __shfl_sync(0xfffu, 1, 0); }
__global__ void different(int, int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(kAllLanes, 1, 0) : __any_sync(kAllLanes, 1);
}
__global__ void off_alignment(int, int* out) { store<4>(out + 1, Vector<int, 4>()); }

extern "C" int run(int kernel, int threads, size_t shared, int* out) {
  void (*const kernels[])(int, int*) = {shuffles, barrier_missing, warp_in_step, synchronised, some_end_early,
                                        stuck, lane_gone, not_in_mask, different, off_alignment};
  return launch(kernels[kernel], 1, threads, shared, nullptr, 0, out);
}
extern "C" unsigned half_bits(float x) { return from_float<f16>(x).bits; }
extern "C" float half_value(unsigned short bits) { return to_float(f16{bits}); }
extern "C" unsigned bf16_bits(float x) { return from_float<bf16>(x).bits; }
"""
NAMES = [
    "shuffles", "barrier_missing", "warp_in_step", "synchronised", "some_end_early",
    "stuck", "lane_gone", "not_in_mask", "different", "off_alignment",
]  # fmt: skip
INVALID_CONFIGURATION, LAUNCH_FAILURE = 9, 719


@cache
def library() -> ctypes.CDLL:
    folder = new_folder()
    (folder / "kernels.cu").write_text(KERNELS, encoding="utf-8")
    files = ["-x", "c++", str(folder / "kernels.cu"), str(CSRC / "emulator" / "fibres.cpp")]
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-DMLITE_EMULATOR", "-I", str(CSRC / "cuda")]
    subprocess.run(["g++", *flags, "-fPIC", "-shared", *files, "-o", str(folder / "kernels.so")], check=True)
    found = ctypes.CDLL(str(folder / "kernels.so"))
    found.mlite_emulator_error.restype = ctypes.c_char_p
    found.half_bits.argtypes = found.bf16_bits.argtypes = [ctypes.c_float]
    found.half_value.restype = ctypes.c_float
    return found


def run(kernel: str, threads: int, schedule: int, shared: int = 0) -> tuple[int, np.ndarray]:
    out = np.full(threads, -7, np.int32)
    library().mlite_emulator_schedule(schedule)
    pointer = out.ctypes.data_as(ctypes.c_void_p)
    return library().run(NAMES.index(kernel), threads, ctypes.c_size_t(shared), pointer), out


@pytest.mark.parametrize("schedule", [*SCHEDULES, 3, 4])
def test_what_is_synchronised_gives_the_same_under_every_schedule(schedule: int) -> None:
    code, out = run("shuffles", 96, schedule)
    assert code == 0 and not out.any(), out
    code, out = run("synchronised", 96, schedule)
    assert code == 0 and (out == np.arange(96)[::-1]).all()
    code, out = run("some_end_early", 96, schedule)
    assert code == 0 and (out == np.where(np.arange(96) % 3, 1, -7)).all()


@pytest.mark.parametrize("kernel", ["barrier_missing", "warp_in_step"])
def test_what_is_not_synchronised_shows_in_some_schedule(kernel: str) -> None:
    wanted = np.arange(96)[::-1] if kernel == "barrier_missing" else np.arange(96) ^ 1
    assert any((run(kernel, 96, schedule)[1] != wanted).any() for schedule in SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("stuck", "stuck"),
        ("lane_gone", "which has ended|stuck"),
        ("not_in_mask", "not in its own mask"),
        ("different", "different collectives"),
        ("off_alignment", "not aligned"),
    ],
)
def test_what_hardware_leaves_undefined_is_an_error(kernel: str, words: str, schedule: int) -> None:
    code, _ = run(kernel, 64, schedule)
    message = library().mlite_emulator_error().decode()
    assert code == LAUNCH_FAILURE
    assert any(part in message for part in words.split("|")), message
    assert run("synchronised", 64, schedule)[0] == 0, "the next launch suffers from the failed one"


def test_launches_beyond_the_hardware_are_refused() -> None:
    assert run("synchronised", 1025, 0)[0] == INVALID_CONFIGURATION
    assert run("synchronised", 32, 0, shared=232449)[0] == INVALID_CONFIGURATION
    assert run("synchronised", 32, 0, shared=232448)[0] == 0


def test_conversions_round_as_numpy_does() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    values = np.array([library().half_value(int(bits)) for bits in halves], np.float32)
    np.testing.assert_array_equal(values, halves.view(np.float16).astype(np.float32))
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal(5000) * 10.0 ** generator.integers(-9, 6, 5000)
    edges = [0, -0.0, 65504, 65519.9, 65520, np.inf, -np.inf, 2**-24, 2**-25, 2**-14, 2047.5 / 2048 * 2**-14]
    x = np.concatenate([drawn, edges]).astype(np.float32)
    with np.errstate(over="ignore"):
        assert [library().half_bits(v) for v in x] == x.astype(np.float16).view(np.uint16).tolist()
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert [library().bf16_bits(v) for v in x] == nearest.tolist()
    assert library().half_bits(np.nan) == library().bf16_bits(np.nan) == 0x7FFF
