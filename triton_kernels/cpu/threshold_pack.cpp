// threshold_pack: one pass over gradient and residual. The reference in threshold_pack.py is the specification.
#include <omp.h>

#include <atomic>

#include "group.h"
#include "pack_plan.h"
#include "payload_sum.h"

namespace dct {
namespace {

// Where the passes get the gradient from: `seek` to a tile of a piece, then `take` that tile and those that follow. `at` an element of it
// the rest of its group lies behind it.
template <typename G>
struct MemorySource {
  using Element = G;
  const G* grad;
  const G* segment = nullptr;

  void seek(const Piece& piece, int64_t) { segment = grad + piece.grad_offset; }
  void take(const Piece&, int64_t) {}
  const G* at(int64_t, int64_t place) const { return segment + place; }
};

struct SumSource {
  using Element = Float32;
  PayloadSum sum;
  alignas(64) Float32 total[kSumSize];

  void seek(const Piece& piece, int64_t tile) { sum.seek(piece, tile); }
  void take(const Piece& piece, int64_t tile) {
    clear_sum(&total[0].raw, kTile);
    sum.add_tile(piece, tile, &total[0].raw);
  }
  const Float32* at(int64_t element, int64_t) const { return total + element; }
};

// What a pass needs to know of the run that it goes over.
template <bool kFeedback>
struct RunView {
  const Layout& layout;
  const Piece& piece;
  ChunkView chunk;
  float tau;

  RunView(const Job& job, const Run& run, bool held)
      : layout(job.layout), piece(layout.piece[run.piece]), chunk(job.chunk(piece.chunk)), tau(job.state.threshold[piece.segment]),
        residual_(job.state.residual) {
    if (held || tau != tau) tau = kInfinity;  // a threshold that is NaN is reached by nothing
  }
  // Of the element at a place of the piece's segment; null without error feedback.
  float* state(int64_t place) const { return kFeedback ? residual_ + piece.state_offset + place : nullptr; }

