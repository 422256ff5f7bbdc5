// What the attention kernels share: swizzled tiles in shared memory, products of tiles, masks.
#pragma once
#include "common.cuh"
#include "mma.cuh"

namespace mlite {

constexpr float kLog2E = 1.4426950408889634f;

// One [sequence, head_dim] matrix of a [batch, head, sequence, head_dim] tensor of 16-bit values.
struct Matrix {
  uint16_t* data;
  int64_t stride;
};

struct Tensor {
  void* data;
  int64_t batch, head, sequence;  // strides in elements

  __device__ __forceinline__ Matrix at(int b, int h) const {
    return {static_cast<uint16_t*>(data) + b * batch + h * head, sequence};
  }
};

// Problem sizes, masks and dropout, the same in every kernel.
struct Attention {
  int heads, groups, queries, keys, head_dim;
  bool causal;
  float scale;
  const int32_t *segments_q, *segments_k;  // [batch, queries], [batch, keys], or both nullptr
  bool drops;             // whether any probability is dropped: where a random word is at most last_dropped
  uint32_t last_dropped;
  uint64_t seed;
  int64_t first_plane, planes;  // first head and number of heads in the index of a probability
  float kept;                   // factor of the others

  // The last query sees the last key: query i sees keys up to i + shift().
  __device__ __forceinline__ int shift() const { return keys - queries; }

  __device__ __forceinline__ int64_t plane(int batch, int head) const { return batch * planes + first_plane + head; }
};

// A tile of rows of D 16-bit values. The 16-byte chunks of a row are permuted by the row's number, so that
// the eight rows of one matrix of ldmatrix, and the rows that cp.async fills, lie in different banks.
template <int D>
struct Tile {
  static constexpr int chunks = D / 8;
  static constexpr int permuted = chunks % 8 == 0   ? 8
                                  : chunks % 4 == 0 ? 4
                                                    : 2;  // neighbouring chunks change places

  static __device__ __forceinline__ int at(int row, int chunk) { return at(0, 0, row, chunk); }

  // Offset of chunk (row + lane_row, chunk + lane_chunk) for row a multiple of 8, chunk even, lane_chunk 0 or
  // 1 (or chunk 0 and lane_chunk any). With row and chunk known to the compiler, few of the offsets a lane needs
  // differ by more than a constant, and the registers are left to the products.
  static __device__ __forceinline__ int at(int row, int chunk, int lane_row, int lane_chunk) {
    const int swizzle = lane_row * permuted / 8 % permuted;
    return (row + lane_row) * D +
           (chunk / permuted * permuted + ((chunk % permuted) ^ lane_chunk ^ swizzle)) * 8;
  }
};

// Starts the copy of rows [first, first + Rows) of a matrix; rows from `rows` on and columns from `head_dim`
// on are zero.
template <int Rows, int D, int Threads>
__device__ __forceinline__ void load_tile(uint16_t* tile, Matrix matrix, int first, int rows, int head_dim) {
  constexpr int chunks = Tile<D>::chunks, threads = Threads / chunks * chunks, step = threads / chunks;
  const int thread = here(threadIdx.x), row = thread / chunks, chunk = thread % chunks;
  if (thread >= threads) return;  // whole rows at a time: of 128 threads 120 copy rows of 12 chunks
  const int valid = chunk * 8 < head_dim ? rows - first - row : 0;  // rows from this thread's first on
  const uint16_t* source = matrix.data + (first + row) * matrix.stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < Rows; i += step, source += step * matrix.stride) {
    if (Rows % step != 0 && i + row >= Rows) break;
    const int to = step % 8 == 0 ? Tile<D>::at(i, 0, row, chunk) : Tile<D>::at(i + row, chunk);
    copy_async(tile + to, source, i < valid);
  }
}

