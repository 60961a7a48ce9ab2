// The matrix product of every attention kernel: C[r][lanes] += sum_k A[r][k] * B[k][lanes].
//
//              lanes ->  B [K x NV*W]              A is read one number (or bf16 pair) at a time and broadcast,
//   K  ┌──────┐     ┌──┬──┬──┬──┐                  so it needs no packing: any two byte strides will do, which
//   ↓  │      │     │b0│b1│b2│b3│  NV registers    covers A and its transpose.  B is rows of W-lane vectors.
//      └──────┘     └──┴──┴──┴──┘
//   R  │A[r,k]│  -> │c[r][0..NV)│  R*NV registers stay put while k runs.
//
//   ISA      W   NV  R   accumulators   why that many
//   avx512   16  4   4   16 of 32       1 FMA a cycle x latency 4, and 4 loads + 4 broadcasts to 16 FMAs
//   avx2     8   3   4   12 of 16       2 FMAs a cycle x latency 4 = 8, and what remains holds b0..b2, a
//   scalar   4   3   4   12 of 16       as avx2
//
// Narrow tiles (NV <= 2) take twice the rows, to have as many sums in flight.
// No include guard: isa.h reads it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {

inline constexpr int kVecs = FASTATTN_SIMD_WIDTH == 64 ? 4 : 3;  // vectors in a tile
inline constexpr int kTile = kVecs * W;                          // lanes in a tile

template <int NV>
inline constexpr int kRows = NV == 1 || (NV == 2 && FASTATTN_SIMD_WIDTH == 64) ? 8 : 4;

// A broadcast operand: A[r][k] is the 32-bit word at base + r * row + k * step, both in bytes.
struct Words {
  const char* base;
  int64_t row, step;
  FASTATTN_INLINE Words at(int64_t r, int64_t k) const {
    return {base + r * row + k * step, row, step};
  }
};

// What multiplies: one float a word, or two bf16 a word where the processor has their dot product.
struct Fma {
  static constexpr int kPack = 1;  // numbers in a word
  static constexpr int kExpDegree = 6;
  static constexpr float kUnit =
      1;  // of a logit: natural, so that lse is what p was formed with, to the bit
  FASTATTN_INLINE static vf mac(vf acc, vf a, vf b) { return a * b + acc; }
};
#if FASTATTN_HAS_BF16DOT
struct Bf16Dot {
  static constexpr int kPack = 2;
  static constexpr int kExpDegree = 3;
  static constexpr float kUnit = 1.4426950408889634f;  // log2(e): one multiplication less
  FASTATTN_INLINE static vf mac(vf acc, vf a, vf b) { return dot(acc, a, b); }
};
#endif

FASTATTN_INLINE vf broadcast(const char* word) {
  float x;
  __builtin_memcpy(&x, word, 4);
  return settled(splat(x));  // an FMA with an embedded broadcast reaches 85 % of the rate
}

// One step of k.  b points at the tile's first lane.
template <class Mul, int R, int NV>
FASTATTN_INLINE void step(vf (&acc)[R][NV], const char* a, int64_t row, const float* b) {
  vf bs[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) bs[v] = load(b + v * W);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf ar = broadcast(a + r * row);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Mul::mac(acc[r][v], ar, bs[v]);
  }
}

// acc = A B; ldb is in floats.  A sum of many terms is rounded at the size of the sum at every step; long ones are
// summed in parts.  Meanwhile job(first), ..., job(last - 1), one in every four steps.
struct Nothing {
  static constexpr int first = 0, last = 0;
  FASTATTN_INLINE void operator()(int) const {}
};
inline constexpr int64_t kChunk = 128;
template <class Mul, int R, int NV, class Job = Nothing>
FASTATTN_INLINE void multiply(vf (&acc)[R][NV], Words a, const float* b, int64_t ldb, int64_t K,
                              const Job& job = {}) {
  const char* at = a.base;
  int64_t k = 0, end = std::min(K, kChunk);
  for (int i = job.first; i < job.last; ++i) {
    if (k + 4 <= end)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, ++k, at += a.step, b += ldb) step<Mul>(acc, at, a.row, b);
    job(i);
  }
#pragma GCC unroll 2
  for (; k < end; ++k, at += a.step, b += ldb) step<Mul>(acc, at, a.row, b);
  while (k < K) {
    vf part[R][NV] = {};
    end = std::min(k + kChunk, K);
#pragma GCC unroll 2
    for (; k < end; ++k, at += a.step, b += ldb) step<Mul>(part, at, a.row, b);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += part[r][v];
  }
}

// acc = A B beside the jobs that the tile before has left: the pipes that multiply leave free those that add and shift.
// Sixteen registers do not hold both; there the jobs come first.
template <class Jobs>
FASTATTN_INLINE void settle(const Jobs& jobs) {
  for (int i = jobs.first; i < jobs.last; ++i) jobs(i);
}
template <class Mul, int R, int NV, class Jobs>
FASTATTN_INLINE void multiply_beside(vf (&acc)[R][NV], Words a, const float* b, int64_t ldb,
                                     int64_t K, const Jobs& jobs) {
  if constexpr (FASTATTN_SIMD_WIDTH == 64) {
    multiply<Mul>(acc, a, b, ldb, K, jobs);
  } else {
    settle(jobs);
    multiply<Mul>(acc, a, b, ldb, K);
  }
}

// Calls f.tile<R, NV>(r0) for blocks of rows that cover [0, rows): as tall as registers allow, then halves.
template <int R, int NV, class F>
FASTATTN_INLINE int64_t rows_of(F& f, int64_t r, int64_t rows) {
  for (; r + R <= rows; r += R) f.template tile<R, NV>(r);
  if constexpr (R > 1) r = rows_of<R / 2, NV>(f, r, rows);
  return r;
}
template <int NV, class F>
[[gnu::noinline]] void for_rows(F& f, int64_t rows) {
  rows_of<kRows<NV>, NV>(f, 0, rows);
  if constexpr (requires { f.template finish<NV>(); }) f.template finish<NV>();
}
template <class F>
FASTATTN_INLINE void for_tiles(F& f, int64_t rows, int vecs) {
  if (vecs == 1) for_rows<1>(f, rows);
  if (vecs == 2) for_rows<2>(f, rows);
  if (vecs == 3) for_rows<3>(f, rows);
  if constexpr (kVecs == 4)
    if (vecs == 4) for_rows<4>(f, rows);
}

// C += A B, for any number of rows and vectors: the epilogue that most products have.
template <class Mul>
struct Accumulate {
  float* c;
  int64_t ldc;
  Words a;
  const float* b;
  int64_t ldb, K;

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply<Mul>(acc, a.at(r0, 0), b, ldb, K);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* const to = c + (r0 + r) * ldc + v * W;
        store(to, load(to) + acc[r][v]);
      }
  }
};
template <class Mul>
FASTATTN_INLINE void accumulate(float* c, int64_t ldc, Words a, const float* b, int64_t ldb,
                                int64_t K, int64_t rows, int vecs) {
  for (int v = 0; v < vecs; v += kVecs) {
    Accumulate<Mul> f{c + v * W, ldc, a, b + v * W, ldb, K};
    for_tiles(f, rows, std::min(vecs - v, kVecs));
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
