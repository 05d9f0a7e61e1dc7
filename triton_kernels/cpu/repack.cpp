// repack: the sum of the payloads of all ranks, thresholded and packed again. The reference in repack.py is the specification.
#include <memory>

#include "gradient_kernels.h"

// Where no threshold is to be selected, the sum exists a tile at a time, in cache.
DCT_EXPORT void dct_repack(const dct::Layout* layout, const dct::Gathered* gathered, const dct::State* state, const dct::Selecting* selecting,
                           uint8_t* payload, int64_t threads) {
  using namespace dct;
  if (!reads_gradient(*selecting, *state)) {
    select_threshold(*selecting, {nullptr, 0, kFloat32}, *state, threads);
    threshold_pack(*layout, *gathered, *state, payload, threads);
    return;
  }
  const std::unique_ptr<float[]> sum(new float[size_t(layout->numel)]);
  const Bucket total{sum.get(), layout->numel, kFloat32};
  unpack_accumulate(*layout, *gathered, {nullptr, nullptr, 0}, total, 1, threads);
  select_threshold(*selecting, total, *state, threads);
  threshold_pack(*layout, total, *state, payload, threads);
}
