// Backward pass of attention, as FlashAttention-2 (Dao 2023): probabilities are computed anew from the forward pass'
// log-sum-exp, tile by tile, and each tile serves the gradients of queries, keys and values.
//
// The work is divided by blocks of keys, whose gradients one thread sums alone. The gradient of a query is summed in the
// workspace, over the blocks of keys from its last to its first: each block waits until the one after it has added its
// part, so that the order, and with it every bit of the result, is the same for any number of threads.
#include <atomic>

#include "attention_problem.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int kTile = 64;     // queries of a tile, and keys
constexpr int kBlock = 256;   // most queries or keys of a block
constexpr int kArea = 16384;  // most elements of a block
static_assert(kTile == kKeys);

constexpr int block_of(int64_t head_dim) {
  const int rows = kArea / round_up(head_dim, 32) / kTile * kTile;  // the same for every instruction set
  return rows > kBlock ? kBlock : rows;
}

// The workspace. Everything is per batch entry and head.
struct Workspace {
  int64_t blocks, row, rows;  // of queries; elements of a query's gradient; queries, padded
  float *dq, *delta;
  int32_t* done;  // blocks of keys that have been added to a block of queries

  Workspace(int64_t batch, int64_t heads, int64_t queries, int64_t head_dim, void* memory)
      : blocks((queries + block_of(head_dim) - 1) / block_of(head_dim)), row(round_up(head_dim, 32)),
        rows(blocks * block_of(head_dim)), dq(static_cast<float*>(memory)), delta(dq + batch * heads * rows * row),
        done(reinterpret_cast<int32_t*>(delta + batch * heads * rows)) {}
};

// A block of keys and one of queries, packed, on the stack.
template <typename E>
struct Blocks {
  static constexpr int kWords = kArea / kPack<E>;
  // keys_t, values_t: a panel of kKeys columns after another, their words along head_dim; keys: words across keys.
  alignas(64) uint32_t keys_t[kWords], values_t[kWords], keys[kWords];
  alignas(64) float dk[kArea], dv[kArea];  // transposed: [head_dim][keys]
  // By rows along head_dim, and transposed: rows of head_dim, words across queries.
  alignas(64) uint32_t q[kWords], q_t[kWords], dout[kWords], dout_t[kWords];
  alignas(64) float lse[kBlock];
  // A tile: probabilities and gradients of scores, words across queries, and the latter by rows too.
  alignas(64) uint32_t p[kTile / kPack<E>][kKeys], ds[kTile / kPack<E>][kKeys], ds_rows[kTile][kKeys / kPack<E>];
  alignas(64) float group[kGroup][kKeys], slopes[kGroup][kKeys];
};

template <typename E, typename T>
struct Backward {
  const Problem& p;
  View<const T> q, k, v, o, dout;
  View<T> dq, dk, dv;
  const float* lse;
  Workspace work;

  int width() const { return static_cast<int>(work.row); }
  int columns() const { return round_up(p.head_dim, kLanes); }
  int words() const { return width() / kPack<E>; }
  int block() const { return block_of(p.head_dim); }
  // The last block of keys of which some query of this block sees some, by the causal limit; -1: none.
  int64_t last_block(int64_t query) const {
    const int64_t last = query + block() < p.queries ? query + block() : p.queries;
    return (p.limit(last - 1) + block() - 1) / block() - 1;
  }

  void pack_keys(Blocks<E>& c, int64_t b, int64_t group, int64_t key, int keys) const {
    const auto k_rows = k.rows(b, group, key, keys, p.head_dim), v_rows = v.rows(b, group, key, keys, p.head_dim);
    for (int panel = 0; panel < keys; panel += kKeys) {
      const int count = keys - panel < kKeys ? keys - panel : kKeys;
      const Rows<T> k_panel{k_rows.data + panel * k_rows.stride, k_rows.stride, count, k_rows.columns};
      const Rows<T> v_panel{v_rows.data + panel * v_rows.stride, v_rows.stride, count, v_rows.columns};
      pack<E, false, true>(k_panel, kKeys, words(), c.keys_t + panel * words(), kKeys);
      pack<E, false, true>(v_panel, kKeys, words(), c.values_t + panel * words(), kKeys);
    }
    pack<E, true, false>(k_rows, round_up(keys, kKeys) / kPack<E>, width(), c.keys, width());
    memset(c.dk, 0, sizeof(float) * columns() * block());
    memset(c.dv, 0, sizeof(float) * columns() * block());
  }

