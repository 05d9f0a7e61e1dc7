// pack_rows. The reference in rows_pack.py is the specification.
#include <algorithm>
#include <type_traits>
#include <vector>

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
  static Key of(T x) { return std::min(Key(x.raw & 0x7fff), kInfinity); }
  static float magnitude(Key key) { return T::load(T{uint16_t(key)}); }
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
  static Key of(Float32 x) { return std::min(Key(bits_of(x.raw) & 0x7fffffffu), kInfinity); }
  static float magnitude(Key key) { return float_of(uint32_t(key)); }
  static Key reaching(float tau) { return Key(bits_of(tau)); }
};

// Kept are the entries above `key` and the first `ties` of those equal to it.
template <typename Key>
struct Cut {
  Key key;
  int64_t ties;
};

constexpr int64_t kLane = 64;  // rows of keys are padded with zeros to a multiple of it: loops have no rest

template <typename Key>
int64_t count_reaching(const Key* keys, int64_t padded, Key least) {
  int64_t total = 0;
  // A count as narrow as the keys keeps the vectors full; a part is so short that it cannot overflow.
  for (int64_t begin = 0; begin < padded; begin += 1 << 14) {
    const int64_t end = std::min<int64_t>(padded, begin + (1 << 14));
    Key count = 0;
    for (int64_t i = begin; i < end; ++i) count = Key(count + (keys[i] >= least));
    total += count;
  }
  return total;
}

// Where to cut so that the `slots` largest of the keys >= least are kept. Neighbouring rows are cut at about the same place: the first
// probe is the cut of the row before (`guess`), the next ones go away from it in growing steps, then halve the gap. On most rows a probe
// meets exactly `slots` entries long before the gap is one.
template <typename Key>
Cut<Key> find_cut(const Key* keys, int64_t padded, int64_t slots, Key least, Key largest, int64_t step, Key guess) {
  if (largest < least) return {least, slots};
  int64_t below = int64_t(least) - 1;    // more than `slots` keys reach it, once it is at `least` or above
  int64_t above = int64_t(largest) + 1;  // fewer reach it:
  int64_t count_above = 0;
  int64_t probe = std::clamp(guess, least, largest);
  while (above - below > 1) {
    const int64_t count = count_reaching(keys, padded, Key(probe));
    if (count == slots) return {Key(probe), slots};
    if (count > slots) {
      below = probe;
    } else {
      above = probe;
      count_above = count;
    }
    const int64_t middle = below + (above - below) / 2;
    if (below < least) {
      probe = std::max<int64_t>(above - step, least);
    } else {
      probe = above > largest ? std::min(below + step, middle) : middle;
    }
    step = std::min<int64_t>(8 * step, above);
  }
  if (below < least) return {least, slots};
  return {Key(below), slots - count_above};
}

enum Method : int64_t { kExact = 0, kLaplace = 1, kFixed = 2 };

// keys -> the least key that is eligible; `parameter` is the factor of the mean for kLaplace, the threshold for kFixed.
template <typename T>
typename Keys<T>::Key least_key(const typename Keys<T>::Key* keys, int64_t padded, int64_t width, int64_t method, float parameter) {
  using Key = typename Keys<T>::Key;
  float tau = 0;
  if (method == kFixed) tau = parameter;
  if (method == kLaplace && parameter > 0) {
    double sums[8] = {};
    for (int64_t i = 0; i < padded; i += 8)
      for (int lane = 0; lane < 8; ++lane) sums[lane] += Keys<T>::magnitude(keys[i + lane]);
    double sum = 0;
    for (double part : sums) sum += part;
    tau = float(sum / double(width)) * parameter;
  }
  return std::clamp<Key>(Keys<T>::reaching(tau), 1, Keys<T>::kInfinity);
}

template <typename T, typename V>
void pack_row(const T* x, typename Keys<T>::Key* keys, uint8_t* hits, typename Keys<T>::Key& guess, const RowFormat& format, int64_t method,
              float parameter, uint8_t* out) {
  using Key = typename Keys<T>::Key;
  const int64_t padded = ceil_div(format.width, kLane) * kLane;
  Key largest = 0;
  for (int64_t i = 0; i < format.width; ++i) {
    keys[i] = Keys<T>::of(x[i]);
    largest = std::max(largest, keys[i]);
  }
  const Key least = least_key<T>(keys, padded, format.width, method, parameter);
  const Cut<Key> cut = find_cut<Key>(keys, padded, format.slots, least, largest, Keys<T>::kBinade / 8, guess);
  guess = cut.key;
  for (int64_t i = 0; i < padded; ++i) hits[i] = keys[i] >= cut.key;

  int64_t slot = 0, ties = cut.ties;
  for (int64_t base = 0; base < padded; base += kLane) {
    uint64_t set = 0;  // 64 hits as bits: one loop whose end is hard to predict, instead of 64 branches
    for (int64_t byte = 0; byte < kLane; byte += 8) {
      uint64_t word;
      std::memcpy(&word, hits + base + byte, sizeof word);
      set |= (word * 0x0102040810204080u >> 56) << byte;  // gathers the lowest bits of eight bytes
    }
    for (; set != 0; set &= set - 1) {
      const int64_t i = base + __builtin_ctzll(set);
      if (keys[i] == cut.key && ties-- <= 0) continue;
      const V value = saturate<V>(T::load(x[i]));
      std::memcpy(out + slot * sizeof value, &value, sizeof value);
      format.write_index(out, slot++, i);
    }
  }
  std::memset(out + slot * sizeof(V), 0, (format.slots - slot) * sizeof(V));
  uint8_t* indices = out + format.slots * sizeof(V);
  std::memset(indices + slot * format.index_bytes, 0, (format.slots - slot) * format.index_bytes);
}

}  // namespace

DCT_EXPORT void dct_pack_rows(const void* x, int64_t dtype, int64_t rows, int64_t width, int64_t slots, int64_t method, double parameter,
                              int64_t value_dtype, uint8_t* payload, int64_t threads) {
  const RowFormat format(width, slots, value_dtype);
  const int64_t padded = ceil_div(width, kLane) * kLane;
  with_dtype(dtype, [&](auto t) {
    with_dtype(value_dtype, [&](auto v) {
      using T = decltype(t);
      using V = decltype(v);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        std::vector<typename Keys<T>::Key> keys(padded);
        std::vector<uint8_t> hits(padded);
        typename Keys<T>::Key guess = Keys<T>::kInfinity;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          pack_row<T, V>(static_cast<const T*>(x) + row * width, keys.data(), hits.data(), guess, format, method,
                         float(parameter), payload + row * format.bytes());
        }
      }
    });
  });
}

}  // namespace dct
