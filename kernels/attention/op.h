// Dense softmax attention: what every backend implements.  Mathematics: README.md; meaning: reference.py.
#pragma once
#include "csrc/core/declare.h"

namespace fastattn {

// The arguments between v and the mask, in api.py's order: bias, bias_index, bias2, bias2_index, weight, weight_index,
// sinks, visible, blocks, heads, cu_q, cu_k, seed, slots_q, slots_k.
using AttentionExtras = std::array<Maybe, 15>;

// o [B,Hq,Nq,Dv], lse f32 [B,Hq,Nq] and what its rounding took from it, rest  <-  q [B,Hq,Nq,D], k [B,Hk,Nk,D], v [B,Hk,Nk,Dv]
// Where queries keep some logits, rest is [B,Hq,3,Nq], with the least of them and the last key that has it; else [B,Hq,1,Nq].
// numbers: scale, softcap (0: none), clip's two (0, 1: none), dropout, whether groups leave o by slot,
// and how many logits a query keeps (0: all)
FASTATTN_DECLARE(attention_fwd, Tensor o, Tensor lse, Tensor rest, Tensor q, Tensor k, Tensor v,
                 AttentionExtras extras, Ints mask, Floats numbers);

// dlse may be absent.  Gradients that `needs` does not ask for are not touched, but for dq, dk and dv, which are cleared.
// work f32 [B,Hq,(rows (D + 1) + rows / 8 + 16 num + 1) up to a multiple of 16] is room for dq and delta, where
// rows = Nq + 64 num and num is the number of sequences in a batch; the next three: csrc/cpu/terms.h; the parts: gradients
// by slot, f32 [B,Hq,slots,D], [B,Hk,slots,D] and [B,Hk,slots,Dv], where groups share tokens, else empty.
FASTATTN_DECLARE(attention_bwd, Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dbias2,
                 Tensor dweight, Tensor dsinks, Tensor work, Tensor bias_work, Tensor bias2_work,
                 Tensor weight_work, Tensor parts_q, Tensor parts_k, Tensor parts_v, Tensor dout,
                 Maybe dlse, Tensor q, Tensor k, Tensor v, AttentionExtras extras, Tensor o,
                 Tensor lse, Tensor rest, Ints mask, Floats numbers, Bools needs);

}  // namespace fastattn
