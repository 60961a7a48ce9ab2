// The limits of a machine, as loops that do nothing else; fastattn/bench/ceilings.py times them.
#pragma once

#include "csrc/core/declare.h"

namespace fastattn {

// `flops` operations in multiply-adds of registers, on all threads; sums [64] float32 keeps them wanted.
FASTATTN_DECLARE(ceiling_fma, Tensor sums, double flops);

// The same in bf16 dot products; one that has none leaves sums alone and is not a ceiling.
FASTATTN_DECLARE(ceiling_dot, Tensor sums, double flops);

// Every float32 of data [N] read once, on all threads.
FASTATTN_DECLARE(ceiling_read, Tensor sums, Tensor data);

}  // namespace fastattn
