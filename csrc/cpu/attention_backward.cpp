// Backward pass of attention: how its tiles are divided among threads.
//
// The work is divided by blocks of keys, whose gradients one thread sums alone. The gradient of a query is summed in
// the workspace, over the blocks of keys from its last to its first: each block waits until the one after it has added
// its part, so that the order, and with it every bit of the result, is the same for any number of threads.
#include <omp.h>
#include <sched.h>

#include <atomic>

#include "attention_gradients.h"

namespace mlite {
namespace MLITE_ISA {
namespace {

// A block of keys, and the workspace's slot of the first of the heads that share them.
struct Work {
  int64_t b, group, key, slot;
};

template <typename E, typename T>
struct Backward {
  const Gradients<E, T>& g;
  const Problem& p = g.p;
  const Workspace& work = g.work;
  const int block = g.block();

  // The last block of keys of which some query of this block sees some, by the causal limit; -1: none.
  int64_t last_block(int64_t query) const {
    const int64_t last = query + block < p.queries ? query + block : p.queries;
    return (p.limit(last - 1) + block - 1) / block - 1;
  }

  int rows_from(int64_t query) const {
    return static_cast<int>(p.queries - query < block ? p.queries - query : block);
  }
  int keys_from(int64_t key) const { return static_cast<int>(p.keys - key < block ? p.keys - key : block); }
  // The first block of queries that has to do with a block of keys; those that see no key at all are left to the first
  // keys.
  int64_t first_query(int64_t key) const {
    const int64_t first = p.causal && key > 0 ? key - p.keys + p.queries : 0;
    return first < 0 ? 0 : first / block * block;
  }

  void add_queries(Prefetch<T>& prefetch, int64_t b, int64_t h, int64_t query, int64_t key) const {
    if (query >= p.queries) return;
    const int rows = rows_from(query);
    prefetch.add(g.q.rows(b, h, query, rows, p.head_dim), g.dout.rows(b, h, query, rows, p.head_dim));
    if (key / block == last_block(query)) prefetch.add(g.o.rows(b, h, query, rows, p.head_dim));
  }

  // What a block of keys adds to the gradients of a block of queries and takes from it.
  void pair(Blocks<E>& c, Place at, Prefetch<T>& prefetch) const {
    const int64_t last = last_block(at.query), index = at.key / block;
    const int rows = rows_from(at.query), keys = keys_from(at.key);
    int32_t* const done = work.done + at.slot * work.blocks + at.query / block;
    const bool first = index == last || (last < 0 && index == 0);
    if (!first && index > last) return;
    for (bool& begun : c.dq_begun) begun = !first;
    if (first) g.find_delta(at, rows);
    else while (__atomic_load_n(done, __ATOMIC_ACQUIRE) != last - index) sched_yield();
    const Range of_q = p.query_range(at.b, at.query, rows), of_k = p.key_range(at.b, at.key, keys);
    if (p.seen(at.query, rows, of_q, at.key, keys, of_k) != Seen::none) {
      g.pack_queries(c, at, rows);
      for (int panel = 0; panel < keys; panel += kKeys) {
        for (int row = 0; row < rows; row += kTile) {
          const int count = rows - row < kTile ? rows - row : kTile;
          const Seen seen = p.seen(at.query + row, count, c.query_ranges[row / kTile], at.key + panel, kKeys,
                                   c.key_ranges[panel / kKeys]);
          if (seen == Seen::none) continue;
          prefetch.step(kTile);
          g.tile(c, {at.b, at.h, at.slot, at.query + row, at.key + panel, row, panel, seen});
        }
      }
    }
    for (int row = 0; row < rows; row += kTile)
      if (!c.dq_begun[row / kTile])
        memset(work.dq + (at.slot * work.rows + at.query + row) * work.row, 0, sizeof(float) * kTile * work.row);
    if (index == 0) g.write_queries(at, rows);
    __atomic_store_n(done, static_cast<int32_t>(last - index + 1), __ATOMIC_RELEASE);
  }

