// Fused attention, backward: FlashAttention-2 (Dao 2023, arXiv:2307.08691) on mma.sync, deterministic.
//
// This code has never run on a GPU: its logic is proven by the emulator (csrc/emulator) and it compiles
// without spills.
//
// With S = scale Q K^T, P = exp(S - lse), dP = dO V^T, delta = rowsum(dO o) and dS = P (dP - delta):
//   dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K
// One kernel serves both passes. A block keeps two tiles of rows in shared memory, streams pairs of tiles of
// columns past them, recomputes P and dS in registers and multiplies these, as they lie there, by the
// streamed tiles:
//   KeyRows: rows K, V; columns Q, dO of all query heads of the group; sums dK and dV (scores are transposed)
//   else:    rows Q, dO; columns K, V; sums dQ
// delta is taken from the rounded output: where probabilities are so peaked that dS cancels below that rounding,
// a backward pass that keeps the probabilities is more exact.
// With dropout, delta stays what it is, and what is dropped is zero in dV's product and in dP; the factor
// 1 / (1 - p) of the others is taken out of the sums, and so out of delta.
// Computing the scores twice costs 7 products of tiles instead of 5, and saves the atomics on dQ, their fp32
// buffer and the order of sums that changes from run to run.
#include "attention_launch.cuh"

namespace mlite {

constexpr int kPad = 128;  // rows of the workspace: queries, up to a multiple of the largest tile

inline int64_t padded(int64_t queries) { return (queries + kPad - 1) / kPad * kPad; }

// What the gradients need of a query: lse in base 2, and delta (1 - p). Queries beyond the end, and such as see no
// key, have lse = +infinity, which makes all of their probabilities zero.
using Row = float2;

// rows[batch, heads, padded queries] from o, dO and lse. `width` lanes, a power of two, read one query.
template <class E>
__global__ void attention_rows_kernel(Attention p, Tensor o, Tensor d_o, const float* lse, Row* rows,
                                      int padded, int width, float share_kept) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int query = static_cast<int>(thread / width), column = static_cast<int>(thread % width) * 8;
  const int64_t head = static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y;
  float delta = 0.0f;
  if (query < p.queries && column < p.head_dim) {
    const Matrix mo = o.at(blockIdx.z, blockIdx.y), md = d_o.at(blockIdx.z, blockIdx.y);
    const uint4 x = *reinterpret_cast<const uint4*>(mo.data + query * mo.stride + column);
    const uint4 y = *reinterpret_cast<const uint4*>(md.data + query * md.stride + column);
    delta = E::low(x.x) * E::low(y.x) + E::high(x.x) * E::high(y.x) + E::low(x.y) * E::low(y.y) +
            E::high(x.y) * E::high(y.y) + E::low(x.z) * E::low(y.z) + E::high(x.z) * E::high(y.z) +
            E::low(x.w) * E::low(y.w) + E::high(x.w) * E::high(y.w);
  }
  for (int lanes = width / 2; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(kAllLanes, delta, lanes);
  if (column == 0 && query < padded) {
    const float sum = query < p.queries ? lse[head * p.queries + query] : -INFINITY;
    rows[head * padded + query] = {sum == -INFINITY ? INFINITY : sum * kLog2E, delta * share_kept};
  }
}

// The tiles of columns that a block visits, in order: of one head after another.
struct ColumnTile {
  int head;     // query head; from `last_head` on there are no more
  int first;    // first column
  bool masked;  // whether some pair of this tile is invisible
};

template <bool KeyRows, int Rows, int Columns>
struct ColumnTiles {
  const Attention& p;
  int batch, row, begin, end, last_head;
  SegmentRange own;

  __device__ __forceinline__ ColumnTiles(const Attention& p, int batch, int row, int last_head)
      : p(p), batch(batch), row(row), last_head(last_head) {
    const int rows = KeyRows ? p.keys : p.queries, columns = KeyRows ? p.queries : p.keys;
    begin = KeyRows && p.causal ? max(0, row - p.shift()) / Columns * Columns : 0;
    end = !KeyRows && p.causal ? min(columns, row + Rows + p.shift()) : columns;
    if (p.segments_q != nullptr) {
      const int32_t* row_ids = (KeyRows ? p.segments_k : p.segments_q) + static_cast<int64_t>(batch) * rows;
      own = segment_range(row_ids, row, min(row + Rows, rows));
    }
  }

