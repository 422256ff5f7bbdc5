// Reading: whole batches from the mapped token ids into the arrays that training takes, one call a batch.

#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "arrays.h"

// The smallest and the largest id met.
struct Range {
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
  void add(int64_t smallest, int64_t largest) {
    low = std::min(low, smallest);
    high = std::max(high, largest);
  }
};

// Where one sample goes: `length` of each, null where not asked for.
struct Row {
  int64_t length;
  int64_t *tokens, *labels;
  float* mask;
  int64_t* positions;
  int32_t* segments;
};

// What the end-of-document token does; -1: there is none.
struct Ends {
  int64_t eod;
  bool mask_loss;
};

// tokens [length] are whole: no loss at eod where asked for, positions and segments that start anew after it.
inline void mark_by_eod(const Row& row, const Ends& ends) {
  if (row.mask) {
    if (ends.mask_loss)
      for (int64_t i = 0; i < row.length; ++i) row.mask[i] = row.tokens[i] == ends.eod ? 0.0f : 1.0f;
    else
      std::fill_n(row.mask, row.length, 1.0f);
  }
  if (!row.positions && !row.segments) return;
  int32_t segment = 0;
  for (int64_t start = 0; start < row.length; ++segment) {
    const int64_t* eod = std::find(row.tokens + start, row.tokens + row.length, ends.eod);
    const int64_t stop = std::min<int64_t>(eod - row.tokens + 1, row.length);
    if (row.positions) std::iota(row.positions + start, row.positions + stop, int64_t{0});
    if (row.segments) std::fill(row.segments + start, row.segments + stop, segment);
    start = stop;
  }
}

// One version for each instruction set; the processor's own is chosen when the module is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define MLITE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MLITE_CLONES
#endif

template <typename Id>
MLITE_CLONES void widen(const void* data, int64_t first, int64_t count, int64_t* out, Range& range) {
  const Id* ids = static_cast<const Id*>(data) + first;
  Id low = ids[0], high = ids[0];
  for (int64_t i = 0; i < count; ++i) {
    const Id id = ids[i];
    out[i] = id;
    low = std::min(low, id);
    high = std::max(high, id);
  }
  range.add(static_cast<int64_t>(low), static_cast<int64_t>(high));
}

// Samples in training order.
class Samples {
 public:
  virtual ~Samples() = default;
  virtual int64_t size() const = 0;
  virtual int64_t length() const = 0;  // tokens of a sample
  virtual void read(int64_t sample, const Ends& ends, const Row& row, Range& range) const = 0;
  // Asks for the ids of a sample that is read soon; any number will do.
  virtual void prefetch(int64_t sample) const = 0;

 protected:
  void check(int64_t sample) const {
    if (sample < 0 || sample >= size())
      throw std::out_of_range("sample " + std::to_string(sample) + " of " + std::to_string(size()));
  }
};

// Samples of one indexed dataset. starts [n, 2]: of each sample the position in the stream, and with it the token
// offset there; or, packed, the number of elements of the stream that are in its row.
class IndexedSamples : public Samples {
 public:
  IndexedSamples(py::array ids, py::array offsets, py::array lengths, py::array documents, py::array spans,
                 py::array starts, int64_t length, bool packed, int64_t first)
      : held_{ids, offsets, lengths, documents, spans, starts},
        ids_(ids.data()),
        num_ids_(ids.size()),
        itemsize_(ids.itemsize()),
        widen_(widener(ids)),
        offsets_(offsets),
        stream_(lengths, documents, spans),
        starts_(starts),
        length_(length),
        packed_(packed),
        first_(first) {
    if (first < 0 || 2 * first > starts_.size()) throw std::invalid_argument("the first sample is past the last");
    if (offsets_.size() != lengths.size()) throw std::invalid_argument("one offset and one length a sequence");
  }

  int64_t size() const override { return starts_.size() / 2 - first_; }
  int64_t length() const override { return length_; }

