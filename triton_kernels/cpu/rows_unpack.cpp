// unpack_rows, gather_rows, scatter_rows. The references in rows_unpack.py are the specification.
#include <algorithm>
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

// out[i] = the float32 sum over the addends, in their order, of what `add_to(dense, addend)` adds to a row of zeros.
template <typename O, typename AddTo>
void sum_row(float* dense, int64_t width, int64_t addends, O* out, AddTo&& add_to) {
  std::fill(dense, dense + width, 0.0f);
  for (int64_t a = 0; a < addends; ++a) add_to(dense, a);
  for (int64_t i = 0; i < width; ++i) out[i] = O::round(dense[i]);
}

}  // namespace

DCT_EXPORT void dct_unpack_rows(const uint8_t* payload, int64_t value_dtype, int64_t rows, int64_t width, int64_t slots, int64_t addends,
                                int64_t dtype, void* out, int64_t threads) {
  const RowFormat format(width, slots, value_dtype);
  with_dtype(value_dtype, [&](auto v) {
    with_dtype(dtype, [&](auto o) {
      using V = decltype(v);
      using O = decltype(o);
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        std::vector<float> dense(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          sum_row(dense.data(), width, addends, static_cast<O*>(out) + row * width, [&](float* sum, int64_t a) {
            const uint8_t* packed = payload + (a * rows + row) * format.bytes();
            for (int64_t slot = 0; slot < slots; ++slot) {
              const int64_t index = format.valid_index(packed, slot);
              if (index >= 0) sum[index] += load_bytes<V>(packed + slot * sizeof(V));
            }
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
#pragma omp parallel for schedule(static) num_threads(worthwhile_threads(rows * slots, threads))
      for (int64_t row = 0; row < rows; ++row) {
        const T* from = static_cast<const T*>(grad) + row % grad_rows * width;
        V* values = static_cast<V*>(out) + row * slots;
        for (int64_t slot = 0; slot < slots; ++slot) {
          const int64_t index = format.valid_index(payload + row * format.bytes(), slot);
          values[slot] = index >= 0 ? saturate<V>(T::load(from[index])) : V{};
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
#pragma omp parallel num_threads(worthwhile_threads(rows * width, threads))
      {
        std::vector<float> dense(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
          sum_row(dense.data(), width, addends, static_cast<O*>(out) + row * width, [&](float* sum, int64_t a) {
            const V* added = static_cast<const V*>(values) + (a * rows + row) * slots;
            for (int64_t slot = 0; slot < slots; ++slot) {
              const int64_t index = format.valid_index(payload + row * format.bytes(), slot);
              if (index >= 0) sum[index] += V::load(added[slot]);
            }
          });
        }
      }
    });
  });
}

}  // namespace dct