  // The first tile from column `first` of `head` on that has a segment in common with the rows.
  __device__ __forceinline__ ColumnTile next(int head, int first) const {
    bool masked = false;
    for (;; first = begin) {
      if (p.segments_q != nullptr) {
        const int32_t* ids = KeyRows ? p.segments_q + static_cast<int64_t>(batch) * p.queries
                                     : p.segments_k + static_cast<int64_t>(batch) * p.keys;
        first = next_meeting<Columns>(ids, first, end, own, masked);
      }
      if (first < end) break;
      if (++head >= last_head || begin >= end) return {last_head, 0, false};
    }
    // Keys beyond the end are masked where they are columns; as rows they spoil only what is not stored.
    if (!KeyRows && first + Columns > p.keys) masked = true;
    const int first_query = KeyRows ? first : row, last_key = (KeyRows ? row + Rows : first + Columns) - 1;
    return {head, first, masked || (p.causal && last_key > first_query + p.shift())};
  }
};

// s becomes P and dp becomes dS. `rows`, in shared memory, are those of the tile's columns (KeyRows) or of this
// warp's rows.
template <bool KeyRows, int MT, int NT>
__device__ __forceinline__ void differentiate(float (&s)[MT][NT][4], float (&dp)[MT][NT][4], const Row* rows,
                                              float scale_log2) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    Row mine[4];
    if (!KeyRows) {
      mine[0] = mine[1] = rows[16 * m + lane / 4];
      mine[2] = mine[3] = rows[16 * m + lane / 4 + 8];
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if (KeyRows) {
        const float4 pair = *reinterpret_cast<const float4*>(rows + 8 * n + lane % 4 * 2);
        mine[0] = mine[2] = {pair.x, pair.y};
        mine[1] = mine[3] = {pair.z, pair.w};
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[m][n][e] = exp2_approx(fmaf(s[m][n][e], scale_log2, -mine[e].x));
        dp[m][n][e] = s[m][n][e] * (dp[m][n][e] - mine[e].y);
      }
    }
  }
}

// Rows of a block, columns of the tiles that stream past, warps.
template <int Rows, int Columns, int Warps>
struct TileShape {
  static constexpr int rows = Rows, columns = Columns, warps = Warps;
};

