// Backward pass of attention, as FlashAttention-2 (Dao 2023): probabilities are computed anew from the forward pass'
// log-sum-exp, tile by tile, and each tile serves the gradients of queries, keys and values.
//
// The work is divided by blocks of keys, whose gradients one thread sums alone. The gradient of a query is summed in the
// workspace, over the blocks of keys from its last to its first: each block waits until the one after it has added its
// part, so that the order, and with it every bit of the result, is the same for any number of threads.
#include <omp.h>
#include <sched.h>

#include <atomic>

#include "attention_problem.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int kTile = 64;    // queries of a tile, and keys
constexpr int kBlock = 256;  // most queries or keys of a block
template <typename E>
constexpr int kArea = kPack<E> * 16384;  // most elements of a block, so that all blocks stay in the second cache
static_assert(kTile == kKeys);

// The workspace: a slot for every head.
struct Workspace {
  int64_t row, rows, blocks;  // of queries: elements of a gradient, their number, that of their blocks (at most)
  float *dq, *delta;
  int32_t* done;  // blocks of keys that have been added to a block of queries

  Workspace(int64_t slots, int64_t queries, int64_t head_dim, void* memory)
      : row(round_up(head_dim, 32)),
        rows(round_up(queries, kTile) + kBlock),
        blocks(rows / kTile),
        dq(static_cast<float*>(memory)),
        delta(dq + slots * rows * row),
        done(reinterpret_cast<int32_t*>(delta + slots * rows)) {}
  static int64_t size(int64_t slots, int64_t queries, int64_t head_dim) {
    const Workspace one(0, queries, head_dim, nullptr);
    return 4 * slots * (one.rows * (one.row + 1) + one.blocks);
  }
};

// A block of keys and one of queries, packed, on the stack. Of what lies by panels and tiles, each is contiguous.
template <typename E>
struct Blocks {
  static constexpr int kWords = kArea<E> / kPack<E>;
  // By panels: words along head_dim, the keys in columns. By rows: words across keys.
  alignas(64) uint32_t keys_t[kWords], values_t[kWords], keys[kWords];
  alignas(64) float dk[kArea<E>], dv[kArea<E>];  // by panels, transposed: rows of head_dim, the keys in columns
  alignas(64) int32_t segments[kBlock];
  // By rows: words along head_dim. By tiles, transposed: rows of head_dim, words across queries.
  alignas(64) uint32_t q[kWords], dout[kWords], q_t[kWords], dout_t[kWords];
  alignas(64) float lse[kBlock];
  // A tile: probabilities that were not dropped and gradients of scores, words across queries; the latter by rows too.
  alignas(64) uint32_t p[kTile / kPack<E>][kKeys], ds[kTile / kPack<E>][kKeys], ds_rows[kTile][kKeys / kPack<E>];
  alignas(64) float scores[kTile][kKeys], slopes[kTile][kKeys];  // gradients of probabilities
  Range key_ranges[kBlock / kKeys], query_ranges[kBlock / kTile];
  bool dk_begun[kBlock / kKeys], dq_begun[kBlock / kTile];  // whether there are sums, of dv too
};

// A block of keys, or of a whole sequence all of them; the workspace's slot of the first of the heads that share them.
struct Work {
  int64_t b, group, key, slot;
};

// Where one tile lies: query and key are those of the tensors, row and panel count within the blocks.
struct Place {
  int64_t b, h, slot, query, key;
  int row, panel;
  Seen seen;
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
  int block() const {
    const int rows = kArea<E> / width() / kTile * kTile;
    return rows > kBlock ? kBlock : rows;
  }
  // The last block of keys of which some query of this block sees some, by the causal limit; -1: none.
  int64_t last_block(int64_t query) const {
    const int64_t last = query + block() < p.queries ? query + block() : p.queries;
    return (p.limit(last - 1) + block() - 1) / block() - 1;
  }

  MLITE_STAGE void pack_keys(Blocks<E>& c, int64_t b, int64_t group, int64_t key, int keys) const {
    const auto k_rows = k.rows(b, group, key, keys, p.head_dim), v_rows = v.rows(b, group, key, keys, p.head_dim);
    for (int panel = 0; panel < keys; panel += kKeys) {
      pack<E, false, true>(k_rows.from(panel), kKeys, words(), c.keys_t + panel * words(), kKeys);
      pack<E, false, true>(v_rows.from(panel), kKeys, words(), c.values_t + panel * words(), kKeys);
      c.key_ranges[panel / kKeys] = p.key_range(b, key + panel, keys - panel < kKeys ? keys - panel : kKeys);
    }
    pack<E, true, false>(k_rows, round_up(keys, kKeys) / kPack<E>, width(), c.keys, width());
    if (p.segments_k) memcpy(c.segments, p.segments_k + b * p.keys + key, sizeof(int32_t) * keys);
    for (bool& begun : c.dk_begun) begun = false;
  }

