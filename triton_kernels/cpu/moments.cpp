// prepare_moments: one pass over the gradients before the step of an optimizer. The reference in moments.py is the specification.
#include <algorithm>

#include "group.h"
#include "stream.h"

namespace dct {

// As moments.py lays it out: one parameter. What is null plays no part; `last` is there where `second` is.
struct Moments {
  const void* grad;
  const void* parameter;
  void* first;
  void* second;
  int32_t* last;
  int64_t numel;
  int64_t dtype;
};

// As SCALARS of moments.py.
struct Scalars {
  float factor, unscale, decay, step, skipped;
};

struct Shares {
  const float* by_gap;
  int64_t count;  // the longest gap, and 1
};

namespace {

constexpr int64_t kPart = 2048;  // elements between listing what arrives and changing it; whole groups

template <typename T>
class Preparation {
 public:
  Preparation(const Moments& moments, const Scalars& scalars, const Shares& shares, bool streamed)
      : grad_(static_cast<const T*>(moments.grad)),
        parameter_(static_cast<const T*>(moments.parameter)),
        first_(static_cast<T*>(moments.first)),
        second_(static_cast<T*>(moments.second)),
        last_(moments.last),
        numel_(moments.numel),
        scalars_(scalars),
        shares_(shares),
        streamed_(streamed && uintptr_t(moments.first) % 64 == 0) {}

  // Parts of the parameter, one after the other. What arrives in one is listed, and asked for, while that of the part before is changed.
  void run(int64_t first_part, int64_t last_part) const {
    uint16_t lists[2][kPart + kGroup];
    int64_t listed = 0;
    for (int64_t part = first_part; part < last_part; ++part) {
      const int64_t begin = part * kPart, count = std::min(kPart, numel_ - begin);
      if (first_ != nullptr) {
        if (parameter_ == nullptr) set_first<false>(begin, count);
        else set_first<true>(begin, count);
      }
      if (second_ == nullptr) continue;
      const int64_t found = list_arrivals(begin, count, lists[part & 1]);
      spread(begin - kPart, lists[(part & 1) ^ 1], listed);
      listed = found;
    }
    spread((last_part - 1) * kPart, lists[(last_part & 1) ^ 1], listed);
  }

 private:
  template <bool kDecays>
  void set_first(int64_t begin, int64_t count) const {
    const T* grad = grad_ + begin;
    const T* parameter = kDecays ? parameter_ + begin : nullptr;
    T* first = first_ + begin;
    int64_t i = 0;
    if (streamed_) {
      for (; i + kGroup <= count; i += kGroup) {
        alignas(64) T formed[kGroup];
        form<kDecays>(grad + i, parameter + (kDecays ? i : 0), formed);
        stream_lines<sizeof formed>(formed, first + i);
      }
    } else {
      for (; i + kGroup <= count; i += kGroup) form<kDecays>(grad + i, parameter + (kDecays ? i : 0), first + i);
    }
    if (i < count) {
      T last_grad[kGroup] = {}, last_parameter[kGroup] = {}, formed[kGroup];
      const size_t bytes = size_t(count - i) * sizeof(T);
      std::memcpy(static_cast<void*>(last_grad), grad + i, bytes);
      if (kDecays) std::memcpy(static_cast<void*>(last_parameter), parameter + i, bytes);
      form<kDecays>(last_grad, last_parameter, formed);
      std::memcpy(static_cast<void*>(first + i), formed, bytes);
    }
  }

  // A group of the first moment.
  template <bool kDecays>
  void form(const T* grad, const T* parameter, T* to) const {
    const auto at = [&](int i) {
      Floats added = load_lanes(grad + i) * scalars_.unscale;
      if constexpr (kDecays) added = added + load_lanes(parameter + i) * scalars_.decay;
      return added * scalars_.factor;
    };
    for (int i = 0; i < kGroup; i += 2 * kLanes) store_lanes(at(i), at(i + kLanes), to + i);
  }

  // Lists the elements of a part whose gradient is not zero, and asks for what is to be changed.
  int64_t list_arrivals(int64_t begin, int64_t count, uint16_t* list) const {
    using Key = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
    const T* grad = grad_ + begin;
    int64_t listed = 0, i = 0;
    for (; i + kGroup <= count; i += kGroup) listed += list_bits(reaching_key<kGroup, Key>(grad + i, Key(1)), uint32_t(i), list + listed);
    for (; i < count; ++i) {
      if (T::load(grad[i]) != 0.0f) list[listed++] = uint16_t(i);
    }
    for (int64_t entry = 0; entry < listed; ++entry) {
      prefetch(second_ + begin + list[entry]);
      prefetch(last_ + begin + list[entry]);
    }
    return listed;
  }

  // Spreads the squares of the listed elements over the steps that they have waited.
  void spread(int64_t begin, const uint16_t* list, int64_t listed) const {
    const int32_t step = int32_t(scalars_.step);
    for (int64_t entry = 0; entry < listed; ++entry) {
      const int64_t i = begin + list[entry];
      float added = T::load(grad_[i]) * scalars_.unscale;
      if (parameter_ != nullptr) added = added + T::load(parameter_[i]) * scalars_.decay;
      const int64_t gap = std::clamp<int64_t>(int64_t(step) - last_[i], 1, shares_.count - 1);
      second_[i] = T::round(T::load(second_[i]) + shares_.by_gap[gap] * (added * added));
      last_[i] = step;
    }
  }

  const T* grad_;
  const T* parameter_;
  T* first_;
  T* second_;
  int32_t* last_;
  int64_t numel_;
  const Scalars& scalars_;
  const Shares& shares_;
  bool streamed_;
};

void prepare(const Moments* parameters, int64_t count, const Scalars& scalars, const Shares& shares, int64_t threads) {
  int64_t numel = 0, parts = 0;
  for (int64_t i = 0; i < count; ++i) numel += parameters[i].numel, parts += ceil_div(parameters[i].numel, kPart);
  const int64_t workers = worthwhile_threads(numel, threads);
#pragma omp parallel for schedule(static) num_threads(int(workers))
  for (int64_t worker = 0; worker < workers; ++worker) {
    const int64_t begin = parts * worker / workers, end = parts * (worker + 1) / workers;
    int64_t before = 0;  // parts of the parameters before
    for (int64_t i = 0; i < count && before < end; ++i) {
      const int64_t own = ceil_div(parameters[i].numel, kPart);
      with_dtype(parameters[i].dtype, [&](auto t) {
        const bool streamed = numel * int64_t(sizeof(t)) >= kStreamedBytes;
        const Preparation<decltype(t)> preparation(parameters[i], scalars, shares, streamed);
        preparation.run(std::max(begin - before, int64_t(0)), std::min(end - before, own));
      });
      before += own;
    }
    stream_fence();
  }
}

}  // namespace

DCT_EXPORT void dct_prepare_moments(const dct::Moments* parameters, int64_t count, const dct::Scalars* scalars, const float* shares,
                                    int64_t gaps, int64_t threads) {
  if (scalars->skipped == 0.0f) prepare(parameters, count, *scalars, {shares, gaps}, threads);
}

}  // namespace dct
