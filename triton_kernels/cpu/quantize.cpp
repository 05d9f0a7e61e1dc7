// quantize_rows and dequantize_rows. The references in quantize.py are the specification.
#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace dct {
namespace {

constexpr float kSmallestScale = 0x1p-126f;

template <int kBits>
constexpr int32_t kLargestCode = kBits == 8 ? 127 : 7;

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

// A row is worked on in parts: loops of a fixed length over arrays of our own need no prologue and no look at what may overlap, which a
// short row would feel.
constexpr int kPart = 64;

// Calls part(begin, count) for all of them; the count of all but a last shorter one is known to the compiler.
template <typename Part>
void each_part(int64_t width, Part&& part) {
  int64_t begin = 0;
  for (; begin + kPart <= width; begin += kPart) part(begin, std::integral_constant<int, kPart>());
  if (begin < width) part(begin, int(width - begin));
}

// The key of the random numbers of 2^32 neighbouring entries: the upper half of the flat index goes into it, so that the loops have 32-bit
// integers only.
struct Key {
  uint64_t seed;
  uint32_t upper = 0;
  uint32_t key = of(0);

  uint32_t of(uint32_t half) const { return mix(uint32_t(seed) ^ mix(uint32_t(seed >> 32) ^ mix(half))); }
  void move_to(uint64_t index) {
    if (uint32_t(index >> 32) == upper) return;
    upper = uint32_t(index >> 32);
    key = of(upper);
  }
};

// The codes of entries that follow each other and whose flat indices, from `index` on, have one upper half.
template <int kBits, typename T, typename Count>
void encode(const T* x, Count count, float scale, uint32_t key, uint32_t index, int8_t* codes) {
  for (int i = 0; i < count; ++i) {
    const float random = float(int32_t(mix((index + uint32_t(i)) ^ key) >> 8));
    // The product is exact, so that it makes no difference whether it is fused with the sum.
#ifdef __FP_FAST_FMAF
    const float moved = __builtin_fmaf(random, 0x1p-24f, T::load(x[i]) / scale);
#else
    const float moved = T::load(x[i]) / scale + random * 0x1p-24f;
#endif
    const int32_t truncated = int32_t(moved);  // and not std::floor, which keeps the compiler from using vectors
    const int32_t code = truncated - (float(truncated) > moved);
    codes[i] = int8_t(std::min(std::max(code, -kLargestCode<kBits>), kLargestCode<kBits>));
  }
}

template <int kBits, typename T>
void encode_row(const T* row, int64_t width, float scale, Key& key, uint64_t first, uint8_t* out) {
  // The scale of a row takes a pass of its own; its entries are asked for while those of a row before are encoded.
  const int64_t ahead = std::max<int64_t>(width, 4096 / int64_t(sizeof(T)));
  each_part(width, [&](int64_t begin, auto count) {
    T x[kPart];
    int8_t codes[kPart] = {};
    std::memcpy(x, row + begin, count * sizeof(T));
    for (int i = 0; i < kPart; i += 64 / int(sizeof(T))) __builtin_prefetch(row + begin + ahead + i);
    const uint64_t index = first + uint64_t(begin);
    key.move_to(index);
    if (uint32_t(index) <= uint32_t(index + uint64_t(count) - 1)) {
      encode<kBits>(x, count, scale, key.key, uint32_t(index), codes);
    } else {
      for (int i = 0; i < count; ++i) {
        key.move_to(index + uint64_t(i));
        encode<kBits>(x + i, 1, scale, key.key, uint32_t(index + uint64_t(i)), codes + i);
      }
    }
    if constexpr (kBits == 8) {
      std::memcpy(out + begin, codes, count);
    } else {
      uint16_t pairs[kPart / 2];
      uint8_t joined[kPart / 2];
      std::memcpy(pairs, codes, sizeof pairs);
      for (int i = 0; i < kPart / 2; ++i) joined[i] = uint8_t((pairs[i] & 15) | (pairs[i] >> 4 & 0xf0));
      std::memcpy(out + begin / 2, joined, (count + 1) / 2);
    }
  });
}

template <int kBits, typename O>
void decode_row(const uint8_t* from, int64_t width, float scale, O* row) {
  const bool clamped = !(std::fabs(scale) * 128.0f <= O::kLargest);  // hardly ever: else no code leaves the range
  each_part(width, [&](int64_t begin, auto count) {
    int8_t codes[kPart];
    O decoded[kPart];
    if constexpr (kBits == 8) {
      std::memcpy(codes, from + begin, count);
    } else {
      uint8_t joined[kPart / 2];
      uint16_t pairs[kPart / 2];
      std::memcpy(joined, from + begin / 2, (count + 1) / 2);
      for (int i = 0; i < kPart / 2; ++i) {
        const int32_t low = ((joined[i] & 15) ^ 8) - 8, high = ((joined[i] >> 4) ^ 8) - 8;
        pairs[i] = uint16_t((low & 0xff) | (high & 0xff) << 8);
      }
      std::memcpy(codes, pairs, sizeof codes);
    }
    for (int i = 0; i < count; ++i) decoded[i] = O::round(float(codes[i]) * scale);
    if (clamped) {
      for (int i = 0; i < count; ++i) {
        const float value = float(codes[i]) * scale;
        decoded[i] = O::round(value > O::kLargest ? O::kLargest : value < -O::kLargest ? -O::kLargest : value);
      }
    }
    std::memcpy(static_cast<void*>(row + begin), decoded, count * sizeof(O));
  });
}

template <int kBits, typename T>
void quantize(const T* x, int64_t rows, int64_t width, uint64_t seed, uint8_t* payload, int64_t threads) {
  const int64_t row_bytes = 2 + code_bytes(width, kBits);
  prefer_huge_pages(payload, rows * row_bytes);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
  {
    Key key{seed};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = x + row * width;
      uint8_t* to = payload + row * row_bytes;
      const BFloat16 scale = row_scale(from, width, kLargestCode<kBits>);
      std::memcpy(to, &scale, sizeof scale);
      if (scale.raw == 0 || scale.raw == 0x7fc0) {
        std::memset(to + 2, 0, size_t(row_bytes - 2));
      } else {
        encode_row<kBits>(from, width, BFloat16::load(scale), key, uint64_t(row) * uint64_t(width), to + 2);
      }
    }
  }
}

