// The geometry of a bucket's payload, as cpu/gradient.py lays it out in one int64 array (names as in layout.py), and its values.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.h"

namespace dct {

constexpr int64_t kTile = 4096;                    // layout.TILE
constexpr int64_t kWholePiece = int64_t(1) << 31;  // layout.WHOLE_PIECE
constexpr int64_t kCounters = 5;                   // layout.COUNTERS
constexpr int64_t kUnit = 256;                     // shares.UNIT
constexpr int64_t kTurn = 40503;                   // shares.TURN
constexpr int64_t kInt8 = 3;                       // dtype code of values that are multiples of their tile's scale

struct Piece {
  int64_t segment, chunk, grad_offset, state_offset, numel, first_block, blocks, first_tile, tiles, capacity;

  int64_t tile_numel(int64_t tile) const { return std::min(kTile, numel - tile * kTile); }
};

// `block` is a power of two, 64 or more.
struct Layout {
  int64_t block, index_bytes, max_count, capacity, values_offset, counts_offset, indices_offset, chunk_bytes, payload_chunks, value_dtype;
  int64_t segments;
  int64_t numel;  // of all pieces
  int64_t pieces;
  Piece piece[1];  // [pieces]

  bool blocks_in_tiles() const { return block <= kTile; }
  int64_t block_of(int64_t element) const { return element >> __builtin_ctzll(uint64_t(block)); }
  int64_t index_of(int64_t element) const { return element & (block - 1); }
};

// Where the elements of a tile lie in the piece's segment, or in the owner's buffer: its units at equal distances, as shares.py says.
class Places {
 public:
  // Apart: inlined, GCC 12 makes code of the pass over the gradient that takes twice as long where there are several chunks.
  __attribute__((noinline)) Places(const Layout& layout, const Piece& piece, int64_t tile) : others_((layout.payload_chunks - 1) * kUnit) {
    const int64_t chunks = layout.payload_chunks;
    const int64_t turn = (tile * kTurn & 0xffff) * chunks >> 16;
    first_ = tile * kTile * chunks + (turn + piece.chunk) % chunks * kUnit;
  }
  int64_t of(int64_t element) const { return first_ + element + element / kUnit * others_; }
  // Whether others lie between the units: then the hardware does not foresee where they go on.
  bool scattered() const { return others_ > 0; }

 private:
  int64_t first_;
  int64_t others_;  // elements between two units
};

struct Int8 {
  int8_t raw;
  static float load(Int8 x) { return float(x.raw); }
};

// Calls `body(V{})` with the storage type of values.
template <typename Body>
inline void with_value_dtype(int64_t code, Body&& body) {
  if (code == kInt8) return body(Int8{});
  with_dtype(code, body);
}

// Calls `body(I{})` with the type of counts and indices.
template <typename Body>
inline void with_index_bytes(int64_t bytes, Body&& body) {
  if (bytes == 1) return body(uint8_t{});
  if (bytes == 2) return body(uint16_t{});
  body(uint32_t{});
}

// What a code of 1 stands for in a tile whose largest candidate is `largest`.
inline float scale_of(float largest) { return is_finite(largest) ? largest * float(1.0 / 127) : largest; }

// The wire value of w, and what it stands for; the scale matters for int8 alone.
template <typename V>
inline V encode(float w, float scale) {
  if constexpr (std::is_same_v<V, Int8>) {
    if (!is_finite(scale)) return {int8_t((w > 0.0f) - (w < 0.0f))};
    return {int8_t(scale > 0.0f ? std::clamp(std::nearbyint(w / scale), -127.0f, 127.0f) : 0.0f)};
  } else {
    return saturate<V>(w);
  }
}

template <typename V>
inline float decode(V value, float scale) {
  return std::is_same_v<V, Int8> ? V::load(value) * scale : V::load(value);
}

template <typename T>
inline T read_at(const uint8_t* from, int64_t i) {
  return read_as<T>(from + i * int64_t(sizeof(T)));
}

template <typename T>
inline void write_at(uint8_t* to, int64_t i, T x) {
  write_as(x, to + i * int64_t(sizeof x));
}

// One chunk of a payload.
struct ChunkView {
  uint8_t* bytes;
  const Layout* layout;

  uint8_t* values() const { return bytes + layout->values_offset; }
  uint8_t* counts() const { return bytes + layout->counts_offset; }
  uint8_t* indices() const { return bytes + layout->indices_offset; }
  float scale(int64_t tile) const { return layout->value_dtype == kInt8 ? read_at<float>(bytes, tile) : 1.0f; }
  void set_scale(int64_t tile, float x) const {
    if (layout->value_dtype == kInt8) write_at(bytes, tile, x);
  }
  void set_count(int64_t block, int64_t x) const {
    with_index_bytes(layout->index_bytes, [&](auto type) { write_at(counts(), block, decltype(type)(x)); });
  }
};

// The elements of all segments, one after the other, are split evenly over threads, by tiles: calls `visit(piece number, first tile, last
// tile + 1)` for each piece that this thread's share touches, in parts that lie in one block or, where blocks are smaller, hold at most
// kWholePiece elements. Of a segment in several pieces each has a tile in turn: together these tiles are a run of memory, and stay in cache
// until all of them are done.
template <typename Visit>
inline void for_each_share(const Layout& layout, int64_t thread, int64_t threads, Visit&& visit) {
  const int64_t begin = layout.numel * thread / threads;
  const int64_t end = layout.numel * (thread + 1) / threads;
  const int64_t chunks = layout.payload_chunks;
  const int64_t longest = chunks > 1 ? 1 : (layout.blocks_in_tiles() ? kWholePiece : layout.block) / kTile;
  int64_t before = 0, numel = 0;
  for (int64_t segment = 0; segment < layout.segments && before < end; before += numel, ++segment) {
    int64_t tiles = numel = 0;  // the most of a piece, and the elements of all
    for (int64_t p = segment; p < layout.pieces; p += layout.segments) {
      tiles = std::max(tiles, layout.piece[p].tiles);
      numel += layout.piece[p].numel;
    }
    int64_t first = ceil_div(std::max<int64_t>(begin - before, 0), kTile * chunks);
    const int64_t last = std::min(ceil_div(end - before, kTile * chunks), tiles);
    for (int64_t stop; first < last; first = stop) {
      stop = std::min((first / longest + 1) * longest, last);
      for (int64_t p = segment; p < layout.pieces; p += layout.segments) {
        if (first < layout.piece[p].tiles) visit(p, first, stop);
      }
    }
  }
}

}  // namespace dct
