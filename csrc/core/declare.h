// One signature per op, for every backend: kernels/<op>/op.h is read like an interface.
//
//   FASTATTN_DECLARE(attention_fwd, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, float scale);
//
// written in namespace fastattn, declares the function in every cpu namespace (one per instruction
// set) and, with a leading Stream, in cuda; and a tag, cpu::attention_fwd, that lists the compiled
// ones for bind.h. A backend that drifts from the signature does not link.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string_view>

#include "csrc/core/tensor.h"

namespace fastattn {

using Ints = std::span<const int64_t>;  // a short list, such as a mask's parameters
using Floats = std::span<const double>;
using Bools = std::span<const bool>;
using Maybe = std::optional<Tensor>;

struct Stream {  // where a CUDA kernel is queued: a cudaStream_t
  void* handle;
};

}  // namespace fastattn

// The instruction sets, best first; csrc/cpu/isa.h says what each may use.
#if defined(__x86_64__)

namespace fastattn {
inline constexpr const char* kIsas[] = {"avx512bf16", "avx512", "avx2", "scalar"};
}
#define FASTATTN_DECLARE(NAME, ...)                                                               \
  namespace cuda { void NAME(Stream, __VA_ARGS__); }                                              \
  namespace [[gnu::visibility("hidden")]] cpu {                                                   \
  namespace avx512bf16 { void NAME(__VA_ARGS__); }                                                \
  namespace avx512 { void NAME(__VA_ARGS__); }                                                    \
  namespace avx2 { void NAME(__VA_ARGS__); }                                                      \
  namespace scalar { void NAME(__VA_ARGS__); }                                                    \
  struct NAME {                                                                                   \
    static constexpr void (*compiled[])(__VA_ARGS__) = {avx512bf16::NAME, avx512::NAME,           \
                                                        avx2::NAME, scalar::NAME}; /* as kIsas */ \
  };                                                                                              \
  }

#else

namespace fastattn { inline constexpr const char* kIsas[] = {"scalar"}; }
#define FASTATTN_DECLARE(NAME, ...)                                    \
  namespace cuda { void NAME(Stream, __VA_ARGS__); }                   \
  namespace [[gnu::visibility("hidden")]] cpu {                        \
  namespace scalar { void NAME(__VA_ARGS__); }                         \
  struct NAME {                                                        \
    static constexpr void (*compiled[])(__VA_ARGS__) = {scalar::NAME}; \
  };                                                                   \
  }

#endif
