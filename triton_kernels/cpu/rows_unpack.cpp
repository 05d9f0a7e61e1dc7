// unpack_rows, gather_rows, scatter_rows. The references in rows_unpack.py are the specification.
#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace dct {
namespace {

constexpr int64_t kBlockEntries = 256;  // that are gathered while the next so many are asked for

// Some rows' entries: their indices, counted from `from`; -1 for an entry that is not valid.
template <typename T>
struct Wanted {
  const T* from;
  std::vector<int32_t> indices;
  int64_t count = 0;
};

// found[i] = the element at now.indices[i], or 0. Asks for what `next` wants meanwhile; where that is less, for what it wanted before, which
// does no harm. Apart from the rounding: so short a loop has many of its scattered loads under way at once.
template <typename T>
void gather(const Wanted<T>& now, const Wanted<T>& next, T* found) {
  for (int64_t i = 0; i < now.count; ++i) {
    __builtin_prefetch(next.from + std::max(next.indices[size_t(i)], 0));
    const int32_t index = now.indices[size_t(i)];
    found[i] = index >= 0 ? now.from[index] : T{};
  }
}

// `rows` counts the payload's; the gradient has `grad_rows` and is read again for each block of so many.
template <typename T, typename V>
void gather_rows(const T* grad, int64_t grad_rows, const uint8_t* payload, int64_t rows, const RowFormat& format, V* out, int64_t threads) {
  const int64_t width = format.width, capacity = format.capacity;
  const int64_t block_rows = std::max<int64_t>(kBlockEntries / capacity, 1);
#pragma omp parallel num_threads(worthwhile_threads(rows * capacity, threads))
  {
    const int64_t shares = omp_get_num_threads(), share = omp_get_thread_num();
    const int64_t last = rows * (share + 1) / shares;
    Wanted<T> now{grad, std::vector<int32_t>(size_t(block_rows * capacity))}, next = now;
    std::vector<T> found(now.indices.size());
    const auto read = [&](int64_t row, Wanted<T>& wanted) {
      wanted.count = 0;
      if (row == last) return row;
      const int64_t grad_row = row % grad_rows, block = std::min({block_rows, last - row, grad_rows - grad_row});
      wanted.from = grad + grad_row * width;
      wanted.count = block * capacity;
      for (int64_t r = 0; r < block; ++r) {
        int32_t* indices = wanted.indices.data() + r * capacity;
        format.each_entry(payload + (row + r) * format.bytes(), [&](int64_t entry, int64_t index) {
          indices[entry] = index >= 0 ? int32_t(r * width + index) : -1;
        });
      }
      return row + block;
    };
    int64_t row = rows * share / shares;
    V* values = out + row * capacity;
    row = read(row, now);
    while (now.count > 0) {
      row = read(row, next);
      gather(now, next, found.data());
      for (int64_t i = 0; i < now.count; ++i) values[i] = saturate<V>(T::load(found[size_t(i)]));
      values += now.count;
      std::swap(now, next);
    }
  }
}

// Adds the values of a row at its indices in `sum`; the first addend finds zeros. The values are converted first, all at once.
template <typename V, typename Sum>
void add_row(const RowFormat& format, const uint8_t* values, const uint8_t* packed, bool first, Sum* converted, Sum* sum) {
  for (int64_t entry = 0; entry < format.capacity; ++entry) {
    converted[entry] = Sum::round(0.0f + V::load(read_as<V>(values + entry * int64_t(sizeof(V)))));
  }
  if (first) {
    format.each_entry(packed, [&](int64_t entry, int64_t index) {
      if (index >= 0) sum[index] = converted[entry];
    });
  } else {
    format.each_entry(packed, [&](int64_t entry, int64_t index) {
      if (index >= 0) sum[index] = Sum::round(Sum::load(sum[index]) + Sum::load(converted[entry]));
    });
  }
}

// Rows of zeros plus the addends in their order, summed in float32 and rounded at the end: `Sum` is `O` where there is no difference.
// `values_of(row, addend)` and `packed_of(row, addend)` say where the values of a row and its indices stand.
template <typename V, typename O, typename Sum, typename Values, typename Packed>
void sum_rows_in(const RowFormat& format, int64_t rows, int64_t addends, O* out, int64_t threads, Values&& values_of, Packed&& packed_of) {
  write_rows(rows, format.width, out, threads, [&] {
    return [&, converted = std::vector<Sum>(size_t(format.capacity)), sums = std::vector<Sum>()](int64_t first, int64_t count, O* to) mutable {
      const int64_t size = count * format.width;
      Sum* sum;
      if constexpr (std::is_same_v<O, Sum>) {
        sum = to;
      } else {
        sums.resize(size_t(size));
        sum = sums.data();
      }
      std::fill_n(sum, size, Sum{});
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t a = 0; a < addends; ++a) {
          add_row<V, Sum>(format, values_of(first + row, a), packed_of(first + row, a), a == 0, converted.data(), sum + row * format.width);
        }
      }
      if constexpr (!std::is_same_v<O, Sum>) {
        for (int64_t i = 0; i < size; ++i) to[i] = O::round(Sum::load(sum[i]));
      }
    };
  });
}

template <typename V, typename O, typename Values, typename Packed>
void sum_rows(const RowFormat& format, int64_t rows, int64_t addends, O* out, int64_t threads, Values&& values_of, Packed&& packed_of) {
  if (addends == 1) {
    sum_rows_in<V, O, O>(format, rows, addends, out, threads, values_of, packed_of);
  } else {
    sum_rows_in<V, O, Float32>(format, rows, addends, out, threads, values_of, packed_of);
  }
}

}  // namespace

DCT_EXPORT void dct_unpack_rows(const uint8_t* payload, const dct::RowFormat* layout, int64_t addends, const dct::Rows* out,
                                int64_t threads) {
  const RowFormat format = *layout;
  const auto packed_of = [&](int64_t row, int64_t a) { return payload + (a * out->rows + row) * format.bytes(); };
  with_dtype(format.value_dtype, [&](auto v) {
    with_dtype(out->dtype, [&](auto o) {
      using V = decltype(v);
      using O = decltype(o);
      sum_rows<V>(format, out->rows, addends, static_cast<O*>(out->start), threads, packed_of, packed_of);
    });
  });
}

DCT_EXPORT void dct_gather_rows(const dct::Rows* grad, const uint8_t* payload, const dct::RowFormat* layout, const dct::Rows* out,
                                int64_t threads) {
  const RowFormat format = *layout;
  with_dtype(grad->dtype, [&](auto t) {
    with_dtype(out->dtype, [&](auto v) {
      const auto* from = static_cast<const decltype(t)*>(grad->start);
      gather_rows(from, grad->rows, payload, out->rows, format, static_cast<decltype(v)*>(out->start), threads);
    });
  });
}

DCT_EXPORT void dct_scatter_rows(const dct::Rows* values, const uint8_t* payload, const dct::RowFormat* layout, int64_t addends,
                                 const dct::Rows* out, int64_t threads) {
  const RowFormat format = *layout;
  const auto packed_of = [&](int64_t row, int64_t) { return payload + row * format.bytes(); };
  with_dtype(values->dtype, [&](auto v) {
    with_dtype(out->dtype, [&](auto o) {
      using V = decltype(v);
      using O = decltype(o);
      const auto values_of = [&](int64_t row, int64_t a) {
        return static_cast<const uint8_t*>(values->start) + (a * out->rows + row) * format.capacity * int64_t(sizeof(V));
      };
      sum_rows<V>(format, out->rows, addends, static_cast<O*>(out->start), threads, values_of, packed_of);
    });
  });
}

}  // namespace dct
