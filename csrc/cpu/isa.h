// One source, many instruction sets (the method is Highway's).
//
// A kernel file names itself, includes what is compiled once, and then this header:
//
//   #define FASTATTN_CPU_FILE "kernels/attention/cpu.cc"
//   #include "kernels/attention/op.h"
//   #include "csrc/cpu/isa.h"
//                                           everything below is compiled once per instruction set
//   #include "csrc/cpu/simd.h"
//   namespace fastattn::cpu::FASTATTN_ISA { ... }
//
// This header includes the file again inside one target region per wide instruction set; the rest of
// the file itself is the scalar pass, which needs no region and is the only one off x86. A pass sees
//
//   FASTATTN_ISA           its namespace             avx512bf16  avx512  avx2  scalar
//   FASTATTN_SIMD_WIDTH    bytes in a register       64          64      32    16
//   FASTATTN_HAS_BF16DOT   bf16 pairs, int8 quads    1           0       0     0
//
// Headers with `#pragma once` must come above: inside a region their inline functions would be compiled
// for that processor and then shared with every other. Headers without it (simd.h, gemm.h) come below.
// Compilers ignore the region for lambdas and for friend functions defined in a class: hot code has
// neither. tests/test_isa.py reads the machine code and the includes.
#ifndef FASTATTN_ISA

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "csrc/core/declare.h"
#include "csrc/core/dispatch.h"
#include "csrc/cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>

// clang-format off: a pragma is one line, and each compiler skips the other's
#define FASTATTN_ISA avx512bf16
#define FASTATTN_SIMD_WIDTH 64
#define FASTATTN_HAS_BF16DOT 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"))), apply_to = function)
#include FASTATTN_CPU_FILE
#pragma clang attribute pop
#pragma GCC pop_options
#undef FASTATTN_ISA
#undef FASTATTN_SIMD_WIDTH
#undef FASTATTN_HAS_BF16DOT

#define FASTATTN_ISA avx512
#define FASTATTN_SIMD_WIDTH 64
#define FASTATTN_HAS_BF16DOT 0
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#include FASTATTN_CPU_FILE
#pragma clang attribute pop
#pragma GCC pop_options
#undef FASTATTN_ISA
#undef FASTATTN_SIMD_WIDTH
#undef FASTATTN_HAS_BF16DOT

#define FASTATTN_ISA avx2
#define FASTATTN_SIMD_WIDTH 32
#define FASTATTN_HAS_BF16DOT 0
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#include FASTATTN_CPU_FILE
#pragma clang attribute pop
#pragma GCC pop_options
#undef FASTATTN_ISA
#undef FASTATTN_SIMD_WIDTH
#undef FASTATTN_HAS_BF16DOT

// clang-format on
#endif  // x86

#define FASTATTN_ISA scalar
#define FASTATTN_SIMD_WIDTH 16
#define FASTATTN_HAS_BF16DOT 0

#endif
