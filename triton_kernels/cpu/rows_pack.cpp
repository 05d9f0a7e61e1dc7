// pack_rows. The reference in rows_pack.py is the specification.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>

#include "group.h"
#include "rows.h"

namespace dct {
namespace {

// The key of an entry: the bits of its magnitude, NaN as infinity; integers in the order of the magnitudes. Those of 16-bit dtypes stay
// 16-bit, twice as many in a vector. kBinade is the distance between the keys of x and 2x.
template <typename T>
struct Keys {
  using Key = int16_t;
  static constexpr Key kBinade = std::is_same_v<T, BFloat16> ? 1 << 7 : 1 << 10;
  static constexpr Key kInfinity = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
  // The least key whose magnitude is at least tau.
  static Key reaching(float tau) {
    const T nearest = T::round(tau);
    return Key(nearest.raw + (T::load(nearest) < tau));
  }
};

template <>
struct Keys<Float32> {
  using Key = int32_t;
  static constexpr Key kBinade = 1 << 23;
  static constexpr Key kInfinity = 0x7f800000;
  static Key reaching(float tau) { return Key(bits_of(tau)); }
};

// Kept are the entries above `key` and the first `ties` of those equal to it.
template <typename Key>
struct Cut {
  Key key;
  int64_t ties;
};

template <typename Key>
int64_t count_reaching(const Key* keys, int64_t padded, Key least) {
  int64_t count = 0;
  for (int64_t base = 0; base < padded; base += kGroup) count += bit_count(reaching_key<kGroup>(keys + base, least));
  return count;
}

// Where to cut so that the `capacity` largest of `count` keys, all >= low, are kept; count > capacity. Keys are padded with zeros to whole
// groups. The first probe is the guess, the next ones follow the line through the last two counts, and each third halves the gap. On most
// rows a probe meets exactly `capacity` entries long before the gap is one.
template <typename Key>
Cut<Key> find_cut(const Key* keys, int64_t padded, int64_t count, int64_t capacity, Key low, Key guess) {
  int64_t below = low;                                                  // more than `capacity` keys reach it;
  int64_t above = int64_t(*std::max_element(keys, keys + padded)) + 1;  // fewer reach it:
  int64_t count_above = 0;
  int64_t last = low, last_count = count;
  double keys_per_entry = 0;
  int64_t probe = guess;
  for (int round = 1; above - below > 1; ++round) {
    probe = std::clamp(probe, below + 1, above - 1);
    const int64_t met = count_reaching(keys, padded, Key(probe));
    if (met == capacity) return {Key(probe), capacity};
    if (met > capacity) {
      below = probe;
    } else {
      above = probe;
      count_above = met;
    }
    if (met != last_count) keys_per_entry = double(probe - last) / double(last_count - met);
    last = probe;
    last_count = met;
    probe = round % 3 == 0 ? below + (above - below) / 2 : probe + int64_t(keys_per_entry * double(met - capacity));
  }
  return {Key(below), capacity - count_above};
}

// The same for `count` of kCount keys, with zeros behind: the bits of those kept; `cut` becomes the least of them. Each key is compared with
// all: a search would cost more in mispredicted branches.
template <int kCount, typename Key>
uint64_t largest_in_group(const Key* keys, int64_t count, int64_t capacity, Key& cut) {
  constexpr int kVectors = kCount / kLanesOf<Key>;
  using Lanes = Vector<Key, kLanesOf<Key>>;
  const auto vector = [](const Key* from, int v) { return read_as<Lanes>(from + v * kLanesOf<Key>); };
  Lanes rank[kVectors];  // how many keys a key reaches: of those kept more than count - capacity
  for (Lanes& lanes : rank) lanes = Lanes{} + Key(count);
  for (int64_t i = 0; i < count; i += 8) {  // zeros behind the keys change nothing
    for (int64_t k = i; k < i + 8; ++k) {
      const Lanes key = Lanes{} + keys[k];
      for (int v = 0; v < kVectors; ++v) rank[v] = vector(keys, v) < key ? rank[v] - 1 : rank[v];
    }
  }
  const Key least_rank = Key(count - capacity + 1);
  Lanes least = Lanes{} + std::numeric_limits<Key>::max();
  for (int v = 0; v < kVectors; ++v) least = rank[v] < Lanes{} + least_rank ? least : smaller(least, vector(keys, v));
  cut = reduce<kLanesOf<Key>, Key>(least, [](auto a, auto b) { return smaller(a, b); });
  const uint64_t reaching = reaching_key<kCount>(reinterpret_cast<const Key*>(rank), least_rank);
  const int64_t extra = bit_count(reaching) - capacity;
  if (extra == 0) return reaching;
  const uint64_t ties = reaching & ~reaching_key<kCount>(keys, Key(cut + 1));
  return (reaching ^ ties) | lowest_bits(ties, bit_count(ties) - extra);
}

enum Method : int64_t { kExact = 0, kLaplace = 1, kFixed = 2 };

// Infinity if an entry is not finite. The bits of a float32 magnitude, moved to where a double has its own, are the magnitude times 2^-896,
// denormals included: so nothing is converted. GCC 12 takes a conversion to wider numbers apart.
template <typename T>
double magnitude_sum(const T* row, int64_t width, const Ahead<T>& ahead) {
  using Doubles = Vector<double, kLanes / 2>;
  Doubles even = {}, odd = {};
  Largest<T> largest;
  each_row_group(row, width, ahead, [&](int64_t, const T* x) {
    largest.add(x);
    each_lanes(x, kGroup, [&](Floats lanes) {
      const Longs pairs = bits_as<Longs>(bits_as<Ints>(lanes) & 0x7fffffff);
      even += bits_as<Doubles>(pairs << 32 >> 3);
      odd += bits_as<Doubles>(pairs >> 32 << 29);
    });
  });
  double sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += even[i] + odd[i];
  return largest.bits() < 0x7f800000 ? sum * 0x1p896 : HUGE_VAL;
}

// The least key that is eligible; `parameter` is the factor of the mean for kLaplace, the threshold for kFixed.
template <typename T>
typename Keys<T>::Key least_key(const T* row, int64_t width, int64_t method, float parameter, const Ahead<T>& ahead) {
  using Key = typename Keys<T>::Key;
  float tau = 0;
  if (method == kFixed) tau = parameter;
  if (method == kLaplace && parameter > 0) {
    tau = float(magnitude_sum(row, width, ahead) / double(width)) * parameter;
  }
  return std::clamp<Key>(Keys<T>::reaching(tau), 1, Keys<T>::kInfinity);
}

// Where the rows of a thread are cut, and how far from that its next row may be cut.
template <typename T>
class Guess {
 public:
  using Key = typename Keys<T>::Key;

