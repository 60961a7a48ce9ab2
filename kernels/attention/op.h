// Dense softmax attention: what every backend implements.  Mathematics: README.md; meaning: reference.py.
#pragma once
#include "csrc/core/declare.h"

namespace fastattn {

// o [B,Hq,Nq,Dv], lse f32 [B,Hq,Nq]  <-  q [B,Hq,Nq,D], k [B,Hk,Nk,D], v [B,Hk,Nk,Dv]
FASTATTN_DECLARE(attention_fwd, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Ints mask,
                 double scale);

// dlse may be absent.  Workspaces: delta f32 [B,Hq,Nq], dq_tiles f32 [B,Hq,Nq + 64,D], turns i32 [B,Hq,Nq / 8 + 1]
FASTATTN_DECLARE(attention_bwd, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor dq_tiles,
                 Tensor turns, Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k,
                 Tensor v, Tensor o, Tensor lse, Ints mask, double scale);

}  // namespace fastattn