template <int kBits, typename O>
void dequantize(const uint8_t* payload, int64_t rows, int64_t width, O* out, int64_t threads) {
  const int64_t row_bytes = 2 + code_bytes(width, kBits);
  write_rows(rows, width, out, threads, [&] {
    return [&](int64_t first, int64_t count, O* to) {
      for (int64_t row = first; row < first + count; ++row, to += width) {
        const uint8_t* from = payload + row * row_bytes;
        BFloat16 scale;
        std::memcpy(&scale, from, sizeof scale);
        decode_row<kBits>(from + 2, width, BFloat16::load(scale), to);
      }
    };
  });
}

}  // namespace

DCT_EXPORT void dct_quantize_rows(const void* x, int64_t dtype, int64_t rows, int64_t width, const int64_t* seed, int64_t bits,
                                  uint8_t* payload, int64_t threads) {
  with_dtype(dtype, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(x);
    (bits == 8 ? quantize<8, decltype(t)> : quantize<4, decltype(t)>)(from, rows, width, uint64_t(*seed), payload, threads);
  });
}

DCT_EXPORT void dct_dequantize_rows(const uint8_t* payload, int64_t rows, int64_t width, int64_t bits, int64_t dtype, void* out,
                                    int64_t threads) {
  with_dtype(dtype, [&](auto o) {
    auto* to = static_cast<decltype(o)*>(out);
    (bits == 8 ? dequantize<8, decltype(o)> : dequantize<4, decltype(o)>)(payload, rows, width, to, threads);
  });
}

}  // namespace dct
