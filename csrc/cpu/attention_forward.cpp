// Forward pass of attention, as FlashAttention (Dao et al. 2022): the softmax is built up panel by panel of keys, so
// that no more than a tile's probabilities ever exist.
#include <omp.h>

#include <atomic>

#include "attention_problem.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

constexpr int kTile = 32;     // queries that go through the stages together; their scores stay in the first cache
constexpr int kChunk = 512;   // most queries that share the packing of a panel
constexpr int kArea = 32768;  // most elements of a chunk's outputs
static_assert(kTile % kLanes == 0);

// What one chunk of queries needs, on the stack.
template <typename E>
struct Chunk {
  static constexpr int kWords = kArea / kPack<E>;
  alignas(64) uint32_t q[kWords], keys[kMaxDim / kPack<E> * kKeys], values[kKeys / kPack<E> * kMaxDim];
  alignas(64) float out[kArea], max[kChunk], sums[kChunk][kLanes];
  alignas(64) int32_t segments[kKeys];
  // A tile: scores and the maxima of their lanes, what is taken off them, what earlier sums are multiplied with.
  alignas(64) float scores[kTile][kKeys], maxima[kTile][kLanes], offset[kTile], shrink[kTile];
  alignas(64) uint32_t probabilities[kTile][kKeys / kPack<E>];
  int reach[kTile / kGroup];  // vectors of keys that count, for each group of queries
};

// A chunk of queries of one head.
struct Work {
  int64_t b, h, query;
  int rows;
};

template <typename E, typename T>
struct Forward {
  const Problem& p;
  View<const T> q, k, v;
  View<T> o;
  float* lse;

  int width() const { return round_up(p.head_dim, kLanes * kPack<E>); }  // of packed rows, in elements
  int columns() const { return round_up(p.head_dim, kLanes); }  // that are computed
  int words() const { return width() / kPack<E>; }

  // Scaled scores (to base 2), -inf where a key is not seen.
  template <bool kMasks>
  MLITE_STAGE void scores(Chunk<E>& c, int64_t b, int64_t query, int row, int64_t key) const {
    const float scale = p.scale * kLog2e;
    for (int i = 0; i < kTile; i += kGroup) {
      const int reach = c.reach[i / kGroup] = kMasks ? p.reach(query + i + kGroup - 1, key) : kPanel;
      Floats maxima[kGroup];
      Sight sight[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        maxima[r] = splat(-INFINITY);
        if (kMasks) sight[r] = p.sight(b, query + i + r, key, c.segments);
      }
      for_widths(reach, [&](auto vectors, int first) MLITE_INLINE {
        Floats sums[kGroup][vectors];
        clear(sums);
        multiply<E, kGroup, vectors>(c.q + (row + i) * words(), words(), c.keys + first * kLanes, kKeys,
                                     words_of<E>(p.head_dim), sums);
        for (int r = 0; r < kGroup; ++r) {
          for (int v = 0; v < vectors; ++v) {
            Floats score = sums[r][v] * scale;
            if (kMasks) score = sight[r]((first + v) * kLanes) ? score : splat(-INFINITY);
            maxima[r] = largest_of(maxima[r], score);
            store(&c.scores[i + r][(first + v) * kLanes], score, kLanes);
          }
        }
      });
      for (int r = 0; r < kGroup; ++r) store(c.maxima[i + r], maxima[r], kLanes);
    }
  }

  // The new maxima, and with them offset and shrink.
  MLITE_STAGE void shift(Chunk<E>& c, int row) const {
    for (int i = 0; i < kTile; i += kLanes) {
      const Floats before = load(c.max + row + i, kLanes);
      const Floats max = largest_of(before, over_rows(c.maxima + i, largest_of));
      const Floats offset = max == -INFINITY ? splat(0) : max;
      store(c.max + row + i, max, kLanes);
      store(c.offset + i, offset, kLanes);
      store(c.shrink + i, exp2(before - offset), kLanes);
    }
  }

