// The loops over text that are too slow in Python. Plain C++17, no torch: see megatron_lite/corpus.
//
// Words: runs of letters and digits between white space, in lower case, everything else inside them left out ("Don't"
// is "dont"); a character of a script without spaces is a word of its own. What is what stands in a table that Python
// makes of its Unicode data (dedup/words.py), one entry a code point: 0 left out, 1 white space, else the lower case,
// with bit 31 set where the character stands alone. Code points beyond the table stand alone.
//
// Hashes are 64 bits and a function of the words alone, so that results are the same on every machine.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

// One more version of a hot loop for CPUs with wider vectors, chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_WIDE_VECTORS __attribute__((target_clones("default", "avx2")))
#else
#define FOR_WIDE_VECTORS
#endif

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr uint32_t kLeftOut = 0, kSpace = 1, kAlone = 1u << 31;
constexpr uint64_t kBase = 0x9E3779B97F4A7C15ULL;  // odd: the base of the polynomials over words and bytes

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection after which every bit depends on every bit.
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

uint64_t power(uint64_t base, int64_t exponent) {
  uint64_t result = 1;
  for (; exponent > 0; --exponent) result *= base;
  return result;
}

// The code point at `at`, which moves past it. The text is valid UTF-8.
uint32_t next_code_point(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[i])); };
  const uint32_t first = byte(at++);
  if (first < 0x80) return first;
  const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  uint32_t code = first & (0x3Fu >> more);
  for (int i = 0; i < more; ++i) code = code << 6 | (byte(at++) & 0x3F);
  return code;
}

class Words {
 public:
  explicit Words(const Array<uint32_t>& table) : table_(table.data()), size_(table.size()) {}

  // letter(code point) for each that counts; word(begin, end) in bytes at the end of each word.
  template <typename Letter, typename Word>
  void each(std::string_view text, Letter&& letter, Word&& word) const {
    size_t begin = 0, end = 0;
    bool inside = false;
    const auto finish = [&] {
      if (inside) word(begin, end);
      inside = false;
    };
    for (size_t at = 0; at < text.size();) {
      const size_t start = at;
      const uint32_t code = next_code_point(text, at);
      const uint32_t found = code < size_ ? table_[code] : code | kAlone;
      if (found == kLeftOut) continue;
      if (found == kSpace) {
        finish();
        continue;
      }
      if (found & kAlone) finish();
      if (!inside) begin = start;
      inside = true;
      end = at;
      letter(found & ~kAlone);
      if (found & kAlone) finish();
    }
    finish();
  }

  // ngram(hash, begin, end) for every run of n words; nothing where the text has fewer, or one of all its words if
  // `shorter`. Returns the number of words.
  template <typename Ngram>
  int64_t each_ngram(std::string_view text, int64_t n, bool shorter, Ngram&& ngram) const {
    constexpr uint64_t kStart = 0xCBF29CE484222325ULL, kPrime = 0x100000001B3ULL;  // FNV-1a
    const uint64_t leaving = power(kBase, n - 1);
    std::vector<std::pair<uint64_t, size_t>> last(n);  // (hash, begin) of the last n words
    uint64_t letters = kStart, sum = 0;
    int64_t count = 0;
    size_t last_end = 0;
    each(
        text, [&](uint32_t code) { letters = (letters ^ code) * kPrime; },
        [&](size_t begin, size_t end) {
          auto& slot = last[count % n];
          if (count >= n) sum -= slot.first * leaving;
          slot = {mix(letters), begin};
          sum = sum * kBase + slot.first;
          letters = kStart;
          last_end = end;
          if (++count >= n) ngram(mix(sum), last[count % n].second, end);
        });
    if (shorter && count > 0 && count < n) ngram(mix(sum), last[0].second, last_end);
    return count;
  }

 private:
  const uint32_t* table_;
  size_t size_;
};

void check_n(int64_t n) {
  if (n < 1 || n > 1000) throw std::invalid_argument("n-grams have 1 to 1000 words");
}

