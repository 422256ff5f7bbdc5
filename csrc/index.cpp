// The loops of the dataset index that are too slow in Python. Plain C++17, no torch: see megatron_lite/data.
//
// Conventions: `lengths` may lie unaligned in a mapped .idx file (its arrays start at byte 34), so elements are read
// with memcpy. Document numbers are int32 or int64; every running sum is int64.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

class Lengths {
 public:
  explicit Lengths(const py::array& array) : bytes_(static_cast<const char*>(array.data())), size_(array.size()) {
    if (!array.dtype().is(py::dtype::of<int32_t>()) || array.ndim() != 1 || (size_ > 1 && array.strides(0) != 4))
      throw std::invalid_argument("lengths must be a contiguous one-dimensional int32 array");
  }
  int64_t operator[](int64_t i) const {
    if (i < 0 || i >= size_) throw std::out_of_range("a document number is outside the lengths");
    int32_t value;
    std::memcpy(&value, bytes_ + i * 4, 4);
    return value;
  }

 private:
  const char* bytes_;
  int64_t size_;
};

// Where tokens first, first + stride, ... (count of them) of the concatenated documents lie: rows of
// (position in documents, offset in that document). Documents without tokens are stepped over.
template <typename Document, typename Row>
void token_positions(const Lengths& lengths, const Document* documents, int64_t size, int64_t first, int64_t stride,
                     int64_t count, Row* rows) {
  int64_t position = 0, offset = first;
  for (int64_t k = 0; k < count; ++k, offset += stride) {
    for (;; ++position) {
      if (position >= size) throw std::out_of_range("the documents hold fewer tokens than asked for");
      const int64_t length = lengths[documents[position]];
      if (offset < length) break;
      offset -= length;
    }
    rows[2 * k] = static_cast<Row>(position);
    rows[2 * k + 1] = static_cast<Row>(offset);
  }
}

template <typename Document>
py::array build_sample_index(const py::array& lengths_array, const Array<Document>& documents, int64_t first,
                             int64_t stride, int64_t count) {
  if (first < 0 || stride < 1 || count < 0) throw std::invalid_argument("first, stride or count is out of range");
  const Lengths lengths(lengths_array);
  const Document* data = documents.data();
  const int64_t size = documents.size();
  const auto build = [&](auto zero) -> py::array {
    using Row = decltype(zero);
    py::array_t<Row> rows(std::vector<py::ssize_t>{count, 2});
    Row* out = rows.mutable_data();
    {
      py::gil_scoped_release release;
      token_positions(lengths, data, size, first, stride, count, out);
    }
    return rows;
  };
  return size > std::numeric_limits<int32_t>::max() ? build(int64_t{0}) : build(int32_t{0});
}

// SplitMix64 (Steele, Lea, Flood 2014): a counter with a mixing step. Small, and the same on every machine and for
// ever, which numpy's Generator does not promise between its versions.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t state) : state_(state) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  // Uniform in [0, bound) without bias: draws above the largest multiple of bound are thrown away.
  uint64_t below(uint64_t bound) {
    const uint64_t reject = (0 - bound) % bound;
    uint64_t draw;
    do draw = next();
    while (draw < reject);
    return draw % bound;
  }

 private:
  uint64_t state_;
};

// Fisher-Yates in place. (seed, epoch, stream) each pass through the mixer, so that neighbouring seeds are unrelated.
template <typename T>
void shuffle(Array<T>& values, uint64_t seed, uint64_t epoch, uint64_t stream) {
  T* data = values.mutable_data();
  const int64_t size = values.size();
  py::gil_scoped_release release;
  uint64_t state = SplitMix64(seed).next();
  state = SplitMix64(state ^ epoch).next();
  SplitMix64 random(SplitMix64(state ^ stream).next());
  for (int64_t i = size - 1; i > 0; --i) std::swap(data[i], data[random.below(static_cast<uint64_t>(i) + 1)]);
}

// The blend rule: at step n the dataset furthest behind its share, that is with the largest
// weight * max(n, 1) - taken, gives its next sample; the lowest number wins a tie. With limits, a dataset that has
// given `limit` samples is passed over.
py::tuple build_blend_index(const Array<double>& weights, int64_t size, const Array<int64_t>& limits) {
  const int64_t members = weights.size();
  if (members < 1 || members > std::numeric_limits<int16_t>::max())
    throw std::invalid_argument("a blend takes 1 to 32767 datasets");
  if (limits.size() != 0 && limits.size() != members) throw std::invalid_argument("one limit per dataset");
  py::array_t<int16_t> dataset(size);
  py::array_t<int64_t> sample(size);
  int16_t* dataset_out = dataset.mutable_data();
  int64_t* sample_out = sample.mutable_data();
  const double* weight = weights.data();
  const int64_t* limit = limits.size() ? limits.data() : nullptr;
  {
    py::gil_scoped_release release;
    std::vector<int64_t> taken(members, 0);
    for (int64_t n = 0; n < size; ++n) {
      const double step = n > 1 ? static_cast<double>(n) : 1.0;
      int64_t chosen = -1;
      double furthest = 0.0;
      for (int64_t i = 0; i < members; ++i) {
        if (limit && taken[i] >= limit[i]) continue;
        const double behind = weight[i] * step - static_cast<double>(taken[i]);
        if (chosen < 0 || behind > furthest) {
          chosen = i;
          furthest = behind;
        }
      }
      if (chosen < 0) throw std::out_of_range("the blend asks for more samples than its datasets have");
      dataset_out[n] = static_cast<int16_t>(chosen);
      sample_out[n] = taken[chosen]++;
    }
  }
  return py::make_tuple(dataset, sample);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Sample index, shuffle and blend index of megatron_lite.data.";
  module.def("build_sample_index", &build_sample_index<int32_t>, py::arg("lengths"), py::arg("documents").noconvert(),
             py::arg("first"), py::arg("stride"), py::arg("count"),
             "[count, 2]: (position in documents, token offset) of tokens first, first + stride, ...; int32, or int64 "
             "where positions need it.");
  module.def("build_sample_index", &build_sample_index<int64_t>, py::arg("lengths"), py::arg("documents").noconvert(),
             py::arg("first"), py::arg("stride"), py::arg("count"));
  module.def("shuffle", &shuffle<int32_t>, py::arg("values").noconvert(), py::arg("seed"), py::arg("epoch"),
             py::arg("stream"), "Shuffle in place, a function of (seed, epoch, stream) alone.");
  module.def("shuffle", &shuffle<int64_t>, py::arg("values").noconvert(), py::arg("seed"), py::arg("epoch"),
             py::arg("stream"));
  module.def("build_blend_index", &build_blend_index, py::arg("weights"), py::arg("size"), py::arg("limits"),
             "(dataset number [size] int16, sample number [size] int64); an empty `limits` means none.");
}
