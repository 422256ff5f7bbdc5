// What the forward and the backward pass of attention share: the arguments, and which keys a query sees.
#pragma once
#include "attention_tile.h"
#include "philox.h"

namespace mlite {
namespace MLITE_ISA {

constexpr int kMaxDim = 256;
constexpr int kKeys = 64;  // keys of a panel: what is packed and multiplied at a time
constexpr int kPanel = kKeys / kLanes;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

template <typename T>
struct View {
  T* data;
  const int64_t* strides;

  T* row(int64_t b, int64_t h, int64_t s) const { return data + b * strides[0] + h * strides[1] + s * strides[2]; }
  Rows<std::remove_const_t<T>> rows(int64_t b, int64_t h, int64_t s, int64_t count, int64_t columns) const {
    return {row(b, h, s), strides[2], static_cast<int>(count), static_cast<int>(columns)};
  }
};

struct Range {
  int32_t low, high;
};

// Bounds of the ids, which are at least one.
inline Range range_of(const int32_t* ids, int64_t count) {
  Range range{ids[0], ids[0]};
  for (int64_t i = 1; i < count; ++i) {
    range.low = ids[i] < range.low ? ids[i] : range.low;
    range.high = ids[i] > range.high ? ids[i] : range.high;
  }
  return range;
}

enum class Seen { none, some, all };

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

  // What `rows` neighbouring queries see of `size` keys, some of which may lie beyond the last one.
  Seen seen(int64_t b, int64_t query, int64_t rows, int64_t key, int64_t size) const {
    const int64_t last = limit(query + rows - 1);
    if (last <= key) return Seen::none;
    const bool all = limit(query) >= key + size;
    if (!segments_q) return all ? Seen::all : Seen::some;
    const Range of_q = range_of(segments_q + b * queries + query, rows);
    const Range of_k = range_of(segments_k + b * keys + key, last - key < size ? last - key : size);
    if (of_q.high < of_k.low || of_k.high < of_q.low) return Seen::none;
    return all && of_q.low == of_q.high && of_k.low == of_k.high ? Seen::all : Seen::some;
  }

  // Which of kLanes keys from `key` on a query sees.
  MLITE_INLINE Ints seen_keys(int64_t b, int64_t query, int64_t key) const {
    const int64_t left = limit(query) - key;
    Ints seen = lanes_below(left < 0 ? 0 : left > kLanes ? kLanes : static_cast<int>(left));
    if (segments_q && left > 0) {
      const int64_t there = keys - key;
      const int32_t* const ids = segments_k + b * keys + key;
      const Ints segments = there < kLanes ? load_raw<Ints>(ids, static_cast<int>(there)) : load_raw<Ints>(ids, kLanes);
      seen &= segments == segments_q[b * queries + query];
    }
    return seen;
  }

  // The random words of a query's probabilities in a panel: from the returned place on.
  const uint32_t* random(int64_t b, int64_t h, int64_t query, int64_t key, uint32_t (&words)[kKeys + 4 * kLanes]) const {
    const uint64_t index = ((b * dropout_heads + dropout_head + h) * queries + query) * keys + key;
    const int skipped = index % 4;
    philox(dropout.seed, index / 4, kKeys / 4 + (skipped > 0), words);
    return words + skipped;
  }
};

}  // namespace MLITE_ISA
}  // namespace mlite