// Out columns of the result are this block's: the scores of the largest heads are computed more than once,
// because two whole sums would not fit into the registers.
template <class E, bool KeyRows, int D, int Out, class Shape>
__global__ void __launch_bounds__(32 * Shape::warps, 1)
    attention_backward_kernel(Attention p, Tensor row0, Tensor row1, Tensor column0, Tensor column1,
                              const Row* rows, int padded, Tensor sum0, Tensor sum1) {
  constexpr int Rows = Shape::rows, Columns = Shape::columns, threads = Shape::warps * kWarp,
                MT = Rows / (16 * Shape::warps), NT = Columns / 8, OT = Out / 8, size = Columns * D;
  MLITE_DYNAMIC_SHARED(shared);
  uint16_t *tile0 = reinterpret_cast<uint16_t*>(shared), *tile1 = tile0 + Rows * D;  // K, V or Q, dO
  uint16_t *stream0 = tile1 + Rows * D, *stream1 = stream0 + 2 * size;  // Q, dO or K, V, two stages
  Row* queries = reinterpret_cast<Row*>(stream1 + 2 * size);  // KeyRows: two stages of columns; else rows

  const int batch = blockIdx.z, heads = p.heads / p.groups;  // of a group
  const int row_head = blockIdx.y, head = KeyRows ? row_head * heads : row_head;
  const int block = blockIdx.x / (D / Out), chunk = blockIdx.x % (D / Out) * OT;
  // Under a causal mask the first keys and the last queries have most to do: they start first.
  const int row = (KeyRows ? block : gridDim.x / (D / Out) - 1 - block) * Rows,
            row_end = KeyRows ? p.keys : p.queries;
  // By way of a shuffle, which tells the compiler that it is the same in all lanes.
  const int warp_row = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0) * 16 * MT;

  const auto load_queries = [&](Row* to, int query_head, int first, int count) {
    if (static_cast<int>(threadIdx.x) >= count / 2) return;  // two to a copy
    const Row* from = rows + (static_cast<int64_t>(batch) * p.heads + query_head) * padded + first;
    copy_async(to + 2 * threadIdx.x, from + 2 * threadIdx.x, true);
  };
  const auto load = [&](const ColumnTile& tile, int stage) {
    const int column_head = KeyRows ? tile.head : tile.head / heads, end = KeyRows ? p.queries : p.keys;
    load_tile<Columns, D, threads>(stream0 + stage * size, column0.at(batch, column_head), tile.first, end,
                                   p.head_dim);
    load_tile<Columns, D, threads>(stream1 + stage * size, column1.at(batch, column_head), tile.first, end,
                                   p.head_dim);
    if (KeyRows) load_queries(queries + stage * Columns, tile.head, tile.first, Columns);
  };

  const ColumnTiles<KeyRows, Rows, Columns> tiles(p, batch, row, KeyRows ? head + heads : head + 1);
  load_tile<Rows, D, threads>(tile0, row0.at(batch, row_head), row, row_end, p.head_dim);
  load_tile<Rows, D, threads>(tile1, row1.at(batch, row_head), row, row_end, p.head_dim);
  if (!KeyRows) load_queries(queries, head, row, Rows);
  ColumnTile next = tiles.next(head - 1, tiles.end);
  if (next.head < tiles.last_head) load(next, 0);
  copy_async_commit();

  float out0[MT][OT][4] = {}, out1[MT][KeyRows ? OT : 1][4] = {};
  for (int stage = 0; next.head < tiles.last_head; stage ^= 1) {
    const ColumnTile tile = next;
    next = tiles.next(tile.head, tile.first + Columns);
    copy_async_wait<0>();
    __syncthreads();  // this tile is there for all; the other stage is no longer read
    if (next.head < tiles.last_head) load(next, stage ^ 1);
    copy_async_commit();
    const int first_key = KeyRows ? row + warp_row : tile.first,
              last_query = (KeyRows ? tile.first + Columns : row + warp_row + 16 * MT) - 1;
    if (p.causal && first_key > last_query + p.shift()) continue;  // only others of the block see this tile

    float s[MT][NT][4] = {}, dp[MT][NT][4] = {};
    multiply_transposed<E, D>(s, tile0, warp_row, stream0 + stage * size);
    if (tile.masked) mask_scores<KeyRows>(s, p, batch, row + warp_row, tile.first);
    multiply_transposed<E, D>(dp, tile1, warp_row, stream1 + stage * size);
    uint32_t bits[MT] = {};
    if (p.drops) {
      draw<KeyRows, NT>(bits, p, p.plane(batch, KeyRows ? tile.head : head), row + warp_row, tile.first);
      drop(dp, bits);
    }
    differentiate<KeyRows>(s, dp, queries + (KeyRows ? stage * Columns : warp_row), p.scale * kLog2E);
    if (KeyRows && p.drops) drop(s, bits);
    if constexpr (KeyRows) multiply<E, D>(out1, s, stream1 + stage * size, chunk);
    multiply<E, D>(out0, dp, stream0 + stage * size, chunk);
  }
  copy_async_wait<0>();  // where there was no column to visit, the rows may still be on their way
  __syncthreads();
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < OT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out0[m][n][e] *= p.scale * p.kept;
        if (KeyRows) out1[m][n][e] *= p.kept;
      }
    }
  }
  store_rows<E, D>(out0, tile0, warp_row, sum0.at(batch, row_head), row, row_end, chunk, p.head_dim);
  if constexpr (KeyRows) {
    store_rows<E, D>(out1, tile1, warp_row, sum1.at(batch, row_head), row, row_end, chunk, p.head_dim);
  }
}

struct Gradients {
  Tensor q, k, v, o, d_o, dq, dk, dv;
  const float* lse;
  Row* rows;
};

template <class E, bool KeyRows, int D, int Out, class Shape>
int launch_pass(const Attention& p, int batch, const Gradients& t, void* stream) {
  constexpr int Rows = Shape::rows, Columns = Shape::columns, threads = Shape::warps * kWarp;
  constexpr size_t shared =
      (2 * Rows + 4 * Columns) * D * sizeof(uint16_t) + (KeyRows ? 2 * Columns : Rows) * sizeof(Row);
  const int end = KeyRows ? p.keys : p.queries, pad = static_cast<int>(padded(p.queries));
  if (end == 0) return 0;
  const dim3 grid((end + Rows - 1) / Rows * (D / Out), KeyRows ? p.groups : p.heads, batch);
  const auto kernel = attention_backward_kernel<E, KeyRows, D, Out, Shape>;
  if (KeyRows)
    return launch(kernel, grid, threads, shared, stream, p, t.k, t.v, t.q, t.d_o, t.rows, pad, t.dk, t.dv);
  return launch(kernel, grid, threads, shared, stream, p, t.q, t.d_o, t.k, t.v, t.rows, pad, t.dq, t.dq);
}

