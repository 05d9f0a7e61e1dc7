// threshold_pack: one pass over gradient and residual. The reference in threshold_pack.py is the specification.
#include <omp.h>

#include <atomic>

#include "pack_plan.h"
#include "tile.h"

namespace dct {
namespace {

// What is sent of W, as float32.
inline float sent(float w, int64_t dtype) {
  switch (dtype) {
    case kBFloat16: return BFloat16::load(saturate<BFloat16>(w));
    case kFloat16: return Float16::load(saturate<Float16>(w));
    default: return w;
  }
}

inline void set_value(const ChunkView& chunk, int64_t slot, float w) {
  with_dtype(chunk.layout->value_dtype, [&](auto type) {
    const auto value = saturate<decltype(type)>(w);
    std::memcpy(chunk.bytes + slot * int64_t(sizeof value), &value, sizeof value);
  });
}

// First pass over one run: W goes to the residual, candidates to the list as if all of them could be sent, their numbers to the counts.
// A run whose candidates alone overflow the piece stops listing: `write_window` will go over it again.
template <typename G, bool kFeedback, bool kHeld>
void scan(const Job& job, Worker& worker, Run& run) {
  const Layout& layout = job.layout;
  const Piece& piece = layout.piece[run.piece];
  const ChunkView chunk = job.chunk(piece.chunk);
  const G* grad = static_cast<const G*>(job.grad) + piece.grad_offset;
  float* residual = kFeedback ? job.residual + piece.state_offset : nullptr;
  const float tau = job.threshold[piece.segment];
  bool listing = true;
  alignas(64) float w[kTile];
  alignas(64) float before[kTile];
  for (int64_t b = run.first; b < run.last; ++b) {
    const int64_t end = std::min((b + 1) * layout.block, piece.numel);
    int64_t count = 0;
    for (int64_t start = b * layout.block; start < end; start += kTile) {
      const int n = int(std::min<int64_t>(kTile, end - start));
      float* state = kFeedback ? residual + start : nullptr;
      load_tile<G, kFeedback>(grad + start, state, n, w);
      uint64_t mask = candidates<kHeld>(w, tau);
      if (mask == 0) {
        if (kFeedback) store_tile(w, n, state);
        continue;
      }
      if (kFeedback) {
        std::memcpy(before, state, size_t(n) * sizeof(float));
        store_tile(w, n, state);
      }
      worker.reserve_tile();
      for (; mask != 0; mask &= mask - 1) {
        const int i = __builtin_ctzll(mask);
        const float x = w[i];
        if (kFeedback && !is_finite(x)) {
          worker.infinite.push_back({state + i, before[i], x});
          state[i] = before[i];
        }
        if (count == layout.max_count) {
          ++run.cut;
          continue;
        }
        ++count;
        if (!listing) continue;
        worker.indices[worker.used] = uint16_t(start + i - b * layout.block);
        worker.values[worker.used++] = x;
        if (kFeedback && is_finite(x)) state[i] = x - sent(x, layout.value_dtype);
      }
    }
    chunk.set_count(piece.first_block + b, count);
    run.entries += count;
    if (listing) {
      run.listed = worker.used - run.list_start;
      listing = int64_t(run.listed) <= piece.capacity;
    }
  }
}

// Second pass over a run of a piece that overflowed: undo what the first pass took out of the residual, then send the window.
template <typename G, bool kFeedback, bool kHeld>
void write_window(const Job& job, const Worker& worker, const Run& run, const Window& window, int64_t slot) {
  const Layout& layout = job.layout;
  const Piece& piece = layout.piece[run.piece];
  const ChunkView chunk = job.chunk(piece.chunk);
  const G* grad = static_cast<const G*>(job.grad) + piece.grad_offset;
  float* residual = kFeedback ? job.residual + piece.state_offset : nullptr;
  const float tau = job.threshold[piece.segment];
  if (kFeedback) {
    int64_t b = run.first;
    int64_t in_block = 0;
    for (size_t i = 0; i < run.listed; ++i, ++in_block) {
      for (; in_block == chunk.count(piece.first_block + b); in_block = 0) ++b;
      residual[b * layout.block + worker.indices[run.list_start + i]] = worker.values[run.list_start + i];
    }
    for (const Infinite& entry : worker.infinite) *entry.place = entry.w;
  }
  int64_t rank = run.base;
  slot += window.held_before(rank);
  alignas(64) float w[kTile];
  for (int64_t b = run.first; b < run.last; ++b) {
    const int64_t end = std::min((b + 1) * layout.block, piece.numel);
    const int64_t last_rank = rank + chunk.count(piece.first_block + b);
    int64_t kept = 0;
    for (int64_t start = b * layout.block; start < end && rank < last_rank; start += kTile) {
      const int n = int(std::min<int64_t>(kTile, end - start));
      if constexpr (kFeedback) {
        load_tile<Float32, false>(reinterpret_cast<const Float32*>(residual + start), nullptr, n, w);
      } else {
        load_tile<G, false>(grad + start, nullptr, n, w);
      }
      for (uint64_t mask = candidates<kHeld>(w, tau); mask != 0 && rank < last_rank; mask &= mask - 1, ++rank) {
        if (!window.holds(rank)) continue;
        const int i = __builtin_ctzll(mask);
        set_value(chunk, slot, w[i]);
        chunk.set_index(slot++, start + i - b * layout.block);
        ++kept;
        if (kFeedback) residual[start + i] = w[i] - sent(w[i], layout.value_dtype);
      }
    }
    chunk.set_count(piece.first_block + b, kept);
  }
  for (const Infinite& entry : worker.infinite) *entry.place = entry.before;
}

void write_list(const Job& job, const Worker& worker, const Run& run, int64_t slot) {
  const ChunkView chunk = job.chunk(job.layout.piece[run.piece].chunk);
  const float* w = worker.values.data() + run.list_start;
  const uint16_t* indices = worker.indices.data() + run.list_start;
  with_dtype(job.layout.value_dtype, [&](auto type) {
    using V = decltype(type);
    V* values = reinterpret_cast<V*>(chunk.bytes) + slot;
    for (int64_t i = 0; i < run.entries; ++i) values[i] = saturate<V>(w[i]);
  });
  for (int64_t i = 0; i < run.entries; ++i) chunk.set_index(slot + i, indices[i]);
}

template <typename G>
bool share_nonfinite(const Job& job, int64_t thread, int64_t threads) {
  bool found = false;
  for_each_share(job.layout, thread, threads, [&](int64_t p, int64_t first, int64_t last) {
    const Piece& piece = job.layout.piece[p];
    const int64_t begin = first * job.layout.block;
    const int64_t end = std::min(last * job.layout.block, piece.numel);
    found = found || any_nonfinite(static_cast<const G*>(job.grad) + piece.grad_offset + begin, end - begin);
  });
  return found;
}

template <typename G>
void pack(const Job& job, bool feedback, int threads) {
  const Layout& layout = job.layout;
  std::atomic<bool> held{false};
  std::atomic<int64_t> arrived{0};
  std::vector<Worker*> workers(size_t(threads), nullptr);
  std::vector<Total> totals(size_t(layout.pieces));
  std::vector<int64_t> steps(size_t(layout.segments));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker& worker = worker_of_thread();
    const int64_t thread = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    workers[size_t(thread)] = &worker;
    if (share_nonfinite<G>(job, thread, team)) held = true;
#pragma omp barrier
    const auto first_pass = held ? scan<G, false, true> : feedback ? scan<G, true, false> : scan<G, false, false>;
    const auto second_pass = held ? write_window<G, false, true> : feedback ? write_window<G, true, false> : write_window<G, false, false>;
    for_each_share(layout, thread, team, [&](int64_t p, int64_t first, int64_t last) {
      worker.runs.push_back({p, first, last, 0, 0, 0, worker.used, 0});
      first_pass(job, worker, worker.runs.back());
    });
    if (++arrived == team) settle(job, workers, totals, steps, held);
#pragma omp barrier
    for (const Run& run : worker.runs) {
      const Total& total = totals[size_t(run.piece)];
      const Piece& piece = layout.piece[run.piece];
      if (total.entries <= piece.capacity) {
        write_list(job, worker, run, total.slot + run.base);
      } else {
        const Window window{steps[size_t(piece.segment)] * piece.capacity % total.entries, piece.capacity, total.entries};
        second_pass(job, worker, run, window, total.slot);
      }
    }
    worker.clear();
  }
}

}  // namespace
}  // namespace dct

DCT_EXPORT void dct_threshold_pack(const void* grad, int64_t grad_dtype, float* residual, const float* threshold, int64_t* counters,
                                   const dct::Layout* layout, int64_t feedback, void* payload, int64_t threads) {
  using namespace dct;
  const Job job{*layout, grad, residual, threshold, counters, static_cast<uint8_t*>(payload)};
  with_dtype(grad_dtype, [&](auto type) { pack<decltype(type)>(job, feedback != 0, worthwhile_threads(layout->numel, threads)); });
}