  template <bool kDrops>
  MLITE_STAGE void probabilities(Chunk<E>& c, int64_t b, int64_t h, int64_t query, int row, int64_t key) const {
    for (int group = 0; group < kTile; group += kGroup) {
      const int reach = c.reach[group / kGroup];
      RandomWords random;
      if (kDrops) p.draw(b, h, query + group, key, reach, random);
      for (int i = group; i < group + kGroup; ++i) {
        const float offset = c.offset[i];
        Floats sum = load(c.sums[row + i], kLanes) * c.shrink[i];
        const auto vector = [&](int v) MLITE_INLINE {
          const Floats e = exp2(load(&c.scores[i][v * kLanes], kLanes) - offset);
          sum += e;
          if (!kDrops) return e;
          return random(i - group, v * kLanes) < p.dropout.threshold ? splat(0) : e;
        };
        for (int v = 0; v < reach; v += kPack<E>) {
          uint32_t* const out = &c.probabilities[i][v * kLanes / kPack<E>];
          const Floats first = vector(v);
#ifdef __AVX512BF16__
          if constexpr (kPack<E> == 2) {
            store_raw(out, to_bf16(first, v + 1 < reach ? vector(v + 1) : splat(0)), kLanes);
            continue;
          }
#endif
          store_raw(out, bit_cast<Words>(first), kLanes);
        }
        store(c.sums[row + i], sum, kLanes);
      }
    }
  }

