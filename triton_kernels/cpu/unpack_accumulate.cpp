// unpack_accumulate: tile by tile, so that the sum of all payloads is formed in cache. unpack_accumulate.py is the specification.
#include <omp.h>

#include "gradient_kernels.h"
#include "payload_sum.h"
#include "stream.h"

namespace dct {
namespace {

template <typename T>
void copy_uncovered(const T* dense, T* out, const Range* ranges, int64_t count, int64_t thread, int64_t threads) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t first = ranges[r].numel * thread / threads;
    const size_t size = size_t(ranges[r].numel * (thread + 1) / threads - first) * sizeof(T);
    if (dense != nullptr) {
      std::memcpy(out + ranges[r].offset + first, dense + first, size);
      dense += ranges[r].numel;
    } else {
      std::memset(static_cast<void*>(out + ranges[r].offset + first), 0, size);
    }
  }
}

void divide(float* total, int64_t n, float divisor) {
  int exponent;
  if (std::frexp(divisor, &exponent) == 0.5f) {  // the reciprocal is exact
    const float reciprocal = 1.0f / divisor;
    for (int64_t i = 0; i < n; ++i) total[i] *= reciprocal;
  } else {
    for (int64_t i = 0; i < n; ++i) total[i] /= divisor;
  }
}

// A tile is written, and cleared for the next one, in parts so short that stores to the cache come between the streamed lines: many of
// these in a row fill the store buffer, and the core stands still.
constexpr int64_t kPart = kUnit;  // what lies together in the output

// Rounds a part of a sum, and clears it. Apart: inlined, the constants of the rounding would be read from memory again and again.
template <typename T>
__attribute__((noinline)) void take(float* part, T* to) {
  for (int64_t i = 0; i < kPart; i += 2 * kLanes) {
    const Floats low = read_as<Floats>(part + i), high = read_as<Floats>(part + i + kLanes);
    write_as(Floats{}, part + i);
    write_as(Floats{}, part + i + kLanes);
    store_lanes(low, high, to + i);
  }
}

template <typename T>
void unpack_share(const Layout& layout, PayloadSum sum, T* out, float divisor, bool streamed, int64_t thread, int64_t threads) {
  alignas(64) float total[kSumSize];
  alignas(64) T taken[kPart];
  clear_sum(total, kTile);
  for_each_share(layout, thread, threads, [&](int64_t p, int64_t first, int64_t last) {
    const Piece& piece = layout.piece[p];
    sum.seek(piece, first);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t n = piece.tile_numel(tile);
      const bool divided = sum.add_tile(piece, tile, total) && divisor != 1.0f;
      const Places places(layout, piece, tile);
      for (int64_t i = 0; i < n; i += kPart) {
        const int64_t count = std::min(kPart, n - i);
        float* const part = total + i;
        if (divided) divide(part, count, divisor);
        take(part, taken);
        copy_out(out + piece.grad_offset + places.of(i), taken, count * int64_t(sizeof(T)), streamed);
      }
      if (n < kTile) clear_sum(total, kTile);  // also of what lies behind the elements
    }
  });
  stream_fence();
}

}  // namespace

void unpack_accumulate(const Layout& layout, const Gathered& gathered, const Uncovered& uncovered, const Bucket& out, int64_t divisor,
                       int64_t threads) {
  with_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t bytes = out.numel * int64_t(sizeof(T));
    const bool streamed = bytes >= kStreamedBytes;
    prefer_huge_pages(out.start, bytes);
    const int team = worthwhile_threads(out.numel, threads);
#pragma omp parallel num_threads(team) if (team > 1)
    {
      const int64_t thread = omp_get_thread_num();
      const int64_t size = omp_get_num_threads();
      T* to = static_cast<T*>(out.start);
      copy_uncovered(static_cast<const T*>(uncovered.dense), to, uncovered.ranges, uncovered.count, thread, size);
      unpack_share(layout, PayloadSum(layout, gathered.bytes, gathered.payloads), to, float(divisor), streamed, thread, size);
    }
  });
}

}  // namespace dct

// Every element of `out` that a piece or a range covers is written.
DCT_EXPORT void dct_unpack_accumulate(const dct::Layout* layout, const dct::Gathered* gathered, const dct::Uncovered* uncovered,
                                      const dct::Bucket* out, int64_t divisor, int64_t threads) {
  dct::unpack_accumulate(*layout, *gathered, *uncovered, *out, divisor, threads);
}