  MLITE_STAGE void pack_queries(Blocks<E>& c, int64_t b, int64_t h, int64_t query, int rows) const {
    const auto q_rows = q.rows(b, h, query, rows, p.head_dim), o_rows = dout.rows(b, h, query, rows, p.head_dim);
    const float* const from = lse + (b * p.heads + h) * p.queries + query;
    for (int row = 0; row < rows; row += kTile) {
      const int across = row / kPack<E> * columns();
      pack<E, false, false>(q_rows.from(row), kTile, words(), c.q + row * words(), words());
      pack<E, false, false>(o_rows.from(row), kTile, words(), c.dout + row * words(), words());
      pack<E, true, true>(q_rows.from(row), kTile / kPack<E>, columns(), c.q_t + across, kTile / kPack<E>);
      pack<E, true, true>(o_rows.from(row), kTile / kPack<E>, columns(), c.dout_t + across, kTile / kPack<E>);
      c.query_ranges[row / kTile] = p.query_range(b, query + row, rows - row < kTile ? rows - row : kTile);
      for (int i = row; i < row + kTile; ++i) c.lse[i] = i < rows ? from[i] * kLog2e : 0;
    }
  }

  // sum(o * do) of each query, which is what the softmax' gradient takes off those of the probabilities.
  MLITE_STAGE void find_delta(int64_t b, int64_t h, int64_t slot, int64_t query, int rows) const {
    float* const delta = work.delta + slot * work.rows + query;
    for (int i = 0; i < block(); i += kLanes) {
      alignas(64) float sums[kLanes][kLanes];
      for (int r = 0; r < kLanes; ++r) {
        Floats sum = splat(0);
        if (i + r < rows) {
          const T *const out = o.row(b, h, query + i + r), *const grad = dout.row(b, h, query + i + r);
          for_vectors(p.head_dim, [&](int64_t at, int count, int) MLITE_INLINE {
            sum += load(out + at, count) * load(grad + at, count);
          });
        }
        store(sums[r], sum, kLanes);
      }
      store(delta + i, sum_rows(sums), kLanes);
    }
  }

  // out = A B for each group of a tile's queries, as far as they reach.
  MLITE_STAGE void scores(const uint32_t* a, const uint32_t* b, const int* reach, float (*out)[kKeys]) const {
    for (int group = 0; group < kTile; group += kGroup) {
      for_widths(reach[group / kGroup], [&](auto vectors, int first) MLITE_INLINE {
        Floats sums[kGroup][vectors];
        clear(sums);
        multiply<E, kGroup, vectors>(a + group * words(), words(), b + first * kLanes, kKeys, words_of<E>(p.head_dim), sums);
        for (int r = 0; r < kGroup; ++r)
          for (int v = 0; v < vectors; ++v) store(&out[group + r][(first + v) * kLanes], sums[r][v], kLanes);
      });
    }
  }

