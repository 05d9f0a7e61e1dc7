// select_threshold: the k-th largest magnitude, or a mean. The reference in select_threshold.py is the specification.
#include <omp.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "gradient_kernels.h"
#include "group.h"

namespace dct {
namespace {

constexpr int64_t kFewest = 4;  // schedule.FEWEST

// What is not finite has magnitude bits of kInfinityBits or above.
constexpr uint32_t kInfinityBits = 0x7f800000u;

// schedule.is_refresh_step
bool is_refresh_step(int64_t step, int64_t interval, bool geometric, bool overflowed) {
  if (!geometric) return step % interval == 0;
  int64_t power = 1;
  while (power <= step / 2) power *= 2;
  const int64_t gap = std::min(interval, std::max<int64_t>(1, power / 8));
  return overflowed || step % gap == 0;
}

bool is_due(const Selecting& selecting, const State& state, int64_t s) {
  const int64_t* counters = state.counters + kCounters * selecting.regions[s].segment;
  const bool overflowed = counters[3] > (selecting.hold != 0 ? counters[4] : 0);
  return selecting.method == kConstant || is_refresh_step(counters[0], selecting.interval, selecting.geometric != 0, overflowed);
}

// schedule.held_threshold
float held_threshold(float threshold, int64_t candidates, const Region& region) {
  if (candidates == 0 || region.target < kFewest) return threshold;
  const int64_t factor = region.numel - region.target + std::min(candidates, 2 * region.target);
  return float(double(threshold) * double(factor) / double(region.numel));
}

constexpr int64_t kSampleGroup = 16;  // select_threshold.SAMPLE_GROUP

// The elements of one region that are looked at: every `stride`-th of the groups of kSampleGroup; the last may be shorter.
template <typename G>
struct Samples {
  const G* grad;
  const float* residual;  // or null
  int64_t numel, stride;

  int64_t count() const {
    const int64_t groups = numel / (stride * kSampleGroup);
    return groups * kSampleGroup + std::min(numel - groups * stride * kSampleGroup, kSampleGroup);
  }
  // Where the share of one of `parts` threads begins: a multiple of kGroup, or the end.
  int64_t share(int64_t part, int64_t parts) const {
    return std::min(ceil_div(count(), kGroup) * part / parts * kGroup, count());
  }
  float at(int64_t i) const {
    const int64_t place = place_of(i);
    return residual != nullptr ? G::load(grad[place]) + residual[place] : G::load(grad[place]);
  }

  // Calls visit(w) for the samples [first, last) in groups, from a multiple of kGroup on: float w[kGroup], filled up with zeros.
  template <typename Visit>
  void each_group(int64_t first, int64_t last, Visit&& visit) const {
    alignas(64) float w[kGroup];
    for (int64_t i = first; i < last; i += kGroup) {
      const int n = int(std::min<int64_t>(kGroup, last - i));
      if (residual != nullptr) {
        load<true>(i, n, w);
      } else {
        load<false>(i, n, w);
      }
      visit(w);
    }
  }

 private:
  int64_t place_of(int64_t i) const { return i / kSampleGroup * (kSampleGroup * stride) + i % kSampleGroup; }

