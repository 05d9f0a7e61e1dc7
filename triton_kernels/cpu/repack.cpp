// repack: the sum of the payloads of all ranks, thresholded and packed again. The reference in repack.py is the specification.
#include <memory>

#include "gradient_kernels.h"

// Where no threshold is to be selected, the sum exists a tile at a time, in cache. `residual` is null without error feedback.
DCT_EXPORT void dct_repack(uint8_t* gathered, int64_t payloads, float* residual, float* threshold, int64_t* counters,
                           const dct::Selection* selections, int64_t count, int64_t method, double factor, int64_t interval,
                           int64_t geometric, const dct::Layout* layout, uint8_t* payload, int64_t threads) {
  using namespace dct;
  const Selecting selecting{selections, count, method, factor, interval, geometric != 0};
  const State state{residual, threshold, counters};
  const Gathered parts{gathered, payloads};
  if (!reads_gradient(selecting, state)) {
    select_threshold(selecting, nullptr, kFloat32, state, threads);
    threshold_pack(*layout, parts, state, payload, threads);
    return;
  }
  const std::unique_ptr<float[]> sum(new float[size_t(layout->numel)]);
  unpack_accumulate(*layout, parts, {nullptr, nullptr, 0}, {sum.get(), layout->numel, kFloat32}, 1, threads);
  select_threshold(selecting, sum.get(), kFloat32, state, threads);
  threshold_pack(*layout, sum.get(), kFloat32, state, payload, threads);
}
