// One row of a payload, as row_codec.py describes it.
#pragma once

#include "common.h"

namespace dct {

struct RowFormat {
  int64_t width, slots, value_bytes, index_bytes;

  RowFormat(int64_t width, int64_t slots, int64_t dtype)
      : width(width), slots(slots), value_bytes(dtype == kFloat32 ? 4 : 2), index_bytes(width <= 256 ? 1 : 2) {}

  int64_t bytes() const { return slots * (value_bytes + index_bytes); }

  void write_index(uint8_t* row, int64_t slot, int64_t index) const {
    uint8_t* place = row + slots * value_bytes + slot * index_bytes;
    place[0] = uint8_t(index);
    if (index_bytes == 2) place[1] = uint8_t(index >> 8);
  }

  // The place that a slot's value belongs to, or -1 if the slot is not valid. Every value dtype is zero iff its bits but the sign are.
  int64_t valid_index(const uint8_t* row, int64_t slot) const {
    const uint8_t* place = row + slots * value_bytes + slot * index_bytes;
    const int64_t index = index_bytes == 1 ? place[0] : place[0] | int64_t(place[1]) << 8;
    bool valid = index != 0;
    if (slot == 0) {
      int bits = row[value_bytes - 1] & 0x7f;
      for (int64_t b = 0; b + 1 < value_bytes; ++b) bits |= row[b];
      valid = bits != 0;
    }
    return valid && index < width ? index : -1;
  }
};

}  // namespace dct
