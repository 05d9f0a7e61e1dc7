// quantize_rows and dequantize_rows. The references in quantize.py are the specification.
#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace dct {
namespace {

constexpr float kSmallestScale = 0x1p-126f;

template <int kBits>
constexpr int32_t kLargestCode = kBits == 8 ? 127 : 7;

// Of a number or of a vector of them.
template <typename Bits>
inline Bits mix(Bits h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ h >> 16;
}

int64_t code_bytes(int64_t width, int64_t bits) { return ceil_div(width * bits, 8); }

constexpr int kDraw = 16;
using Draw = Vector<uint32_t, kDraw>;
constexpr Draw kPlace = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The row's scale: its largest magnitude over `qmax`, rounded up to bfloat16; NaN if an entry is not finite.
template <typename T>
BFloat16 row_scale(const T* row, int64_t width, int32_t qmax) {
  Largest<T> largest;
  each_row_group(row, width, Ahead(row, width, 0, 2), [&](int64_t, const T* group) { largest.add(group); });
  if (largest.bits() == 0) return {0};
  if (largest.bits() >= 0x7f800000) return {0x7fc0};
  const float exact = std::max(float_of(largest.bits()) / float(qmax), kSmallestScale);
  return {uint16_t((bits_of(exact) + 0xffffu) >> 16)};
}

// 32 random bits for each number, of which each of two entries takes 16. The upper half of the number goes into a key, so that the loops
// have 32-bit integers only.
class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed), key_(key_of(0)) {}

  // Of kDraw numbers from `first` on, which is a multiple of kDraw.
  Draw draw(uint64_t first) {
    if (uint32_t(first >> 32) != upper_) set_upper(uint32_t(first >> 32));
    return mix((uint32_t(first) + kPlace) ^ key_);
  }

 private:
  __attribute__((noinline)) void set_upper(uint32_t upper) { upper_ = upper, key_ = key_of(upper); }
  uint32_t key_of(uint32_t upper) const { return mix(uint32_t(seed_) ^ mix(uint32_t(seed_ >> 32) ^ mix(upper))); }

  uint64_t seed_;
  uint32_t upper_ = 0;
  uint32_t key_;
};

// Codes of entries; the random bits are the upper ones of `random`.
template <int kBits>
Ints encode(Floats x, float reciprocal, Words random) {
  // From the least to the largest 16 bits: -0.5 + 2^-17 to 0.5 - 2^-17.
  const Floats moved = x * reciprocal + __builtin_convertvector(bits_as<Ints>((random & 0xffff0000u) | 0x8000u), Floats) * 0x1p-32f;
  // Up there the distance between float32 numbers is 1: the sum is rounded to even, and its last bits are the code.
  const Ints code = bits_as<Ints>(moved + 0x1.8p23f) - 0x4b400000;
  const Ints largest = Ints{} + kLargestCode<kBits>;
  return larger(-largest, smaller(largest, code));
}

template <int kBits>
void write_codes(Ints codes, uint8_t* to) {
  if constexpr (kBits == 8) {
    store_bytes(codes, to);
  } else {
    const auto pairs = bits_as<Longs>(codes & 15);
    store_bytes(pairs | pairs >> 28, to);
  }
}

// A row of which the first entry shares the random number `number`.
template <int kBits, typename T>
inline void encode_row(const T* row, int64_t width, float reciprocal, Random& random, uint64_t number, uint8_t* out) {
  each_row_group(row, width, Ahead(row, width, 1, 2), [&](int64_t base, const T* x) {
    uint8_t last[kGroup];
    uint8_t* const place = out + base * kBits / 8;
    const int64_t count = std::min<int64_t>(kGroup, width - base);
    uint8_t* const to = count < kGroup ? last : place;
    for (int i = 0; i < kGroup; i += 2 * kDraw) {
      const Draw bits = random.draw(number + uint64_t(base + i) / 2);
      for (int k = i; k < i + kDraw; k += kLanes) {
        const Words part = read_as<Words>(reinterpret_cast<const uint32_t*>(&bits) + (k - i));
        write_codes<kBits>(encode<kBits>(load_lanes(x + k), reciprocal, part << 16), to + k * kBits / 8);
        write_codes<kBits>(encode<kBits>(load_lanes(x + k + kDraw), reciprocal, part), to + (k + kDraw) * kBits / 8);
      }
    }
    if (count < kGroup) std::memcpy(place, last, size_t(code_bytes(count, kBits)));
  });
}