py::str words(std::string_view text, const Array<uint32_t>& table) {
  std::string out;
  const auto put = [&](uint32_t code) {
    if (code < 0x80) {
      out += static_cast<char>(code);
      return;
    }
    const int more = code >= 0x10000 ? 3 : code >= 0x800 ? 2 : 1;
    out += static_cast<char>((0xFF00u >> (more + 1) & 0xFFu) | code >> 6 * more);
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
  };
  Words(table).each(text, put, [&](size_t, size_t) { out += ' '; });
  if (!out.empty()) out.pop_back();
  return py::str(out);
}

py::array_t<uint64_t> ngram_hashes(std::string_view text, int64_t n, const Array<uint32_t>& table, bool shorter) {
  check_n(n);
  std::vector<uint64_t> found;
  Words(table).each_ngram(text, n, shorter, [&](uint64_t hash, size_t, size_t) { found.push_back(hash); });
  return py::array_t<uint64_t>(static_cast<py::ssize_t>(found.size()), found.data());
}

// Lowest value of every linear permutation a * x + b (mod 2^32, a odd) over the hashes (Broder 1997; linear ones:
// Bohman, Cooper, Frieze 2000).
FOR_WIDE_VECTORS
void lowest(const uint32_t* hashes, size_t count, const uint32_t* a, const uint32_t* b, int64_t permutations,
            uint32_t* out) {
  for (int64_t p = 0; p < permutations; ++p) {
    const uint32_t factor = a[p], addend = b[p];
    uint32_t low = std::numeric_limits<uint32_t>::max();
    for (size_t i = 0; i < count; ++i) {
      const uint32_t value = factor * hashes[i] + addend;
      low = value < low ? value : low;
    }
    out[p] = low;
  }
}

py::tuple minhash(const py::list& texts, int64_t n, const Array<uint32_t>& table, const Array<uint32_t>& a,
                  const Array<uint32_t>& b) {
  check_n(n);
  if (a.ndim() != 1 || b.ndim() != 1 || a.size() != b.size()) throw std::invalid_argument("one addend per factor");
  const auto count = static_cast<py::ssize_t>(texts.size());
  py::array_t<uint32_t> signatures(std::vector<py::ssize_t>{count, a.size()});
  py::array_t<int64_t> lengths(count);
  const Words reader(table);
  std::vector<uint32_t> hashes;
  for (py::ssize_t i = 0; i < count; ++i) {
    hashes.clear();
    lengths.mutable_at(i) = reader.each_ngram(texts[i].cast<std::string_view>(), n, true, [&](uint64_t hash, size_t, size_t) {
      hashes.push_back(static_cast<uint32_t>(hash >> 32));
    });
    lowest(hashes.data(), hashes.size(), a.data(), b.data(), a.size(), signatures.mutable_data(i, 0));
  }
  return py::make_tuple(signatures, lengths);
}

// A set of hashes as an array of 2^k slots, looked up by linear probing from the top k bits; 0 is an empty slot.
class HashSet {
 public:
  explicit HashSet(uint64_t* slots, int64_t size) : slots_(slots), mask_(static_cast<uint64_t>(size) - 1) {
    if (size < 2 || (size & (size - 1))) throw std::invalid_argument("a table has a power of two slots");
    while (size >>= 1) --shift_;
  }
  uint64_t& slot(uint64_t hash) const {
    uint64_t at = hash >> shift_;
    while (slots_[at] != 0 && slots_[at] != hash) at = (at + 1) & mask_;
    return slots_[at];
  }

 private:
  uint64_t* slots_;
  uint64_t mask_;
  int shift_ = 64;
};

uint64_t not_zero(uint64_t hash) { return hash ? hash : 1; }

py::array_t<uint64_t> hash_table(const Array<uint64_t>& hashes) {
  int64_t size = 2;
  while (size < 4 * hashes.size()) size *= 2;
  py::array_t<uint64_t> table(size);
  std::fill_n(table.mutable_data(), size, uint64_t{0});
  const HashSet set(table.mutable_data(), size);
  for (py::ssize_t i = 0; i < hashes.size(); ++i) {
    const uint64_t hash = not_zero(hashes.data()[i]);
    set.slot(hash) = hash;
  }
  return table;
}

