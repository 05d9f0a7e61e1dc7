// Writes past the caches: what is larger than they are need not be read before it is overwritten.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "common.h"

namespace dct {

constexpr int64_t kStreamedBytes = int64_t(1) << 23;  // from here on an output is streamed: its beginning would not stay in cache anyway

// Copies from cache to memory that is not read again soon. Whole cache lines only bypass the caches; the ends are copied as usual.
inline void stream_out(void* to, const void* from, int64_t bytes) {
#ifdef __SSE2__
  constexpr int64_t kLine = 64;
  uint8_t* out = static_cast<uint8_t*>(to);
  const uint8_t* in = static_cast<const uint8_t*>(from);
  const int64_t head = -int64_t(uintptr_t(out)) & (kLine - 1);
  if (bytes >= head + kLine) {
    std::memcpy(out, in, size_t(head));
    out += head, in += head, bytes -= head;
    for (; bytes >= kLine; out += kLine, in += kLine, bytes -= kLine) {
#ifdef __AVX512F__
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#else
      for (int64_t part = 0; part < kLine; part += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + part), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + part)));
      }
#endif
    }
  }
  std::memcpy(out, in, size_t(bytes));
#else
  std::memcpy(to, from, size_t(bytes));
#endif
}

// Streams whole lines that the compiler may hold in registers. Both addresses are multiples of a line.
template <size_t kBytes>
inline void stream_lines(const void* from, void* to) {
  static_assert(kBytes % 64 == 0);
#if defined(__AVX512F__)
  const auto* lines = static_cast<const __m512i*>(from);
  for (size_t i = 0; i < kBytes / 64; ++i) _mm512_stream_si512(static_cast<__m512i*>(to) + i, _mm512_load_si512(lines + i));
#elif defined(__SSE2__)
  const auto* quarters = static_cast<const __m128i*>(from);
  for (size_t i = 0; i < kBytes / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(quarters + i));
#else
  std::memcpy(to, from, kBytes);
#endif
}

// Copies what has been formed in cache to where it stays, past the caches if it is part of an output that is `streamed`.
inline void copy_out(void* to, const void* from, int64_t bytes, bool streamed) {
  if (streamed) {
    stream_out(to, from, bytes);
  } else {
    std::memcpy(to, from, size_t(bytes));
  }
}

// Makes what a thread has streamed visible to others; to be called once per thread when its share is written.
inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace dct
