// Attention of few queries over a cache of keys and values: what every backend implements.  Mathematics: README.md;
// meaning: reference.py.
#pragma once
#include "csrc/core/declare.h"

namespace fastattn {

// o [B,Hq,Nq,Dv], lse f32 [B,Hq,Nq]  <-  q [B,Hq,Nq,D]; caches [B,Hk,Nmax,D] and [B,Hk,Nmax,Dv], or with block_table
// [B,pages of a sequence] caches [pages,page_size,Hk,D] and [pages,page_size,Hk,Dv].  A sequence has lengths[b] + num_new
// tokens, all of them in the cache.  sinks, alibi_slopes f32 [Hq]; softcap 0 is none; num_splits 0 is by length.
// terms: bias, bias_index, bias2, bias2_index, weight, weight_index, visible, blocks, as attention takes them.
using DecodeTerms = std::array<Maybe, 8>;
FASTATTN_DECLARE(attention_decode_fwd, Tensor o, Tensor lse, Tensor q, Tensor k_cache,
                 Tensor v_cache, Tensor lengths, std::optional<Tensor> block_table,
                 std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes, DecodeTerms terms,
                 int64_t num_new, Ints mask, double scale, double softcap, int64_t num_splits);

// Writes k_new [B,Hk,Nnew,D] and v_new [B,Hk,Nnew,Dv] into the caches, at lengths[b], lengths[b] + 1, ...
FASTATTN_DECLARE(attention_decode_append, Tensor k_cache, Tensor v_cache, Tensor k_new,
                 Tensor v_new, Tensor lengths, std::optional<Tensor> block_table);

}  // namespace fastattn