  void pack_queries(Blocks<E>& c, int64_t b, int64_t h, int64_t query, int rows) const {
    const auto q_rows = q.rows(b, h, query, rows, p.head_dim), o_rows = dout.rows(b, h, query, rows, p.head_dim);
    const int padded = round_up(rows, kTile), across = block() / kPack<E>;
    pack<E, false, false>(q_rows, padded, words(), c.q, words());
    pack<E, false, false>(o_rows, padded, words(), c.dout, words());
    pack<E, true, true>(q_rows, padded / kPack<E>, columns(), c.q_t, across);
    pack<E, true, true>(o_rows, padded / kPack<E>, columns(), c.dout_t, across);
    const float* const from = lse + (b * p.heads + h) * p.queries + query;
    for (int i = 0; i < padded; ++i) c.lse[i] = i < rows ? from[i] * kLog2e : 0;
  }

  // sum(o * do) of each query, which is what the softmax' gradient takes off those of the probabilities.
  void find_delta(int64_t b, int64_t h, int64_t query, int rows) const {
    float* const delta = work.delta + (b * p.heads + h) * work.rows + query;
    for (int i = 0; i < block(); ++i) {
      delta[i] = 0;
      if (i >= rows) continue;
      const T *const out = o.row(b, h, query + i), *const grad = dout.row(b, h, query + i);
      Floats sums[kUnroll] = {};
      for_vectors(p.head_dim, [&](int64_t at, int count, int j) MLITE_INLINE {
        sums[j] += load(out + at, count) * load(grad + at, count);
      });
      delta[i] = sum_of(sums);
    }
  }

  // Probabilities of one group of queries into c.group (dropped ones 0, in `kept` not), gradients of scores into c.slopes.
  void group(Blocks<E>& c, int64_t b, int64_t h, int64_t query, int row, int64_t key, int panel, Seen seen,
             const float* delta, float (&dropped)[kGroup][kKeys]) const {
    const float scale = p.scale * kLog2e;
    const int depth = words_of<E>(p.head_dim);
    for_widths(kPanel, [&](auto vectors, int first) MLITE_INLINE {
      Floats sums[kGroup][vectors] = {};
      multiply<E, vectors>(c.q + row * words(), words(), c.keys_t + panel * words() + first * kLanes, kKeys, depth, sums);
      for (int r = 0; r < kGroup; ++r) {
        for (int v = 0; v < vectors; ++v) {
          Floats e = exp2(sums[r][v] * scale - c.lse[row + r]);
          if (seen == Seen::some)
            e = query + r < p.queries ? (p.seen_keys(b, query + r, key + (first + v) * kLanes) ? e : splat(0))
                                              : splat(0);
          store(&c.group[r][(first + v) * kLanes], e, kLanes);
        }
      }
    });
    for_widths(kPanel, [&](auto vectors, int first) MLITE_INLINE {
      Floats sums[kGroup][vectors] = {};
      multiply<E, vectors>(c.dout + row * words(), words(), c.values_t + panel * words() + first * kLanes, kKeys, depth,
                           sums);
      for (int r = 0; r < kGroup; ++r)
        for (int v = 0; v < vectors; ++v) store(&c.slopes[r][(first + v) * kLanes], sums[r][v], kLanes);
    });
    for (int r = 0; r < kGroup; ++r) {
      uint32_t words[kKeys + 4 * kLanes];
      const uint32_t* const random = p.drops ? p.random(b, h, query + r, key, words) : nullptr;
      for (int i = 0; i < kKeys; i += kLanes) {
        const Floats e = load(&c.group[r][i], kLanes);
        Floats d = load(&c.slopes[r][i], kLanes), rest = e;
        if (random) {
          const auto drop = load_raw<Words>(random + i, kLanes) < p.dropout.threshold;
          d = drop ? splat(0) : d * p.dropout.kept;
          rest = drop ? splat(0) : e;
        }
        store(&dropped[r][i], rest, kLanes);
        // Of a key that is not seen the probability is 0, and the gradient too, whatever there is to multiply with.
        Floats slope = e * (d - delta[r]);
        if (seen == Seen::some)
          slope = query + r < p.queries ? (p.seen_keys(b, query + r, key + i) ? slope : splat(0)) : splat(0);
        store(&c.slopes[r][i], slope, kLanes);
      }
    }
  }

