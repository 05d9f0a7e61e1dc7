// What threshold_pack's passes hand to each other: the candidates that each thread found, and what each piece sends of them.
#pragma once

#include <vector>

#include "gradient_kernels.h"
#include "group.h"

namespace dct {

constexpr size_t kKeptScratch = size_t(1) << 23;  // entries of scratch that a thread keeps for its next call

struct Job {
  const Layout& layout;
  const State& state;
  uint8_t* payload;

  ChunkView chunk(int64_t c) const { return {payload + c * layout.chunk_bytes, &layout}; }
};

// A thread's part of one piece.
struct Run {
  int64_t piece, first, last;  // tiles
  int64_t entries;             // candidates that a count can express
  int64_t cut;                 // those that it cannot
  int64_t base;                // entries of the piece in the runs before
  size_t list_start;           // in the worker's list, which holds all of `entries` unless they alone overflow the piece
  size_t tiles_start;          // in the worker's counts
};

// What a thread has listed of the candidates: how many of each tile, their indices in it, and their W.
struct Worker {
  std::vector<Run> runs;
  std::vector<uint16_t> counts;
  std::vector<uint16_t> indices;
  std::vector<float> values;
  size_t used = 0;  // of indices and values

  void start_run(int64_t piece, int64_t first, int64_t last) { runs.push_back({piece, first, last, 0, 0, 0, used, counts.size()}); }
  void reserve_tile() {
    if (used + kTile + kGroup > indices.size()) {  // groups are listed in steps of kGroup
      const size_t size = 2 * indices.size() + kTile + kGroup;
      indices.resize(size);
      values.resize(size);
    }
  }
  void list_group(uint64_t mask, uint32_t first, const float* w) {
    list_elements(mask, w, values.data() + used);
    used += size_t(list_bits(mask, first, indices.data() + used));
  }
  // Calls visit(tile, candidates, their indices, their W) for the tiles of a run.
  template <typename Visit>
  void each_tile(const Run& run, Visit&& visit) const {
    size_t start = run.list_start;
    for (int64_t tile = run.first; tile < run.last; ++tile) {
      const size_t n = counts[run.tiles_start + size_t(tile - run.first)];
      visit(tile, int64_t(n), indices.data() + start, values.data() + start);
      start += n;
    }
  }
  void clear() {
    runs.clear();
    counts.clear();
    used = 0;
    if (indices.size() > kKeptScratch) {
      indices = {};
      values = {};
    }
  }
};

// Scratch lives as long as its thread: a call in steady state allocates nothing large.
inline Worker& worker_of_thread() {
  static thread_local Worker worker;
  return worker;
}

// The candidates of a piece that are sent: `capacity` of `total`, cyclically from `start`.
struct Window {
  int64_t start, capacity, total;

