// unpack_accumulate: block by block, so that the sum of all payloads is formed in cache. unpack_accumulate.py is the specification.
#include <omp.h>

#include <vector>

#include "gradient.h"

namespace dct {
namespace {

struct Range {
  int64_t offset, numel;
};

template <typename T>
void copy_uncovered(const T* dense, T* out, const Range* ranges, int64_t count, int64_t thread, int64_t threads) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t first = ranges[r].numel * thread / threads;
    const size_t size = size_t(ranges[r].numel * (thread + 1) / threads - first) * sizeof(T);
    if (dense != nullptr) {
      std::memcpy(out + ranges[r].offset + first, dense + first, size);
      dense += ranges[r].numel;
    } else {
      std::memset(static_cast<void*>(out + ranges[r].offset + first), 0, size);
    }
  }
}

// Payloads of one chunk, read from block to block: `next` is the first entry not read yet.
struct Reader {
  ChunkView chunk;
  int64_t next;
};

// Adds a block's entries of one payload; what a damaged payload says beyond its own bytes or the block is left out.
template <typename V>
bool add_block(Reader& reader, int64_t block, int64_t size, float* total) {
  const Layout& layout = *reader.chunk.layout;
  const int64_t end = std::min(reader.next + reader.chunk.count(block), layout.capacity);
  const V* values = reinterpret_cast<const V*>(reader.chunk.bytes);
  const bool any = reader.next < end;
  for (; reader.next < end; ++reader.next) {
    const int64_t index = reader.chunk.index(reader.next);
    if (index < size) total[index] += V::load(values[reader.next]);
  }
  return any;
}

template <typename T, typename V>
void unpack_share(const Layout& layout, uint8_t* gathered, int64_t payloads, T* out, float divisor, int64_t thread, int64_t threads) {
  std::vector<float> scratch(std::is_same_v<T, Float32> ? 0 : size_t(layout.block));
  std::vector<Reader> readers;
  const float reciprocal = 1.0f / divisor;
  int exponent;
  const bool exact_reciprocal = std::frexp(divisor, &exponent) == 0.5f;
  int64_t chunk = -1;
  for_each_share(layout, thread, threads, [&](int64_t p, int64_t first, int64_t last) {
    const Piece& piece = layout.piece[p];
    if (piece.chunk != chunk) {
      chunk = piece.chunk;
      readers.clear();
      for (int64_t j = chunk; j < payloads; j += layout.payload_chunks) {
        readers.push_back({{gathered + j * layout.chunk_bytes, &layout}, 0});
        for (int64_t b = 0; b < piece.first_block + first; ++b) readers.back().next += readers.back().chunk.count(b);
      }
    }
    for (int64_t b = first; b < last; ++b) {
      const int64_t size = std::min(layout.block, piece.numel - b * layout.block);
      T* place = out + piece.grad_offset + b * layout.block;
      float* total = std::is_same_v<T, Float32> ? reinterpret_cast<float*>(place) : scratch.data();
      std::memset(total, 0, size_t(size) * sizeof(float));
      bool any = false;
      for (Reader& reader : readers) any |= add_block<V>(reader, piece.first_block + b, size, total);
      if (any && exact_reciprocal) {
        for (int64_t i = 0; i < size; ++i) total[i] *= reciprocal;
      } else if (any) {
        for (int64_t i = 0; i < size; ++i) total[i] /= divisor;
      }
      if constexpr (!std::is_same_v<T, Float32>) {
        for (int64_t i = 0; i < size; ++i) place[i] = T::round(total[i]);
      }
    }
  });
}

}  // namespace
}  // namespace dct

// `dense` (of the dtype of `out`) may be null. Every element of `out` that a piece or a range covers is written.
DCT_EXPORT void dct_unpack_accumulate(void* gathered, int64_t payloads, const void* dense, const dct::Range* ranges, int64_t range_count,
                                      void* out, int64_t numel, int64_t out_dtype, const dct::Layout* layout, int64_t divisor, int64_t threads) {
  using namespace dct;
  with_dtype(out_dtype, [&](auto out_type) {
    using T = decltype(out_type);
    prefer_huge_pages(out, numel * int64_t(sizeof(T)));
    with_dtype(layout->value_dtype, [&](auto value_type) {
      using V = decltype(value_type);
      const int team = worthwhile_threads(numel, threads);
#pragma omp parallel num_threads(team) if (team > 1)
      {
        const int64_t thread = omp_get_thread_num();
        const int64_t size = omp_get_num_threads();
        copy_uncovered(static_cast<const T*>(dense), static_cast<T*>(out), ranges, range_count, thread, size);
        unpack_share<T, V>(*layout, static_cast<uint8_t*>(gathered), payloads, static_cast<T*>(out), float(divisor), thread, size);
      }
    });
  });
}
