// Best-fit packing: documents side by side in rows of a fixed length, with as few cuts as can be (Ding et al. 2024,
// "Fewer Truncations Improve Language Modeling").

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "arrays.h"

// A set of numbers 0 to size - 1 that answers: the smallest member that is at least n.
class OrderedSet {
 public:
  explicit OrderedSet(int64_t size) : words_(size / 64 + 1, 0), summary_(words_.size() / 64 + 1, 0) {}
  void insert(int64_t n) {
    words_[n / 64] |= bit(n);
    summary_[n / 4096] |= bit(n / 64);
  }
  void erase(int64_t n) {
    words_[n / 64] &= ~bit(n);
    if (!words_[n / 64]) summary_[n / 4096] &= ~bit(n / 64);
  }
  int64_t at_least(int64_t n) const {  // -1: none
    if (const uint64_t here = words_[n / 64] >> (n % 64)) return n + __builtin_ctzll(here);
    const int64_t word = next(summary_, n / 64 + 1);
    return word < 0 ? -1 : word * 64 + __builtin_ctzll(words_[word]);
  }

 private:
  static uint64_t bit(int64_t n) { return uint64_t{1} << (n % 64); }
  static int64_t next(const std::vector<uint64_t>& words, int64_t n) {
    for (int64_t w = n / 64; w < static_cast<int64_t>(words.size()); ++w) {
      const uint64_t found = w == n / 64 ? words[w] >> (n % 64) << (n % 64) : words[w];
      if (found) return w * 64 + __builtin_ctzll(found);
    }
    return -1;
  }
  std::vector<uint64_t> words_, summary_;
};

// A stretch of a document that stays in one piece.
struct Piece {
  int64_t document;
  int32_t begin, end;
  int32_t length() const { return end - begin; }
};

// Every document cut into pieces of `capacity` tokens and what is left.
inline std::vector<Piece> cut_into_pieces(const Stream& stream, int64_t capacity) {
  std::vector<Piece> pieces;
  pieces.reserve(stream.size());
  for (int64_t i = 0; i < stream.size(); ++i) {
    stream.prefetch(i + 32);
    const int64_t end = stream.end(i);
    for (int64_t begin = stream.begin(i); begin < end; begin += capacity)
      pieces.push_back({stream.document(i), static_cast<int32_t>(begin),
                        static_cast<int32_t>(std::min(begin + capacity, end))});
  }
  return pieces;
}

// The numbers of the pieces, longest first and else in their order: a counting sort.
inline std::vector<int64_t> longest_first(const std::vector<Piece>& pieces, int64_t capacity) {
  std::vector<int64_t> place(capacity + 2, 0), order(pieces.size());
  for (const Piece& piece : pieces) ++place[capacity - piece.length() + 1];
  for (int64_t i = 1; i < capacity + 2; ++i) place[i] += place[i - 1];
  for (size_t i = 0; i < pieces.size(); ++i) order[place[capacity - pieces[i].length()]++] = static_cast<int64_t>(i);
  return order;
}

// Rows of pieces. Each piece, the longest first, goes into the fullest row that still has room for it. The search
// costs a few words of a bit set per piece, so that packing takes linear time.
class Rows {
 public:
  Rows(const std::vector<Piece>& pieces, int64_t capacity)
      : next_piece_(pieces.size(), -1), open_(capacity + 1, -1), rooms_(capacity + 1) {
    for (const int64_t piece : longest_first(pieces, capacity)) {
      const int64_t length = pieces[piece].length();
      const int64_t room = rooms_.at_least(length);
      const int64_t row = room < 0 ? static_cast<int64_t>(first_.size()) : take(room);
      if (room < 0) {
        first_.push_back(-1);
        next_row_.push_back(-1);
      }
      next_piece_[piece] = first_[row];
      first_[row] = piece;
      give(row, (room < 0 ? capacity : room) - length);
    }
  }
  int64_t size() const { return static_cast<int64_t>(first_.size()); }
  // The pieces of a row in their own order, which is random, where that of packing is by length.
  void list(int64_t row, std::vector<int64_t>& out) const {
    out.clear();
    for (int64_t piece = first_[row]; piece >= 0; piece = next_piece_[piece]) out.push_back(piece);
    std::sort(out.begin(), out.end());
  }

