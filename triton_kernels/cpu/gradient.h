// The geometry of a bucket's payload, as cpu/gradient.py lays it out in one int64 array (names as in layout.py).
#pragma once

#include <algorithm>

#include "common.h"

namespace dct {

struct Piece {
  int64_t segment, chunk, grad_offset, state_offset, numel, first_block, blocks, capacity;
};

struct Layout {
  int64_t block, index_bytes, max_count, blocks_per_chunk, capacity, counts_offset, indices_offset, chunk_bytes, payload_chunks, value_dtype;
  int64_t segments;
  int64_t blocks;  // of all pieces
  int64_t numel;   // of all pieces
  int64_t pieces;
  Piece piece[1];  // [pieces]
};

// One chunk of a payload.
struct ChunkView {
  uint8_t* bytes;
  const Layout* layout;

  int64_t small(int64_t offset, int64_t i) const {
    if (layout->index_bytes == 1) return bytes[offset + i];
    uint16_t x;
    std::memcpy(&x, bytes + offset + 2 * i, sizeof x);
    return x;
  }
  void set_small(int64_t offset, int64_t i, int64_t x) const {
    if (layout->index_bytes == 1) {
      bytes[offset + i] = uint8_t(x);
    } else {
      const uint16_t narrow = uint16_t(x);
      std::memcpy(bytes + offset + 2 * i, &narrow, sizeof narrow);
    }
  }
  int64_t count(int64_t i) const { return small(layout->counts_offset, i); }
  int64_t index(int64_t i) const { return small(layout->indices_offset, i); }
  void set_count(int64_t i, int64_t x) const { set_small(layout->counts_offset, i, x); }
  void set_index(int64_t i, int64_t x) const { set_small(layout->indices_offset, i, x); }
};

// The blocks of all pieces, one after the other, are split evenly over threads: calls `visit(piece number, first block, last block + 1)`
// for each piece that this thread's share touches.
template <typename Visit>
inline void for_each_share(const Layout& layout, int64_t thread, int64_t threads, Visit&& visit) {
  const int64_t begin = layout.blocks * thread / threads;
  const int64_t end = layout.blocks * (thread + 1) / threads;
  int64_t before = 0;
  for (int64_t p = 0; p < layout.pieces && before < end; before += layout.piece[p].blocks, ++p) {
    const int64_t first = std::max<int64_t>(begin - before, 0);
    const int64_t last = std::min(end - before, layout.piece[p].blocks);
    if (first < last) visit(p, first, last);
  }
}

// Whether grad[0..n) holds a NaN or an infinity: an integer test of the exponent, 4096 elements at a time.
template <typename G>
inline bool any_nonfinite(const G* grad, int64_t n) {
  using Bits = std::conditional_t<sizeof(G) == 4, uint32_t, uint16_t>;
  constexpr Bits exponent = std::is_same_v<G, Float32> ? 0x7f800000u : std::is_same_v<G, BFloat16> ? 0x7f80u : 0x7c00u;
  for (int64_t start = 0; start < n; start += 4096) {
    const int64_t stop = std::min<int64_t>(start + 4096, n);
    Bits largest = 0;
    for (int64_t i = start; i < stop; ++i) {
      Bits bits;
      std::memcpy(&bits, grad + i, sizeof bits);
      largest = std::max<Bits>(largest, bits & exponent);
    }
    if (largest == exponent) return true;
  }
  return false;
}

}  // namespace dct
