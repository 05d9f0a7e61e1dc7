// What the CPU kernels share: number formats, kernel exports, threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#define DCT_EXPORT extern "C" __attribute__((visibility("default")))

namespace dct {

template <typename T>
inline T read_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
inline void write_as(const T& value, void* to) {
  std::memcpy(to, &value, sizeof value);
}

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return read_as<To>(&from);
}

// Codes of dtypes in the C interface; `DTYPE_CODES` in dispatch.py lists the same numbers.
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline uint32_t bits_of(float x) { return bits_as<uint32_t>(x); }
inline float float_of(uint32_t bits) { return bits_as<float>(bits); }

inline bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
inline bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

// Storage types: `load` widens to float32, `round` rounds to nearest even (to infinity past the range, NaN to the canonical NaN),
// `kLargest` is the largest finite value. `widen` is `load`, and `narrow` is `round`, for the bits of one number or of a vector of them.
struct Float32 {
  float raw;
  static constexpr float kLargest = 3.40282346638528859812e38f;
  static float load(Float32 x) { return x.raw; }
  static Float32 round(float x) { return {is_nan(x) ? float_of(0x7fc00000u) : x}; }
};

struct BFloat16 {
  uint16_t raw;
  static constexpr float kLargest = 3.38953138925153547590e38f;
  static constexpr uint16_t kInfinity = 0x7f80;
  template <typename Float, typename Bits>
  static Float widen(Bits raw) {
    return bits_as<Float>(raw << 16);
  }
  static float load(BFloat16 x) { return widen<float>(uint32_t(x.raw)); }
  template <typename Bits, typename Float>
  static Bits narrow(Float x) {
    const Bits bits = bits_as<Bits>(x);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x == x ? rounded : Bits{} + 0x7fc0u;
  }
  static BFloat16 round(float x) { return {uint16_t(narrow<uint32_t>(x))}; }
};

struct Float16 {
  uint16_t raw;
  static constexpr float kLargest = 65504.0f;
  static constexpr uint16_t kInfinity = 0x7c00;
  template <typename Float, typename Bits>
  static Float widen(Bits raw) {
    // Shifted into float32's place the exponent is too small by 112; the exact product by 2^112 corrects it, denormals included.
    const Bits sign = (raw & 0x8000u) << 16;
    const Bits rest = (raw & 0x7fffu) << 13;
    const Bits finite = bits_as<Bits>(bits_as<Float>(rest) * 0x1p112f);
    const Bits special = rest | 0x7f800000u;
    return bits_as<Float>(sign | (rest >= 0x0f800000u ? special : finite));
  }
  static float load(Float16 x) { return widen<float>(uint32_t(x.raw)); }
  template <typename Bits, typename Float>
  static Bits narrow(Float x) {
    const Bits bits = bits_as<Bits>(x);
    const Bits sign = (bits >> 16) & 0x8000u;
    const Bits rest = bits & 0x7fffffffu;
    // Below 2^-14 the result is denormal: adding 0.5 makes the float32 adder round at 2^-24, and leaves the answer in the low bits.
    const Bits denormal = bits_as<Bits>(bits_as<Float>(rest) + 0.5f) - 0x3f000000u;
    const Bits normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    const Bits finite = rest < 0x38800000u ? denormal : normal;
    const Bits small = rest >= 0x477ff000u ? Bits{} + 0x7c00u : finite;
    return x == x ? sign | small : Bits{} + 0x7e00u;
  }
  static Float16 round(float x) { return {uint16_t(narrow<uint32_t>(x))}; }
};

// Rounding for the wire: a finite value stays finite.
template <typename T>
inline T saturate(float x) {
  T rounded = T::round(x);
  if constexpr (sizeof(T) == 2) rounded.raw = uint16_t(rounded.raw - ((rounded.raw & 0x7fff) == T::kInfinity && is_finite(x)));
  return rounded;
}

// Calls `body(T{})` with the storage type that a dtype code means.
template <typename Body>
inline void with_dtype(int64_t code, Body&& body) {
  switch (code) {
    case kBFloat16: return body(BFloat16{});
    case kFloat16: return body(Float16{});
    default: return body(Float32{});
  }
}

// Asks for a line of a stream, into the second-level cache: the core can wait for more lines there than in the first.
inline void prefetch(const void* place) { __builtin_prefetch(place, 0, 2); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads worth starting for `elements`: below some thousand elements per thread the start costs more than the work.
inline int worthwhile_threads(int64_t elements, int64_t threads) {
  const int64_t useful = elements / 32768;
  return int(useful < 1 ? 1 : useful < threads ? useful : threads);
}

// A large buffer fresh from the system costs more in page faults than in writing: one fault for 2 MB instead of 4 KB.
inline void prefer_huge_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t first = (uintptr_t(start) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (uintptr_t(start) + uintptr_t(bytes)) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace dct