  // Packed, the probabilities that were not dropped and the gradients of the scores.
  template <bool kDrops, bool kMasks>
  MLITE_STAGE void softmax(Blocks<E>& c, const Place& at, int group, int reach) const {
    const float* const delta = work.delta + at.slot * work.rows + at.query + group;
    const float *const lses = c.lse + at.row + group, scale = p.scale * kLog2e;
    RandomWords random;
    if (kDrops) p.draw(at.b, at.h, at.query + group, at.key, reach, random);
    Sight sight[kGroup];
    for (int r = 0; kMasks && r < kGroup; ++r)
      sight[r] = p.sight(at.b, at.query + group + r, at.key, c.segments + at.panel);

    struct Pair {
      Floats p, ds;
    };
    const auto element = [&](int r, int v) MLITE_INLINE {
      const int first = v * kLanes;
      if (kMasks && v >= reach) return Pair{splat(0), splat(0)};
      const Floats e = exp2(load(&c.scores[group + r][first], kLanes) * scale - lses[r]);
      Floats slope = load(&c.slopes[group + r][first], kLanes), rest = e;
      if (kDrops) {
        const auto drop = random(r, first) < p.dropout.threshold;
        slope = drop ? splat(0) : slope * p.dropout.kept;
        rest = drop ? splat(0) : e;
      }
      slope = e * (slope - delta[r]);
      if (!kMasks) return Pair{rest, slope};
      // Selected, not multiplied: what stands beside a key that is not seen may be infinite.
      const Ints seen = sight[r](first);
      return Pair{seen ? rest : splat(0), seen ? slope : splat(0)};
    };
    for (int r = 0; r < kGroup; r += kPack<E>) {
      for (int v = 0; v < kPanel; v += kPack<E>) {
        uint32_t *const p_out = &c.p[(group + r) / kPack<E>][v * kLanes], *const ds_out = &c.ds[(group + r) / kPack<E>][v * kLanes];
        uint32_t* const row_out = &c.ds_rows[group + r][v * kLanes / kPack<E>];
        const Pair first = element(r, v);
#ifdef __AVX512BF16__
        if constexpr (kPack<E> == 2) {
          const Pair right = element(r, v + 1), below = element(r + 1, v), last = element(r + 1, v + 1);
          store_raw(p_out, to_pairs(first.p, below.p), kLanes);
          store_raw(p_out + kLanes, to_pairs(right.p, last.p), kLanes);
          store_raw(ds_out, to_pairs(first.ds, below.ds), kLanes);
          store_raw(ds_out + kLanes, to_pairs(right.ds, last.ds), kLanes);
          store_raw(row_out, to_bf16(first.ds, right.ds), kLanes);
          store_raw(row_out + kKeys / 2, to_bf16(below.ds, last.ds), kLanes);
          continue;
        }
#endif
        store_raw(p_out, bit_cast<Words>(first.p), kLanes);
        store_raw(ds_out, bit_cast<Words>(first.ds), kLanes);
        store_raw(row_out, bit_cast<Words>(first.ds), kLanes);
      }
    }
  }

  // All that one tile of queries and keys adds to the gradients.
  void tile(Blocks<E>& c, const Place& at) const {
    constexpr int kGroups = kTile / kGroup;
    const bool masks = at.seen == Seen::some;
    int reach[kGroups];
    for (int i = 0; i < kGroups; ++i) reach[i] = masks ? p.reach(at.query + (i + 1) * kGroup - 1, at.key) : kPanel;
    scores(c.q + at.row * words(), c.keys_t + at.panel * words(), reach, c.scores);
    scores(c.dout + at.row * words(), c.values_t + at.panel * words(), reach, c.slopes);
    for (int i = 0; i < kGroups; ++i) {
      if (p.drops) masks ? softmax<true, true>(c, at, i * kGroup, reach[i]) : softmax<true, false>(c, at, i * kGroup, reach[i]);
      else masks ? softmax<false, true>(c, at, i * kGroup, reach[i]) : softmax<false, false>(c, at, i * kGroup, reach[i]);
    }
    float* const sums = work.dq + (at.slot * work.rows + at.query) * work.row;
    bool &dq_begun = c.dq_begun[at.row / kTile], &dk_begun = c.dk_begun[at.panel / kKeys];
    for (int i = 0, next; i < kGroups; i = next) {  // groups that reach as far
      for (next = i + 2; next < kGroups && reach[next + 1] == reach[i + 1];) next += 2;
      product<E>(dq_begun, (next - i) * kGroup, columns(), reach[i + 1] * kLanes / kPack<E>, c.ds_rows[i * kGroup],
                 kKeys / kPack<E>, c.keys + at.panel / kPack<E> * width(), width(), sums + i * kGroup * work.row, work.row);
    }
    const int across = at.row / kPack<E> * columns();
    for (int first = 0, next; first < kPanel; first = next) {  // vectors of keys, all or half of them
      next = masks && dk_begun ? first + kPanel / 2 : kPanel;
      int row = 0;  // the first query that reaches them
      while (row + 8 * kGroup < kTile && reach[row / kGroup + 7] <= first) row += 8 * kGroup;
      const int word = row / kPack<E>, to = at.panel * columns() + first * kLanes;
      product<E>(dk_begun, columns(), (next - first) * kLanes, kTile / kPack<E> - word, c.dout_t + across + word,
                 kTile / kPack<E>, &c.p[word][first * kLanes], kKeys, c.dv + to, kKeys);
      product<E>(dk_begun, columns(), (next - first) * kLanes, kTile / kPack<E> - word, c.q_t + across + word,
                 kTile / kPack<E>, &c.ds[word][first * kLanes], kKeys, c.dk + to, kKeys);
    }
    dq_begun = dk_begun = true;
  }