  // The more entries are kept, the less do the cuts differ.
  explicit Guess(int64_t capacity) : margin_(1 + int64_t(Keys<T>::kBinade * std::min(0.18, 0.7 / std::sqrt(double(capacity))))) {}

  Key key() const { return Key(key_); }
  Key low() const { return Key(std::max<int64_t>(key_ - margin_, 1)); }
  int64_t margin() const { return margin_; }
  void add(Key cut) { key_ = known_ ? key_ + (cut - key_) / 4 : cut, known_ = true; }

 private:
  int64_t margin_;
  int64_t key_ = Keys<T>::kInfinity;
  bool known_ = false;
};

constexpr int64_t kStep = 16;

// Writes f(from[i]) for `count` elements. In whole steps, as `from` and `to` have room for: a loop that ends within one does its last
// elements one by one.
template <typename To, typename From, typename F>
inline void write_steps(const From* from, int64_t count, uint8_t* to, F&& f) {
  for (int64_t i = 0; i < count; i += kStep) {
    To step[kStep];
    for (int64_t k = 0; k < kStep; ++k) step[k] = f(from[i + k]);
    std::memcpy(to + i * int64_t(sizeof(To)), step, sizeof step);
  }
}

// The entries of a row that may be kept.
template <typename T>
class Candidates {
 public:
  using Key = typename Keys<T>::Key;

  explicit Candidates(int64_t width) : values_(new T[room(width)]), indices_(new uint16_t[room(width)]()), keys_(new Key[room(width)]) {}

  // Lists them: at least `capacity`, if so many reach `least`. Neighbouring rows are cut at about the same magnitude, so most rows are listed
  // once, with a few entries more than are kept.
  void list(const T* row, int64_t width, int64_t capacity, Key least, const Guess<T>& guess, const Ahead<T>& ahead) {
    int64_t step = 2 * guess.margin();
    for (low_ = std::max(least, guess.low());; low_ = Key(std::max<int64_t>(least, int64_t(low_) - step)), step *= 4) {
      count_ = 0;
      each_row_group(row, width, ahead, [&](int64_t base, const T* x) {
        count_ += list_bits(reaching_key<kGroup>(x, low_), uint32_t(base), indices_.get() + count_);
      });
      if (count_ >= capacity || low_ == least) break;
    }
    // In steps, so that the number of these can be foreseen for short lists; what lies behind is of no use.
    for (int64_t i = 0; i < count_; i += kStep) {
      for (int64_t k = i; k < i + kStep; ++k) values_[size_t(k)] = row[indices_[size_t(k)]];
    }
  }

  // Leaves the `capacity` largest, of equal ones the first.
  void cut(int64_t capacity, Guess<T>& guess) {
    if (count_ <= capacity) return guess.add(low_);
    const int64_t padded = ceil_div(count_, kGroup) * kGroup;
    fill_keys(padded);
    const Key* const keys = keys_.get();
    const int64_t count = std::exchange(count_, 0);
    if (count <= kGroup) {
      Key cut;
      constexpr int kFew = std::max(kGroup / 4, kLanesOf<Key>);
      keep(0, count <= kFew         ? largest_in_group<kFew>(keys, count, capacity, cut)
              : count <= kGroup / 2 ? largest_in_group<kGroup / 2>(keys, count, capacity, cut)
                                    : largest_in_group<kGroup>(keys, count, capacity, cut));
      return guess.add(cut);
    }
    Cut<Key> cut = find_cut<Key>(keys, padded, count, capacity, low_, guess.key());
    for (int64_t base = 0; base < padded; base += kGroup) {
      const uint64_t above = reaching_key<kGroup>(keys + base, Key(cut.key + 1));
      const uint64_t ties = lowest_bits(reaching_key<kGroup>(keys + base, cut.key) ^ above, cut.ties);
      cut.ties -= bit_count(ties);
      keep(base, above | ties);
    }
    guess.add(cut.key);
  }

