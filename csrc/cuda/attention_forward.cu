// Fused attention, forward: FlashAttention-2 (Dao 2023, arXiv:2307.08691) on mma.sync.
//
// This code has never run on a GPU: its logic is proven by the emulator (csrc/emulator) and it compiles
// without spills.
//
// A block owns `Rows` queries of one head, kept in shared memory, and walks over the keys in tiles of
// `Columns`. Each warp owns 16 MT queries: their scores, their running maximum and sum, and their output stay
// in its registers, so that warps never exchange anything. While one tile of keys and values is worked on,
// the next is on its way.
#include "attention_launch.cuh"

namespace mlite {

// One step of the online softmax: s becomes exp(scale s - maximum); out, maximum and sum follow. Statistics
// are those of rows 16 m + g and 16 m + g + 8 of the lane; `sum` is this lane's share of the row.
template <int MT, int NT, int DT>
__device__ __forceinline__ void online_softmax(float (&s)[MT][NT][4], float (&out)[MT][DT][4],
                                               float (&maximum)[MT][2], float (&sum)[MT][2],
                                               float scale_log2) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = 2 * half;
      float top = maximum[m][half];
#pragma unroll
      for (int n = 0; n < NT; ++n) top = fmaxf(top, fmaxf(s[m][n][e], s[m][n][e + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      // A row that has seen no key yet: its probabilities are exp2(-inf - 0) = 0, not exp2(-inf + inf).
      const float base = top == -INFINITY ? 0.0f : top * scale_log2;
      const float shrink = exp2_approx(maximum[m][half] * scale_log2 - base);
      maximum[m][half] = top;
      if (shrink != 1.0f) {  // rare after the first tiles
        sum[m][half] *= shrink;
#pragma unroll
        for (int d = 0; d < DT; ++d) {
          out[m][d][e] *= shrink;
          out[m][d][e + 1] *= shrink;
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        s[m][n][e] = exp2_approx(fmaf(s[m][n][e], scale_log2, -base));
        s[m][n][e + 1] = exp2_approx(fmaf(s[m][n][e + 1], scale_log2, -base));
        sum[m][half] += s[m][n][e] + s[m][n][e + 1];
      }
    }
  }
}

// Divides by the sums and writes the log-sum-exps [queries] of one head.
template <int MT, int DT>
__device__ __forceinline__ void finish_rows(float (&out)[MT][DT][4], const float (&maximum)[MT][2],
                                            float (&sum)[MT][2], float* lse, int row,
                                            const Attention& p) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[m][half];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const float inverse = total == 0.0f ? 0.0f : p.kept / total;
#pragma unroll
      for (int d = 0; d < DT; ++d) {
        out[m][d][2 * half] *= inverse;
        out[m][d][2 * half + 1] *= inverse;
      }
      const int query = row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < p.queries) {
        lse[query] = total == 0.0f ? -INFINITY : maximum[m][half] * p.scale + logf(total);
      }
    }
  }
}

// The tiles of keys that a block of queries visits, in order.
struct KeyTile {
  int first;    // first key; from `end` on there are no more
  bool masked;  // whether some pair of this tile is invisible
};

template <int Rows, int Columns>
struct KeyTiles {
  const Attention& p;
  int batch, query, end;
  SegmentRange own;

  __device__ __forceinline__ KeyTiles(const Attention& p, int batch, int query)
      : p(p), batch(batch), query(query) {
    end = p.causal ? min(p.keys, query + Rows + p.shift()) : p.keys;
    if (p.segments_q != nullptr) {
      const int32_t* ids = p.segments_q + static_cast<int64_t>(batch) * p.queries;
      own = segment_range(ids, query, min(query + Rows, p.queries));
    }
  }

  // The first tile from `key` on that has a segment in common with the queries.
  __device__ __forceinline__ KeyTile next(int key) const {
    bool masked = false;
    if (p.segments_q != nullptr) {
      const int32_t* ids = p.segments_k + static_cast<int64_t>(batch) * p.keys;
      key = next_meeting<Columns>(ids, key, end, own, masked);
    }
    masked = masked || key + Columns > p.keys || (p.causal && key + Columns - 1 > query + p.shift());
    return {key, masked};
  }
};