  void read(int64_t sample, const Ends& ends, const Row& row, Range& range) const override {
    check(sample);
    const int64_t position = starts_[2 * (first_ + sample)], second = starts_[2 * (first_ + sample) + 1];
    if (packed_) return read_packed(position, second, ends, row, range);
    read_stream(position, second, row, range);
    mark_by_eod(row, ends);
  }

  void prefetch(int64_t sample) const override {
    if (sample < 0 || sample >= size()) return;
    const int64_t position = starts_[2 * (first_ + sample)];
    if (position < 0 || position >= stream_.size()) return;
    const int64_t first = stream_.begin(position) + (packed_ ? 0 : starts_[2 * (first_ + sample) + 1]);
    const char* begin = static_cast<const char*>(ids_) + offsets_[stream_.document(position)] + first * itemsize_;
    const int64_t bytes = std::min<int64_t>(length_ * itemsize_, 2048);  // from there the processor goes on by itself
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(begin + byte);
  }

 private:
  using Widen = void (*)(const void*, int64_t, int64_t, int64_t*, Range&);

  static Widen widener(const py::array& ids) {
    const bool is_signed = ids.dtype().kind() == 'i', is_unsigned = ids.dtype().kind() == 'u';
    if (ids.ndim() == 1 && (ids.size() < 2 || ids.strides(0) == ids.itemsize())) {
      if (ids.itemsize() == 1 && is_signed) return &widen<int8_t>;
      if (ids.itemsize() == 1 && is_unsigned) return &widen<uint8_t>;
      if (ids.itemsize() == 2 && is_signed) return &widen<int16_t>;
      if (ids.itemsize() == 2 && is_unsigned) return &widen<uint16_t>;
      if (ids.itemsize() == 4 && is_signed) return &widen<int32_t>;
      if (ids.itemsize() == 8 && is_signed) return &widen<int64_t>;
    }
    throw std::invalid_argument("token ids of this type cannot be read");
  }

  // Where in ids_ the tokens first up to first + count of the document at `position` are.
  int64_t locate(int64_t position, int64_t first, int64_t count) const {
    const int64_t at = offsets_[stream_.document(position)] / itemsize_ + first;
    if (first < 0 || count < 1 || at < 0 || at + count > num_ids_)
      throw std::out_of_range("the index points outside the token ids: it is damaged, or of other data");
    return at;
  }

  // Inputs from row.tokens[done] on, and all their labels but the last.
  void copy(int64_t position, int64_t first, int64_t count, const Row& row, int64_t done, Range& range) const {
    widen_(ids_, locate(position, first, count), count, row.tokens + done, range);
    std::memcpy(row.labels + done, row.tokens + done + 1, (count - 1) * sizeof(int64_t));
  }
  void copy_label(int64_t position, int64_t token, const Row& row, int64_t place, Range& range) const {
    widen_(ids_, locate(position, token, 1), 1, row.labels + place, range);
  }

  // The label of a token is what follows it in its document; after the document's end, what follows in the stream.
  void read_stream(int64_t position, int64_t offset, const Row& row, Range& range) const {
    int64_t done = 0;
    for (bool lacks_label = false; done < row.length || lacks_label; ++position, offset = 0) {
      if (position < 0 || position >= stream_.size()) throw std::out_of_range("the index ends within a sample");
      const int64_t first = stream_.begin(position) + offset, rest = stream_.end(position) - first;
      if (rest <= 0) continue;
      if (lacks_label) copy_label(position, first, row, done - 1, range);
      lacks_label = false;
      if (done == row.length) break;
      const int64_t count = std::min(rest, row.length - done);
      copy(position, first, count, row, done, range);
      done += count;
      lacks_label = first + count == stream_.document_length(position);
      if (!lacks_label) copy_label(position, first + count, row, done - 1, range);
    }
  }

