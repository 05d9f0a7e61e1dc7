// Numbers by vectors.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common.h"

namespace dct {

// Vectors of the compiler's own (GCC, Clang), as long as those of the machine: GCC 12 takes conversions and choices of longer ones apart.
#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T, int kCount>
using Vector = typename VectorOf<T, kCount>::type;

template <typename T>
constexpr int kLanesOf = kVectorBytes / int(sizeof(T));
constexpr int kLanes = kLanesOf<float>;
using Floats = Vector<float, kLanes>;
using Ints = Vector<int32_t, kLanes>;
using Words = Vector<uint32_t, kLanes>;
using Longs = Vector<uint64_t, kLanes / 2>;

template <typename Numbers>
inline Numbers larger(Numbers a, Numbers b) {
  return a > b ? a : b;
}
template <typename Numbers>
inline Numbers smaller(Numbers a, Numbers b) {
  return a > b ? b : a;
}

// Neighbours made wider, and narrow ones of the lowest bits. GCC 12 takes a vector's conversion in two steps apart, but not a loop's.
#if defined(__AVX512BW__)
inline Words load_words(const uint16_t* from) { return Words(_mm512_cvtepu16_epi32(read_as<__m256i>(from))); }
inline Ints load_ints(const int8_t* from) { return Ints(_mm512_cvtepi8_epi32(read_as<__m128i>(from))); }
inline Longs load_longs(const uint8_t* from) { return Longs(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(read_as<int64_t>(from)))); }
#elif defined(__AVX2__)
inline Words load_words(const uint16_t* from) { return Words(_mm256_cvtepu16_epi32(read_as<__m128i>(from))); }
inline Ints load_ints(const int8_t* from) { return Ints(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read_as<int64_t>(from)))); }
inline Longs load_longs(const uint8_t* from) { return Longs(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(read_as<int32_t>(from)))); }
#else
template <typename Wide, typename Narrow>
inline Wide load_wide(const Narrow* from) {
  Wide wide;
  for (size_t i = 0; i < sizeof(Wide) / sizeof(wide[0]); ++i) wide[i] = from[i];
  return wide;
}
inline Words load_words(const uint16_t* from) { return load_wide<Words>(from); }
inline Ints load_ints(const int8_t* from) { return load_wide<Ints>(from); }
inline Longs load_longs(const uint8_t* from) { return load_wide<Longs>(from); }
#endif

template <typename Wide>
inline void store_bytes(const Wide& x, uint8_t* to) {
  constexpr int kCount = int(sizeof(Wide) / sizeof(x[0]));
#ifdef __AVX512BW__
  write_as(__builtin_convertvector(x, Vector<uint8_t, kCount>), to);
#else
  for (int i = 0; i < kCount; ++i) to[i] = uint8_t(x[i]);
#endif
}

// A vector of neighbours.
template <typename T>
inline Floats load_lanes(const T* from) {
  if constexpr (sizeof(T) == 4) {
    return read_as<Floats>(from);
  } else {
    return T::template widen<Floats>(load_words(&from->raw));
  }
}

// Rounds neighbours. Those of 16 bits are written as one vector: one that is soon read again comes from the store buffer only if a single
// store has written it.
template <typename T>
inline void store_lanes(Floats low, Floats high, T* to) {
  if constexpr (sizeof(T) == 4) {
    write_as(low, to);
    write_as(high, to + kLanes);
  } else {
    const Words first = T::template narrow<Words>(low), second = T::template narrow<Words>(high);
#if defined(__AVX512BW__)
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    write_as(_mm512_permutexvar_epi64(order, _mm512_packus_epi32(__m512i(first), __m512i(second))), to);
#elif defined(__AVX2__)
    write_as(_mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(first), __m256i(second)), 0xd8), to);
#else
    using Halves = Vector<uint16_t, kLanes>;
    write_as(__builtin_convertvector(first, Halves), to);
    write_as(__builtin_convertvector(second, Halves), to + kLanes);
#endif
  }
}

// Calls visit(x) for `count` neighbours by vectors, in whatever order is the cheapest; `count` is a multiple of 32.
template <typename T, typename Visit>
inline void each_lanes(const T* from, int count, Visit&& visit) {
  for (int i = 0; i < count; i += kLanesOf<T>) {
    if constexpr (sizeof(T) == 4) {
      visit(read_as<Floats>(from + i));
    } else {
      const Words pairs = read_as<Words>(from + i);
      visit(T::template widen<Floats>(pairs & 0xffffu));
      visit(T::template widen<Floats>(pairs >> 16));
    }
  }
}

}  // namespace dct