  // A group's probabilities and gradients of scores, packed.
  void pack_group(Blocks<E>& c, int row, const float (&dropped)[kGroup][kKeys]) const {
    const int at = row % kTile;
    for (int i = 0; i < kKeys; i += kLanes) {
      for (int r = 0; r < kGroup; r += kPack<E>) {
        const Floats e = load(&dropped[r][i], kLanes), slope = load(&c.slopes[r][i], kLanes);
        uint32_t *const e_out = &c.p[(at + r) / kPack<E>][i], *const slope_out = &c.ds[(at + r) / kPack<E>][i];
#ifdef __AVX512BF16__
        if constexpr (kPack<E> == 2) {
          store_raw(e_out, to_pairs(e, load(&dropped[r + 1][i], kLanes)), kLanes);
          store_raw(slope_out, to_pairs(slope, load(&c.slopes[r + 1][i], kLanes)), kLanes);
          continue;
        }
#endif
        store_raw(e_out, bit_cast<Words>(e), kLanes);
        store_raw(slope_out, bit_cast<Words>(slope), kLanes);
        store_raw(&c.ds_rows[at + r][i], bit_cast<Words>(slope), kLanes);
      }
    }
#ifdef __AVX512BF16__
    if constexpr (kPack<E> == 2)
      for (int r = 0; r < kGroup; ++r)
        for (int i = 0; i < kKeys; i += 2 * kLanes)
          store_raw(&c.ds_rows[at + r][i / 2],
                    to_bf16(load(&c.slopes[r][i], kLanes), load(&c.slopes[r][i + kLanes], kLanes)), kLanes);
#endif
  }

  // All that one tile of queries and keys adds to the gradients.
  void tile(Blocks<E>& c, int64_t b, int64_t h, int64_t query, int row, int64_t key, int panel, Seen seen) const {
    const int64_t at = (b * p.heads + h) * work.rows + query + row;
    for (int r = 0; r < kTile; r += kGroup) {
      alignas(64) float dropped[kGroup][kKeys];
      group(c, b, h, query + row + r, row + r, key + panel, panel, seen, work.delta + at + r, dropped);
      pack_group(c, row + r, dropped);
    }
    const int across = block() / kPack<E>;
    add_matrix_product<E>(kTile, columns(), kKeys / kPack<E>, c.ds_rows[0], kKeys / kPack<E>,
                          c.keys + panel / kPack<E> * width(), width(), work.dq + at * work.row, work.row);
    add_matrix_product<E>(columns(), kKeys, kTile / kPack<E>, c.dout_t + row / kPack<E>, across, c.p[0], kKeys,
                          c.dv + panel, block());
    add_matrix_product<E>(columns(), kKeys, kTile / kPack<E>, c.q_t + row / kPack<E>, across, c.ds[0], kKeys,
                          c.dk + panel, block());
  }

  void write_queries(int64_t b, int64_t h, int64_t query, int rows) const {
    for (int i = 0; i < rows; ++i) {
      const float* const sum = work.dq + ((b * p.heads + h) * work.rows + query + i) * work.row;
      T* const out = dq.row(b, h, query + i);
      for_vectors(p.head_dim, [&](int64_t at, int count, int) MLITE_INLINE {
        store(out + at, load(sum + at, kLanes) * p.scale, count);
      });
    }
  }

  void write_keys(const Blocks<E>& c, int64_t b, int64_t group, int64_t key, int keys) const {
    for (int i = 0; i < keys; ++i) {
      T *const k_out = dk.row(b, group, key + i), *const v_out = dv.row(b, group, key + i);
      for (int at = 0; at < p.head_dim; ++at) {
        put(k_out + at, c.dk[at * block() + i] * p.scale);
        put(v_out + at, c.dv[at * block() + i] * p.dropout.kept);
      }
    }
  }
  static void put(T* out, float x) { store(out, splat(x), 1); }