  // The gradients of a block of keys; `next` is the one that may be the next for this thread.
  void run(const Work& at, const Work& next) const {
    Blocks<E> c;
    const int keys = keys_from(at.key);
    g.pack_keys(c, at.b, at.group, at.key, keys);
    const int64_t share = p.heads / p.groups, first = first_query(at.key);
    for (int64_t i = 0; i < share; ++i) {
      const int64_t h = at.group * share + i;
      for (int64_t query = first; query < p.queries; query += block) {
        Prefetch<T> prefetch;
        if (query + block < p.queries) {
          add_queries(prefetch, at.b, h, query + block, at.key);
        } else if (i + 1 < share) {
          add_queries(prefetch, at.b, h + 1, first, at.key);
        } else if (next.b < p.batch) {
          const int following = keys_from(next.key);
          prefetch.add(g.k.rows(next.b, next.group, next.key, following, p.head_dim),
                       g.v.rows(next.b, next.group, next.key, following, p.head_dim));
          add_queries(prefetch, next.b, next.group * share, first_query(next.key), next.key);
        }
        pair(c, {at.b, h, at.slot + i, query, at.key, 0, 0, Seen::all}, prefetch);
      }
    }
    g.write_keys(c, at.b, at.group, at.key, keys);
  }

  // A thread goes through all the keys of a sequence, from the last block to the first, and sums the gradients of its
  // queries in a slot of its own, as long as there is a sequence for each thread. What is left is divided by blocks, of
  // which none waits for one that has not begun.
  void run_all() const {
    const int64_t blocks = p.keys > 0 ? (p.keys + block - 1) / block : 1, sequences = p.batch * p.groups;
    const int64_t share = p.heads / p.groups;
    std::atomic<int64_t> next{0}, next_block{0};
#pragma omp parallel if (blocks * sequences > 1)
    {
      const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num() * share;
      const int64_t whole = sequences / threads * threads;
      const auto begin = [&](int64_t slot) {
        memset(work.done + slot * work.blocks, 0, sizeof(int32_t) * share * work.blocks);
      };
      const auto place = [&](int64_t sequence, int64_t i, int64_t slot) -> Work {
        return {sequence / p.groups, sequence % p.groups, i * block, slot};
      };
#pragma omp for
      for (int64_t sequence = whole; sequence < sequences; ++sequence) begin(sequence * share);
      for (int64_t sequence; (sequence = next.fetch_add(1)) < whole;) {
        begin(own);
        for (int64_t i = blocks - 1; i >= 0; --i) {
          const int64_t following = next.load();
          run(place(sequence, i, own), i > 0 ? place(sequence, i - 1, own)
                                             : place(following < whole ? following : sequences, blocks - 1, own));
        }
      }
      for (int64_t item; (item = next_block.fetch_add(1)) < (sequences - whole) * blocks;) {
        const int64_t sequence = whole + item / blocks;
        run(place(sequence, blocks - 1 - item % blocks, sequence * share), place(sequences, 0, 0));
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
                                  const int64_t* o_strides, const float* lse, const void* do_,
                                  const int64_t* do_strides, void* dq, const int64_t* dq_strides, void* dk,
                                  const int64_t* dk_strides, void* dv, const int64_t* dv_strides, void* workspace) {
  if (head_dim > kMaxDim) return 1;
  const Problem problem{batch, heads, groups, queries, keys, head_dim, scale, causal, segments_q, segments_k,
                        Dropout(dropout_p, dropout_seed), dropout_p > 0, dropout_head, dropout_heads};
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto in = [](const void* x, const int64_t* strides) -> View<const T> {
      return {static_cast<const T*>(x), strides};
    };
    const auto out = [](void* x, const int64_t* strides) -> View<T> { return {static_cast<T*>(x), strides}; };
    const Gradients<Packed<T>, T> gradients{
        problem, in(q, q_strides), in(k, k_strides), in(v, v_strides), in(o, o_strides), in(do_, do_strides),
        out(dq, dq_strides), out(dk, dk_strides), out(dv, dv_strides), lse,
        Workspace(batch * heads, queries, head_dim, workspace)};
    Backward<Packed<T>, T>{gradients}.run_all();
  });
}

int64_t MLITE_CPU(attention_workspace)(int64_t batch, int64_t heads, int64_t queries, int64_t head_dim) {
  return Workspace::size(batch * heads, queries, head_dim);
}
