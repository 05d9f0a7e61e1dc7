// 64 elements at a time: enough for the vector units, and one bit each in a word.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common.h"

namespace dct {

constexpr int kTile = 64;

// w = grad (+ state) for n elements, 0 for the rest of the tile.
template <typename G, bool kAdd>
inline void load_tile(const G* grad, const float* state, int n, float* w) {
  if (n == kTile) {
    for (int i = 0; i < kTile; ++i) w[i] = kAdd ? G::load(grad[i]) + state[i] : G::load(grad[i]);
  } else {
    for (int i = 0; i < n; ++i) w[i] = kAdd ? G::load(grad[i]) + state[i] : G::load(grad[i]);
    for (int i = n; i < kTile; ++i) w[i] = 0.0f;
  }
}

inline void store_tile(const float* w, int n, float* state) {
  if (n == kTile) {
    std::memcpy(state, w, kTile * sizeof(float));
  } else {
    std::memcpy(state, w, size_t(n) * sizeof(float));
  }
}

// Bit i: |w[i]| >= tau and w[i] != 0.
inline uint64_t reaching(const float* w, float tau) {
  uint64_t mask = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < kTile; i += 16) {
    const __m512 x = _mm512_load_ps(w + i);
    const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(tau), _CMP_GE_OQ);
    mask |= uint64_t(_mm512_mask_cmp_ps_mask(large, x, _mm512_setzero_ps(), _CMP_NEQ_OQ)) << i;
  }
#elif defined(__AVX2__)
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int i = 0; i < kTile; i += 8) {
    const __m256 x = _mm256_load_ps(w + i);
    const __m256 large = _mm256_cmp_ps(_mm256_and_ps(x, magnitude), _mm256_set1_ps(tau), _CMP_GE_OQ);
    const __m256 kept = _mm256_and_ps(large, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ));
    mask |= uint64_t(uint32_t(_mm256_movemask_ps(kept))) << i;
  }
#else
  for (int i = 0; i < kTile; ++i) mask |= uint64_t(std::fabs(w[i]) >= tau && w[i] != 0.0f) << i;
#endif
  return mask;
}

// Bit i: w[i] is sent if there is room. In a held step that is what is not finite, else what reaches the threshold.
template <bool kHeld>
inline uint64_t candidates(const float* w, float tau) {
  if (!kHeld) return reaching(w, tau);
  uint64_t mask = 0;
  for (int i = 0; i < kTile; ++i) mask |= uint64_t(!is_finite(w[i])) << i;
  return mask;
}

}  // namespace dct