py::tuple match_ngrams(std::string_view text, int64_t n, const Array<uint32_t>& table, const Array<uint64_t>& wanted) {
  check_n(n);
  const HashSet set(const_cast<uint64_t*>(wanted.data()), wanted.size());
  std::vector<uint64_t> hashes;
  std::vector<int64_t> bounds;
  Words(table).each_ngram(text, n, false, [&](uint64_t hash, size_t begin, size_t end) {
    if (set.slot(not_zero(hash)) == 0) return;
    hashes.push_back(not_zero(hash));
    bounds.push_back(static_cast<int64_t>(begin));
    bounds.push_back(static_cast<int64_t>(end));
  });
  const auto count = static_cast<py::ssize_t>(hashes.size());
  py::array_t<int64_t> spans(std::vector<py::ssize_t>{count, 2});
  std::copy(bounds.begin(), bounds.end(), spans.mutable_data());
  return py::make_tuple(spans, py::array_t<uint64_t>(count, hashes.data()));
}

// Winnowing (Schleimer, Wilkerson, Aiken 2003) of the hashes of all runs of `width` bytes: at least one in every
// `window` neighbours is chosen, the lowest; among equals the one already chosen, else the last. What a window chooses
// is a hash that depends on its bytes alone.
py::tuple winnow(std::string_view text, int64_t width, int64_t window) {
  if (width < 1 || window < 1) throw std::invalid_argument("width and window are at least 1");
  const int64_t size = static_cast<int64_t>(text.size()) - width + 1;
  const uint64_t leaving = power(kBase, width);
  std::vector<uint64_t> chosen, recent(window);
  std::vector<int64_t> positions;
  uint64_t sum = 0, low = 0;
  int64_t low_at = -1;
  for (int64_t i = 0; i + 1 < width && i < static_cast<int64_t>(text.size()); ++i)
    sum = sum * kBase + static_cast<unsigned char>(text[i]) + 1;
  for (int64_t at = 0; at < size; ++at) {
    sum = sum * kBase + static_cast<unsigned char>(text[at + width - 1]) + 1;
    if (at > 0) sum -= leaving * (static_cast<unsigned char>(text[at - 1]) + 1);
    const uint64_t hash = recent[at % window] = mix(sum);
    if (low_at >= 0 && low_at > at - window) {
      if (hash >= low) continue;
      low = hash, low_at = at;
    } else if (at >= window - 1 || low_at >= 0) {  // the first full window, or the lowest one has left it
      low_at = at, low = hash;
      for (int64_t back = 1; back < window; ++back) {
        const uint64_t other = recent[(at - back) % window];
        if (other < low) low = other, low_at = at - back;
      }
    } else {
      continue;
    }
    chosen.push_back(low);
    positions.push_back(low_at);
  }
  const auto count = static_cast<py::ssize_t>(chosen.size());
  return py::make_tuple(py::array_t<uint64_t>(count, chosen.data()), py::array_t<int64_t>(count, positions.data()));
}

// Two Rabin-Karp fingerprints mod 2^61 - 1 of each run of `width` bytes that starts in one of the ranges
// [first, last): rows (mixed, plain). Two different runs agree in both with a chance below (width / 2^61)^2.
constexpr uint64_t kPrime61 = (uint64_t{1} << 61) - 1;

uint64_t times61(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  const uint64_t sum = (static_cast<uint64_t>(product) & kPrime61) + static_cast<uint64_t>(product >> 61);
  return sum >= kPrime61 ? sum - kPrime61 : sum;
}