  static Window at_step(int64_t step, int64_t capacity, int64_t total) {
    if (total <= capacity) return {0, total, total};
    return {int64_t(static_cast<unsigned __int128>(step) * uint64_t(capacity) % uint64_t(total)), capacity, total};
  }
  bool holds_all() const { return capacity == total; }
  bool holds(int64_t rank) const { return (rank >= start ? rank - start : rank - start + total) < capacity; }
  int64_t held_before(int64_t rank) const {
    const int64_t wrapped = std::max<int64_t>(start + capacity - total, 0);
    return std::min(rank, wrapped) + std::clamp<int64_t>(rank - start, 0, capacity - wrapped);
  }
};

struct Total {
  int64_t entries = 0, cut = 0;
  int64_t slot = 0;  // of the piece's first entry in its chunk
  Window window{};
};

// Bytes [from, to), of which an empty payload has none.
inline void zero(uint8_t* bytes, int64_t from, int64_t to) {
  if (from < to) std::memset(bytes + from, 0, size_t(to - from));
}

// The entries of pieces whose blocks are larger than tiles; runs lie in one block.
inline void set_large_counts(const Job& job, const std::vector<Worker*>& workers, const std::vector<Total>& totals) {
  const Layout& layout = job.layout;
  for (int64_t c = 0; c < layout.payload_chunks; ++c) zero(job.chunk(c).bytes, layout.counts_offset, layout.indices_offset);
  for (const Worker* worker : workers) {
    for (const Run& run : worker->runs) {
      const Piece& piece = layout.piece[run.piece];
      const Window& window = totals[size_t(run.piece)].window;
      const int64_t kept = window.held_before(run.base + run.entries) - window.held_before(run.base);
      const ChunkView chunk = job.chunk(piece.chunk);
      const int64_t block = piece.first_block + layout.block_of(run.first * kTile);
      chunk.set_count(block, int64_t(read_at<uint32_t>(chunk.counts(), block)) + kept);
    }
  }
}

// The totals of the pieces, and where their entries and those of the runs go.
inline void set_windows(const Job& job, const std::vector<Worker*>& workers, std::vector<Total>& totals) {
  const Layout& layout = job.layout;
  for (Worker* worker : workers) {
    for (Run& run : worker->runs) {
      Total& total = totals[size_t(run.piece)];
      run.base = total.entries;
      total.entries += run.entries;
      total.cut += run.cut;
    }
  }
  int64_t chunk = -1, slot = 0;
  for (int64_t p = 0; p < layout.pieces; ++p) {
    const Piece& piece = layout.piece[p];
    Total& total = totals[size_t(p)];
    total.window = Window::at_step(job.state.counters[kCounters * piece.segment], piece.capacity, total.entries);
    if (piece.chunk != chunk) slot = 0;
    chunk = piece.chunk;
    total.slot = slot;
    slot += total.window.capacity;
  }
}

inline void count_step(const Job& job, const std::vector<Total>& totals) {
  for (int64_t s = 0; s < job.layout.segments; ++s) {
    job.state.counters[kCounters * s] += 1;
    job.state.counters[kCounters * s + 3] = 0;
  }
  for (int64_t p = 0; p < job.layout.pieces; ++p) {
    const Total& total = totals[size_t(p)];
    const int64_t overflow = total.entries + total.cut - total.window.capacity;
    int64_t* counters = job.state.counters + kCounters * job.layout.piece[p].segment;
    counters[1] += total.window.capacity;
    counters[2] += overflow;
    counters[3] += overflow;
    counters[4] += total.window.capacity;
  }
}

// Zeros where a payload is not used.
inline void clear_unused(const Job& job, const std::vector<Total>& totals) {
  const Layout& layout = job.layout;
  int64_t value_bytes = 0;
  with_value_dtype(layout.value_dtype, [&](auto type) { value_bytes = sizeof type; });
  int64_t p = 0;
  for (int64_t c = 0; c < layout.payload_chunks; ++c) {
    int64_t entries = 0, blocks = 0, tiles = 0;
    for (; p < layout.pieces && layout.piece[p].chunk == c; ++p) {
      entries = totals[size_t(p)].slot + totals[size_t(p)].window.capacity;
      blocks = layout.piece[p].first_block + layout.piece[p].blocks;
      tiles = layout.piece[p].first_tile + layout.piece[p].tiles;
    }
    uint8_t* bytes = job.chunk(c).bytes;
    zero(bytes, tiles * int64_t(sizeof(float)), layout.values_offset);
    zero(bytes, layout.values_offset + entries * value_bytes, layout.counts_offset);
    zero(bytes, layout.counts_offset + blocks * layout.index_bytes, layout.indices_offset);
    zero(bytes, layout.indices_offset + entries * layout.index_bytes, layout.chunk_bytes);
  }
}

// Between the passes, on the thread that ends the first one last. A held step counts nothing.
inline void settle(const Job& job, std::vector<Worker*>& workers, std::vector<Total>& totals, bool held) {
  while (workers.back() == nullptr) workers.pop_back();  // fewer threads than asked for
  set_windows(job, workers, totals);
  if (!job.layout.blocks_in_tiles()) set_large_counts(job, workers, totals);
  for (int64_t s = 0; s < job.layout.segments; ++s) job.state.counters[kCounters * s + 4] = 0;
  if (!held) count_step(job, totals);
  clear_unused(job, totals);
}

}  // namespace dct