  MLITE_STAGE void add_values(Chunk<E>& c, int row, bool begun) const {
    for_widths(columns() / kLanes, [&](auto vectors, int first) MLITE_INLINE {
      for (int i = 0; i < kTile; i += kGroup) {
        float* const out = c.out + (row + i) * width() + first * kLanes;
        Floats sums[kGroup][vectors];
        clear(sums);
        multiply<E, kGroup, vectors>(c.probabilities[i], kKeys / kPack<E>, c.values + first * kLanes, width(),
                             c.reach[i / kGroup] * kLanes / kPack<E>, sums);
        for (int r = 0; begun && r < kGroup; ++r)
          for (int v = 0; v < vectors; ++v) sums[r][v] += load(out + r * width() + v * kLanes, kLanes) * c.shrink[i + r];
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

  // kLanes queries, of which `count` are there.
  MLITE_STAGE void finish(Chunk<E>& c, int64_t b, int64_t h, int64_t query, int row, int count) const {
    const Floats sum = sum_rows(c.sums + row);
    const Floats lses = (load(c.max + row, kLanes) + log2(sum)) * kLn2;
    if (lse) store(lse + (b * p.heads + h) * p.queries + query, lses, count);
    for (int i = 0; i < count; ++i) {
      // A sum of 0 is of no key, or of scores that are all -inf, whose softmax is NaN.
      const float factor = sum[i] == 0.0f ? (sees(b, query + i) ? NAN : 0.0f) : p.dropout.kept / sum[i];
      T* const out = o.row(b, h, query + i);
      const float* const in = c.out + (row + i) * width();
      for_vectors(p.head_dim, [&](int64_t at, int size, int) MLITE_INLINE {
        store(out + at, load(in + at, kLanes) * factor, size);
      });
    }
  }

  Rows<T> panel(const View<const T>& x, const Work& work, int64_t key) const {
    const int64_t count = p.keys - key < kKeys ? p.keys - key : kKeys;
    return x.rows(work.b, work.h / (p.heads / p.groups), key, count, p.head_dim);
  }

  // What follows the first panel: more panels, then what the next chunk begins with.
  Prefetch<T> needed(const Work& work, const Work& next, int64_t limit) const {
    Prefetch<T> prefetch;
    const int64_t share = p.heads / p.groups, left = limit - kKeys;
    if (left > 0)
      prefetch.add(k.rows(work.b, work.h / share, kKeys, left, p.head_dim),
                   v.rows(work.b, work.h / share, kKeys, left, p.head_dim));
    prefetch.add(view(o).rows(work.b, work.h, work.query, work.rows, p.head_dim));
    if (next.rows == 0) return prefetch;
    prefetch.add(q.rows(next.b, next.h, next.query, next.rows, p.head_dim));
    prefetch.add(panel(k, next, 0), panel(v, next, 0));
    return prefetch;
  }
  static View<const T> view(const View<T>& x) { return {x.data, x.strides}; }

  void run(const Work& work, const Work& next) const {
    const auto [b, h, query, rows] = work;
    Chunk<E> c;
    Range ranges[kChunk / kTile];
    bool begun[kChunk / kTile] = {};  // whether there are sums
    for (int row = 0; row < rows; row += kTile)
      ranges[row / kTile] = p.query_range(b, query + row, rows - row < kTile ? rows - row : kTile);
    const int padded = round_up(rows, kTile);
    pack<E, false, false>(q.rows(b, h, query, rows, p.head_dim), padded, words(), c.q, words());
    memset(c.sums, 0, sizeof(c.sums[0]) * padded);
    for (int i = 0; i < padded; ++i) c.max[i] = -INFINITY;
    const int64_t limit = p.limit(query + rows - 1);
    int tiles = 0;  // to come, for each of which a part of what will be needed is fetched
    for (int row = 0; row < rows; row += kTile) {
      const int64_t seen = p.limit(query + (rows - row < kTile ? rows : row + kTile) - 1);
      tiles += static_cast<int>((seen + kKeys - 1) / kKeys);
    }
    Prefetch<T> prefetch = needed(work, next, limit);
    const int step = prefetch.rows() / (tiles + 1) + 1;
    for (int64_t key = 0; key < limit; key += kKeys) {
      const Rows<T> keys = panel(k, work, key), values = panel(v, work, key);
      const Range range = p.key_range(b, key, keys.rows);
      bool packed = false;
      for (int row = 0; row < rows; row += kTile) {
        const int count = rows - row < kTile ? rows - row : kTile;
        const Seen seen = p.seen(query + row, count, ranges[row / kTile], key, kKeys, range);
        if (seen == Seen::none) continue;
        if (!packed) {
          pack<E, false, true>(keys, kKeys, words(), c.keys, kKeys);
          pack<E, true, false>(values, kKeys / kPack<E>, width(), c.values, width());
          if (p.segments_k) memcpy(c.segments, p.segments_k + b * p.keys + key, sizeof(int32_t) * keys.rows);
          packed = true;
        }
        prefetch.step(step);
        if (seen == Seen::some) scores<true>(c, b, query + row, row, key);
        else scores<false>(c, b, query + row, row, key);
        shift(c, row);
        if (p.drops) probabilities<true>(c, b, h, query + row, row, key);
        else probabilities<false>(c, b, h, query + row, row, key);
        add_values(c, row, begun[row / kTile]);
        begun[row / kTile] = true;
      }
    }
    for (int row = 0; row < rows; row += kTile)
      if (!begun[row / kTile]) memset(c.out + row * width(), 0, sizeof(float) * kTile * width());
    for (int row = 0; row < rows; row += kLanes)
      finish(c, b, h, query + row, row, rows - row < kLanes ? rows - row : kLanes);
  }

  // The number of queries in a chunk, which changes no bit of the result, is such that all threads have work.
  void run_all() const {
    const int64_t heads = p.batch * p.heads, wanted = 4 * omp_get_max_threads();
    int rows = kArea / width() / kTile * kTile;
    if (rows > kChunk) rows = kChunk;
    while (rows > 4 * kTile && heads * ((p.queries + rows - 1) / rows) < wanted) rows = round_up(rows / 2, kTile);
    const int64_t chunks = (p.queries + rows - 1) / rows, count = heads * chunks;
    // The last queries see most: first, so that what remains at the end is small.
    const auto work = [&](int64_t item) -> Work {
      if (item >= count) return {};
      const int64_t query = (chunks - 1 - item / heads) * rows, left = p.queries - query, h = item % heads;
      return {h / p.heads, h % p.heads, query, static_cast<int>(left < rows ? left : rows)};
    };
    std::atomic<int64_t> next{0};
#pragma omp parallel if (count > 1)
    for (int64_t item; (item = next.fetch_add(1)) < count;) run(work(item), work(next.load()));
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
    Forward<Packed<T>, T>{problem,
                          {static_cast<const T*>(q), q_strides},
                          {static_cast<const T*>(k), k_strides},
                          {static_cast<const T*>(v), v_strides},
                          {static_cast<T*>(o), o_strides},
                          lse}
        .run_all();
  });
}
