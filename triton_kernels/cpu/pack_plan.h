// What threshold_pack's passes hand to each other: the candidates that each thread found, and what each piece sends of them.
#pragma once

#include <vector>

#include "gradient.h"
#include "tile.h"

namespace dct {

constexpr size_t kKeptScratch = size_t(1) << 21;  // entries of scratch that a thread keeps for its next call

struct Job {
  const Layout& layout;
  const void* grad;
  float* residual;
  const float* threshold;
  int64_t* counters;
  uint8_t* payload;

  ChunkView chunk(int64_t c) const { return {payload + c * layout.chunk_bytes, &layout}; }
};

// A thread's part of one piece.
struct Run {
  int64_t piece, first, last;      // blocks
  int64_t entries;                 // candidates that a count can express
  int64_t cut;                     // those that it cannot
  size_t listed, list_start;       // the part of `entries` that is in the worker's list
  int64_t base;                    // entries of the piece in the runs before
};

struct Infinite {
  float* place;
  float before;
  float w;
};

struct Worker {
  std::vector<Run> runs;
  std::vector<uint16_t> indices;
  std::vector<float> values;
  std::vector<Infinite> infinite;
  size_t used = 0;

  void reserve_tile() {
    if (used + kTile > indices.size()) {
      const size_t size = std::max<size_t>(2 * indices.size(), 4096);
      indices.resize(size);
      values.resize(size);
    }
  }
  void clear() {
    runs.clear();
    infinite.clear();
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

// The candidates of a piece that are sent when not all fit: `capacity` of `total`, cyclically from `start`.
struct Window {
  int64_t start, capacity, total;

  bool holds(int64_t rank) const { return (rank >= start ? rank - start : rank - start + total) < capacity; }
  int64_t held_before(int64_t rank) const {
    const int64_t wrapped = std::max<int64_t>(start + capacity - total, 0);
    return std::min(rank, wrapped) + std::clamp<int64_t>(rank - start, 0, capacity - wrapped);
  }
};

struct Total {
  int64_t entries = 0, cut = 0, slot = 0;
};

// Between the passes, on the thread that ends the first one last: totals of the pieces, their slots, the counters, and zeros where the payload is not used.
inline void settle(const Job& job, std::vector<Worker*>& workers, std::vector<Total>& totals, std::vector<int64_t>& steps, bool held) {
  const Layout& layout = job.layout;
  for (Worker* worker : workers) {
    if (worker == nullptr) break;  // fewer threads than asked for
    for (Run& run : worker->runs) {
      run.base = totals[size_t(run.piece)].entries;
      totals[size_t(run.piece)].entries += run.entries;
      totals[size_t(run.piece)].cut += run.cut;
    }
  }
  for (int64_t s = 0; s < layout.segments; ++s) {
    int64_t* counters = job.counters + 4 * s;
    steps[size_t(s)] = counters[0];
    counters[0] += held ? 0 : 1;
    counters[3] = 0;
  }
  const int64_t value_bytes = layout.value_dtype == kFloat32 ? 4 : 2;
  int64_t p = 0;
  for (int64_t c = 0; c < layout.payload_chunks; ++c) {
    int64_t slot = 0, blocks = 0;
    for (; p < layout.pieces && layout.piece[p].chunk == c; ++p) {
      const Piece& piece = layout.piece[p];
      Total& total = totals[size_t(p)];
      const int64_t kept = std::min(total.entries, piece.capacity);
      total.slot = slot;
      slot += kept;
      blocks = piece.first_block + piece.blocks;
      if (held) continue;
      int64_t* counters = job.counters + 4 * piece.segment;
      const int64_t overflow = total.entries + total.cut - kept;
      counters[1] += kept;
      counters[2] += overflow;
      counters[3] += overflow;
    }
    uint8_t* bytes = job.chunk(c).bytes;
    const auto zero = [bytes](int64_t from, int64_t to) { std::memset(bytes + from, 0, size_t(to - from)); };
    zero(slot * value_bytes, layout.counts_offset);
    zero(layout.counts_offset + blocks * layout.index_bytes, layout.indices_offset);
    zero(layout.indices_offset + slot * layout.index_bytes, layout.chunk_bytes);
  }
}

}  // namespace dct
