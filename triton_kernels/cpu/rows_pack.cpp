// pack_rows. The reference in rows_pack.py is the specification.
#include <algorithm>
#include <memory>
#include <type_traits>

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

template <typename T>
typename Keys<T>::Key key_of(const T& x) {
  using Key = typename Keys<T>::Key;
  return std::min<Key>(bits_as<Key>(x) & std::numeric_limits<Key>::max(), Keys<T>::kInfinity);
}

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

// Where to cut so that the `slots` largest of `count` keys, all >= low, are kept; count > slots. Keys are padded with zeros to whole
// groups. The first probe is the guess, the next ones follow the line through the last two counts, and each third halves the gap. On most
// rows a probe meets exactly `slots` entries long before the gap is one.
template <typename Key>
Cut<Key> find_cut(const Key* keys, int64_t padded, int64_t count, int64_t slots, Key low, Key guess) {
  int64_t below = low;                                                  // more than `slots` keys reach it;
  int64_t above = int64_t(*std::max_element(keys, keys + padded)) + 1;  // fewer reach it:
  int64_t count_above = 0;
  int64_t last = low, last_count = count;
  double keys_per_entry = 0;
  int64_t probe = guess;
  for (int round = 1; above - below > 1; ++round) {
    probe = std::clamp(probe, below + 1, above - 1);
    const int64_t met = count_reaching(keys, padded, Key(probe));
    if (met == slots) return {Key(probe), slots};
    if (met > slots) {
      below = probe;
    } else {
      above = probe;
      count_above = met;
    }
    if (met != last_count) keys_per_entry = double(probe - last) / double(last_count - met);
    last = probe;
    last_count = met;
    probe = round % 3 == 0 ? below + (above - below) / 2 : probe + int64_t(keys_per_entry * double(met - slots));
  }
  return {Key(below), slots - count_above};
}

// The same for at most kCount keys: a search would cost more in mispredicted branches.
template <int kCount, typename Key>
Cut<Key> find_cut_in_group(const Key* keys, int64_t count, int64_t slots, Key low) {
  Key key = low;
  for (int64_t i = 0; i < count; i += 8) {  // zeros behind the keys change nothing
    for (int64_t k = i; k < i + 8; ++k) {
      const Key larger = std::max(key, keys[k]);
      key = bit_count(reaching_key<kCount>(keys, keys[k])) >= slots ? larger : key;
    }
  }
  return {key, slots - bit_count(reaching_key<kCount>(keys, Key(key + 1)))};
}

enum Method : int64_t { kExact = 0, kLaplace = 1, kFixed = 2 };

