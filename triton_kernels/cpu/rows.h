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

  // Calls visit(slot, index) for every slot of a row: the place that its value belongs to, or -1 if the slot is not valid.
  template <typename Visit>
  void each_slot(const uint8_t* row, Visit&& visit) const {
    if (index_bytes == 1) {
      each_slot_of<uint8_t>(row, visit);
    } else {
      each_slot_of<uint16_t>(row, visit);
    }
  }

 private:
  template <typename Index, typename Visit>
  void each_slot_of(const uint8_t* row, Visit&& visit) const {
    const uint8_t* indices = row + slots * value_bytes;
    for (int64_t slot = 0; slot < slots; ++slot) {
      Index index;
      std::memcpy(&index, indices + slot * int64_t(sizeof index), sizeof index);
      const bool valid = slot == 0 ? holds_value(row) : index != 0;  // places ascend: only the first can be 0
      visit(slot, valid && index < width ? int64_t(index) : -1);
    }
  }

  // Every value dtype is zero iff its bits but the sign are.
  bool holds_value(const uint8_t* value) const {
    int bits = value[value_bytes - 1] & 0x7f;
    for (int64_t b = 0; b + 1 < value_bytes; ++b) bits |= value[b];
    return bits != 0;
  }
};

}  // namespace dct
