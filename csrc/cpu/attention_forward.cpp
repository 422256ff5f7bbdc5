// Forward pass of attention, as FlashAttention (Dao et al. 2022): the softmax is built up panel by panel of keys, so that
// no more than a tile's probabilities ever exist.
#include "attention_problem.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int kTile = 16;      // queries that go through the stages together; their scores stay in the first cache
constexpr int kChunk = 256;    // most queries that share the packing of a panel
constexpr int kArea = 32768;   // most elements of a chunk's outputs

// What one chunk of queries needs, on the stack.
template <typename E>
struct Chunk {
  static constexpr int kWords = kArea / kPack<E>;
  alignas(64) uint32_t q[kWords], keys[kMaxDim / kPack<E> * kKeys], values[kKeys / kPack<E> * kMaxDim];
  alignas(64) float out[kArea], scores[kTile][kKeys], max[kChunk], sums[kChunk][kLanes], shrink[kTile], offset[kTile];
  alignas(64) uint32_t probabilities[kTile][kKeys / kPack<E>];
  alignas(64) Floats maxima[kTile];
};

// Vectors of keys that are computed for one group of queries in a panel.
struct Reach {
  int vectors[kTile / kGroup];
};

template <typename E, typename T>
struct Forward {
  const Problem& p;
  View<const T> q, k, v;
  View<T> o;
  float* lse;

  int width() const { return round_up(p.head_dim, kLanes * kPack<E>); }  // of packed rows, in elements
  int columns() const { return round_up(p.head_dim, kLanes); }           // that are computed

  // Scaled scores of a tile (to base 2) and the maxima of their lanes; -inf where a key is not seen.
  void scores(Chunk<E>& c, int64_t b, int64_t query, int row, int rows, int64_t key, Seen seen, Reach& reach) const {
    const int words = width() / kPack<E>;
    const float scale = p.scale * kLog2e;
    for (int g = 0; g < kTile / kGroup; ++g) {
      const int last = g * kGroup + kGroup < rows ? g * kGroup + kGroup - 1 : rows - 1;
      const int64_t left = g * kGroup < rows ? p.limit(query + last) - key : 0;
      reach.vectors[g] = left <= 0 ? 0 : left >= kKeys ? kPanel : static_cast<int>((left + kLanes - 1) / kLanes);
      for (int r = 0; r < kGroup; ++r) c.maxima[g * kGroup + r] = splat(-INFINITY);
      for_widths(reach.vectors[g], [&](auto vectors, int first) MLITE_INLINE {
        Floats sums[kGroup][vectors] = {};
        multiply<E, vectors>(c.q + (row + g * kGroup) * words, words, c.keys + first * kLanes, kKeys,
                             words_of<E>(p.head_dim), sums);
        for (int r = 0; r < kGroup; ++r) {
          const int i = g * kGroup + r;
          for (int v = 0; v < vectors; ++v) {
            Floats score = sums[r][v] * scale;
            if (seen == Seen::some && i < rows)
              score = p.seen_keys(b, query + i, key + (first + v) * kLanes) ? score : splat(-INFINITY);
            c.maxima[i] = larger(c.maxima[i], score);
            store(&c.scores[i][(first + v) * kLanes], score, kLanes);
          }
        }
      });
    }
  }

  // The new maximum of each row, and what earlier sums are to be multiplied with.
  void shift(Chunk<E>& c, int row) const {
    alignas(64) float tops[kTile];
    for (int i = 0; i < kTile; ++i) {
      const Floats one[1] = {c.maxima[i]};
      tops[i] = max_of(one);
    }
    for (int i = 0; i < kTile; i += kLanes) {
      const Floats before = load(c.max + row + i, kLanes), max = larger(before, load(tops + i, kLanes));
      const Floats offset = max == -INFINITY ? splat(0) : max;
      store(c.max + row + i, max, kLanes);
      store(c.offset + i, offset, kLanes);
      store(c.shrink + i, exp2(before - offset), kLanes);
    }
  }

  void probabilities(Chunk<E>& c, int64_t b, int64_t h, int64_t query, int row, int64_t key, const Reach& reach) const {
    for (int i = 0; i < kTile; ++i) {
      const int vectors = reach.vectors[i / kGroup];
      if (vectors == 0) continue;
      uint32_t words[kKeys + 4 * kLanes];
      const uint32_t* const random = p.drops ? p.random(b, h, query + i, key, words) : nullptr;
      const float offset = c.offset[i];
      Floats sum = load(c.sums[row + i], kLanes) * c.shrink[i];
      const auto vector = [&](int v) MLITE_INLINE {
        const Floats e = exp2(load(&c.scores[i][v * kLanes], kLanes) - offset);
        sum += e;
        return random ? (load_raw<Words>(random + v * kLanes, kLanes) < p.dropout.threshold ? splat(0) : e) : e;
      };
      for (int v = 0; v < vectors; v += kPack<E>) {
        const Floats first = vector(v);
        uint32_t* const out = &c.probabilities[i][v * kLanes / kPack<E>];
#ifdef __AVX512BF16__
        if constexpr (kPack<E> == 2) {
          store_raw(out, to_bf16(first, v + 1 < vectors ? vector(v + 1) : splat(0)), kLanes);
          continue;
        }
#endif
        store_raw(out, bit_cast<Words>(first), kLanes);
      }
      store(c.sums[row + i], sum, kLanes);
    }
  }

