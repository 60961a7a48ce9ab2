// Dense softmax attention: what every backend implements.  Mathematics: README.md; meaning: reference.py.
#pragma once
#include "csrc/core/declare.h"

namespace fastattn {

// o [B,Hq,Nq,Dv], lse f32 [B,Hq,Nq]  <-  q [B,Hq,Nq,D], k [B,Hk,Nk,D], v [B,Hk,Nk,Dv]
FASTATTN_DECLARE(attention_fwd, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Ints mask,
                 double scale);

// dlse may be absent.  work f32 [B,Hq,(Nq + 64) D + Nq + Nq / 8 + 1 up to a multiple of 16] is room for dq and delta.
FASTATTN_DECLARE(attention_bwd, Tensor dq, Tensor dk, Tensor dv, Tensor work, Tensor dout,
                 std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,
                 Ints mask, double scale);

}  // namespace fastattn
