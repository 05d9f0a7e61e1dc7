// What the kernels of rows share: the format of a packed row, as row_codec.py describes it, and how dense rows are read and written.
#pragma once

#include <algorithm>
#include <vector>

#include "group.h"
#include "stream.h"

namespace dct {

// Dense rows, or values without their indices.
struct Rows {
  void* start;
  int64_t rows;
  int64_t dtype;
};

// As in structs.py.
struct RowFormat {
  int64_t width, capacity, value_bytes, index_bytes, value_dtype;

  int64_t bytes() const { return capacity * (value_bytes + index_bytes); }

  // Calls visit(entry, index) for every entry of a row: the index that its value belongs to, or -1 if the entry is not valid.
  template <typename Visit>
  void each_entry(const uint8_t* row, Visit&& visit) const {
    if (index_bytes == 1) {
      each_entry_of<uint8_t>(row, visit);
    } else {
      each_entry_of<uint16_t>(row, visit);
    }
  }

 private:
  template <typename Index, typename Visit>
  void each_entry_of(const uint8_t* row, Visit&& visit) const {
    const uint8_t* indices = row + capacity * value_bytes;
    const auto at = [&](int64_t entry) { return int64_t(read_as<Index>(indices + entry * int64_t(sizeof(Index)))); };
    visit(0, holds_value(row) && at(0) < width ? at(0) : -1);
    // Indices ascend: only the first can be 0.
    for (int64_t entry = 1; entry < capacity; ++entry) visit(entry, uint64_t(at(entry) - 1) < uint64_t(width - 1) ? at(entry) : -1);
  }

  // Every value dtype is zero iff its bits but the sign are.
  bool holds_value(const uint8_t* value) const {
    int bits = value[value_bytes - 1] & 0x7f;
    for (int64_t b = 0; b + 1 < value_bytes; ++b) bits |= value[b];
    return bits != 0;
  }
};

// Asks for entries of a row to come while one is looked at: all of them in its only pass, or half of them in the pass 0 or 1 of two.
template <typename T>
class Ahead {
 public:
  Ahead(const T* row, int64_t width, int pass, int passes)
      : from_(row + std::max<int64_t>(width, 4096 / int64_t(sizeof(T))) + (pass == 0 ? 0 : width / 2)), halves_(passes - 1) {}

  void ask(int64_t base) const {
    for (int i = 0; i < kGroup >> halves_; i += 64 / int(sizeof(T))) prefetch(from_ + (base >> halves_) + i);
  }

 private:
  const T* from_;
  int halves_;  // how often the passes are halved; a division takes too long
};

// Calls group(base, x) for each group of a row; a last shorter one is filled up with zeros.
template <typename T, typename Group>
inline void each_row_group(const T* row, int64_t width, const Ahead<T>& ahead, Group&& group) {
  for (int64_t base = 0; base < width; base += kGroup) {
    ahead.ask(base);
    const T* x = row + base;
    T last[kGroup];
    if (width - base < kGroup) {
      std::memset(static_cast<void*>(last), 0, sizeof last);
      std::memcpy(static_cast<void*>(last), x, size_t(width - base) * sizeof(T));
      x = last;
    }
    group(base, x);
  }
}

// Of rows that are formed in the first-level cache, then streamed: few enough to wait in the store buffer while the next ones are formed.
constexpr int64_t kTileBytes = 1 << 11;

// Writes rows, some at a time: `make_form()`, called once per thread, returns form(first, count, to), which writes `count` rows from
// `first` on to `to`.
template <typename O, typename MakeForm>
void write_rows(int64_t rows, int64_t width, O* out, int64_t threads, MakeForm&& make_form) {
  const int64_t row_bytes = width * int64_t(sizeof(O));
  const int64_t tile_rows = std::max<int64_t>(kTileBytes / std::max<int64_t>(row_bytes, 1), 1);
  const bool streamed = rows * row_bytes >= kStreamedBytes;
  prefer_huge_pages(out, rows * row_bytes);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
  {
    auto form = make_form();
    // From a cache line's beginning on, or every second vector would lie across two lines.
    std::vector<O> memory(streamed ? size_t(tile_rows * width) + 64 / sizeof(O) : 0);
    O* const tile = reinterpret_cast<O*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += tile_rows) {
      const int64_t count = std::min(tile_rows, rows - first);
      O* to = out + first * width;
      form(first, count, streamed ? tile : to);
      if (streamed) stream_out(to, tile, count * row_bytes);
    }
    stream_fence();
  }
}

}  // namespace dct
