// Numpy arrays as the parts of the module _index take them.
//
// `lengths` and `offsets` may lie unaligned in a mapped .idx file (its arrays start at byte 34), so their elements are
// read with memcpy. Document numbers are int32 or int64; every running sum is int64.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// A one-dimensional array of T at any address. The array must outlive it.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(const py::array& array) : bytes_(static_cast<const char*>(array.data())), size_(array.size()) {
    if (!array.dtype().is(py::dtype::of<T>()) || array.ndim() != 1 ||
        (size_ > 1 && array.strides(0) != static_cast<py::ssize_t>(sizeof(T))))
      throw std::invalid_argument("lengths and offsets must be contiguous one-dimensional int" +
                                  std::to_string(8 * sizeof(T)) + " arrays");
  }
  int64_t size() const { return size_; }
  T operator[](int64_t i) const {
    if (i < 0 || i >= size_) throw std::out_of_range("a document number is outside the lengths");
    T value;
    std::memcpy(&value, bytes_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  void prefetch(int64_t i) const { __builtin_prefetch(bytes_ + i * static_cast<int64_t>(sizeof(T))); }

 private:
  const char* bytes_;
  int64_t size_;
};

// An aligned array of int32 or int64, read as int64. The array must outlive it.
class Integers {
 public:
  explicit Integers(const py::array& array)
      : data_(array.data()), size_(array.size()), wide_(array.dtype().is(py::dtype::of<int64_t>())) {
    if (!(wide_ || array.dtype().is(py::dtype::of<int32_t>())) || !(array.flags() & py::array::c_style))
      throw std::invalid_argument("an index array must be contiguous and of int32 or int64");
  }
  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  int64_t size_;
  bool wide_;
};

// Which tokens of its document each element of a stream stands for: the first ones as the rows of `spans`
// (first token, end), the others whole.
class Stream {
 public:
  Stream(const py::array& lengths, const py::array& documents, const py::array& spans)
      : lengths_(lengths), documents_(documents), spans_(spans) {
    if (spans.ndim() != 2 || spans.shape(1) != 2) throw std::invalid_argument("spans must be [n, 2]");
  }
  int64_t size() const { return documents_.size(); }
  int64_t document(int64_t position) const { return documents_[position]; }
  bool has_span(int64_t position) const { return 2 * position < spans_.size(); }
  int64_t begin(int64_t position) const { return has_span(position) ? spans_[2 * position] : 0; }
  int64_t end(int64_t position) const {
    return has_span(position) ? spans_[2 * position + 1] : lengths_[documents_[position]];
  }
  int64_t document_length(int64_t position) const { return lengths_[documents_[position]]; }
  void prefetch(int64_t position) const {
    if (position < size()) lengths_.prefetch(documents_[position]);
  }

 private:
  Unaligned<int32_t> lengths_;
  Integers documents_, spans_;
};
