// The sum of gathered payloads, tile by tile, so that it is formed in cache.
#pragma once

#include <vector>

#include "gradient.h"
#include "group.h"

namespace dct {

// Reads one payload of one chunk from tile to tile. What a damaged payload says beyond its own bytes or the block is left out.
class PayloadReader {
 public:
  explicit PayloadReader(const ChunkView& chunk) : chunk_(chunk) {}

  // Goes to a tile; later calls of `add` go on from there.
  void seek(const Piece& piece, int64_t tile) {
    with_index_bytes(chunk_.layout->index_bytes, [&](auto type) { seek_as<decltype(type)>(piece, tile); });
  }

  // Adds the entries of the next tile; whether there are any.
  bool add(const Piece& piece, int64_t tile, float* total) {
    bool any = false;
    with_value_dtype(chunk_.layout->value_dtype, [&](auto value) {
      with_index_bytes(chunk_.layout->index_bytes, [&](auto index) { any = add_as<decltype(value), decltype(index)>(piece, tile, total); });
    });
    return any;
  }

 private:
  template <typename I>
  void enter_block(int64_t block) {
    next_ = end_;
    end_ = std::min(end_ + int64_t(read_at<I>(chunk_.counts(), block)), chunk_.layout->capacity);
  }

  template <typename I>
  void seek_as(const Piece& piece, int64_t tile) {
    const Layout& layout = *chunk_.layout;
    const int64_t place = tile * kTile;
    const int64_t block = piece.first_block + layout.block_of(place);
    int64_t before = 0;
    for (int64_t b = 0; b < block; ++b) before += read_at<I>(chunk_.counts(), b);
    next_ = end_ = std::min(before, layout.capacity);
    if (layout.index_of(place) == 0) return;  // `add` enters the block
    enter_block<I>(block);
    for (int64_t after = end_; next_ < after;) {  // the first entry of this block that does not lie before the tile
      const int64_t middle = next_ + (after - next_) / 2;
      if (int64_t(read_at<I>(chunk_.indices(), middle)) < layout.index_of(place)) {
        next_ = middle + 1;
      } else {
        after = middle;
      }
    }
  }

  // For blocks that are shorter than a tile. A block has so few entries that a loop over them would end unforeseen each time: where each
  // entry's block starts is written down first, 32 at a time, then all entries of the tile are added in one loop.
  template <typename V, typename I>
  bool add_blocks(const Piece& piece, int64_t tile, float* total) {
    constexpr int64_t kStep = 32;
    const Layout& layout = *chunk_.layout;
    const float scale = chunk_.scale(piece.first_tile + tile);
    const int64_t numel = piece.tile_numel(tile);
    const int64_t block = piece.first_block + layout.block_of(tile * kTile);
    const int64_t first = end_;
    uint16_t starts[kTile + kStep];
    for (int64_t start = 0, b = block; start < numel; start += layout.block, ++b) {
      const int64_t count = std::min(int64_t(read_at<I>(chunk_.counts(), b)), layout.block);
      for (int64_t i = 0; i < count; i += kStep) std::fill_n(starts + (end_ - first) + i, kStep, uint16_t(start));
      end_ += count;
    }
    const int64_t entries = std::min(end_, layout.capacity) - first;
    const uint8_t* const values = chunk_.values();
    const uint8_t* const indices = chunk_.indices();
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t place = starts[i] + int64_t(read_at<I>(indices, first + i));
      if (place < numel) total[place] += decode(read_at<V>(values, first + i), scale);
    }
    return entries > 0;
  }

  template <typename V, typename I>
  bool add_as(const Piece& piece, int64_t tile, float* total) {
    const Layout& layout = *chunk_.layout;
    if (layout.block < kTile) return add_blocks<V, I>(piece, tile, total);
    const uint8_t* const values = chunk_.values();
    const uint8_t* const indices = chunk_.indices();
    const float scale = chunk_.scale(piece.first_tile + tile);
    const int64_t numel = piece.tile_numel(tile);
    const int64_t place = tile * kTile;
    const int64_t first = layout.index_of(place);
    const int64_t last = first + numel;
    if (first == 0) enter_block<I>(piece.first_block + layout.block_of(place));
    const bool any = next_ < end_;
    for (; next_ < end_; ++next_) {
      const int64_t index = read_at<I>(indices, next_);
      if (index >= last) break;
      if (index >= first) total[index - first] += decode(read_at<V>(values, next_), scale);
    }
    return any;
  }

  ChunkView chunk_;
  int64_t next_ = 0;  // entry to read next
  int64_t end_ = 0;   // end of the entries of the block that was entered last
};

// Zeros for a tile in cache. In steps: as one large memset it would be done in a way that is made for memory, and misses the cache.
inline void clear_tile(float* total) {
  for (int64_t i = 0; i < kTile; i += kGroup) std::memset(total + i, 0, kGroup * sizeof(float));
}

// The gathered payloads of a bucket, summed in their order. Tiles are asked for in order, after a `seek` to the first.
class PayloadSum {
 public:
  PayloadSum(const Layout& layout, uint8_t* gathered, int64_t payloads) : layout_(layout), gathered_(gathered), payloads_(payloads) {}

  void seek(const Piece& piece, int64_t tile) {
    if (piece.chunk == chunk_ && piece.first_tile + tile == next_tile_) return;
    chunk_ = piece.chunk;
    next_tile_ = piece.first_tile + tile;
    readers_.clear();
    for (int64_t j = chunk_; j < payloads_; j += layout_.payload_chunks) {
      readers_.emplace_back(ChunkView{gathered_ + j * layout_.chunk_bytes, &layout_});
      readers_.back().seek(piece, tile);
    }
  }

  // Adds the next tile to total[0 .. elements of the tile); whether a payload has entries there.
  bool add_tile(const Piece& piece, int64_t tile, float* total) {
    bool any = false;
    for (PayloadReader& reader : readers_) any |= reader.add(piece, tile, total);
    ++next_tile_;
    return any;
  }

 private:
  const Layout& layout_;
  uint8_t* gathered_;
  int64_t payloads_;
  std::vector<PayloadReader> readers_;
  int64_t chunk_ = -1;
  int64_t next_tile_ = -1;
};

}  // namespace dct
