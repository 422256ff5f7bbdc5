// The loops of megatron_lite.data that are too slow in Python: the sample index here, packing and reading in the
// headers. Plain C++17, no torch.

#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "arrays.h"
#include "packing.h"
#include "samples.h"

namespace {

// Where tokens first, first + stride, ... of the stream from element `position` on lie: one row of (position in the
// stream, offset in what it holds there) for each row of `rows`. Elements without tokens are stepped over.
template <typename Row>
void token_positions(const Stream& stream, int64_t position, int64_t first, int64_t stride, int64_t count, Row* rows) {
  constexpr int64_t kAhead = 32;
  int64_t offset = first, length = -1;  // -1: of this position not yet known
  for (int64_t k = 0; k < count; ++k, offset += stride) {
    for (;; ++position, offset -= length, length = -1) {
      if (position >= stream.size()) throw std::out_of_range("the documents hold fewer tokens than asked for");
      if (length < 0) {
        stream.prefetch(position + kAhead);
        length = stream.end(position) - stream.begin(position);
      }
      if (offset < length) break;
    }
    rows[2 * k] = static_cast<Row>(position);
    rows[2 * k + 1] = static_cast<Row>(offset);
  }
}

template <typename Row>
void fill_starts(Array<Row>& rows, const py::array& lengths, const py::array& documents, const py::array& spans,
                 int64_t position, int64_t first, int64_t stride) {
  if (position < 0 || first < 0 || stride < 1) throw std::invalid_argument("position, first or stride is out of range");
  if (rows.ndim() != 2 || rows.shape(1) != 2) throw std::invalid_argument("rows must be [n, 2]");
  const Stream stream(lengths, documents, spans);
  Row* out = rows.mutable_data();
  const int64_t count = rows.shape(0);
  py::gil_scoped_release release;
  token_positions(stream, position, first, stride, count, out);
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
  // Uniform in [0, bound) without bias: the lowest 2^64 mod bound draws are thrown away.
  uint64_t below(uint64_t bound) {
    uint64_t draw = next();
    if (draw < bound) {  // else it is above the remainder of 2^64 / bound in any case, and a division is saved
      const uint64_t reject = (0 - bound) % bound;
      while (draw < reject) draw = next();
    }
    return draw % bound;
  }

 private:
  uint64_t state_;
};

// numpy's legacy generator, as Megatron shuffles with it: MT19937, and numbers below a bound by masking and drawing again.
class LegacyRandom {
 public:
  explicit LegacyRandom(uint32_t seed) : twister_(seed) {}
  uint64_t below(uint64_t bound) {
    const uint32_t largest = static_cast<uint32_t>(bound - 1);
    uint32_t mask = largest;
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    uint32_t draw;
    do draw = static_cast<uint32_t>(twister_()) & mask;
    while (draw > largest);
    return draw;
  }

 private:
  std::mt19937 twister_;
};

// Fisher-Yates in place. Draws do not depend on what is moved: they are made ahead, so that memory comes in time.
template <typename Element, typename Random>
void fisher_yates(Element* data, int64_t size, Random& random) {
  constexpr int64_t kAhead = 64;
  uint64_t draws[kAhead];
  for (int64_t end = size; end > 1;) {
    const int64_t count = std::min(kAhead, end - 1);
    for (int64_t k = 0; k < count; ++k) {
      draws[k] = random.below(static_cast<uint64_t>(end - k));
      __builtin_prefetch(data + draws[k], 1);
    }
    for (int64_t k = 0; k < count; ++k) std::swap(data[end - 1 - k], data[draws[k]]);
    end -= count;
  }
}

// The rows of an array [n] or [n, 2], moved whole.
template <typename Random>
void shuffle_rows(py::array& values, Random& random) {
  const int64_t rows = values.ndim() ? values.shape(0) : 0;
  if (!(values.flags() & py::array::c_style) || values.ndim() > 2)
    throw std::invalid_argument("what is shuffled must be contiguous, of one or two dimensions");
  const int64_t bytes = rows ? values.nbytes() / rows : 4;
  void* data = values.mutable_data();
  py::gil_scoped_release release;
  if (bytes == 4) return fisher_yates(static_cast<uint32_t*>(data), rows, random);
  if (bytes == 8) return fisher_yates(static_cast<std::pair<uint32_t, uint32_t>*>(data), rows, random);
  if (bytes == 16) return fisher_yates(static_cast<std::pair<uint64_t, uint64_t>*>(data), rows, random);
  throw std::invalid_argument("rows of 4, 8 or 16 bytes can be shuffled");
}

// (seed, epoch, stream) each pass through the mixer, so that neighbouring seeds are unrelated.
void shuffle(py::array values, uint64_t seed, uint64_t epoch, uint64_t stream) {
  uint64_t state = SplitMix64(seed).next();
  state = SplitMix64(state ^ epoch).next();
  SplitMix64 random(SplitMix64(state ^ stream).next());
  shuffle_rows(values, random);
}

void legacy_shuffle(LegacyRandom& random, py::array values) {
  if (values.ndim() && values.shape(0) > int64_t{1} << 32)
    throw std::invalid_argument("more than 2^32 rows cannot be shuffled as Megatron does");
  shuffle_rows(values, random);
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
  module.doc() = "Sample index, shuffles, blend index, packing and reading of megatron_lite.data.";
  module.def("fill_starts", &fill_starts<int32_t>, py::arg("rows").noconvert(), py::arg("lengths"),
             py::arg("documents").noconvert(), py::arg("spans").noconvert(), py::arg("position"), py::arg("first"),
             py::arg("stride"),
             "Write (position in documents, token offset) of tokens first, first + stride, ..., counted from document "
             "`position` on.");
  module.def("fill_starts", &fill_starts<int64_t>, py::arg("rows").noconvert(), py::arg("lengths"),
             py::arg("documents").noconvert(), py::arg("spans").noconvert(), py::arg("position"), py::arg("first"),
             py::arg("stride"));
  module.def("shuffle", &shuffle, py::arg("values").noconvert(), py::arg("seed"), py::arg("epoch"), py::arg("stream"),
             "Shuffle rows in place, a function of (seed, epoch, stream) alone.");
  py::class_<LegacyRandom>(module, "LegacyRandom", "numpy.random.RandomState(seed), as far as shuffling goes.")
      .def(py::init<uint32_t>(), py::arg("seed"))
      .def("shuffle", &legacy_shuffle, py::arg("values").noconvert());
  module.def("build_blend_index", &build_blend_index, py::arg("weights"), py::arg("size"), py::arg("limits"),
             "(dataset number [size] int16, sample number [size] int64); an empty `limits` means none.");
  bind_packing(module);
  bind_samples(module);
}
