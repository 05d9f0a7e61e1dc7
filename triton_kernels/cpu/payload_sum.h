// The sum of gathered payloads, tile by tile, so that it is formed in cache.
#pragma once

#include <vector>

#include "gradient.h"
#include "group.h"

namespace dct {

constexpr int64_t kNowhere = kTile;  // the element of a tile's sum that takes what does not lie in the tile
constexpr int64_t kSumSize = kNowhere + 1;

// Reads one payload of one chunk from tile to tile. Of a damaged payload what lies beyond its own bytes or the tile is left out.
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
  static constexpr int64_t kStep = 32;     // entries that are listed at a time
  static constexpr int64_t kAhead = 1024;  // bytes

  template <typename I>
  void enter_block(int64_t block) {
    next_ = end_;
    end_ = std::min(end_ + int64_t(read_at<I>(chunk_.counts(), block)), chunk_.layout->capacity);
  }

  template <typename I>
  void seek_as(const Piece& piece, int64_t tile) {
    const Layout& layout = *chunk_.layout;
    const int64_t offset = tile * kTile;
    const int64_t block = piece.first_block + layout.block_of(offset);
    int64_t before = 0;
    for (int64_t b = 0; b < block; ++b) before += read_at<I>(chunk_.counts(), b);
    next_ = end_ = std::min(before, layout.capacity);
    if (layout.index_of(offset) == 0) return;  // `add` enters the block
    enter_block<I>(block);
    for (int64_t after = end_; next_ < after;) {  // the first entry of this block that does not lie before the tile
      const int64_t middle = next_ + (after - next_) / 2;
      if (int64_t(read_at<I>(chunk_.indices(), middle)) < layout.index_of(offset)) {
        next_ = middle + 1;
      } else {
        after = middle;
      }
    }
  }

  // Where in their tile `count` entries of a block go that starts at `start`. In whole steps, one at least: the last takes in some more.
  template <typename I>
  static void list_in_tile(const uint8_t* indices, int64_t count, int64_t start, uint16_t* in_tile) {
    int64_t i = 0;
    do {
      for (const int64_t stop = i + kStep; i < stop; ++i) {
        in_tile[i] = std::min(uint16_t(uint16_t(start) + read_at<I>(indices, i)), uint16_t(kNowhere));
      }
    } while (i < count);
  }

  // For blocks that lie in a tile. A block has so few entries that a loop over them would end unforeseen each time: where they go is
  // written down first, then all entries of the tile are added in one loop.
  template <typename V, typename I>
  bool add_blocks(const Piece& piece, int64_t tile, float* total) {
    const Layout& layout = *chunk_.layout;
    const float scale = chunk_.scale(piece.first_tile + tile);
    const int64_t numel = piece.tile_numel(tile);
    const int64_t block = piece.first_block + layout.block_of(tile * kTile);
    const int64_t first = end_;
    constexpr int64_t kListed = kTile + kStep;  // at most
    uint16_t in_tile[kListed];
    const uint8_t* indices = chunk_.indices() + first * int64_t(sizeof(I));
    uint8_t last[kListed * sizeof(I)];  // so that no step reads beyond the payload
    if (first + kListed > layout.capacity) {
      const size_t bytes = size_t(std::min(layout.capacity - first, kTile)) * sizeof(I);
      std::memcpy(last, indices, bytes);
      std::memset(last + bytes, 0, kStep * sizeof(I));
      indices = last;
    }
    for (int64_t start = 0, b = block; start < numel; start += layout.block, ++b) {
      const int64_t count = std::min({int64_t(read_at<I>(chunk_.counts(), b)), layout.block, layout.capacity - end_});
      list_in_tile<I>(indices + (end_ - first) * int64_t(sizeof(I)), count, start, in_tile + (end_ - first));
      end_ += count;
    }
    const int64_t entries = end_ - first;
    const uint8_t* const values = chunk_.values() + first * int64_t(sizeof(V));
    // Each of several payloads is left after a few lines, before the hardware has seen what will be read next.
    for (int64_t i = 0; i < entries; i += kStep) {
      prefetch(indices + i * int64_t(sizeof(I)) + kAhead);
      prefetch(values + i * int64_t(sizeof(V)) + kAhead);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < entries; ++i) total[in_tile[i]] += decode(read_at<V>(values, i), scale);
    return entries > 0;
  }

  template <typename V, typename I>
  bool add_as(const Piece& piece, int64_t tile, float* total) {
    const Layout& layout = *chunk_.layout;
    if (layout.blocks_in_tiles()) return add_blocks<V, I>(piece, tile, total);
    const uint8_t* const values = chunk_.values();
    const uint8_t* const indices = chunk_.indices();
    const float scale = chunk_.scale(piece.first_tile + tile);
    const int64_t numel = piece.tile_numel(tile);
    const int64_t offset = tile * kTile;
    const int64_t first = layout.index_of(offset);
    const int64_t last = first + numel;
    if (first == 0) enter_block<I>(piece.first_block + layout.block_of(offset));
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

// Zeros for `count` elements in cache, whole groups. In steps: as one large memset it would be done in a way that is made for memory, and
// misses the cache.
inline void clear_sum(float* total, int64_t count) {
  for (int64_t i = 0; i < count; i += kGroup) std::memset(total + i, 0, kGroup * sizeof(float));
}

// The gathered payloads of a bucket, summed in their order. Of each chunk, tiles are asked for in order, after a `seek` to the first.
class PayloadSum {
 public:
  PayloadSum(const Layout& layout, uint8_t* gathered, int64_t payloads) : chunks_(layout.payload_chunks), next_tiles_(size_t(chunks_), -1) {
    for (int64_t j = 0; j < payloads; ++j) readers_.emplace_back(ChunkView{gathered + j * layout.chunk_bytes, &layout});
  }

  void seek(const Piece& piece, int64_t tile) {
    int64_t& next_tile = next_tiles_[size_t(piece.chunk)];
    if (next_tile == piece.first_tile + tile) return;
    next_tile = piece.first_tile + tile;
    each_reader(piece, [&](PayloadReader& reader) { reader.seek(piece, tile); });
  }

  // Adds the next tile to total[kSumSize], where what lies behind the tile's elements means nothing; whether a payload has entries there.
  bool add_tile(const Piece& piece, int64_t tile, float* total) {
    bool any = false;
    each_reader(piece, [&](PayloadReader& reader) { any |= reader.add(piece, tile, total); });
    ++next_tiles_[size_t(piece.chunk)];
    return any;
  }

 private:
  template <typename Visit>
  void each_reader(const Piece& piece, Visit&& visit) {
    for (size_t j = size_t(piece.chunk); j < readers_.size(); j += size_t(chunks_)) visit(readers_[j]);
  }

  int64_t chunks_;
  std::vector<PayloadReader> readers_;   // of all payloads
  std::vector<int64_t> next_tiles_;      // of each chunk
};

}  // namespace dct
