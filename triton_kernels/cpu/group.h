// 64 elements at a time: enough for the vector units, and one bit each in a word.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>

#include "lanes.h"

namespace dct {

constexpr int kGroup = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// w = grad (+ state) for n elements, 0 for the rest of the group.
template <bool kAdd, typename G>
inline void load_group(const G* grad, const float* state, int n, float* w) {
  if (n == kGroup) {
    for (int i = 0; i < kGroup; ++i) w[i] = kAdd ? G::load(grad[i]) + state[i] : G::load(grad[i]);
  } else {
    for (int i = 0; i < n; ++i) w[i] = kAdd ? G::load(grad[i]) + state[i] : G::load(grad[i]);
    for (int i = n; i < kGroup; ++i) w[i] = 0.0f;
  }
}

inline void store_group(const float* w, int n, float* state) {
  if (n == kGroup) {
    std::memcpy(state, w, kGroup * sizeof(float));
  } else {
    std::memcpy(state, w, size_t(n) * sizeof(float));
  }
}

inline uint32_t magnitude_bits(float w) { return bits_of(w) & 0x7fffffffu; }

// Combines `kCount` numbers to one, half with half.
template <int kCount, typename Number, typename Combine>
inline Number reduce(const Vector<Number, kCount>& lanes, Combine&& combine) {
  if constexpr (kCount * sizeof(Number) > 16) {
    const auto half = bits_as<std::array<Vector<Number, kCount / 2>, 2>>(lanes);
    return reduce<kCount / 2, Number>(combine(half[0], half[1]), combine);
  } else {
    Number result = lanes[0];
    for (int i = 1; i < kCount; ++i) result = combine(result, Number(lanes[i]));
    return result;
  }
}

// The largest magnitude of numbers of type T, float or one of storage. Bits of magnitudes are integers in the order of the magnitudes.
template <typename T>
class Largest {
 public:
  // A group.
  void add(const T* x) {
    for (int i = 0; i < kGroup; i += kCount) lanes_ = larger(lanes_, read_as<Keys>(x + i) & std::numeric_limits<Key>::max());
  }
  // Of the magnitude as a float32.
  uint32_t bits() const {
    const Key largest = reduce<kCount, Key>(lanes_, [](auto a, auto b) { return larger(a, b); });
    if constexpr (sizeof(T) == 4) return uint32_t(largest);
    else return bits_of(T::load(bits_as<T>(largest)));
  }

 private:
  using Key = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  static constexpr int kCount = kLanesOf<T>;
  using Keys = Vector<Key, kCount>;
  Keys lanes_ = {};
};

// Bit i: w[i] != 0 and |w[i]| is not below tau. What is not finite is never below: with an infinite tau these are the bits.
inline uint64_t reaching(const float* w, float tau) {
  uint64_t mask = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kGroup; i += 16) {
    const __m512 x = _mm512_load_ps(w + i);
    const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(tau), _CMP_NLT_UQ);
    mask |= uint64_t(_mm512_mask_cmp_ps_mask(large, x, _mm512_setzero_ps(), _CMP_NEQ_UQ)) << i;
  }
#elif defined(__AVX2__)
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int i = 0; i < kGroup; i += 8) {
    const __m256 x = _mm256_load_ps(w + i);
    const __m256 large = _mm256_cmp_ps(_mm256_and_ps(x, magnitude), _mm256_set1_ps(tau), _CMP_NLT_UQ);
    const __m256 kept = _mm256_and_ps(large, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    mask |= uint64_t(uint32_t(_mm256_movemask_ps(kept))) << i;
  }
#else
  for (int i = 0; i < kGroup; ++i) mask |= uint64_t(!(std::fabs(w[i]) < tau) && w[i] != 0.0f) << i;
#endif
  return mask;
}

