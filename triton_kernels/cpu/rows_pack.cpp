// pack_rows. The reference in rows_pack.py is the specification.
#include <algorithm>
#include <type_traits>
#include <vector>

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

// Bit i: keys[i] >= least.
template <typename Key>
uint64_t reaching(const Key* keys, Key least) {
  uint64_t mask = 0;
#if defined(__AVX512BW__)
  constexpr int kLanes = 64 / int(sizeof(Key));
  for (int i = 0; i < kGroup; i += kLanes) {
    const __m512i x = _mm512_loadu_si512(keys + i);
    if constexpr (sizeof(Key) == 2) {
      mask |= uint64_t(_mm512_cmpge_epi16_mask(x, _mm512_set1_epi16(least))) << i;
    } else {
      mask |= uint64_t(_mm512_cmpge_epi32_mask(x, _mm512_set1_epi32(least))) << i;
    }
  }
#else
  uint8_t hits[kGroup];
  for (int i = 0; i < kGroup; ++i) hits[i] = keys[i] >= least;
  for (int byte = 0; byte < kGroup; byte += 8) {
    uint64_t word;
    std::memcpy(&word, hits + byte, sizeof word);
    mask |= (word * 0x0102040810204080u >> 56) << byte;  // gathers the lowest bits of eight bytes
  }
#endif
  return mask;
}

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

// Where to cut so that the `slots` largest of the keys >= least, which are more, are kept. Rows of keys are padded with zeros to whole
// groups. The first probe is the cut of the row before (`guess`), the next ones go away from it in growing steps, then halve the gap. On
// most rows a probe meets exactly `slots` entries long before the gap is one.
template <typename Key>
Cut<Key> find_cut(const Key* keys, int64_t padded, int64_t slots, Key least, Key largest, int64_t step, Key guess) {
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

// The same for one group of keys, of which more than `slots` are >= least: a search would cost more in mispredicted branches.
template <typename Key>
Cut<Key> find_cut_in_group(const Key* keys, int64_t count, int64_t slots, Key least) {
  Key key = least;
  for (int64_t i = 0; i < count; ++i) {
    const Key larger = std::max(key, keys[i]);
    key = bit_count(reaching(keys, keys[i])) >= slots ? larger : key;
  }
  return {key, slots - bit_count(reaching(keys, Key(key + 1)))};
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

// Lists the places of the keys >= least, in order; `places` has room for all and one group more. Returns how many they are.
template <typename Key>
int64_t list_reaching(const Key* keys, int64_t padded, Key least, uint32_t* places) {
  int64_t count = 0;
  for (int64_t base = 0; base < padded; base += kGroup) {
    count += list_bits(reaching(keys + base, least), uint32_t(base), places + count);
  }
  return count;
}

// What a thread needs for a row, and what it remembers of the one before.
template <typename T>
struct RowScratch {
  using Key = typename Keys<T>::Key;
  std::vector<Key> keys, listed;
  std::vector<uint32_t> places;
  Key guess = Keys<T>::kInfinity;  // where the row before was cut

  explicit RowScratch(int64_t padded) : keys(size_t(padded)), listed(size_t(padded)), places(size_t(padded + kGroup)) {}

  // Lists the entries that may be kept: at least `slots`, if so many reach `least`. Neighbouring rows are cut at about the same place, so
  // most rows are listed once, with a few entries more than are kept. Returns their number; `low` becomes the key that all of them reach.
  int64_t list(int64_t padded, int64_t slots, Key least, Key& low) {
    int64_t step = Keys<T>::kBinade / 8;
    low = Key(std::max<int64_t>(least, int64_t(guess) - step));
    while (true) {
      const int64_t count = list_reaching(keys.data(), padded, low, places.data());
      if (count >= slots || low == least) return count;
      low = Key(std::max<int64_t>(least, int64_t(low) - step));
      step *= 4;
    }
  }
};

template <typename T, typename V>
void pack_row(const T* x, RowScratch<T>& scratch, const RowFormat& format, int64_t method, float parameter, uint8_t* out) {
  using Key = typename Keys<T>::Key;
  const int64_t padded = ceil_div(format.width, kGroup) * kGroup;
  Key* keys = scratch.keys.data();
  Key largest = 0;
  // The keys are all that comes from memory; those of a row to come are asked for while this one is searched.
  const int64_t ahead = std::max<int64_t>(format.width, 4096 / int64_t(sizeof(T)));
  for (int64_t begin = 0; begin < format.width; begin += 1024) {
    const int64_t end = std::min<int64_t>(format.width, begin + 1024);
    for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i + ahead);
    for (int64_t i = begin; i < end; ++i) {
      keys[i] = Keys<T>::of(x[i]);
      largest = std::max(largest, keys[i]);
    }
  }
  const Key guess = scratch.guess;
  Key low;
  const int64_t count = scratch.list(padded, format.slots, least_key<T>(keys, padded, format.width, method, parameter), low);
  const uint32_t* places = scratch.places.data();
  scratch.guess = low;
  int64_t slot = 0;
  const auto send = [&](uint32_t place) {
    const V value = saturate<V>(T::load(x[place]));
    std::memcpy(out + slot * int64_t(sizeof value), &value, sizeof value);
    format.write_index(out, slot++, place);
  };
  if (count <= format.slots) {
    for (int64_t i = 0; i < count; ++i) send(places[i]);
  } else {
    Key* listed = scratch.listed.data();
    const int64_t listed_padded = ceil_div(count, kGroup) * kGroup;
    for (int64_t i = 0; i < count; ++i) listed[i] = keys[places[i]];
    std::fill(listed + count, listed + listed_padded, Key(0));
    Cut<Key> cut = count <= kGroup ? find_cut_in_group(listed, count, format.slots, low)
                                   : find_cut<Key>(listed, listed_padded, format.slots, low, largest, Keys<T>::kBinade / 32, guess);
    scratch.guess = cut.key;
    for (int64_t base = 0; base < listed_padded; base += kGroup) {
      const uint64_t above = reaching(listed + base, Key(cut.key + 1));
      const uint64_t ties = lowest_bits(reaching(listed + base, cut.key) ^ above, cut.ties);
      cut.ties -= bit_count(ties);
      each_bit(above | ties, [&](int bit) { send(places[base + bit]); });
    }
  }
  std::memset(out + slot * int64_t(sizeof(V)), 0, size_t(format.slots - slot) * sizeof(V));
  uint8_t* indices = out + format.slots * int64_t(sizeof(V));
  std::memset(indices + slot * format.index_bytes, 0, size_t((format.slots - slot) * format.index_bytes));
}

}  // namespace

DCT_EXPORT void dct_pack_rows(const void* x, int64_t dtype, int64_t rows, int64_t width, int64_t slots, int64_t method, double parameter,
                              int64_t value_dtype, uint8_t* payload, int64_t threads) {
  const RowFormat format(width, slots, value_dtype);
  const int64_t padded = ceil_div(width, kGroup) * kGroup;
  with_dtype(dtype, [&](auto t) {
    with_dtype(value_dtype, [&](auto v) {
      using T = decltype(t);
      using V = decltype(v);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        RowScratch<T> scratch(padded);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          pack_row<T, V>(static_cast<const T*>(x) + row * width, scratch, format, method, float(parameter), payload + row * format.bytes());
        }
      }
    });
  });
}

}  // namespace dct
