// Operands: rows of a tensor as gemm.h wants them, in place where they lie right, else copied, converted and padded.
// `Mul` says what a 32-bit word holds: one float (Fma) or two bf16 (Bf16Dot).
// No include guard: isa.h reads it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {

inline constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How numbers of a type are multiplied.
template <class T>
struct MulOf {
  using type = Fma;
};
#if FASTATTN_HAS_BF16DOT
template <>
struct MulOf<bf16> {
  using type = Bf16Dot;
};
#endif

struct Carver {  // hands out consecutive parts of this thread's scratch memory
  float* next;
  float* take(int64_t floats) { return std::exchange(next, next + up(floats, 16)); }
};

// One vector of 32-bit words from a row: floats, or bf16 pairs as they lie.  n counts numbers left in the row.
template <class Mul, class T>
FASTATTN_INLINE vf load_words(const T* p, int64_t n) {
  if constexpr (Mul::kPack == 2) {
    if (n >= 2 * W) return load_as<vf>(p);
    T padded[2 * W] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load_as<vf>(padded);
  } else {
    return n >= W ? load(p) : load(p, n);
  }
}

// Rows [i0, i1) as the right operand of a product over their columns: to [ceil(D / pack) x T], a query a lane.
// Vectors of no row at all are left alone: no run reaches them.
template <class Mul, class T>
void pack_lanes(float* to, Strided<const T> rows, int64_t i0, int64_t i1, int64_t D) {
  for (int64_t v = 0; i0 + v * W < i1; ++v)
    for (int64_t d = 0; d < D; d += W * Mul::kPack) {
      vf block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const int64_t i = i0 + v * W + r;
        block[r] = i < i1 ? load_words<Mul>(rows[i] + d, D - d) : vf{};
        if (i + W < i1) __builtin_prefetch(rows[i + W] + d);
      }
      transpose(block);
      const int64_t word = d / Mul::kPack, words = (D - d + Mul::kPack - 1) / Mul::kPack;
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        if (r < words) store(to + (word + r) * kTile + v * W, block[r]);
    }
}

// Rows [i0, i1) as an operand of a product over the rows: to [ceil(N / pack) x up(D, W)], padded with zeros up to N.
template <class Mul, class T>
void pack_rows(float* to, Strided<const T> rows, int64_t i0, int64_t i1, int64_t N, int64_t D) {
  const int64_t width = up(D, W);
  for (int64_t i = i0; i < i0 + N; i += Mul::kPack, to += width)
    for (int64_t d = 0; d < width; d += W) {
      vf x{};
      if constexpr (Mul::kPack == 1) {
        if (i < i1) x = load_words<Mul>(rows[i] + d, D - d);
      }
#if FASTATTN_HAS_BF16DOT
      if constexpr (Mul::kPack == 2) {
        static const T zeros[W] = {};
        T tails[2][W] = {};
        const T* row[2];
        for (int half = 0; half < 2; ++half) {
          row[half] = i + half < i1 ? rows[i + half] + d : zeros;
          if (i + half < i1 && D - d < W)
            row[half] = static_cast<T*>(std::memcpy(tails[half], row[half], (D - d) * sizeof(T)));
        }
        x = pairs(row[0], row[1]);
      }
#endif
      store(to + d, x);
    }
}

// Rows [j0, j1) to be broadcast along their columns: A[j][d].  In place where no index picks them and the numbers can be
// multiplied as they lie, else copied to `to` [N x up(D, W)] (Fma) or [N x words up to a multiple of W] (odd bf16).
template <class Mul, class T>
Words along_columns(float* to, Strided<const T> rows, int64_t j0, int64_t j1, int64_t D) {
  if (!rows.index && (std::is_same_v<T, float> || (Mul::kPack == 2 && D % 2 == 0)))
    return {reinterpret_cast<const char*>(rows[j0]), rows.step * static_cast<int64_t>(sizeof(T)),
            4};
  const int64_t width = up((D + Mul::kPack - 1) / Mul::kPack, W);
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t d = 0; d < D; d += W * Mul::kPack)
      store(to + (j - j0) * width + d / Mul::kPack, load_words<Mul>(rows[j] + d, D - d));
  return {reinterpret_cast<const char*>(to), width * 4, 4};
}

// Rows [j0, j1) to be broadcast across: A[d][j].  bf16 pairs are of neighbouring rows, so they are always copied.
template <class Mul, class T>
Words across_rows(float* to, Strided<const T> rows, int64_t j0, int64_t j1, int64_t D) {
  if constexpr (Mul::kPack == 1) {
    const Words columns = along_columns<Mul>(to, rows, j0, j1, D);
    return {columns.base, columns.step, columns.row};
  } else {
    pack_rows<Mul>(to, rows, j0, j1, up(j1 - j0, 2), D);
    return {reinterpret_cast<const char*>(to), 4, up(D, W) * 4};
  }
}

// X^T [D x T] scaled lane by lane, back to rows [i0, i1) in their own type.
template <class T>
void unpack_lanes(Strided<T> rows, int64_t i0, int64_t i1, const float* from, int64_t D,
                  const float* factor) {
  for (int v = 0; i0 + v * W < i1; ++v) {
    const vf by = load(factor + v * W);
    for (int64_t d = 0; d < D; d += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        block[r] = d + r < D ? load(from + (d + r) * kTile + v * W) * by : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const int64_t i = i0 + v * W + r;
        if (i < i1) D - d >= W ? store(rows[i] + d, block[r]) : store(rows[i] + d, block[r], D - d);
      }
    }
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