  template <bool kAdd>
  void load(int64_t first, int n, float* w) const {
    if (stride == 1) return load_group<kAdd>(grad + first, residual + (kAdd ? first : 0), n, w);
    constexpr int64_t kAhead = 256;  // samples: the hardware does not foresee them where others lie between
    std::fill_n(w + n, kGroup - n, 0.0f);
    for (int64_t start = 0; start < n; start += kSampleGroup) {
      const int64_t place = place_of(first + start), next = place_of(first + start + kAhead);
      prefetch(grad + next);
      if (kAdd) prefetch(residual + next);
      const int64_t count = std::min<int64_t>(kSampleGroup, n - start);
      for (int64_t k = 0; k < count; ++k) w[start + k] = kAdd ? G::load(grad[place + k]) + residual[place + k] : G::load(grad[place + k]);
    }
  }
};

// One digit of a radix selection: among samples whose bits above `shift + width` equal `prefix`, finds the digit of the rank-th largest,
// appends it to the prefix and makes the rank one among those with that digit. False if a sample is not finite.
template <typename G>
bool select_digit(const Samples<G>& samples, int shift, int width, int threads, uint32_t& prefix, int64_t& rank) {
  const size_t bins = size_t(1) << width;
  const uint32_t digit = uint32_t(bins - 1);
  constexpr size_t kCopies = 4;  // neighbours often share a bin: counting them in different copies keeps the increments independent
  std::vector<int64_t> totals(bins);
  std::atomic<bool> finite{true};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint32_t> counts(kCopies * bins);
    const int64_t thread = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    Largest<float> largest;
    samples.each_group(samples.share(thread, team), samples.share(thread + 1, team), [&](const float* w) {
      largest.add(w);
      for (size_t i = 0; i < kGroup; ++i) {
        const uint32_t bits = magnitude_bits(w[i]);
        if ((bits >> shift) >> width == prefix) ++counts[i % kCopies * bins + ((bits >> shift) & digit)];
      }
    });
    if (largest.bits() >= kInfinityBits) finite = false;
#pragma omp critical
    for (size_t i = 0; i < counts.size(); ++i) totals[i % bins] += counts[i];
  }
  if (!finite) return false;
  size_t bin = bins - 1;
  for (; totals[bin] < rank; --bin) rank -= totals[bin];  // the zeros that fill up groups are the smallest: they move no larger one
  prefix = prefix << width | uint32_t(bin);
  return true;
}

// In three passes. Nothing if a sample is not finite.
template <typename G>
std::optional<float> rank_by_digits(const Samples<G>& samples, int64_t rank, int threads) {
  uint32_t prefix = 0;
  const bool found = select_digit(samples, 20, 11, threads, prefix, rank) && select_digit(samples, 10, 10, threads, prefix, rank) &&
                     select_digit(samples, 0, 10, threads, prefix, rank);
  return found ? std::optional<float>(float_of(prefix)) : std::nullopt;
}

// Bits low <= x < high, between which the rank-th largest probably is.
struct Bracket {
  uint32_t low, high;
};

constexpr int64_t kBracketedCount = 1 << 15;  // samples from which on a bracket is worthwhile
constexpr int64_t kFewestProbes = 1 << 11, kMostProbes = 1 << 13;

// Found from every n-th sample; six standard deviations of the rank wide.
template <typename G>
Bracket guess_bracket(const Samples<G>& samples, int64_t rank, int threads) {
  const int64_t all = samples.count();
  const int64_t step = std::max<int64_t>(all / std::clamp(all >> 10, kFewestProbes, kMostProbes), 16) | 1;
  std::vector<uint32_t> probes(size_t(ceil_div(all - step / 2, step)));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (size_t i = 0; i < probes.size(); ++i) probes[i] = magnitude_bits(samples.at(step / 2 + int64_t(i) * step));
  const double count = double(probes.size());
  const double fraction = double(rank) / double(all);
  const int64_t margin = int64_t(3 * std::sqrt(count * fraction * (1 - fraction))) + 2;
  const int64_t middle = int64_t(count * fraction);
  const auto probe = [&](int64_t place) {
    std::nth_element(probes.begin(), probes.begin() + place, probes.end(), std::greater<>());
    return probes[size_t(place)];
  };
  const uint32_t low = middle + margin < int64_t(probes.size()) ? probe(middle + margin) : 0;
  return {std::max(low, 1u), middle >= margin ? probe(middle - margin) + 1 : kInfinityBits};
}

// The samples in a bracket that one thread met, and how many it met above.
struct Listed {
  std::unique_ptr<float[]> samples;
  int64_t count = 0, above = 0;
};

// Lists the samples of [first, last) that lie in the bracket.
template <typename G>
void list_bracket(const Samples<G>& samples, int64_t first, int64_t last, const Bracket& bracket, Listed& listed, Largest<float>& largest) {
  samples.each_group(first, last, [&](const float* w) {
    largest.add(w);
    const uint64_t larger = reaching_key<kGroup>(w, int32_t(bracket.high));
    const uint64_t between = reaching_key<kGroup>(w, int32_t(bracket.low)) & ~larger;
    listed.above += bit_count(larger);
    list_elements(between, w, listed.samples.get() + listed.count);
    listed.count += bit_count(between);
  });
}

// The leading digit of bits in a bracket: few share one.
struct Digits {
  static constexpr size_t kBins = 1 << 11;
  uint32_t low;
  int shift = 0;