// Infinity if an entry is not finite. The bits of a float32 magnitude, moved to where a double has its own, are the magnitude times 2^-896,
// denormals included: so nothing is converted. GCC 12 takes a conversion to wider numbers apart.
template <typename T>
double magnitude_sum(const T* row, int64_t width, const Ahead<T>& ahead) {
  using Longs = Vector<uint64_t, kLanes / 2>;
  using Doubles = Vector<double, kLanes / 2>;
  Doubles even = {}, odd = {};
  Largest largest;
  each_row_group(row, width, ahead, [&](int64_t, const T* x) {
    each_lanes(x, kGroup, [&](Floats lanes) {
      largest.add(lanes);
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
  explicit Guess(int64_t slots) : margin_(1 + int64_t(Keys<T>::kBinade * std::min(0.18, 0.7 / std::sqrt(double(slots))))) {}

  Key key() const { return Key(key_); }
  Key low() const { return Key(std::max<int64_t>(key_ - margin_, 1)); }
  int64_t margin() const { return margin_; }
  void add(Key cut) { key_ = known_ ? key_ + (cut - key_) / 4 : cut, known_ = true; }

 private:
  int64_t margin_;
  int64_t key_ = Keys<T>::kInfinity;
  bool known_ = false;
};

// What a thread needs for a row, and what it remembers of those before.
template <typename T>
struct RowScratch {
  using Key = typename Keys<T>::Key;
  std::unique_ptr<T[]> values;
  std::unique_ptr<uint16_t[]> places;
  std::unique_ptr<Key[]> keys;
  Guess<T> guess;

  static constexpr int64_t kReadStep = 16;

  RowScratch(int64_t width, int64_t slots) : guess(slots) {
    const size_t size = size_t(width + 2 * kGroup);
    values.reset(new T[size]);
    places.reset(new uint16_t[size]());
    keys.reset(new Key[size]);
  }

  // Lists the places of the entries that may be kept: at least `slots`, if so many reach `least`. Neighbouring rows are cut at about the
  // same magnitude, so most rows are listed once, with a few entries more than are kept. Returns their number; `low` becomes the key that
  // all of them reach.
  int64_t list(const T* row, int64_t width, int64_t slots, Key least, Key& low, const Ahead<T>& ahead) {
    int64_t step = 2 * guess.margin();
    low = std::max(least, guess.low());
    while (true) {
      int64_t count = 0;
      each_row_group(row, width, ahead, [&](int64_t base, const T* x) {
        count += list_bits(reaching_key<kGroup>(x, low), uint32_t(base), places.get() + count);
      });
      if (count >= slots || low == least) return count;
      low = Key(std::max<int64_t>(least, int64_t(low) - step));
      step *= 4;
    }
  }

  // Reads the listed entries. In steps, so that the number of these can be foreseen for short lists; what lies behind is of no use.
  void read(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += kReadStep) {
      for (int64_t k = i; k < i + kReadStep; ++k) values[size_t(k)] = row[places[size_t(k)]];
    }
  }

  // Of `count` listed entries leaves the `slots` largest, of equal ones the first.
  void cut(int64_t count, int64_t slots, Key low) {
    const int64_t padded = ceil_div(count, kGroup) * kGroup;
    Key* const listed = keys.get();
    const T* const entries = values.get();
    for (int64_t i = 0; i < padded; ++i) listed[i] = i < count ? key_of(entries[i]) : Key(0);
    Cut<Key> cut = count <= kKeyLanes<Key> ? find_cut_in_group<kKeyLanes<Key>>(listed, count, slots, low)
                   : count <= kGroup       ? find_cut_in_group<kGroup>(listed, count, slots, low)
                                           : find_cut<Key>(listed, padded, count, slots, low, guess.key());
    guess.add(cut.key);
    int64_t kept = 0;
    for (int64_t base = 0; base < padded; base += kGroup) {
      const uint64_t above = reaching_key<kGroup>(listed + base, Key(cut.key + 1));
      const uint64_t ties = lowest_bits(reaching_key<kGroup>(listed + base, cut.key) ^ above, cut.ties);
      cut.ties -= bit_count(ties);
      list_elements(above | ties, values.get() + base, values.get() + kept);
      list_elements(above | ties, places.get() + base, places.get() + kept);
      kept += bit_count(above | ties);
    }
  }
};

template <typename T, typename V>
void pack_row(const T* row, RowScratch<T>& scratch, const RowFormat& format, int64_t method, float parameter, uint8_t* out) {
  using Key = typename Keys<T>::Key;
  const int passes = method == kLaplace ? 2 : 1;
  const Key least = least_key<T>(row, format.width, method, parameter, Ahead(row, format.width, 0, passes));
  Key low;
  int64_t count = scratch.list(row, format.width, format.slots, least, low, Ahead(row, format.width, passes - 1, passes));
  scratch.read(row, count);
  if (count > format.slots) {
    scratch.cut(count, format.slots, low);
    count = format.slots;
  } else {
    scratch.guess.add(low);
  }
  const T* const values = scratch.values.get();
  const uint16_t* const places = scratch.places.get();
  for (int64_t i = 0; i < count; ++i) write_as(saturate<V>(T::load(values[i])), out + i * int64_t(sizeof(V)));
  std::memset(out + count * int64_t(sizeof(V)), 0, size_t(format.slots - count) * sizeof(V));
  uint8_t* const indices = out + format.slots * int64_t(sizeof(V));
  if (format.index_bytes == 1) {
    for (int64_t i = 0; i < count; ++i) indices[i] = uint8_t(places[i]);
  } else {
    std::memcpy(indices, places, size_t(count) * sizeof *places);
  }
  std::memset(indices + count * format.index_bytes, 0, size_t((format.slots - count) * format.index_bytes));
}

}  // namespace

DCT_EXPORT void dct_pack_rows(const void* x, int64_t dtype, int64_t rows, int64_t width, int64_t slots, int64_t method, double parameter,
                              int64_t value_dtype, uint8_t* payload, int64_t threads) {
  const RowFormat format(width, slots, value_dtype);
  with_dtype(dtype, [&](auto t) {
    with_dtype(value_dtype, [&](auto v) {
      using T = decltype(t);
      using V = decltype(v);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        RowScratch<T> scratch(width, slots);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          pack_row<T, V>(static_cast<const T*>(x) + row * width, scratch, format, method, float(parameter), payload + row * format.bytes());
        }
      }
    });
  });
}

}  // namespace dct