// c[i][j] += A B^T: c is [16 MT, 8 NT] of this warp, A its rows from `row` on, B all rows of the other tile.
template <class E, int D, int MT, int NT>
__device__ __forceinline__ void multiply_transposed(float (&c)[MT][NT][4], const uint16_t* a, int row,
                                                    const uint16_t* b) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // lanes may come from different branches
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t fa[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      ldmatrix(fa[m], a + Tile<D>::at(16 * m, 2 * k, row + lane % 16, lane / 16));
    }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t fb[4];
      ldmatrix(fb, b + Tile<D>::at(8 * n, 2 * k, lane % 8 + lane / 16 * 8, lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        E::mma(c[m][n], fa[m], fb[0], fb[1]);
        E::mma(c[m][n + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// c += S B: S [16 MT, 8 KT] are scores in registers (fragments of C, rounded to E here), B rows of a tile, of
// which the columns from 8 * `chunk` on, 8 NT in number, are used.
template <class E, int D, int MT, int KT, int NT>
__device__ __forceinline__ void multiply(float (&c)[MT][NT][4], const float (&s)[MT][KT][4],
                                         const uint16_t* b, int chunk) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // lanes may come from different branches
#pragma unroll
  for (int k = 0; k < KT; k += 2) {
    uint32_t fa[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      fa[m][0] = E::pack(s[m][k][0], s[m][k][1]);
      fa[m][1] = E::pack(s[m][k][2], s[m][k][3]);
      fa[m][2] = E::pack(s[m][k + 1][0], s[m][k + 1][1]);
      fa[m][3] = E::pack(s[m][k + 1][2], s[m][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t fb[4];
      ldmatrix_transposed(fb, b + Tile<D>::at(8 * k, chunk + n, lane % 16, lane / 16));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        E::mma(c[m][n], fa[m], fb[0], fb[1]);
        E::mma(c[m][n + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// Writes c [16 MT, 8 NT] of this warp to rows `first` + `row` ... of a matrix, by way of the warp's own rows
// of a tile that nobody reads any more, so that the writes are 16 bytes wide.
template <class E, int D, int MT, int NT>
__device__ __forceinline__ void store_rows(const float (&c)[MT][NT][4], uint16_t* tile, int row,
                                           Matrix matrix, int first, int rows, int chunk, int head_dim) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint16_t* to = tile + Tile<D>::at(row + 16 * m + 8 * half + lane / 4, chunk + n) + 2 * (lane % 4);
        *reinterpret_cast<uint32_t*>(to) = E::pack(c[m][n][2 * half], c[m][n][2 * half + 1]);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * MT * NT; i += kWarp) {
    const int r = row + i / NT, column = chunk + i % NT;
    if (first + r < rows && column * 8 < head_dim) {
      *reinterpret_cast<uint4*>(matrix.data + (first + r) * matrix.stride + column * 8) =
          *reinterpret_cast<const uint4*>(tile + Tile<D>::at(r, column));
    }
  }
}

// Smallest and largest segment id among some tokens: two tiles whose ranges do not meet have nothing in
// common.
struct SegmentRange {
  int low, high;

  __device__ __forceinline__ bool meets(SegmentRange other) const {
    return low <= other.high && other.low <= high;
  }
  __device__ __forceinline__ bool same(SegmentRange other) const {
    return low == high && low == other.low && high == other.high;
  }
};

// Range of ids[begin, end), found by every warp for itself.
__device__ __forceinline__ SegmentRange segment_range(const int32_t* ids, int begin, int end) {
  SegmentRange range = {INT32_MAX, INT32_MIN};
  for (int i = begin + here(threadIdx.x % kWarp); i < end; i += kWarp) {
    range = {min(range.low, ids[i]), max(range.high, ids[i])};
  }
  // Leaves the same in all lanes, and lets the compiler know, so that what follows from it needs one register a warp.
  return {__reduce_min_sync(kAllLanes, range.low), __reduce_max_sync(kAllLanes, range.high)};
}

// The first column of the first tile that has a segment in common with `own`, from `first` on; nothing below `end`
// where there is none. `masked`: whether it has other segments too. Long stretches without `own` are passed at once.
template <int Columns>
__device__ __forceinline__ int next_meeting(const int32_t* ids, int first, int end, SegmentRange own, bool& masked) {
  constexpr int stretch = 512;
  for (; first < end; first += Columns) {
    while (first % stretch == 0 && first < end &&
           !segment_range(ids, first, min(first + stretch, end)).meets(own))
      first += stretch;
    if (first >= end) break;
    const SegmentRange range = segment_range(ids, first, min(first + Columns, end));
    masked = !range.same(own);
    if (range.meets(own)) break;
  }
  return first;
}

// Scores of invisible pairs become -infinity. `row` and `column` are the first of this warp's scores; rows
// are queries and columns keys, or with KeyRows the other way round. Queries beyond the end keep theirs:
// nobody reads what comes of them, or their probabilities are zero.
template <bool KeyRows, int MT, int NT>
__device__ __forceinline__ void mask_scores(float (&s)[MT][NT][4], const Attention& p, int batch, int row,
                                            int column) {
  const int lane = here(threadIdx.x % kWarp), last_key = p.keys - 1, shift = p.causal ? p.shift() : p.keys;
  row += lane / 4;
  column += lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + 16 * m + e / 2 * 8, c = column + 8 * n + e % 2;
        const int query = KeyRows ? c : r, key = KeyRows ? r : c;
        if (key > min(last_key, query + shift)) s[m][n][e] = -INFINITY;
      }
    }
  }
  if (p.segments_q == nullptr) return;
  const int last_row = (KeyRows ? p.keys : p.queries) - 1, last_column = (KeyRows ? p.queries : p.keys) - 1;
  const int32_t* rows = (KeyRows ? p.segments_k : p.segments_q) + batch * (last_row + int64_t(1));
  const int32_t* columns = (KeyRows ? p.segments_q : p.segments_k) + batch * (last_column + int64_t(1));
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int id = columns[min(column + 8 * n + e, last_column)];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        if (id != rows[min(row + 16 * m, last_row)]) s[m][n][e] = -INFINITY;
        if (id != rows[min(row + 16 * m + 8, last_row)]) s[m][n][e + 2] = -INFINITY;
      }
    }
  }
}

}  // namespace mlite
