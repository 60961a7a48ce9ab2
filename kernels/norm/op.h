// add_norm: the interface of its kernels. The mathematics is in README.md.
//
//   x, residual, s, y and their gradients [rows, D], dense on the last axis; bias, weight, beta [D];
//   mean, rstd [rows]. Parameters, their gradients and statistics are float32 whatever x is.
//   Empty (0 elements): s, where neither residual nor bias is given, as it is x; the gradient of a
//   parameter that is not given.
//   kind: 0 layer, 1 rms, 2 crms
#pragma once

#include "csrc/core/declare.h"
#include "csrc/core/dispatch.h"

namespace fastattn {

inline constexpr auto kNormDtypes = types<float, bf16, f16>;
inline constexpr int64_t kNormBlock = 64;  // rows whose parameter gradients are summed together

FASTATTN_DECLARE(add_norm_fwd, Tensor y, Tensor s, Tensor mean, Tensor rstd, Tensor x,
                 std::optional<Tensor> residual, std::optional<Tensor> bias,
                 std::optional<Tensor> weight, std::optional<Tensor> beta, double eps,
                 int64_t kind);

// Workspace: partial [ceil(rows / kNormBlock), 3, D], the sums of dx, dy * xhat and dy over a block.
FASTATTN_DECLARE(add_norm_bwd, Tensor dx, Tensor dbias, Tensor dweight, Tensor dbeta,
                 Tensor partial, Tensor dy, std::optional<Tensor> ds, Tensor s,
                 std::optional<Tensor> bias, std::optional<Tensor> weight,
                 std::optional<Tensor> beta, Tensor mean, Tensor rstd, double eps, int64_t kind);

}  // namespace fastattn
