// The element types: their names at run time, and the two 16-bit floats C++20 lacks.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define FASTATTN_HD __host__ __device__
#else
#define FASTATTN_HD
#endif
#define FASTATTN_INLINE \
  [[gnu::always_inline]] inline  // for what must take its caller's instruction set

namespace fastattn {

enum class DType : int8_t { f32, f64, bf16, f16, i8, u8, i32, i64, b8 };

constexpr const char* name(DType t) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int8",
                                   "uint8",   "int32",   "int64",    "bool"};
  return names[static_cast<int>(t)];
}

constexpr size_t size_of(DType t) {
  constexpr size_t sizes[] = {4, 8, 2, 2, 1, 1, 4, 8, 1};
  return sizes[static_cast<int>(t)];
}

// Rounding is to nearest, ties to even, as the processors' own conversions do; NaN stays NaN and is
// made quiet. Neither direction depends on the denormal mode of the calling thread, except that a
// float below 2^-126 may count as zero.
struct bf16 {
  uint16_t bits;

  bf16() = default;
  FASTATTN_HD constexpr explicit bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>((is_nan ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  FASTATTN_HD constexpr operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

struct f16 {
  uint16_t bits;

  f16() = default;
  FASTATTN_HD constexpr explicit f16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    uint32_t h;
    if (magnitude > 0x7f800000u) {
      h = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
      h = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to a multiple of 2^-24
      h = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      h = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | h);
  }
  FASTATTN_HD constexpr operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu,
                   wide = magnitude << 13;
    if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | wide);
    if (magnitude >= 0x400u) return std::bit_cast<float>(sign | (wide + (112u << 23)));
    const float x = std::bit_cast<float>(wide | (113u << 23)) - 0x1p-14f;  // m 2^-24, exactly
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(x));
  }
};

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>)
    return DType::f32;
  else if constexpr (std::is_same_v<T, double>)
    return DType::f64;
  else if constexpr (std::is_same_v<T, bf16>)
    return DType::bf16;
  else if constexpr (std::is_same_v<T, f16>)
    return DType::f16;
  else if constexpr (std::is_same_v<T, int8_t>)
    return DType::i8;
  else if constexpr (std::is_same_v<T, uint8_t>)
    return DType::u8;
  else if constexpr (std::is_same_v<T, int32_t>)
    return DType::i32;
  else if constexpr (std::is_same_v<T, int64_t>)
    return DType::i64;
  else {
    static_assert(std::is_same_v<T, bool>, "not an element type");
    return DType::b8;
  }
}

}  // namespace fastattn