  template <typename V>
  void write(const RowFormat& format, uint8_t* out) const {
    uint8_t* const indices = out + format.capacity * int64_t(sizeof(V));
    write_steps<V>(values_.get(), count_, out, [](T x) { return saturate<V>(T::load(x)); });
    std::memset(out + count_ * int64_t(sizeof(V)), 0, size_t(format.capacity - count_) * sizeof(V));
    if (format.index_bytes == 1) {
      write_steps<uint8_t>(indices_.get(), count_, indices, [](uint16_t index) { return uint8_t(index); });
    } else {
      write_steps<uint16_t>(indices_.get(), count_, indices, [](uint16_t index) { return index; });
    }
    std::memset(indices + count_ * format.index_bytes, 0, size_t((format.capacity - count_) * format.index_bytes));
  }

 private:
  static size_t room(int64_t width) { return size_t(width + 2 * kGroup); }

  // The keys of the entries, and zeros.
  void fill_keys(int64_t padded) {
    constexpr int kCount = kLanesOf<Key>;
    using Lanes = Vector<Key, kCount>;
    Lanes number = {};
    for (int i = 0; i < kCount; ++i) number[i] = Key(i);
    for (int64_t i = 0; i < padded; i += kCount) {
      const Lanes key = smaller(read_as<Lanes>(values_.get() + i) & std::numeric_limits<Key>::max(), Lanes{} + Keys<T>::kInfinity);
      write_as(number < Lanes{} + Key(std::min<int64_t>(count_ - i, kCount)) ? key : Lanes{}, keys_.get() + i);
    }
  }

  // Moves those of a group that are kept behind the ones before.
  void keep(int64_t base, uint64_t mask) {
    list_elements(mask, values_.get() + base, values_.get() + count_);
    list_elements(mask, indices_.get() + base, indices_.get() + count_);
    count_ += bit_count(mask);
  }

  std::unique_ptr<T[]> values_;
  std::unique_ptr<uint16_t[]> indices_;
  std::unique_ptr<Key[]> keys_;
  int64_t count_ = 0;
  Key low_ = 0;  // all of them reach it
};

// Packed rows are formed in the first-level cache, some at a time: what is written behind one is overwritten by the next. A row is listed
// before the one before it is cut, so that neither waits for the other's result.
template <typename T, typename V>
void pack_rows(const T* x, int64_t rows, const RowFormat& format, int64_t method, float parameter, uint8_t* payload, int64_t threads) {
  const int64_t width = format.width, capacity = format.capacity;
  const int64_t tile_rows = std::max<int64_t>(kTileBytes / format.bytes(), 1);
  const bool streamed = rows * format.bytes() >= kStreamedBytes;
  const int passes = method == kLaplace ? 2 : 1;
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
  {
    Guess<T> guess(capacity);
    Candidates<T> candidates[2] = {Candidates<T>(width), Candidates<T>(width)};
    std::vector<uint8_t> tile(size_t(tile_rows * format.bytes() + kStep * int64_t(sizeof(V))));
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += tile_rows) {
      const int64_t count = std::min(tile_rows, rows - first);
      for (int64_t r = 0; r <= count; ++r) {
        if (r < count) {
          const T* const row = x + (first + r) * width;
          const auto least = least_key<T>(row, width, method, parameter, Ahead(row, width, 0, passes));
          candidates[r % 2].list(row, width, capacity, least, guess, Ahead(row, width, passes - 1, passes));
        }
        if (r > 0) {
          Candidates<T>& before = candidates[(r - 1) % 2];
          before.cut(capacity, guess);
          before.template write<V>(format, tile.data() + (r - 1) * format.bytes());
        }
      }
      copy_out(payload + first * format.bytes(), tile.data(), count * format.bytes(), streamed);
    }
    stream_fence();
  }
}

}  // namespace

DCT_EXPORT void dct_pack_rows(const dct::Rows* x, const dct::RowFormat* layout, int64_t method, double parameter, uint8_t* payload,
                              int64_t threads) {
  const RowFormat format = *layout;
  with_dtype(x->dtype, [&](auto t) {
    with_dtype(format.value_dtype, [&](auto v) {
      const auto* from = static_cast<const decltype(t)*>(x->start);
      pack_rows<decltype(t), decltype(v)>(from, x->rows, format, method, float(parameter), payload, threads);
    });
  });
}

}  // namespace dct
