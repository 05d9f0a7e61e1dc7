// unpack_rows, gather_rows, scatter_rows. The references in rows_unpack.py are the specification.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace dct {
namespace {

template <typename T>
float load_bytes(const uint8_t* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return T::load(x);
}

// out[i] = the float32 sum over the addends, in their order, of what `add_to(sum, addend)` adds to a row of zeros; formed in `out` itself
// where that is float32.
template <typename O, typename AddTo>
void sum_row(float* scratch, int64_t width, int64_t addends, O* out, AddTo&& add_to) {
  float* sum = scratch;
  if constexpr (std::is_same_v<O, Float32>) sum = reinterpret_cast<float*>(out);
  std::fill(sum, sum + width, 0.0f);
  for (int64_t a = 0; a < addends; ++a) add_to(sum, a);
  for (int64_t i = 0; i < width; ++i) out[i] = O::round(sum[i]);
}

}  // namespace

DCT_EXPORT void dct_unpack_rows(const uint8_t* payload, int64_t value_dtype, int64_t rows, int64_t width, int64_t slots, int64_t addends,
                                int64_t dtype, void* out, int64_t threads) {
  const RowFormat format(width, slots, value_dtype);
  with_dtype(value_dtype, [&](auto v) {
    with_dtype(dtype, [&](auto o) {
      using V = decltype(v);
      using O = decltype(o);
      prefer_huge_pages(out, rows * width * int64_t(sizeof(O)));
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        std::vector<float> dense(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          sum_row(dense.data(), width, addends, static_cast<O*>(out) + row * width, [&](float* sum, int64_t a) {
            const uint8_t* packed = payload + (a * rows + row) * format.bytes();
            format.each_slot(packed, [&](int64_t slot, int64_t index) {
              if (index >= 0) sum[index] += load_bytes<V>(packed + slot * int64_t(sizeof(V)));
            });
          });
        }
      }
    });
  });
}

// `rows` counts the payload's; the gradient has `grad_rows` and is read again for each block of so many.
DCT_EXPORT void dct_gather_rows(const void* grad, int64_t dtype, int64_t grad_rows, const uint8_t* payload, int64_t payload_dtype,
                                int64_t rows, int64_t width, int64_t slots, int64_t value_dtype, void* out, int64_t threads) {
  const RowFormat format(width, slots, payload_dtype);
  with_dtype(dtype, [&](auto t) {
    with_dtype(value_dtype, [&](auto v) {
      using T = decltype(t);
      using V = decltype(v);
#pragma omp parallel num_threads(worthwhile_threads(rows * slots, threads))
      {
        std::vector<T> found(static_cast<size_t>(slots));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          const T* from = static_cast<const T*>(grad) + row % grad_rows * width;
          V* values = static_cast<V*>(out) + row * slots;
          // Apart from the rounding: so short a loop has many of its scattered loads under way at once.
          format.each_slot(payload + row * format.bytes(), [&](int64_t slot, int64_t index) { found[size_t(slot)] = index >= 0 ? from[index] : T{}; });
          for (int64_t slot = 0; slot < slots; ++slot) values[slot] = saturate<V>(T::load(found[size_t(slot)]));
        }
      }
    });
  });
}

DCT_EXPORT void dct_scatter_rows(const void* values, int64_t value_dtype, const uint8_t* payload, int64_t payload_dtype, int64_t rows,
                                 int64_t width, int64_t slots, int64_t addends, int64_t dtype, void* out, int64_t threads) {
  const RowFormat format(width, slots, payload_dtype);
  with_dtype(value_dtype, [&](auto v) {
    with_dtype(dtype, [&](auto o) {
      using V = decltype(v);
      using O = decltype(o);
      prefer_huge_pages(out, rows * width * int64_t(sizeof(O)));
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        std::vector<float> dense(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          sum_row(dense.data(), width, addends, static_cast<O*>(out) + row * width, [&](float* sum, int64_t a) {
            const V* added = static_cast<const V*>(values) + (a * rows + row) * slots;
            format.each_slot(payload + row * format.bytes(), [&](int64_t slot, int64_t index) {
              if (index >= 0) sum[index] += V::load(added[slot]);
            });
          });
        }
      }
    });
  });
}

}  // namespace dct