  // What a block of keys adds to the gradients of a block of queries and takes from it.
  void pair(Blocks<E>& c, int64_t b, int64_t h, int64_t query, int64_t key, int keys) const {
    const int64_t last = last_block(query), index = key / block();
    const int rows = static_cast<int>(p.queries - query < block() ? p.queries - query : block());
    std::atomic<int32_t>& done =
        *reinterpret_cast<std::atomic<int32_t>*>(work.done + (b * p.heads + h) * work.blocks + query / block());
    if (index == last || (last < 0 && index == 0)) {
      memset(work.dq + ((b * p.heads + h) * work.rows + query) * work.row, 0, sizeof(float) * block() * work.row);
      find_delta(b, h, query, rows);
    } else {
      if (index > last) return;
      while (done.load(std::memory_order_acquire) != last - index) {
      }
    }
    if (last >= 0 && p.seen(b, query, rows, key, keys) != Seen::none) {
      pack_queries(c, b, h, query, rows);
      for (int panel = 0; panel < keys; panel += kKeys) {
        for (int row = 0; row < rows; row += kTile) {
          const int tile_rows = rows - row < kTile ? rows - row : kTile;
          const Seen seen = p.seen(b, query + row, tile_rows, key + panel, kKeys);
          if (seen != Seen::none) tile(c, b, h, query, row, key, panel, seen);
        }
      }
    }
    if (index == 0) write_queries(b, h, query, rows);
    done.store(static_cast<int32_t>(last - index + 1), std::memory_order_release);
  }

  // The gradients of a block of keys.
  void run(int64_t b, int64_t group, int64_t key) const {
    Blocks<E> c;
    const int keys = static_cast<int>(p.keys - key < block() ? p.keys - key : block());
    pack_keys(c, b, group, key, keys);
    const int64_t share = p.heads / p.groups;
    for (int64_t h = group * share; h < (group + 1) * share; ++h)
      for (int64_t query = 0; query < p.queries; query += block()) pair(c, b, h, query, key, keys);
    write_keys(c, b, group, key, keys);
  }

  // Blocks of keys, the last ones first: none waits for one that has not begun.
  void run_all() const {
    const int64_t blocks = p.keys > 0 ? (p.keys + block() - 1) / block() : 1, chains = p.batch * p.groups;
    for (int64_t i = 0; i < p.batch * p.heads * work.blocks; ++i) work.done[i] = 0;
    std::atomic<int64_t> next{0};
#pragma omp parallel if (blocks * chains > 1)
    for (int64_t item; (item = next.fetch_add(1)) < blocks * chains;) {
      const int64_t chain = item / blocks, key = (blocks - 1 - item % blocks) * block();
      run(chain / p.groups, chain % p.groups, key);
    }
  }
};

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(attention_backward)(int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys,
                                  int64_t head_dim, float scale, bool causal, const void* q, const int64_t* q_strides,
                                  const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                  const int32_t* segments_q, const int32_t* segments_k, double dropout_p,
                                  uint64_t dropout_seed, int64_t dropout_head, int64_t dropout_heads, const void* o,
                                  const int64_t* o_strides, const float* lse, const void* do_, const int64_t* do_strides,
                                  void* dq, const int64_t* dq_strides, void* dk, const int64_t* dk_strides, void* dv,
                                  const int64_t* dv_strides, void* workspace) {
  if (head_dim > kMaxDim) return 1;
  const Problem problem{batch, heads, groups, queries, keys, head_dim, scale, causal, segments_q, segments_k,
                        Dropout(dropout_p, dropout_seed), dropout_p > 0, dropout_head, dropout_heads};
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto in = [](const void* data, const int64_t* strides) { return View<const T>{static_cast<const T*>(data), strides}; };
    const auto out = [](void* data, const int64_t* strides) { return View<T>{static_cast<T*>(data), strides}; };
    Backward<Packed<T>, T>{problem, in(q, q_strides), in(k, k_strides), in(v, v_strides), in(o, o_strides),
                           in(do_, do_strides), out(dq, dq_strides), out(dk, dk_strides), out(dv, dv_strides), lse,
                           Workspace(batch, heads, queries, head_dim, workspace)}
        .run_all();
  });
}

int64_t MLITE_CPU(attention_workspace)(int64_t batch, int64_t heads, int64_t queries, int64_t head_dim) {
  const Workspace end(batch, heads, queries, head_dim, nullptr);
  return reinterpret_cast<intptr_t>(end.done + batch * heads * end.blocks);
}