  MLITE_STAGE void write_queries(int64_t b, int64_t h, int64_t slot, int64_t query, int rows) const {
    for (int i = 0; i < rows; ++i) {
      const float* const sum = work.dq + (slot * work.rows + query + i) * work.row;
      T* const out = dq.row(b, h, query + i);
      for_vectors(p.head_dim, [&](int64_t at, int count, int) MLITE_INLINE {
        store(out + at, load(sum + at, kLanes) * p.scale, count);
      });
    }
  }

  // The gradients of a block of keys from their sums.
  MLITE_STAGE void write_keys(const View<T>& to, const float* sums, int64_t b, int64_t group, int64_t key, int keys,
                              float scale) const {
    constexpr int kColumns = kLanes * kPack<E>;
    for (int i = 0; i < keys; i += kLanes) {
      const float* const panel = sums + i / kKeys * kKeys * columns() + i % kKeys;
      for (int first = 0; first < p.head_dim; first += kColumns) {
        const int left = static_cast<int>(p.head_dim) - first;
        Words square[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          const float* const from = panel + (first + j * kPack<E>) * kKeys;
#ifdef __AVX512BF16__
          if constexpr (kPack<E> == 2) {
            square[j] = to_pairs(load(from, kLanes) * scale, load(from + kKeys, kLanes) * scale);
            continue;
          }
#endif
          square[j] = bit_cast<Words>(load(from, kLanes) * scale);
        }
        transpose(square);
        for (int j = 0; j < kLanes && i + j < keys; ++j) {
          T* const out = to.row(b, group, key + i + j) + first;
#ifdef __AVX512BF16__
          if constexpr (kPack<E> == 2) {
            _mm512_mask_storeu_epi16(out, left < kColumns ? (1u << left) - 1 : ~0u, bit_cast<__m512i>(square[j]));
            continue;
          }
#endif
          if (left < kLanes) store(out, bit_cast<Floats>(square[j]), left);
          else store(out, bit_cast<Floats>(square[j]), kLanes);
        }
      }
    }
  }

  int rows_from(int64_t query) const {
    return static_cast<int>(p.queries - query < block() ? p.queries - query : block());
  }
  int keys_from(int64_t key) const { return static_cast<int>(p.keys - key < block() ? p.keys - key : block()); }
  // The first block of queries that has to do with a block of keys; of those that see no key at all, the first keys take
  // care.
  int64_t first_query(int64_t key) const {
    const int64_t first = p.causal && key > 0 ? key - p.keys + p.queries : 0;
    return first < 0 ? 0 : first / block() * block();
  }

  void add_queries(Prefetch<T>& prefetch, int64_t b, int64_t h, int64_t query, int64_t key) const {
    if (query >= p.queries) return;
    prefetch.add(q.rows(b, h, query, rows_from(query), p.head_dim), dout.rows(b, h, query, rows_from(query), p.head_dim));
    if (key / block() == last_block(query)) prefetch.add(o.rows(b, h, query, rows_from(query), p.head_dim));
  }

  // What a block of keys adds to the gradients of a block of queries and takes from it.
  void pair(Blocks<E>& c, int64_t b, int64_t h, int64_t slot, int64_t query, int64_t key, Prefetch<T>& prefetch) const {
    const int64_t last = last_block(query), index = key / block();
    const int rows = rows_from(query), keys = keys_from(key);
    std::atomic<int32_t>& done =
        *reinterpret_cast<std::atomic<int32_t>*>(work.done + slot * work.blocks + query / block());
    const bool first = index == last || (last < 0 && index == 0);
    for (bool& begun : c.dq_begun) begun = !first;
    if (first) {
      find_delta(b, h, slot, query, rows);
    } else {
      if (index > last) return;
      while (done.load(std::memory_order_acquire) != last - index) sched_yield();
    }
    const Seen seen = p.seen(query, rows, p.query_range(b, query, rows), key, keys, p.key_range(b, key, keys));
    if (seen != Seen::none) {
      pack_queries(c, b, h, query, rows);
      for (int panel = 0; panel < keys; panel += kKeys) {
        for (int row = 0; row < rows; row += kTile) {
          const int count = rows - row < kTile ? rows - row : kTile;
          const Seen part = p.seen(query + row, count, c.query_ranges[row / kTile], key + panel, kKeys,
                                   c.key_ranges[panel / kKeys]);
          if (part == Seen::none) continue;
          prefetch.step(kTile);
          tile(c, {b, h, slot, query + row, key + panel, row, panel, part});
        }
      }
    }
    for (int row = 0; row < rows; row += kTile)
      if (!c.dq_begun[row / kTile])
        memset(work.dq + (slot * work.rows + query + row) * work.row, 0, sizeof(float) * kTile * work.row);
    if (index == 0) write_queries(b, h, slot, query, rows);
    done.store(static_cast<int32_t>(last - index + 1), std::memory_order_release);
  }