  explicit Digits(const Bracket& bracket) : low(bracket.low) {
    while ((bracket.high - bracket.low) >> shift >= kBins) ++shift;
  }
  size_t of(float sample) const { return (magnitude_bits(sample) - low) >> shift; }
};

// The sample at `place` of all that are listed, the largest being at 0: found among those with the same digit. `counts` says how many
// have each.
float nth_largest(const std::vector<Listed>& lists, const std::vector<int64_t>& counts, const Digits& digits, int64_t place) {
  size_t bin = Digits::kBins - 1;
  for (; counts[bin] <= place; --bin) place -= counts[bin];
  std::vector<uint32_t> same(static_cast<size_t>(counts[bin]));
  std::atomic<size_t> found{0};
#pragma omp parallel for num_threads(lists.size()) if (lists.size() > 1)
  for (size_t thread = 0; thread < lists.size(); ++thread) {
    for (int64_t i = 0; i < lists[thread].count; ++i) {
      const float sample = lists[thread].samples[size_t(i)];
      if (digits.of(sample) == bin) same[found++] = magnitude_bits(sample);
    }
  }
  std::nth_element(same.begin(), same.begin() + place, same.end(), std::greater<>());
  return float_of(same[size_t(place)]);
}

// In one pass that counts what is above the bracket and lists what is in it. Nothing if a sample is not finite, the rank-th largest is
// not in the bracket, or the bracket holds too many (equal magnitudes).
template <typename G>
std::optional<float> rank_in_bracket(const Samples<G>& samples, int64_t rank, int threads) {
  Bracket bracket = guess_bracket(samples, rank, threads);
  if (bracket.high > kInfinityBits) return std::nullopt;
  const int64_t room = samples.count() / 8 / threads;
  std::vector<Listed> lists(static_cast<size_t>(threads));
  std::vector<int64_t> counts(Digits::kBins);
  std::atomic<bool> failed{false};
  uint32_t most = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    const int64_t end = samples.share(thread + 1, team);
    Listed listed{std::unique_ptr<float[]>(new float[size_t(room + kTile + kGroup)])};
    Largest<float> largest;
    for (int64_t first = samples.share(thread, team); first < end && !failed; first += kTile) {
      list_bracket(samples, first, std::min(first + kTile, end), bracket, listed, largest);
      if (listed.count > room) failed = true;
    }
#pragma omp critical
    most = std::max(most, largest.bits());
#pragma omp barrier
#pragma omp single
    {
      if (most >= kInfinityBits) failed = true;
      bracket.high = std::clamp(most + 1, bracket.low, bracket.high);  // or few digits would be met, where the rank is among the largest
    }
    const Digits digits(bracket);
    std::vector<uint32_t> own(Digits::kBins);
    for (int64_t i = 0; i < listed.count && !failed; ++i) ++own[digits.of(listed.samples[size_t(i)])];
#pragma omp critical
    for (size_t bin = 0; bin < Digits::kBins; ++bin) counts[bin] += own[bin];
    lists[size_t(thread)] = std::move(listed);
  }
  int64_t inside = 0, place = rank - 1;
  for (const Listed& listed : lists) inside += listed.count, place -= listed.above;
  if (failed || place < 0) return std::nullopt;
  if (place >= inside) return bracket.low == 1 ? std::optional<float>(0.0f) : std::nullopt;  // all below 1 is zero
  return nth_largest(lists, counts, Digits(bracket), place);
}

template <typename G>
std::optional<float> rank_threshold(const Samples<G>& samples, int64_t rank, int threads) {
  if (samples.count() >= kBracketedCount) {
    if (const auto found = rank_in_bracket(samples, rank, threads)) return found;
  }
  return rank_by_digits(samples, rank, threads);
}

// The mean is a sum of fixed parts, so that it does not depend on the number of threads. Not finite if a sample is not.
template <typename G>
double mean_magnitude(const Samples<G>& samples, int threads) {
  constexpr int64_t kPart = 16384;
  const int64_t parts = ceil_div(samples.count(), kPart);
  std::vector<double> sums(static_cast<size_t>(parts));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    double lanes[8] = {};
    samples.each_group(part * kPart, std::min(samples.count(), (part + 1) * kPart), [&](const float* w) {
      for (int i = 0; i < kGroup; i += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += double(std::fabs(w[i + lane]));
    });
    for (const double sum : lanes) sums[size_t(part)] += sum;
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total / double(samples.count());
}

template <typename G>
std::optional<float> select_one(const Selecting& selecting, int64_t s, const G* grad, const float* residual, int64_t threads) {
  const Region& region = selecting.regions[s];
  const float* const owed = residual != nullptr ? residual + region.state_offset : nullptr;
  const Samples<G> samples{grad + region.grad_offset, owed, region.numel, region.stride};
  const int team = worthwhile_threads(samples.count(), threads);
  if (selecting.method == kRank) return rank_threshold(samples, region.rank, team);
  const double mean = mean_magnitude(samples, team);
  return std::isfinite(mean) ? std::optional<float>(float(mean * selecting.factors[s])) : std::nullopt;
}

}  // namespace

bool reads_gradient(const Selecting& selecting, const State& state) {
  if (selecting.method == kConstant) return false;
  for (int64_t s = 0; s < selecting.count; ++s) {
    if (is_due(selecting, state, s)) return true;
  }
  return false;
}

void select_threshold(const Selecting& selecting, const Bucket& grad, const State& state, int64_t threads) {
  for (int64_t s = 0; s < selecting.count; ++s) {
    const Region& region = selecting.regions[s];
    float& threshold = state.threshold[region.segment];
    if (!is_due(selecting, state, s)) {
      const int64_t* counters = state.counters + kCounters * region.segment;
      if (selecting.hold != 0 && counters[4] > 0) threshold = held_threshold(threshold, counters[3] + counters[4], region);
      continue;
    }
    if (selecting.method == kConstant) {
      threshold = float(selecting.constant);
      continue;
    }
    with_dtype(grad.dtype, [&](auto type) {
      threshold = select_one(selecting, s, static_cast<const decltype(type)*>(grad.start), state.residual, threads).value_or(threshold);
    });
  }
}

}  // namespace dct

DCT_EXPORT void dct_select_threshold(const dct::Bucket* grad, const dct::State* state, const dct::Selecting* selecting, int64_t threads) {
  dct::select_threshold(*selecting, *grad, *state, threads);
}