template <class E, int D, int Rows, int Columns, int Warps>
__global__ void __launch_bounds__(32 * Warps, 1)
    attention_forward_kernel(Attention p, Tensor q, Tensor k, Tensor v, Tensor o, float* lse) {
  constexpr int MT = Rows / (16 * Warps), NT = Columns / 8, DT = D / 8, threads = Warps * kWarp;
  MLITE_DYNAMIC_SHARED(shared);
  uint16_t *tile_q = reinterpret_cast<uint16_t*>(shared), *tile_k = tile_q + Rows * D,
           *tile_v = tile_k + 2 * Columns * D;

  const int batch = blockIdx.z, head = blockIdx.y, group = head / (p.heads / p.groups);
  const int query =
      (gridDim.x - 1 - blockIdx.x) * Rows;  // under a causal mask the last have most to do: they start first
  const int row = threadIdx.x / kWarp * 16 * MT;
  const KeyTiles<Rows, Columns> tiles(p, batch, query);
  const auto load = [&](int key, int stage) {
    load_tile<Columns, D, threads>(tile_k + stage * Columns * D, k.at(batch, group), key, p.keys, p.head_dim);
    load_tile<Columns, D, threads>(tile_v + stage * Columns * D, v.at(batch, group), key, p.keys, p.head_dim);
  };

  load_tile<Rows, D, threads>(tile_q, q.at(batch, head), query, p.queries, p.head_dim);
  KeyTile next = tiles.next(0);
  if (next.first < tiles.end) load(next.first, 0);
  copy_async_commit();

  float out[MT][DT][4] = {}, maximum[MT][2], sum[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; ++m) maximum[m][0] = maximum[m][1] = -INFINITY;

  for (int stage = 0; next.first < tiles.end; stage ^= 1) {
    const KeyTile tile = next;
    next = tiles.next(tile.first + Columns);
    copy_async_wait<0>();
    __syncthreads();  // this tile is there for all; the other stage is no longer read
    if (next.first < tiles.end) load(next.first, stage ^ 1);
    copy_async_commit();

    float s[MT][NT][4] = {};
    multiply_transposed<E, D>(s, tile_q, row, tile_k + stage * Columns * D);
    if (tile.masked) mask_scores<false>(s, p, batch, query + row, tile.first);
    online_softmax(s, out, maximum, sum, p.scale * kLog2E);
    if (p.drops) {  // the sums are those of all probabilities
      uint32_t bits[MT];
      draw<false, NT>(bits, p, p.plane(batch, head), query + row, tile.first);
      drop(s, bits);
    }
    multiply<E, D>(out, s, tile_v + stage * Columns * D, 0);
  }
  copy_async_wait<0>();  // where there was no key to visit, the queries may still be on their way
  __syncthreads();
  lse += (static_cast<int64_t>(batch) * p.heads + head) * p.queries;
  finish_rows(out, maximum, sum, lse, query + row, p);
  store_rows<E, D>(out, tile_q, row, o.at(batch, head), query, p.queries, 0, p.head_dim);
}

template <class E, int D, int Rows, int Columns, int Warps>
int launch_forward(const Attention& p, int batch, Tensor q, Tensor k, Tensor v, Tensor o, float* lse,
                   void* stream) {
  const dim3 grid((p.queries + Rows - 1) / Rows, p.heads, batch);
  return launch(attention_forward_kernel<E, D, Rows, Columns, Warps>, grid, Warps * kWarp,
                (Rows + 4 * Columns) * D * sizeof(uint16_t), stream, p, q, k, v, o, lse);
}

// Tiles by head size: 32 queries a warp up to 128 (fewest reads of shared memory for each product), 16 above,
// where the output alone takes half of the registers; keys as the registers allow. At 128, 64 KiB of shared
// memory: an A100 holds two blocks on a multiprocessor, as an H100 does.
template <class E>
int forward_by_size(const Attention& p, int batch, Tensor q, Tensor k, Tensor v, Tensor o, float* lse,
                    void* stream) {
  if (p.head_dim <= 16) return launch_forward<E, 16, 128, 64, 4>(p, batch, q, k, v, o, lse, stream);
  if (p.head_dim <= 32) return launch_forward<E, 32, 128, 64, 4>(p, batch, q, k, v, o, lse, stream);
  if (p.head_dim <= 64) return launch_forward<E, 64, 128, 64, 4>(p, batch, q, k, v, o, lse, stream);
  if (p.head_dim <= 96) return launch_forward<E, 96, 128, 32, 4>(p, batch, q, k, v, o, lse, stream);
  if (p.head_dim <= 128) return launch_forward<E, 128, 128, 32, 4>(p, batch, q, k, v, o, lse, stream);
  if (p.head_dim <= 192) return launch_forward<E, 192, 128, 32, 8>(p, batch, q, k, v, o, lse, stream);
  return launch_forward<E, 256, 128, 32, 8>(p, batch, q, k, v, o, lse, stream);
}

}  // namespace mlite

int mlite_cuda_attention_forward(int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries,
                                 int64_t keys, int64_t head_dim, float scale, bool causal, const void* q,
                                 const int64_t* q_strides, const void* k, const int64_t* k_strides,
                                 const void* v, const int64_t* v_strides, const int32_t* segments_q,
                                 const int32_t* segments_k, double dropout_p, uint64_t dropout_seed,
                                 int64_t dropout_head, int64_t dropout_heads, void* o, const int64_t* o_strides,
                                 float* lse, void* stream) {
  using namespace mlite;
  const Sizes sizes = {batch, heads, groups, queries, keys, head_dim};
  const Tensor tq = tensor(q, q_strides), tk = tensor(k, k_strides), tv = tensor(v, v_strides),
               to = tensor(o, o_strides);
  const Dropout dropout = {dropout_p, dropout_seed, dropout_head, dropout_heads};
  if (const int error = check(dtype, sizes, scale, segments_q, segments_k, dropout, {tq, tk, tv, to}))
    return error;
  if (batch == 0 || heads == 0 || queries == 0) return 0;
  const Attention p = attention(sizes, scale, causal, segments_q, segments_k, dropout);
  const auto run = dtype == MLITE_BF16 ? forward_by_size<Bf16> : forward_by_size<Fp16>;
  return run(p, int(batch), tq, tk, tv, to, lse, stream);
}
