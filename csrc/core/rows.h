// Where the i-th query or key of a head lies in memory.
#pragma once
#include <cstdint>

#include "csrc/core/dtype.h"

namespace fastattn {

// Rows at equal distances: dense tensors of any strides, and sequences packed end to end; or those of them that an index
// names, in its order.  Where it names none (-1), `hole` stands: zeros to read, or room for what nobody wants.
template <class T>
struct Strided {
  T* base;
  int64_t step;  // elements from one row to the next
  const int32_t* index = nullptr;
  T* hole = nullptr;
  FASTATTN_HD T* operator[](int64_t i) const {
    if (!index) return base + i * step;
    return index[i] < 0 ? hole : base + index[i] * step;
  }
};

}  // namespace fastattn