  // Documents side by side: no loss where a document ends, since what comes next is not its own, nor on padding.
  void read_packed(int64_t position, int64_t elements, const Ends& ends, const Row& row, Range& range) const {
    if (position < 0 || elements < 1 || position + elements > stream_.size())
      throw std::out_of_range("the index ends within a sample");
    int64_t done = 0;
    for (int64_t k = 0; k < elements; ++k, ++position) {
      const int64_t first = stream_.begin(position), count = stream_.end(position) - first;
      if (count < 1 || count > row.length - done) throw std::out_of_range("a row of the index is longer than a sample");
      copy(position, first, count, row, done, range);
      if (row.positions) std::iota(row.positions + done, row.positions + done + count, int64_t{0});
      if (row.segments) std::fill_n(row.segments + done, count, static_cast<int32_t>(k));
      if (row.mask)
        for (int64_t i = done; i < done + count; ++i)
          row.mask[i] = ends.mask_loss && row.tokens[i] == ends.eod ? 0.0f : 1.0f;
      done += count;
      if (first + count < stream_.document_length(position)) {
        copy_label(position, first + count, row, done - 1, range);
      } else {
        row.labels[done - 1] = 0;
        if (row.mask) row.mask[done - 1] = 0.0f;
      }
    }
    const int64_t padding = row.length - done;
    std::fill_n(row.tokens + done, padding, int64_t{0});
    std::fill_n(row.labels + done, padding, int64_t{0});
    if (row.mask) std::fill_n(row.mask + done, padding, 0.0f);
    if (row.positions) std::iota(row.positions + done, row.positions + row.length, int64_t{0});
    if (row.segments) std::fill_n(row.segments + done, padding, int32_t{-1});
  }

  const std::vector<py::array> held_;  // what the pointers below point into
  const void* ids_;
  int64_t num_ids_, itemsize_;
  Widen widen_;
  Unaligned<int64_t> offsets_;
  Stream stream_;
  Integers starts_;
  int64_t length_;
  bool packed_;
  int64_t first_;
};

// Sample i is sample sample[i] of member dataset[i].
class BlendedSamples : public Samples {
 public:
  BlendedSamples(std::vector<std::shared_ptr<Samples>> members, Array<int16_t> dataset, Array<int64_t> sample)
      : members_(std::move(members)), dataset_(std::move(dataset)), sample_(std::move(sample)) {
    if (dataset_.ndim() != 1 || sample_.ndim() != 1 || dataset_.size() != sample_.size())
      throw std::invalid_argument("one dataset and one sample number for each sample of the blend");
    for (const auto& member : members_)
      if (member->length() != length()) throw std::invalid_argument("the samples of a blend must be of one length");
  }

  int64_t size() const override { return dataset_.size(); }
  int64_t length() const override { return members_.at(0)->length(); }

  void read(int64_t sample, const Ends& ends, const Row& row, Range& range) const override {
    check(sample);
    const int16_t member = dataset_.data()[sample];
    if (member < 0 || member >= static_cast<int64_t>(members_.size()))
      throw std::out_of_range("the blend's index is damaged: it names a dataset that is not there");
    members_[member]->read(sample_.data()[sample], ends, row, range);
  }

  void prefetch(int64_t sample) const override {
    if (sample < 0 || sample >= size()) return;
    const int16_t member = dataset_.data()[sample];
    if (member >= 0 && member < static_cast<int64_t>(members_.size()))
      members_[member]->prefetch(sample_.data()[sample]);
  }

 private:
  std::vector<std::shared_ptr<Samples>> members_;
  Array<int16_t> dataset_;
  Array<int64_t> sample_;
};

template <typename T>
T* rows_of(std::optional<Array<T>>& array, int64_t count, int64_t length) {
  if (!array) return nullptr;
  if (array->ndim() != 2 || array->shape(0) != count || array->shape(1) != length)
    throw std::invalid_argument("the arrays of a batch must all be [samples, length]");
  return array->mutable_data();
}