// What codes stand for. kClamped: one of them may leave the range of O.
template <int kBits, bool kClamped, typename O>
Floats decode(const uint8_t* from, float scale) {
  Ints codes;
  if constexpr (kBits == 8) {
    codes = load_ints(reinterpret_cast<const int8_t*>(from));
  } else {
    const Longs pairs = load_longs(from);
    codes = bits_as<Ints>(pairs | pairs << 28) << 28 >> 28;
  }
  const Floats value = __builtin_convertvector(codes, Floats) * scale;
  return kClamped ? smaller(larger(Floats{} - O::kLargest, value), Floats{} + O::kLargest) : value;
}

template <int kBits, bool kClamped, typename O>
void decode_group(const uint8_t* from, float scale, O* to) {
  const auto at = [&](int i) { return decode<kBits, kClamped, O>(from + i * kBits / 8, scale); };
  for (int i = 0; i < kGroup; i += 2 * kLanes) store_lanes(at(i), at(i + kLanes), to + i);
}

template <int kBits, typename O>
void decode_row(const uint8_t* from, int64_t width, float scale, O* row) {
  const bool clamped = !(std::fabs(scale) * 128.0f <= O::kLargest);  // hardly ever: else no code leaves the range
  const auto group = clamped ? decode_group<kBits, true, O> : decode_group<kBits, false, O>;
  int64_t begin = 0;
  for (; begin + kGroup <= width; begin += kGroup) group(from + begin * kBits / 8, scale, row + begin);
  if (begin == width) return;
  uint8_t codes[kGroup] = {};
  O last[kGroup];
  std::memcpy(codes, from + begin * kBits / 8, size_t(code_bytes(width - begin, kBits)));
  group(codes, scale, last);
  std::memcpy(static_cast<void*>(row + begin), last, size_t(width - begin) * sizeof(O));
}

template <int kBits, typename T>
void quantize(const T* x, int64_t rows, int64_t width, uint64_t seed, uint8_t* payload, int64_t threads) {
  const int64_t row_bytes = 2 + code_bytes(width, kBits);
  const uint64_t numbers = uint64_t(ceil_div(width, 2 * kDraw)) * kDraw;  // of a row
  prefer_huge_pages(payload, rows * row_bytes);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
  {
    Random random(seed);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = x + row * width;
      uint8_t* to = payload + row * row_bytes;
      const BFloat16 scale = row_scale(from, width, kLargestCode<kBits>);
      write_as(scale, to);
      if (scale.raw == 0 || scale.raw == 0x7fc0) {
        std::memset(to + 2, 0, size_t(row_bytes - 2));
      } else {
        encode_row<kBits>(from, width, 1.0f / BFloat16::load(scale), random, uint64_t(row) * numbers, to + 2);
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
        decode_row<kBits>(from + 2, width, BFloat16::load(read_as<BFloat16>(from)), to);
      }
    };
  });
}

}  // namespace

DCT_EXPORT void dct_quantize_rows(const dct::Rows* x, int64_t width, const int64_t* seed, int64_t bits, uint8_t* payload, int64_t threads) {
  with_dtype(x->dtype, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(x->start);
    (bits == 8 ? quantize<8, decltype(t)> : quantize<4, decltype(t)>)(from, x->rows, width, uint64_t(*seed), payload, threads);
  });
}

DCT_EXPORT void dct_dequantize_rows(const uint8_t* payload, int64_t width, int64_t bits, const dct::Rows* out, int64_t threads) {
  with_dtype(out->dtype, [&](auto o) {
    auto* to = static_cast<decltype(o)*>(out->start);
    (bits == 8 ? dequantize<8, decltype(o)> : dequantize<4, decltype(o)>)(payload, out->rows, width, to, threads);
  });
}

}  // namespace dct
