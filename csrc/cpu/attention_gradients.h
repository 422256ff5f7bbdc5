// The tiles of attention's backward pass, as FlashAttention-2 (Dao 2023): probabilities are computed anew from the
// forward pass' log-sum-exp, and each tile serves the gradients of queries, keys and values.
#pragma once
#include "attention_problem.h"

namespace mlite {
namespace MLITE_ISA {

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

// Where one tile lies: query and key are those of the tensors, row and panel count within the blocks.
struct Place {
  int64_t b, h, slot, query, key;
  int row, panel;
  Seen seen;
};

template <typename E, typename T>
struct Gradients {
  const Problem& p;
  View<const T> q, k, v, o, dout;
  View<T> dq, dk, dv;
  const float* lse;
  Workspace work;

  int width() const { return static_cast<int>(work.row); }
  int columns() const { return round_up(p.head_dim, kLanes < 2 * kGroup ? 2 * kGroup : kLanes); }
  int words() const { return width() / kPack<E>; }
  int block() const {
    const int rows = kArea<E> / width() / kTile * kTile;
    return rows > kBlock ? kBlock : rows;
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

  MLITE_STAGE void pack_queries(Blocks<E>& c, const Place& at, int rows) const {
    const auto q_rows = q.rows(at.b, at.h, at.query, rows, p.head_dim);
    const auto o_rows = dout.rows(at.b, at.h, at.query, rows, p.head_dim);
    const float* const from = lse + (at.b * p.heads + at.h) * p.queries + at.query;
    for (int row = 0; row < rows; row += kTile) {
      const int across = row / kPack<E> * columns();
      pack<E, false, false>(q_rows.from(row), kTile, words(), c.q + row * words(), words());
      pack<E, false, false>(o_rows.from(row), kTile, words(), c.dout + row * words(), words());
      pack<E, true, true>(q_rows.from(row), kTile / kPack<E>, columns(), c.q_t + across, kTile / kPack<E>);
      pack<E, true, true>(o_rows.from(row), kTile / kPack<E>, columns(), c.dout_t + across, kTile / kPack<E>);
      c.query_ranges[row / kTile] = p.query_range(at.b, at.query + row, rows - row < kTile ? rows - row : kTile);
      for (int i = row; i < row + kTile; ++i) c.lse[i] = i < rows ? from[i] * kLog2e : 0;
    }
  }

  // sum(o * do) of each query, which is what the softmax' gradient takes off those of the probabilities.
  MLITE_STAGE void find_delta(const Place& at, int rows) const {
    float* const delta = work.delta + at.slot * work.rows + at.query;
    for (int i = 0; i < block(); i += kLanes) {
      alignas(64) float sums[kLanes][kLanes];
      for (int r = 0; r < kLanes; ++r) {
        Floats sum = splat(0);
        if (i + r < rows) {
          const int64_t query = at.query + i + r;
          const T *const out = o.row(at.b, at.h, query), *const grad = dout.row(at.b, at.h, query);
          for_vectors(p.head_dim, [&](int64_t d, int count, int) MLITE_INLINE {
            sum += load(out + d, count) * load(grad + d, count);
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
        multiply<E, kGroup, vectors>(a + group * words(), words(), b + first * kLanes, kKeys, words_of<E>(p.head_dim),
                                     sums);
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
        uint32_t* const p_out = &c.p[(group + r) / kPack<E>][v * kLanes];
        uint32_t* const ds_out = &c.ds[(group + r) / kPack<E>][v * kLanes];
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
    const auto run = p.drops ? (masks ? &Gradients::softmax<true, true> : &Gradients::softmax<true, false>)
                             : (masks ? &Gradients::softmax<false, true> : &Gradients::softmax<false, false>);
    for (int i = 0; i < kGroups; ++i) (this->*run)(c, at, i * kGroup, reach[i]);
    float* const sums = work.dq + (at.slot * work.rows + at.query) * work.row;
    bool &dq_begun = c.dq_begun[at.row / kTile], &dk_begun = c.dk_begun[at.panel / kKeys];
    for (int i = 0, next; i < kGroups; i = next) {  // groups that reach as far
      for (next = i + 2; next < kGroups && reach[next + 1] == reach[i + 1];) next += 2;
      product<E>(dq_begun, (next - i) * kGroup, columns(), reach[i + 1] * kLanes / kPack<E>, c.ds_rows[i * kGroup],
                 kKeys / kPack<E>, c.keys + at.panel / kPack<E> * width(), width(), sums + i * kGroup * work.row,
                 work.row);
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

  MLITE_STAGE void write_queries(const Place& at, int rows) const {
    for (int i = 0; i < rows; ++i) {
      const float* const sum = work.dq + (at.slot * work.rows + at.query + i) * work.row;
      T* const out = dq.row(at.b, at.h, at.query + i);
      for_vectors(p.head_dim, [&](int64_t d, int count, int) MLITE_INLINE {
        store(out + d, load(sum + d, kLanes) * p.scale, count);
      });
    }
  }

  void write_keys(Blocks<E>& c, int64_t b, int64_t group, int64_t key, int keys) const {
    for (int panel = 0; panel < keys; panel += kKeys) {
      if (c.dk_begun[panel / kKeys]) continue;
      memset(c.dk + panel * columns(), 0, sizeof(float) * kKeys * columns());
      memset(c.dv + panel * columns(), 0, sizeof(float) * kKeys * columns());
    }
    write_sums(dk, c.dk, b, group, key, keys, p.scale);
    write_sums(dv, c.dv, b, group, key, keys, p.dropout.kept);
  }

  // Transposes the sums of a block of keys.
  MLITE_STAGE void write_sums(const View<T>& to, const float* sums, int64_t b, int64_t group, int64_t key, int keys,
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
};

}  // namespace MLITE_ISA
}  // namespace mlite