// Calls act(i, row i of these arrays) for each of `count` rows, without the interpreter's lock.
template <typename Act>
void for_each_row(int64_t count, Array<int64_t>& tokens, std::optional<Array<int64_t>> labels,
                  std::optional<Array<float>> mask, std::optional<Array<int64_t>> positions,
                  std::optional<Array<int32_t>> segments, Act act) {
  if (tokens.ndim() != 2) throw std::invalid_argument("the arrays of a batch must all be [samples, length]");
  const int64_t length = tokens.shape(1);
  std::optional<Array<int64_t>> inputs(tokens);
  Row row{length,
          rows_of(inputs, count, length),
          rows_of(labels, count, length),
          rows_of(mask, count, length),
          rows_of(positions, count, length),
          rows_of(segments, count, length)};
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    act(i, row);
    row.tokens += length;
    if (row.labels) row.labels += length;
    if (row.mask) row.mask += length;
    if (row.positions) row.positions += length;
    if (row.segments) row.segments += length;
  }
}

inline py::tuple read_batch(const Samples& samples, const Array<int64_t>& numbers, Array<int64_t> tokens,
                            Array<int64_t> labels, std::optional<Array<float>> mask,
                            std::optional<Array<int64_t>> positions, std::optional<Array<int32_t>> segments,
                            int64_t eod, bool mask_loss) {
  if (tokens.ndim() != 2 || tokens.shape(1) != samples.length())
    throw std::invalid_argument("the arrays of a batch must all be [samples, length]");
  Range range;
  const int64_t* number = numbers.data();
  const int64_t count = numbers.size();
  for_each_row(count, tokens, labels, mask, positions, segments, [&](int64_t i, const Row& row) {
    if (i + 1 < count) samples.prefetch(number[i + 1]);
    samples.read(number[i], Ends{eod, mask_loss}, row, range);
  });
  return py::make_tuple(range.low, range.high);
}

inline void mark_documents(Array<int64_t> tokens, std::optional<Array<float>> mask,
                           std::optional<Array<int64_t>> positions, std::optional<Array<int32_t>> segments,
                           int64_t eod, bool mask_loss) {
  for_each_row(tokens.ndim() ? tokens.shape(0) : 0, tokens, std::nullopt, mask, positions, segments,
               [&](int64_t, const Row& row) { mark_by_eod(row, Ends{eod, mask_loss}); });
}

inline void bind_samples(py::module_& module) {
  py::class_<Samples, std::shared_ptr<Samples>>(module, "Samples", "Samples in training order.")
      .def("__len__", &Samples::size)
      .def_property_readonly("length", &Samples::length, "Tokens of a sample.")
      .def("read", &read_batch, py::arg("numbers"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
           py::arg("mask").noconvert() = py::none(), py::arg("positions").noconvert() = py::none(),
           py::arg("segments").noconvert() = py::none(), py::arg("eod") = -1, py::arg("mask_loss") = false,
           "Write the samples `numbers` into arrays [len(numbers), S]; returns the (smallest, largest) id.");
  py::class_<IndexedSamples, Samples, std::shared_ptr<IndexedSamples>>(module, "IndexedSamples")
      .def(py::init<py::array, py::array, py::array, py::array, py::array, py::array, int64_t, bool, int64_t>(),
           py::arg("ids"), py::arg("offsets"), py::arg("lengths"), py::arg("documents"), py::arg("spans"),
           py::arg("starts"), py::arg("length"), py::arg("packed"), py::arg("first"));
  py::class_<BlendedSamples, Samples, std::shared_ptr<BlendedSamples>>(module, "BlendedSamples")
      .def(py::init<std::vector<std::shared_ptr<Samples>>, Array<int16_t>, Array<int64_t>>(), py::arg("members"),
           py::arg("dataset").noconvert(), py::arg("sample").noconvert());
  module.def("mark_documents", &mark_documents, py::arg("tokens").noconvert(),
             py::arg("mask").noconvert() = py::none(), py::arg("positions").noconvert() = py::none(),
             py::arg("segments").noconvert() = py::none(), py::arg("eod") = -1, py::arg("mask_loss") = false,
             "Loss mask, positions and segments of rows of tokens, by their end-of-document tokens.");
}