// Bit i: the magnitude bits of x[i], keys or entries, are at least `least`. Of kCount neighbours, whole vectors.
template <int kCount, typename Key, typename T>
inline uint64_t reaching_key(const T* x, Key least) {
  constexpr Key kMagnitude = std::numeric_limits<Key>::max();
  uint64_t mask = 0;
#if defined(__AVX512BW__)
  for (int i = 0; i < kCount; i += kLanesOf<Key>) {
    if constexpr (sizeof(Key) == 2) {
      const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi16(kMagnitude));
      mask |= uint64_t(_mm512_cmpge_epi16_mask(magnitude, _mm512_set1_epi16(least))) << i;
    } else {
      const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(kMagnitude));
      mask |= uint64_t(_mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(least))) << i;
    }
  }
#else
  uint8_t hits[kCount];
  for (int i = 0; i < kCount; ++i) hits[i] = (read_as<Key>(x + i) & kMagnitude) >= least;
  for (int byte = 0; byte < kCount; byte += 8) {
    mask |= (read_as<uint64_t>(hits + byte) * 0x0102040810204080u >> 56) << byte;  // gathers the lowest bits of eight bytes
  }
#endif
  return mask;
}

// Calls visit(i) for each set bit i of the mask, from the lowest on.
template <typename Visit>
inline void each_bit(uint64_t mask, Visit&& visit) {
  for (; mask != 0; mask &= mask - 1) visit(__builtin_ctzll(mask));
}

inline int64_t bit_count(uint64_t mask) { return __builtin_popcountll(mask); }

// Writes the numbers of the set bits, counted from `first`, from the lowest on; `indices` has room for 64. Returns how many they are.
template <typename Index>
inline int64_t list_bits(uint64_t mask, uint32_t first, Index* indices) {
  const int64_t count = bit_count(mask);
#if defined(__AVX512VBMI2__)
  alignas(64) static constexpr uint8_t kNumbers[kGroup] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
      32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const __m512i numbers = _mm512_maskz_compress_epi8(mask, _mm512_load_si512(kNumbers));
  // Without a branch for the first ones: whether a group has candidates cannot be predicted.
  if constexpr (sizeof(Index) == 2) {
    const __m512i start = _mm512_set1_epi16(short(first));
    _mm512_storeu_si512(indices, _mm512_add_epi16(start, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(numbers))));
    if (count > 32) _mm512_storeu_si512(indices + 32, _mm512_add_epi16(start, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(numbers, 1))));
  } else {
    const __m512i start = _mm512_set1_epi32(int(first));
    _mm512_storeu_si512(indices, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(numbers))));
    if (count > 16) {
      _mm512_storeu_si512(indices + 16, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(numbers, 1))));
      _mm512_storeu_si512(indices + 32, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(numbers, 2))));
      _mm512_storeu_si512(indices + 48, _mm512_add_epi32(start, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(numbers, 3))));
    }
  }
#else
  each_bit(mask, [&](int i) { *indices++ = Index(first + uint32_t(i)); });
#endif
  return count;
}

// Writes the elements of a group whose bits are set, from the lowest on; `to` has room for 64 and may be `from`, or lie before it.
template <typename T>
inline void list_elements(uint64_t mask, const T* from, T* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kGroup; i += 16, mask >>= 16) {
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_loadu_si512(from + i)));
      to += bit_count(mask & 0xffff);
    }
    return;
  }
#endif
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < kGroup; i += 32, mask >>= 32) {
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(__mmask32(mask), _mm512_loadu_si512(from + i)));
      to += bit_count(mask & 0xffffffff);
    }
    return;
  }
#endif
  each_bit(mask, [&](int i) { *to++ = from[i]; });
}

// The `room` lowest set bits of the mask.
inline uint64_t lowest_bits(uint64_t mask, int64_t room) {
  for (int64_t extra = bit_count(mask) - room; extra > 0; --extra) mask ^= uint64_t(1) << (63 - __builtin_clzll(mask));
  return mask;
}

}  // namespace dct