  void add_values(Chunk<E>& c, int row, const Reach& reach) const {
    for_widths(columns() / kLanes, [&](auto vectors, int first) MLITE_INLINE {
      for (int g = 0; g < kTile / kGroup; ++g) {
        if (reach.vectors[g] == 0) continue;
        float* const out = c.out + (row + g * kGroup) * width() + first * kLanes;
        Floats sums[kGroup][vectors];
        for (int r = 0; r < kGroup; ++r)
          for (int v = 0; v < vectors; ++v)
            sums[r][v] = load(out + r * width() + v * kLanes, kLanes) * c.shrink[g * kGroup + r];
        multiply<E, vectors>(c.probabilities[g * kGroup], kKeys / kPack<E>, c.values + first * kLanes, width(),
                             reach.vectors[g] * kLanes / kPack<E>, sums);
        for (int r = 0; r < kGroup; ++r)
          for (int v = 0; v < vectors; ++v) store(out + r * width() + v * kLanes, sums[r][v], kLanes);
      }
    });
  }

  // Whether a query sees any key at all.
  bool sees(int64_t b, int64_t query) const {
    const int64_t limit = p.limit(query);
    if (!p.segments_q) return limit > 0;
    for (int64_t key = 0; key < limit; ++key)
      if (p.segments_k[b * p.keys + key] == p.segments_q[b * p.queries + query]) return true;
    return false;
  }

  void finish(Chunk<E>& c, int64_t b, int64_t h, int64_t query, int row) const {
    const Floats parts[1] = {load(c.sums[row], kLanes)};
    const float sum = sum_of(parts);
    // A sum of 0 is of no key, or of scores that are all -inf, whose softmax is NaN.
    const float factor = sum == 0.0f ? (sees(b, query) ? NAN : 0.0f) : p.dropout.kept / sum;
    T* const out = o.row(b, h, query);
    for_vectors(p.head_dim, [&](int64_t i, int count, int) MLITE_INLINE {
      store(out + i, load(c.out + row * width() + i, kLanes) * factor, count);
    });
    if (lse) lse[(b * p.heads + h) * p.queries + query] = (c.max[row] + std::log2(sum)) * kLn2;
  }

  void run(int64_t b, int64_t h, int64_t query, int rows) const {
    Chunk<E> c;
    const int padded = round_up(rows, kTile), words = width() / kPack<E>;
    pack<E, false, false>(q.rows(b, h, query, rows, p.head_dim), padded, words, c.q, words);
    memset(c.out, 0, sizeof(float) * padded * width());
    memset(c.sums, 0, sizeof(c.sums[0]) * padded);
    for (int i = 0; i < padded; ++i) c.max[i] = -INFINITY;
    const int64_t limit = p.limit(query + rows - 1), group = h / (p.heads / p.groups);
    for (int64_t key = 0; key < limit; key += kKeys) {
      if (p.seen(b, query, rows, key, kKeys) == Seen::none) continue;
      const int64_t count = p.keys - key < kKeys ? p.keys - key : kKeys;
      pack<E, false, true>(k.rows(b, group, key, count, p.head_dim), kKeys, words, c.keys, kKeys);
      pack<E, true, false>(v.rows(b, group, key, count, p.head_dim), kKeys / kPack<E>, width(), c.values, width());
      for (int row = 0; row < rows; row += kTile) {
        const int tile = rows - row < kTile ? rows - row : kTile;
        const Seen seen = p.seen(b, query + row, tile, key, kKeys);
        if (seen == Seen::none) continue;
        Reach reach;
        scores(c, b, query + row, row, tile, key, seen, reach);
        shift(c, row);
        probabilities(c, b, h, query + row, row, key, reach);
        add_values(c, row, reach);
      }
    }
    for (int row = 0; row < rows; ++row) finish(c, b, h, query + row, row);
  }
};

}  // namespace
}  // namespace MLITE_ISA
}  // namespace mlite

using namespace mlite::MLITE_ISA;

int MLITE_CPU(attention_forward)(int dtype, int64_t batch, int64_t heads, int64_t groups, int64_t queries, int64_t keys,
                                 int64_t head_dim, float scale, bool causal, const void* q, const int64_t* q_strides,
                                 const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                 const int32_t* segments_q, const int32_t* segments_k, double dropout_p,
                                 uint64_t dropout_seed, int64_t dropout_head, int64_t dropout_heads, void* o,
                                 const int64_t* o_strides, float* lse) {
  if (head_dim > kMaxDim) return 1;
  const Problem problem{batch, heads, groups, queries, keys, head_dim, scale, causal, segments_q, segments_k,
                        Dropout(dropout_p, dropout_seed), dropout_p > 0, dropout_head, dropout_heads};
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<Packed<T>, T> pass{problem, {static_cast<const T*>(q), q_strides},
                                     {static_cast<const T*>(k), k_strides}, {static_cast<const T*>(v), v_strides},
                                     {static_cast<T*>(o), o_strides}, lse};
    int64_t rows = kArea / pass.width() / kTile * kTile;
    if (rows > kChunk) rows = kChunk;
    const int64_t chunks = (queries + rows - 1) / rows;
    // The last queries see most: first, so that what remains at the end is small.
#pragma omp parallel for schedule(dynamic, 1) if (batch * heads * chunks > 1)
    for (int64_t item = 0; item < batch * heads * chunks; ++item) {
      const int64_t chunk = chunks - 1 - item / (batch * heads), bh = item % (batch * heads), first = chunk * rows;
      pass.run(bh / heads, bh % heads, first, static_cast<int>(queries - first < rows ? queries - first : rows));
    }
  });
}