 private:
  float* residual_;
};

// Calls visit(first element, last element + 1) for each part of a tile that lies in one block, and stores the count that it returns.
template <typename Visit>
inline void each_block(const Layout& layout, const Piece& piece, const ChunkView& chunk, int64_t tile, Visit&& visit) {
  const int64_t numel = piece.tile_numel(tile);
  if (!layout.blocks_in_tiles()) {
    visit(0, numel);  // `settle` sets these counts
    return;
  }
  for (int64_t start = 0; start < numel; start += layout.block) {
    const int64_t count = visit(start, std::min(start + layout.block, numel));
    chunk.set_count(piece.first_block + layout.block_of(tile * kTile + start), count);
  }
}

constexpr int64_t kAhead = 8 * kUnit;

// Asks for the group at an element that comes soon, into the first-level cache: into the second one only, nothing was gained.
template <bool kFeedback, typename Source>
inline void prefetch_group(const Source& source, const RunView<kFeedback>& at, const Places& places, int64_t element) {
  const int64_t place = places.of(element);
  const auto* grad = source.at(element, place);
  for (int64_t i = 0; i < kGroup; i += 64 / int64_t(sizeof *grad)) __builtin_prefetch(grad + i, 0, 3);
  for (int64_t i = 0; kFeedback && i < kGroup; i += 16) __builtin_prefetch(at.state(place) + i, 0, 3);
}

// W of a group goes to the residual, where it is finite; where one is not it sets `held`. Returns the candidates.
template <bool kFeedback, typename G>
inline uint64_t take_group(const G* grad, float* state, int n, float tau, float* w, bool& held) {
  load_group<kFeedback>(grad, state, n, w);
  const uint64_t nonfinite = reaching(w, kInfinity);
  if (nonfinite != 0) {
    held = true;
    each_bit(nonfinite, [&](int i) { w[i] = kFeedback ? state[i] : 0.0f; });
  }
  if (kFeedback) store_group(w, n, state);
  return reaching(w, tau) & ~nonfinite;
}

// What is sent of the candidates of a tile, listed from `first` on, goes out of the residual.
inline void take_listed(const Layout& layout, const Worker& worker, size_t first, float scale, const Places& places, float* state) {
  with_value_dtype(layout.value_dtype, [&](auto type) {
    for (size_t start = first; start < worker.used; start += kGroup) {
      const uint16_t* indices = worker.indices.data() + start;
      const float* w = worker.values.data() + start;
      float rest[kGroup];
      for (int i = 0; i < kGroup; ++i) rest[i] = w[i] - decode(encode<decltype(type)>(w[i], scale), scale);  // of whole groups: by vectors
      const size_t n = std::min<size_t>(kGroup, worker.used - start);
      for (size_t i = 0; i < n; ++i) state[places.of(indices[i])] = rest[i];
    }
  });
}

// First pass over a run: W goes to the residual, candidates to the list as if all of them could be sent, their numbers to the counts. A
// run whose candidates alone overflow the piece stops listing: `write_window` will go over it again. Whether a W is not finite.
template <bool kFeedback, typename Source>
bool scan(const Job& job, Source& source, Worker& worker, Run& run) {
  const RunView<kFeedback> at(job, run, false);
  const Layout& layout = job.layout;
  bool held = false;
  bool listing = true;
  const bool scaled = layout.value_dtype == kInt8;
  alignas(64) float w[kGroup];
  source.seek(at.piece, run.first);
  for (int64_t tile = run.first; tile < run.last; ++tile) {
    const Places places(layout, at.piece, tile);
    source.take(at.piece, tile);
    const size_t first_listed = worker.used;
    Largest<float> largest;
    worker.reserve_tile();
    each_block(layout, at.piece, at.chunk, tile, [&](int64_t start, int64_t end) {
      int64_t count = 0;
      for (int64_t i = start; i < end; i += kGroup) {
        const int n = int(std::min<int64_t>(kGroup, end - i));
        const int64_t place = places.of(i);
        if (places.scattered()) prefetch_group(source, at, places, i + kAhead);
        const uint64_t mask = take_group<kFeedback>(source.at(i, place), at.state(place), n, at.tau, w, held);
        if (scaled) largest.add(w);
        const uint64_t counted = lowest_bits(mask, layout.max_count - count);
        run.cut += bit_count(mask ^ counted);
        count += bit_count(counted);
        if (listing) worker.list_group(counted, uint32_t(i), w);
      }
      run.entries += count;
      return count;
    });
    const float most = float_of(largest.bits());  // a candidate's, where the tile has one
    const float scale = most >= at.tau ? scale_of(most) : 0.0f;
    at.chunk.set_scale(at.piece.first_tile + tile, scale);
    if (kFeedback) take_listed(layout, worker, first_listed, scale, places, at.state(0));
    worker.counts.push_back(uint16_t(worker.used - first_listed));
    listing = int64_t(worker.used - run.list_start) <= at.piece.capacity;
  }
  return held;
}

// Puts back into the residual what the first pass took out of it.
void restore(const Job& job, const Worker& worker, const Run& run) {
  const Piece& piece = job.layout.piece[run.piece];
  float* residual = job.state.residual + piece.state_offset;
  worker.each_tile(run, [&](int64_t tile, int64_t n, const uint16_t* indices, const float* w) {
    const Places places(job.layout, piece, tile);
    for (int64_t i = 0; i < n; ++i) residual[places.of(indices[i])] = w[i];
  });
}

// First pass of a held step, over what `scan` and `restore` left: counts what is still not finite when the gradient is added again.
template <bool kFeedback, typename Source>
void recount(const Job& job, Source& source, Run& run) {
  const RunView<kFeedback> at(job, run, true);
  alignas(64) float w[kGroup];
  run.entries = 0;
  source.seek(at.piece, run.first);
  for (int64_t tile = run.first; tile < run.last; ++tile) {
    const Places places(job.layout, at.piece, tile);
    source.take(at.piece, tile);
    bool any = false;
    each_block(job.layout, at.piece, at.chunk, tile, [&](int64_t start, int64_t end) {
      int64_t count = 0;
      for (int64_t i = start; i < end; i += kGroup) {
        const int64_t place = places.of(i);
        load_group<kFeedback>(source.at(i, place), at.state(place), int(std::min<int64_t>(kGroup, end - i)), w);
        count += bit_count(reaching(w, at.tau));
      }
      any |= count > 0;
      count = std::min(count, job.layout.max_count);
      run.entries += count;
      return count;
    });
    at.chunk.set_scale(at.piece.first_tile + tile, any ? kInfinity : 0.0f);
  }
}

// Second pass over a run that is not listed as a whole: sends the window's part of its candidates and takes that out of the residual.
// In a held step what is not sent loses the gradient that `scan` has added.
template <bool kFeedback, bool kHeld, typename Source>
void write_window(const Job& job, Source& source, const Run& run, const Window& window, int64_t slot) {
  constexpr bool kReadsGradient = kHeld || !kFeedback;
  const RunView<kFeedback> at(job, run, kHeld);
  const Layout& layout = job.layout;
  int64_t rank = run.base;
  const int64_t stop = rank + run.entries;  // the sum of a damaged payload may have more candidates when it is formed again
  slot += window.held_before(rank);
  alignas(64) float w[kGroup];
  if (kReadsGradient) source.seek(at.piece, run.first);
  for (int64_t tile = run.first; tile < run.last; ++tile) {
    const Places places(layout, at.piece, tile);
    if (kReadsGradient) source.take(at.piece, tile);
    const float scale = at.chunk.scale(at.piece.first_tile + tile);
    each_block(layout, at.piece, at.chunk, tile, [&](int64_t start, int64_t end) {
      int64_t count = 0, kept = 0;
      for (int64_t i = start; i < end; i += kGroup) {
        const int n = int(std::min<int64_t>(kGroup, end - i));
        const int64_t place = places.of(i);
        const auto* grad = source.at(i, place);
        float* state = at.state(place);
        if constexpr (kReadsGradient) {
          load_group<kFeedback>(grad, state, n, w);
        } else {
          load_group<false>(reinterpret_cast<const Float32*>(state), nullptr, n, w);
        }
        if constexpr (kHeld && kFeedback) {
          for (int k = 0; k < n; ++k) state[k] = is_finite(w[k]) ? state[k] - Source::Element::load(grad[k]) : state[k];
        }
        const uint64_t counted = lowest_bits(reaching(w, at.tau), layout.max_count - count);
        count += bit_count(counted);
        each_bit(counted, [&](int bit) {
          if (rank == stop || !window.holds(rank++)) return;
          with_value_dtype(layout.value_dtype, [&](auto type) {
            const auto value = encode<decltype(type)>(w[bit], scale);
            write_at(at.chunk.values(), slot, value);
            if (kFeedback && !kHeld) state[bit] = w[bit] - decode(value, scale);
          });
          with_index_bytes(layout.index_bytes, [&](auto type) {
            write_at(at.chunk.indices(), slot, decltype(type)(layout.index_of(tile * kTile + i + bit)));
          });
          ++slot;
          ++kept;
        });
      }
      return kept;
    });
  }
}

// Writes make(0), ..., make(n - 1). Whole groups are made, by vectors, in a buffer of their own: what follows in `to` may be another
// thread's.
template <typename T, typename Make>
inline void write_groups(uint8_t* to, int64_t n, Make&& make) {
  T made[kGroup];
  for (int64_t start = 0; start < n; start += kGroup) {
    for (int64_t i = 0; i < kGroup; ++i) made[i] = make(start + i);
    std::memcpy(to + start * int64_t(sizeof(T)), made, size_t(std::min<int64_t>(kGroup, n - start)) * sizeof(T));
  }
}

// Second pass over a run that is listed and sent as a whole.
template <typename V, typename I>
void write_list(const Job& job, const Worker& worker, const Run& run, int64_t slot) {
  const Piece& piece = job.layout.piece[run.piece];
  const ChunkView chunk = job.chunk(piece.chunk);
  const uint32_t last_index = uint32_t(job.layout.block - 1);
  worker.each_tile(run, [&](int64_t tile, int64_t n, const uint16_t* indices, const float* w) {
    const float scale = chunk.scale(piece.first_tile + tile);
    const uint32_t first = uint32_t(tile * kTile);
    write_groups<V>(chunk.values() + slot * int64_t(sizeof(V)), n, [&](int64_t i) { return encode<V>(w[i], scale); });
    write_groups<I>(chunk.indices() + slot * int64_t(sizeof(I)), n, [&](int64_t i) { return I((first + indices[i]) & last_index); });
    slot += n;
  });
}

template <bool kFeedback, typename Source>
void pack(const Job& job, const Source& gradient, int threads) {
  const Layout& layout = job.layout;
  std::atomic<bool> held{false};
  std::atomic<int64_t> arrived{0};
  std::vector<Worker*> workers(size_t(threads), nullptr);
  std::vector<Total> totals(size_t(layout.pieces));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Source source = gradient;
    Worker& worker = worker_of_thread();
    const int64_t thread = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    workers[size_t(thread)] = &worker;
    for_each_share(layout, thread, team, [&](int64_t p, int64_t first, int64_t last) {
      worker.start_run(p, first, last);
      if (scan<kFeedback>(job, source, worker, worker.runs.back())) held = true;
    });
#pragma omp barrier
    for (Run& run : worker.runs) {
      if (!held) break;
      if (kFeedback) restore(job, worker, run);
      recount<kFeedback>(job, source, run);
    }
    if (++arrived == team) settle(job, workers, totals, held);
#pragma omp barrier
    for (const Run& run : worker.runs) {
      const Total& total = totals[size_t(run.piece)];
      if (held) {
        write_window<kFeedback, true>(job, source, run, total.window, total.slot);
      } else if (total.window.holds_all()) {
        with_value_dtype(layout.value_dtype, [&](auto value) {
          with_index_bytes(layout.index_bytes,
                           [&](auto index) { write_list<decltype(value), decltype(index)>(job, worker, run, total.slot + run.base); });
        });
      } else {
        if (kFeedback) restore(job, worker, run);
        write_window<kFeedback, false>(job, source, run, total.window, total.slot);
      }
    }
    worker.clear();
  }
}

template <typename Source>
void pack(const Job& job, const Source& gradient, int64_t threads) {
  const int team = worthwhile_threads(job.layout.numel, threads);
  if (job.state.residual != nullptr) {
    pack<true>(job, gradient, team);
  } else {
    pack<false>(job, gradient, team);
  }
}

}  // namespace

void threshold_pack(const Layout& layout, const Bucket& grad, const State& state, uint8_t* payload, int64_t threads) {
  with_dtype(grad.dtype, [&](auto type) {
    using G = decltype(type);
    pack(Job{layout, state, payload}, MemorySource<G>{static_cast<const G*>(grad.start)}, threads);
  });
}

void threshold_pack(const Layout& layout, const Gathered& gathered, const State& state, uint8_t* payload, int64_t threads) {
  pack(Job{layout, state, payload}, SumSource{PayloadSum(layout, gathered.bytes, gathered.payloads), {}}, threads);
}

}  // namespace dct

DCT_EXPORT void dct_threshold_pack(const dct::Layout* layout, const dct::Bucket* grad, const dct::State* state, uint8_t* payload,
                                   int64_t threads) {
  dct::threshold_pack(*layout, *grad, *state, payload, threads);
}