  // The gradients of a block of keys; `next` is the one that may be the next for this thread.
  void run(const Work& at, const Work& next) const {
    Blocks<E> c;
    const int keys = keys_from(at.key);
    pack_keys(c, at.b, at.group, at.key, keys);
    const int64_t share = p.heads / p.groups, first = first_query(at.key);
    for (int64_t i = 0; i < share; ++i) {
      for (int64_t query = first; query < p.queries; query += block()) {
        const int64_t h = at.group * share + i, following = query + block();
        Prefetch<T> prefetch;
        if (following < p.queries) {
          add_queries(prefetch, at.b, h, following, at.key);
        } else if (i + 1 < share) {
          add_queries(prefetch, at.b, h + 1, first, at.key);
        } else if (next.b < p.batch) {
          prefetch.add(k.rows(next.b, next.group, next.key, keys_from(next.key), p.head_dim),
                       v.rows(next.b, next.group, next.key, keys_from(next.key), p.head_dim));
          add_queries(prefetch, next.b, next.group * share, first_query(next.key), next.key);
        }
        pair(c, at.b, h, at.slot + i, query, at.key, prefetch);
      }
    }
    for (int panel = 0; panel < keys; panel += kKeys) {
      if (c.dk_begun[panel / kKeys]) continue;
      memset(c.dk + panel * columns(), 0, sizeof(float) * kKeys * columns());
      memset(c.dv + panel * columns(), 0, sizeof(float) * kKeys * columns());
    }
    write_keys(dk, c.dk, at.b, at.group, at.key, keys, p.scale);
    write_keys(dv, c.dv, at.b, at.group, at.key, keys, p.dropout.kept);
  }

  // A thread goes through all the keys of a sequence, from the last block to the first, and sums the gradients of its
  // queries in a slot of its own, as long as there is a sequence for each thread. What is left is divided by blocks, of
  // which none waits for one that has not begun.
  void run_all() const {
    const int64_t blocks = p.keys > 0 ? (p.keys + block() - 1) / block() : 1, chains = p.batch * p.groups;
    const int64_t share = p.heads / p.groups;
    std::atomic<int64_t> next{0}, next_block{0};
#pragma omp parallel if (blocks * chains > 1)
    {
      const int64_t threads = omp_get_num_threads(), whole = chains / threads * threads, thread = omp_get_thread_num();
      const auto clear = [&](int64_t slot) { memset(work.done + slot * work.blocks, 0, 4 * share * work.blocks); };
      const auto place = [&](int64_t chain, int64_t block_index, int64_t slot) -> Work {
        return {chain / p.groups, chain % p.groups, block_index * block(), slot};
      };
#pragma omp for
      for (int64_t chain = whole; chain < chains; ++chain) clear(chain * share);
      for (int64_t chain; (chain = next.fetch_add(1)) < whole;) {
        clear(thread * share);
        for (int64_t i = blocks - 1; i >= 0; --i) {
          const int64_t following = next.load();
          run(place(chain, i, thread * share), i > 0 ? place(chain, i - 1, 0)
                                               : place(following < whole ? following : chains, blocks - 1, 0));
        }
      }
      for (int64_t item; (item = next_block.fetch_add(1)) < (chains - whole) * blocks;) {
        const int64_t chain = whole + item / blocks;
        run(place(chain, blocks - 1 - item % blocks, chain * share), place(chains, 0, 0));
      }
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
                           Workspace(batch * heads, queries, head_dim, workspace)}
        .run_all();
  });
}

int64_t MLITE_CPU(attention_workspace)(int64_t batch, int64_t heads, int64_t queries, int64_t head_dim) {
  return Workspace::size(batch * heads, queries, head_dim);
}
