// What the forward and the backward pass of attention share: the arguments, which keys a query sees, 2^x.
#pragma once
#include "attention_product.h"
#include "philox.h"

namespace mlite {
namespace MLITE_ISA {

constexpr int kMaxDim = 256;
constexpr int kKeys = 64;  // keys of a panel: what is packed and multiplied at a time
constexpr int kPanel = kKeys / kLanes;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^t to about one unit in the last place; 2^-inf is 0. A fit of 2^f for 0 <= f <= 1, exact at 0.
MLITE_INLINE inline Floats exp2(Floats t) {
#ifdef __AVX512F__
  const Floats f = _mm512_maskz_reduce_ps(0xffff, t, 1);  // t - floor(t); of an infinity 0
#else
  t = smallest_of(largest_of(t, splat(-151.0f)), splat(129.0f));
  const Floats magic = splat(12582912.0f), shifted = (t - 0.5f) + magic, f = t - (shifted - magic);
#endif
  Floats p = splat(0.000216129279f);
  p = p * f + 0.00124678423f;
  p = p * f + 0.00967545155f;
  p = p * f + 0.0554852821f;
  p = p * f + 0.240229309f;
  p = p * f + 0.693147063f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return _mm512_maskz_scalef_ps(0xffff, p, t);
#else
  const Ints whole = bit_cast<Ints>(shifted) - bit_cast<Ints>(magic), half = whole >> 1;
  return p * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((whole - half + 127) << 23);
#endif
}

// log2(x), by two steps of Halley's method on 2^y; of 0 -inf.
MLITE_INLINE inline Floats log2(Floats x) {
  Floats y = __builtin_convertvector(bit_cast<Ints>(x), Floats) * (1.0f / (1 << 23)) - 127.0f;
  for (int step = 0; step < 2; ++step) {
    const Floats e = exp2(y);
    y += 2.88539008f * (x - e) / (x + e);
  }
  return x == 0.0f ? splat(-INFINITY) : y;
}

template <typename T>
struct View {
  T* data;
  const int64_t* strides;

  T* row(int64_t b, int64_t h, int64_t s) const { return data + b * strides[0] + h * strides[1] + s * strides[2]; }
  Rows<std::remove_const_t<T>> rows(int64_t b, int64_t h, int64_t s, int64_t count, int64_t columns) const {
    return {row(b, h, s), strides[2], static_cast<int>(count), static_cast<int>(columns)};
  }
};

// Bounds of the documents' ids in a tile.
struct Range {
  int32_t low, high;
};

enum class Seen { none, some, all };

// Which keys of a panel one query sees: those before `limit`, of its own segment.
struct Sight {
  int limit;
  const int32_t* segments;  // of the panel's keys, or null
  int32_t segment;

  MLITE_INLINE Ints operator()(int first) const {
    Ints lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Ints seen = lane < limit - first;
    return segments ? seen & (load_raw<Ints>(segments + first, kLanes) == segment) : seen;
  }
};

// Random words of kGroup queries' probabilities in a panel.
struct RandomWords {
  alignas(64) uint32_t words[kGroup][kKeys + 4 * kCounters];
  int skipped[kGroup];  // words that belong to keys before the panel

  MLITE_INLINE Words operator()(int row, int first) const {
    return load_raw<Words>(words[row] + skipped[row] + first, kLanes);
  }
};
static_assert(kGroup == kStreams);

struct Problem {
  int64_t batch, heads, groups, queries, keys, head_dim;
  float scale;
  bool causal;
  const int32_t *segments_q, *segments_k;
  Dropout dropout;
  bool drops;
  int64_t dropout_head, dropout_heads;

  // A query sees none but the keys before this one.
  int64_t limit(int64_t query) const {
    if (!causal) return keys;
    const int64_t limit = query + keys - queries + 1;
    return limit < 0 ? 0 : limit > keys ? keys : limit;
  }

  Range range(const int32_t* segments, int64_t at, int64_t count) const {
    if (!segments || count <= 0) return {0, 0};
    Range range{segments[at], segments[at]};
    for (int64_t i = at + 1; i < at + count; ++i) {
      range.low = segments[i] < range.low ? segments[i] : range.low;
      range.high = segments[i] > range.high ? segments[i] : range.high;
    }
    return range;
  }
  Range query_range(int64_t b, int64_t query, int64_t count) const {
    return range(segments_q, b * queries + query, count);
  }
  Range key_range(int64_t b, int64_t key, int64_t count) const { return range(segments_k, b * keys + key, count); }

  // What `rows` neighbouring queries see of `size` keys, some of which may lie beyond the last one.
  Seen seen(int64_t query, int64_t rows, Range of_q, int64_t key, int64_t size, Range of_k) const {
    if (limit(query + rows - 1) <= key || of_q.high < of_k.low || of_k.high < of_q.low) return Seen::none;
    const bool one = of_q.low == of_q.high && of_k.low == of_k.high;
    return one && limit(query) >= key + size ? Seen::all : Seen::some;
  }

  // segments: those of a panel from `key` on, padded; nothing is seen by queries beyond the last one.
  Sight sight(int64_t b, int64_t query, int64_t key, const int32_t* segments) const {
    if (query >= queries) return {0, nullptr, 0};
    const int64_t left = limit(query) - key;
    return {left < 0 ? 0 : left > kKeys ? kKeys : static_cast<int>(left), segments_q ? segments : nullptr,
            segments_q ? segments_q[b * queries + query] : 0};
  }

  // Vectors of a panel's keys that reach as far as a query sees.
  int reach(int64_t query, int64_t key) const {
    const int64_t left = limit(query < queries ? query : queries - 1) - key;
    return left <= 0 ? 0 : left >= kKeys ? kPanel : static_cast<int>((left + kLanes - 1) / kLanes);
  }

  // Of as many vectors of keys.
  void draw(int64_t b, int64_t h, int64_t query, int64_t key, int vectors, RandomWords& random) const {
    uint64_t first[kGroup];
    uint32_t* out[kGroup];
    int count = 0;
    for (int r = 0; r < kGroup; ++r) {
      const uint64_t index = ((b * dropout_heads + dropout_head + h) * queries + query + r) * keys + key;
      first[r] = index / 4, out[r] = random.words[r], random.skipped[r] = index % 4;
      if (count < random.skipped[r] + vectors * kLanes) count = random.skipped[r] + vectors * kLanes;
    }
    for (int done = 0; done < count; done += 4 * kCounters) {
      dropout.random.draw(first, out);
      for (int r = 0; r < kGroup; ++r) first[r] += kCounters, out[r] += 4 * kCounters;
    }
  }
};

}  // namespace MLITE_ISA
}  // namespace mlite
