// Where the i-th query or key of a head lies in memory.
#pragma once
#include <cstdint>

#include "csrc/core/dtype.h"

namespace fastattn {

// Rows at equal distances: dense tensors of any strides, and sequences packed end to end.
template <class T>
struct Strided {
  T* base;
  int64_t step;  // elements from one row to the next
  FASTATTN_HD T* operator[](int64_t i) const { return base + i * step; }
};

}  // namespace fastattn
