// quantize_rows and dequantize_rows. The references in quantize.py are the specification.
#include <algorithm>
#include <vector>

#include "common.h"

namespace dct {
namespace {

constexpr float kSmallestScale = 0x1p-126f;

inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ h >> 16;
}

int64_t code_bytes(int64_t width, int64_t bits) { return ceil_div(width * bits, 8); }

// The row's scale: its largest magnitude over `qmax`, rounded up to bfloat16; NaN if an entry is not finite.
template <typename T>
BFloat16 row_scale(const T* x, int64_t width, int32_t qmax) {
  int32_t largest = 0;
  for (int64_t i = 0; i < width; ++i) largest = std::max(largest, int32_t(bits_of(T::load(x[i])) & 0x7fffffffu));
  if (largest == 0) return {0};
  if (largest >= 0x7f800000) return {0x7fc0};
  const float exact = std::max(float_of(uint32_t(largest)) / float(qmax), kSmallestScale);
  return {uint16_t((bits_of(exact) + 0xffffu) >> 16)};
}

// codes[i] for the entries of a row; `first` is the flat index of its first entry.
template <typename T>
void row_codes(const T* x, int64_t width, float scale, int32_t qmax, uint64_t seed, uint64_t first, int8_t* codes) {
  for (int64_t begin = 0; begin < width;) {
    // The upper half of the index goes into the key: the loop has 32-bit integers only, and ends where that half changes.
    const uint64_t index = first + uint64_t(begin);
    const uint32_t key = mix(uint32_t(seed) ^ mix(uint32_t(seed >> 32) ^ mix(uint32_t(index >> 32))));
    const int64_t count = std::min<int64_t>(width - begin, (int64_t(1) << 32) - int64_t(uint32_t(index)));
    const T* from = x + begin;
    int8_t* to = codes + begin;
    const uint32_t low = uint32_t(index);
    for (int32_t i = 0; i < int32_t(count); ++i) {
      // The product is exact, so that it makes no difference whether the compiler fuses it with the sum.
      const float u = float(int32_t(mix((low + uint32_t(i)) ^ key) >> 8)) * 0x1p-24f;
      const float moved = T::load(from[i]) / scale + u;
      const int32_t truncated = int32_t(moved);  // and not std::floor, which keeps the compiler from using vectors
      const int32_t code = truncated - (float(truncated) > moved);
      to[i] = int8_t(std::min(std::max(code, -qmax), qmax));
    }
    begin += count;
  }
}

// Two codes of eight bits become two of four; by itself, because bytes written through `out` could alias what a longer function uses.
void join_pairs(const uint16_t* pairs, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = uint8_t((pairs[i] & 15) | (pairs[i] >> 4 & 0xf0));
}

}  // namespace

DCT_EXPORT void dct_quantize_rows(const void* x, int64_t dtype, int64_t rows, int64_t width, const int64_t* seed, int64_t bits,
                                  uint8_t* payload, int64_t threads) {
  const int64_t row_bytes = 2 + code_bytes(width, bits);
  const int32_t qmax = bits == 8 ? 127 : 7;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    prefer_huge_pages(payload, rows * row_bytes);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
    {
      std::vector<uint16_t> pairs(ceil_div(width, 2));  // of codes; a last one without an entry stays 0
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) {
        const T* from = static_cast<const T*>(x) + row * width;
        uint8_t* out = payload + row * row_bytes;
        const BFloat16 scale = row_scale(from, width, qmax);
        std::memcpy(out, &scale, sizeof scale);
        if (scale.raw == 0 || scale.raw == 0x7fc0) {
          std::memset(out + 2, 0, row_bytes - 2);
          continue;
        }
        int8_t* row_out = bits == 8 ? reinterpret_cast<int8_t*>(out + 2) : reinterpret_cast<int8_t*>(pairs.data());
        row_codes(from, width, BFloat16::load(scale), qmax, uint64_t(*seed), uint64_t(row) * uint64_t(width), row_out);
        if (bits == 4) join_pairs(pairs.data(), row_bytes - 2, out + 2);
      }
    }
  });
}

DCT_EXPORT void dct_dequantize_rows(const uint8_t* payload, int64_t rows, int64_t width, int64_t bits, int64_t dtype, void* out,
                                    int64_t threads) {
  const int64_t row_bytes = 2 + code_bytes(width, bits);
  with_dtype(dtype, [&](auto o) {
    using O = decltype(o);
    prefer_huge_pages(out, rows * width * int64_t(sizeof(O)));
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
    {
      std::vector<uint16_t> pairs(ceil_div(width, 2));
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* from = payload + row * row_bytes;
        O* to = static_cast<O*>(out) + row * width;
        BFloat16 stored;
        std::memcpy(&stored, from, sizeof stored);
        const float scale = BFloat16::load(stored);
        const int8_t* read = reinterpret_cast<const int8_t*>(from + 2);
        if (bits == 4) {
          for (int64_t i = 0; i < row_bytes - 2; ++i) {
            const int32_t low = ((from[2 + i] & 15) ^ 8) - 8, high = ((from[2 + i] >> 4) ^ 8) - 8;
            pairs[i] = uint16_t((low & 0xff) | (high & 0xff) << 8);
          }
          read = reinterpret_cast<const int8_t*>(pairs.data());
        }
        for (int64_t i = 0; i < width; ++i) {
          const float value = float(read[i]) * scale;
          to[i] = O::round(value > O::kLargest ? O::kLargest : value < -O::kLargest ? -O::kLargest : value);
        }
      }
    }
  });
}

}  // namespace dct