 private:
  int64_t take(int64_t room) {
    const int64_t row = open_[room];
    open_[room] = next_row_[row];
    if (open_[room] < 0) rooms_.erase(room);
    return row;
  }
  void give(int64_t row, int64_t room) {
    if (room == 0) return;
    next_row_[row] = open_[room];
    open_[room] = row;
    rooms_.insert(room);
  }
  std::vector<int64_t> next_piece_, first_, next_row_, open_;  // open_: of each room, the row last put there
  OrderedSet rooms_;
};

// (documents [P], spans [P, 2] int32, starts [K, 2]): the stream's tokens in K rows of at most `capacity`. Row k is the
// starts[k, 1] pieces from starts[k, 0] on.
inline py::tuple pack(const py::array& lengths, const py::array& documents, const py::array& spans, int64_t capacity) {
  if (capacity < 1 || capacity > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("a row holds 1 to 2^31 - 1 tokens");
  const Stream stream(lengths, documents, spans);
  std::vector<Piece> pieces;
  std::vector<int64_t> order, counts;
  {
    py::gil_scoped_release release;
    pieces = cut_into_pieces(stream, capacity);
    const Rows rows(pieces, capacity);
    order.reserve(pieces.size());
    counts.reserve(rows.size());
    std::vector<int64_t> row;
    for (int64_t i = 0; i < rows.size(); ++i) {
      rows.list(i, row);
      order.insert(order.end(), row.begin(), row.end());
      counts.push_back(static_cast<int64_t>(row.size()));
    }
  }
  const auto size = static_cast<py::ssize_t>(order.size());
  py::array_t<int32_t> out_spans(std::vector<py::ssize_t>{size, 2});
  for (py::ssize_t i = 0; i < size; ++i) {
    out_spans.mutable_data()[2 * i] = pieces[order[i]].begin;
    out_spans.mutable_data()[2 * i + 1] = pieces[order[i]].end;
  }
  const auto write = [&](auto zero) -> py::tuple {
    using Number = decltype(zero);
    py::array_t<Number> out(size);
    for (py::ssize_t i = 0; i < size; ++i) out.mutable_data()[i] = static_cast<Number>(pieces[order[i]].document);
    py::array_t<Number> starts(std::vector<py::ssize_t>{static_cast<py::ssize_t>(counts.size()), 2});
    int64_t position = 0;
    for (size_t k = 0; k < counts.size(); position += counts[k++]) {
      starts.mutable_data()[2 * k] = static_cast<Number>(position);
      starts.mutable_data()[2 * k + 1] = static_cast<Number>(counts[k]);
    }
    return py::make_tuple(out, out_spans, starts);
  };
  const bool wide = documents.dtype().is(py::dtype::of<int64_t>()) || size > std::numeric_limits<int32_t>::max();
  return wide ? write(int64_t{0}) : write(int32_t{0});
}

// How many elements of the stream are cut by rows of `length` tokens: where they are joined end to end, and where only
// those are cut that are longer than a row.
inline py::tuple count_cut(const py::array& lengths, const py::array& documents, const py::array& spans,
                           int64_t length) {
  const Stream stream(lengths, documents, spans);
  int64_t joined = 0, longer = 0, room = length;  // room: left in the row
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < stream.size(); ++i) {
      stream.prefetch(i + 32);
      const int64_t tokens = stream.end(i) - stream.begin(i);
      joined += tokens > room;
      longer += tokens > length;
      room = tokens < room ? room - tokens : length - (tokens - room) % length;
    }
  }
  return py::make_tuple(joined, longer);
}

inline void bind_packing(py::module_& module) {
  module.def("pack", &pack, py::arg("lengths"), py::arg("documents").noconvert(), py::arg("spans").noconvert(),
             py::arg("capacity"),
             "(documents [P], spans [P, 2], starts [K, 2]): the documents best-fit packed into K rows.");
  module.def("count_cut", &count_cut, py::arg("lengths"), py::arg("documents").noconvert(),
             py::arg("spans").noconvert(), py::arg("length"),
             "How many documents rows of `length` tokens cut: joined end to end, and where each begins in a new row.");
}
