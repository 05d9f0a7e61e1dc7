// select_threshold: the k-th largest magnitude by radix selection, or a mean. The reference in select_threshold.py is the specification.
#include <omp.h>

#include <vector>

#include "gradient.h"

namespace dct {
namespace {

// As in select_threshold.py.
struct Selection {
  int64_t segment, grad_offset, state_offset, numel, stride, rank;
};

enum Method : int64_t { kRank = 0, kMean = 1, kConstant = 2 };

// schedule.is_refresh_step
bool is_refresh_step(int64_t step, int64_t interval, bool geometric, bool overflowed) {
  if (!geometric) return step % interval == 0;
  int64_t power = 1;
  while (power <= step / 2) power *= 2;
  const int64_t gap = std::min(interval, std::max<int64_t>(1, power / 8));
  return overflowed || step % gap == 0;
}

// The sampled elements of one selection, as bits of their magnitudes: integers in the order of the magnitudes.
template <typename G>
struct Magnitudes {
  const G* grad;
  const float* residual;  // or null
  int64_t stride;

  // Calls visit(bits) for samples [first, last).
  template <typename Visit>
  void each(int64_t first, int64_t last, Visit&& visit) const {
    if (residual != nullptr) {
      for (int64_t i = first * stride; i < last * stride; i += stride) visit(bits_of(G::load(grad[i]) + residual[i]) & 0x7fffffffu);
    } else {
      for (int64_t i = first * stride; i < last * stride; i += stride) visit(bits_of(G::load(grad[i])) & 0x7fffffffu);
    }
  }
};

// One digit of the radix selection: among samples whose bits above `shift + width` equal `prefix`, finds the digit of the rank-th
// largest, appends it to the prefix and makes the rank one among those with that digit.
template <typename G>
void select_digit(const Magnitudes<G>& source, int64_t samples, int shift, int width, int threads, uint32_t& prefix, int64_t& rank) {
  const size_t bins = size_t(1) << width;
  const uint32_t digit = uint32_t(bins - 1);
  constexpr size_t kCopies = 4;  // neighbours often share a bin: counting them in different copies keeps the increments independent
  std::vector<int64_t> totals(bins);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint32_t> counts(kCopies * bins);
    const int64_t thread = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    size_t copy = 0;
    source.each(samples * thread / team, samples * (thread + 1) / team, [&](uint32_t bits) {
      if ((bits >> shift) >> width == prefix) {
        ++counts[copy * bins + ((bits >> shift) & digit)];
        copy = (copy + 1) % kCopies;
      }
    });
#pragma omp critical
    for (size_t i = 0; i < counts.size(); ++i) totals[i % bins] += counts[i];
  }
  size_t bin = bins - 1;
  for (; totals[bin] < rank; --bin) rank -= totals[bin];
  prefix = prefix << width | uint32_t(bin);
}

template <typename G>
float rank_threshold(const Magnitudes<G>& source, int64_t samples, int64_t rank, int threads) {
  uint32_t prefix = 0;
  select_digit(source, samples, 20, 11, threads, prefix, rank);
  select_digit(source, samples, 10, 10, threads, prefix, rank);
  select_digit(source, samples, 0, 10, threads, prefix, rank);
  return float_of(prefix);
}

// The mean is a sum of fixed parts, so that it does not depend on the number of threads.
template <typename G>
double mean_magnitude(const Magnitudes<G>& source, int64_t samples, int threads) {
  constexpr int64_t kPart = 16384;
  const int64_t parts = ceil_div(samples, kPart);
  std::vector<double> sums(static_cast<size_t>(parts));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    double lanes[8] = {};
    size_t lane = 0;
    source.each(part * kPart, std::min(samples, (part + 1) * kPart), [&](uint32_t bits) {
      lanes[lane] += double(float_of(bits));
      lane = (lane + 1) % 8;
    });
    for (const double sum : lanes) sums[size_t(part)] += sum;
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total / double(samples);
}

template <typename G>
bool all_finite(const G* grad, const Selection* selections, int64_t count, int threads) {
  bool found = false;
  for (int64_t s = 0; s < count && !found; ++s) {
    const G* start = grad + selections[s].grad_offset;
    const int64_t n = selections[s].numel;
    const int team = std::min(threads, worthwhile_threads(n, threads));
#pragma omp parallel for num_threads(team) reduction(|| : found) if (team > 1)
    for (int64_t thread = 0; thread < team; ++thread) {
      const int64_t first = n * thread / team;
      found = found || any_nonfinite(start + first, n * (thread + 1) / team - first);
    }
  }
  return !found;
}

template <typename G>
void select(const G* grad, const float* residual, float* threshold, const Selection* selections, const std::vector<int64_t>& due, int64_t method,
            double factor, int64_t threads) {
  for (const int64_t s : due) {
    const Selection& part = selections[s];
    const Magnitudes<G> source{grad + part.grad_offset, residual ? residual + part.state_offset : nullptr, part.stride};
    const int64_t samples = ceil_div(part.numel, part.stride);
    const int team = worthwhile_threads(samples, threads);
    if (method == kConstant) {
      threshold[part.segment] = float(factor);
    } else if (method == kMean) {
      threshold[part.segment] = float(mean_magnitude(source, samples, team) * factor);
    } else {
      threshold[part.segment] = rank_threshold(source, samples, part.rank, team);
    }
  }
}

}  // namespace
}  // namespace dct

// `factor`: of the mean (kMean), or the threshold itself (kConstant). `residual` is null without error feedback.
DCT_EXPORT void dct_select_threshold(const void* grad, int64_t grad_dtype, const float* residual, float* threshold, const int64_t* counters,
                                     const dct::Selection* selections, int64_t count, int64_t method, double factor, int64_t interval,
                                     int64_t geometric, int64_t threads) {
  using namespace dct;
  std::vector<int64_t> due;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t* row = counters + 4 * selections[s].segment;
    const bool stale = threshold[selections[s].segment] != float(factor);
    if (method == kConstant ? stale : is_refresh_step(row[0], interval, geometric != 0, row[3] > 0)) due.push_back(s);
  }
  if (due.empty()) return;
  with_dtype(grad_dtype, [&](auto type) {
    using G = decltype(type);
    const G* typed = static_cast<const G*>(grad);
    if (all_finite(typed, selections, count, int(threads))) select(typed, residual, threshold, selections, due, method, factor, threads);
  });
}