class Fingerprint {
 public:
  Fingerprint(uint64_t base, int64_t width) : base_(base), leaving_(1) {
    for (int64_t i = 0; i < width; ++i) leaving_ = times61(leaving_, base_);
  }
  void clear() { value_ = 0; }
  void roll(uint64_t in, uint64_t out) {  // `out` left the run: width bytes before `in`
    uint64_t sum = times61(value_, base_) + in + (kPrime61 - times61(leaving_, out));
    while (sum >= kPrime61) sum -= kPrime61;
    value_ = sum;
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t base_, leaving_, value_ = 0;
};

py::array_t<uint64_t> window_hashes(std::string_view text, const Array<int64_t>& ranges, int64_t width) {
  if (width < 1 || ranges.ndim() != 2 || ranges.shape(1) != 2) throw std::invalid_argument("ranges are [n, 2]");
  const auto size = static_cast<int64_t>(text.size());
  int64_t total = 0;
  for (py::ssize_t i = 0; i < ranges.shape(0); ++i) {
    const int64_t first = ranges.at(i, 0), last = ranges.at(i, 1);
    if (first < 0 || last < first || last + width - 1 > size) throw std::out_of_range("a range leaves the text");
    total += last - first;
  }
  py::array_t<uint64_t> hashes(std::vector<py::ssize_t>{total, 2});
  uint64_t* out = hashes.mutable_data();
  Fingerprint one(0x0B4E0EF37BC32127ULL % kPrime61, width), two(0x1D8E4E27C47D124FULL % kPrime61, width);
  for (py::ssize_t i = 0; i < ranges.shape(0); ++i) {
    const int64_t first = ranges.at(i, 0), last = ranges.at(i, 1);
    if (first == last) continue;
    one.clear();
    two.clear();
    for (int64_t at = first; at < last + width - 1; ++at) {
      const auto byte = [&](int64_t j) { return uint64_t{static_cast<unsigned char>(text[j])} + 1; };
      const uint64_t in = byte(at), left = at - width >= first ? byte(at - width) : 0;
      one.roll(in, left);
      two.roll(in, left);
      if (at - first >= width - 1) {
        *out++ = mix(one.value());
        *out++ = two.value();
      }
    }
  }
  return hashes;
}

// Union-find in place: parents[i] <= i, and the root of a cluster is its lowest member, whatever the order of pairs.
void join(Array<int64_t>& parents, const Array<int64_t>& first, const Array<int64_t>& second) {
  int64_t* parent = parents.mutable_data();
  const auto find = [&](int64_t i) {
    if (i < 0 || i >= parents.size()) throw std::out_of_range("a pair is outside the parents");
    while (parent[i] != i) i = parent[i] = parent[parent[i]];  // path halving
    return i;
  };
  if (first.size() != second.size()) throw std::invalid_argument("pairs have two members");
  for (py::ssize_t i = 0; i < first.size(); ++i) {
    const int64_t a = find(first.data()[i]), b = find(second.data()[i]);
    if (a < b) parent[b] = a;
    else parent[a] = b;
  }
}

// Every parent becomes the root: one pass, since parents[i] <= i.
void flatten(Array<int64_t>& parents) {
  int64_t* parent = parents.mutable_data();
  for (py::ssize_t i = 0; i < parents.size(); ++i) parent[i] = parent[parent[i]];
}

}  // namespace

PYBIND11_MODULE(_text, module) {
  module.doc() = "Words, n-grams, MinHash, fingerprints and union-find of megatron_lite.corpus.dedup.";
  module.def("words", &words, py::arg("text"), py::arg("table"), "The words of a text, with a space between them.");
  module.def("ngram_hashes", &ngram_hashes, py::arg("text"), py::arg("n"), py::arg("table"),
             py::arg("shorter") = false, "Hash of every run of n words; with `shorter` of all words if they are fewer.");
  module.def("minhash", &minhash, py::arg("texts"), py::arg("n"), py::arg("table"), py::arg("a"), py::arg("b"),
             "(uint32 [texts, permutations] signatures over runs of n words, int64 [texts] numbers of words).");
  module.def("hash_table", &hash_table, py::arg("hashes"), "A table of the hashes for match_ngrams.");
  module.def("match_ngrams", &match_ngrams, py::arg("text"), py::arg("n"), py::arg("table"), py::arg("wanted"),
             "(int64 [m, 2] bounds in UTF-8 bytes, uint64 [m] hashes) of the runs of n words that are in `wanted`.");
  module.def("winnow", &winnow, py::arg("text"), py::arg("width"), py::arg("window"),
             "(uint64 hashes, int64 positions) of the runs of `width` bytes that winnowing chooses.");
  module.def("window_hashes", &window_hashes, py::arg("text"), py::arg("ranges"), py::arg("width"),
             "uint64 [windows, 2]: fingerprint of each run of `width` bytes that starts in the ranges.");
  module.def("join", &join, py::arg("parents").noconvert(), py::arg("first"), py::arg("second"),
             "Union-find in place; the lowest member is the root.");
  module.def("flatten", &flatten, py::arg("parents").noconvert(), "Every parent becomes its root.");
}