template <class E, int D, int Out, class OfKeys, class OfQueries>
int launch_backward(const Attention& p, int batch, const Gradients& t, void* stream) {
  if (p.queries > 0) {
    int width = 1;
    while (width * 8 < p.head_dim) width *= 2;
    const int pad = static_cast<int>(padded(p.queries)), threads = 256;
    const dim3 grid(static_cast<unsigned>(int64_t(pad) * width / threads) + 1, p.heads, batch);
    if (const int error = launch(attention_rows_kernel<E>, grid, threads, 0, stream, p, t.o, t.d_o, t.lse,
                                 t.rows, pad, width, p.kept == 0.0f ? 0.0f : 1.0f / p.kept))
      return error;
  }
  if (const int error = launch_pass<E, true, D, Out, OfKeys>(p, batch, t, stream)) return error;
  return launch_pass<E, false, D, D, OfQueries>(p, batch, t, stream);
}

// By head size, as registers and shared memory allow. With 32 rows to a warp, each read of a column's fragment
// from shared memory serves two products, not one; where two results of large heads fill the registers, 16.
template <class E>
int backward_by_size(const Attention& p, int batch, const Gradients& t, void* stream) {
  using Small = TileShape<128, 64, 4>;
  using Middle = TileShape<128, 32, 4>;
  using Wide = TileShape<128, 32, 8>;
  using Large = TileShape<64, 32, 4>;
  if (p.head_dim <= 16) return launch_backward<E, 16, 16, Small, Small>(p, batch, t, stream);
  if (p.head_dim <= 32) return launch_backward<E, 32, 32, Small, Small>(p, batch, t, stream);
  if (p.head_dim <= 64) return launch_backward<E, 64, 64, Middle, Middle>(p, batch, t, stream);
  if (p.head_dim <= 96) return launch_backward<E, 96, 96, Wide, Middle>(p, batch, t, stream);
  if (p.head_dim <= 128) return launch_backward<E, 128, 128, Wide, Middle>(p, batch, t, stream);
  if (p.head_dim <= 192) return launch_backward<E, 192, 96, Large, Large>(p, batch, t, stream);
  return launch_backward<E, 256, 128, Large, Large>(p, batch, t, stream);
}

}  // namespace mlite

int64_t mlite_cuda_attention_workspace(int64_t batch, int64_t heads, int64_t queries, int64_t) {
  return batch * heads * mlite::padded(queries) * static_cast<int64_t>(sizeof(mlite::Row));
}

int mlite_cuda_attention_backward(int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries,
                                  int64_t keys, int64_t head_dim, float scale, bool causal, const void* q,
                                  const int64_t* q_strides, const void* k, const int64_t* k_strides,
                                  const void* v, const int64_t* v_strides, const int32_t* segments_q,
                                  const int32_t* segments_k, double dropout_p, uint64_t dropout_seed,
                                  int64_t dropout_head, int64_t dropout_heads, const void* o, const int64_t* o_strides,
                                  const float* lse, const void* do_, const int64_t* do_strides, void* dq,
                                  const int64_t* dq_strides, void* dk, const int64_t* dk_strides, void* dv,
                                  const int64_t* dv_strides, void* workspace, void* stream) {
  using namespace mlite;
  const Sizes sizes = {batch, heads, groups, queries, keys, head_dim};
  const Gradients t = {tensor(q, q_strides),        tensor(k, k_strides),    tensor(v, v_strides),
                       tensor(o, o_strides),        tensor(do_, do_strides), tensor(dq, dq_strides),
                       tensor(dk, dk_strides),      tensor(dv, dv_strides),  lse,
                       static_cast<Row*>(workspace)};
  const Dropout dropout = {dropout_p, dropout_seed, dropout_head, dropout_heads};
  if (const int error = check(dtype, sizes, scale, segments_q, segments_k, dropout,
                              {t.q, t.k, t.v, t.o, t.d_o, t.dq, t.dk, t.dv, {workspace, 0, 0, 0}}))
    return error;
  if (batch == 0 || heads == 0) return 0;
  const Attention p = attention(sizes, scale, causal, segments_q, segments_k, dropout);
  const auto run = dtype == MLITE_BF16 ? backward_by_size<Bf16> : backward_by_size<Fp16>;
  return run(p, int(batch), t, stream);
}
