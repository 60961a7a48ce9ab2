// The vector vocabulary of the CPU kernels.  No include guard: isa.h reads it once for each instruction set.
//
// A vector holds W 32-bit lanes (16, 8 or 4).  Arithmetic is written with operators, which the compiler maps to
// the instruction set of the region; only what has no operator is spelled out here: conversions, the bf16 dot
// product, exp2, transposition.  Free functions only: lambdas and friends do not inherit the target region.
namespace fastattn::cpu::FASTATTN_ISA {

inline constexpr int W = FASTATTN_SIMD_WIDTH / 4;

typedef float vf __attribute__((vector_size(FASTATTN_SIMD_WIDTH)));
typedef int32_t vi __attribute__((vector_size(FASTATTN_SIMD_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(FASTATTN_SIMD_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(FASTATTN_SIMD_WIDTH / 2)));

// The high and low words of a * b.
FASTATTN_INLINE void multiply(vu a, uint32_t b, vu& high, vu& low) {
#if FASTATTN_SIMD_WIDTH == 64
  const __m512i by = _mm512_set1_epi32(static_cast<int>(b)),
                even = _mm512_mul_epu32((__m512i)a, by),
                odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), by);
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif FASTATTN_SIMD_WIDTH == 32
  const __m256i by = _mm256_set1_epi32(static_cast<int>(b)),
                even = _mm256_mul_epu32((__m256i)a, by),
                odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), by);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int lane = 0; lane < W; ++lane) {
    const uint64_t product = static_cast<uint64_t>(a[lane]) * b;
    high[lane] = static_cast<uint32_t>(product >> 32), low[lane] = static_cast<uint32_t>(product);
  }
#endif
}

template <class V, class P>
FASTATTN_INLINE V load_as(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class P, class V>
FASTATTN_INLINE void store_as(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

FASTATTN_INLINE vf splat(float x) { return x - vf{}; }
FASTATTN_INLINE vi splat(int x) { return x - vi{}; }
FASTATTN_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
FASTATTN_INLINE vi select(vi mask, vi yes, vi no) { return mask ? yes : no; }
FASTATTN_INLINE vf max(vf a, vf b) {  // b where either is NaN
#if FASTATTN_SIMD_WIDTH == 64
  return (vf)_mm512_mask_max_ps((__m512)a, 0xffff, (__m512)a,
                                (__m512)b);  // GCC warns of _mm512_max_ps
#elif FASTATTN_SIMD_WIDTH == 32
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

FASTATTN_INLINE vf min(vf a, vf b) { return b < a ? b : a; }  // a where either is NaN

// x as it is in a register, not folded into the instruction that uses it.
FASTATTN_INLINE vf settled(vf x) {
#if FASTATTN_SIMD_WIDTH == 64
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <int... lane>
FASTATTN_INLINE vi lanes(std::integer_sequence<int, lane...>) {
  return vi{lane...};
}
FASTATTN_INLINE vi iota() { return lanes(std::make_integer_sequence<int, W>{}); }

// Lanes are queries i0, i0 + 1, ...: all bits set where the mask lets them see key j.  The loop vectorises.
template <class Mask>
FASTATTN_INLINE vi visible(const Mask& mask, int i0, int j) {
  int32_t lane_mask[W];
  for (int lane = 0; lane < W; ++lane)
    lane_mask[lane] = -static_cast<int>(mask.visible(i0 + lane, j));
  return load_as<vi>(lane_mask);
}

FASTATTN_INLINE bool any(vi mask) {
#if FASTATTN_SIMD_WIDTH == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif FASTATTN_SIMD_WIDTH == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// ---- loads and stores of each storage type, converted to float ------------------------------------------

FASTATTN_INLINE vf load(const float* p) { return load_as<vf>(p); }
FASTATTN_INLINE void store(float* p, vf v) { store_as(p, v); }

FASTATTN_INLINE vf load(const bf16* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}
FASTATTN_INLINE vh to_bf16(vf v) {
#if FASTATTN_HAS_BF16DOT
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v, nearest_even = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((v == v ? nearest_even : (bits | 0x400000)) >> 16, vh);
#endif
}
FASTATTN_INLINE void store(bf16* p, vf v) { store_as(p, to_bf16(v)); }

FASTATTN_INLINE vf load(const f16* p) {
#if FASTATTN_SIMD_WIDTH == 64
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif FASTATTN_SIMD_WIDTH == 32
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  vf v;
  for (int lane = 0; lane < W; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
#endif
}
FASTATTN_INLINE void store(f16* p, vf v) {
#if FASTATTN_SIMD_WIDTH == 64
  store_as(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTATTN_SIMD_WIDTH == 32
  store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int lane = 0; lane < W; ++lane) p[lane] = f16(static_cast<float>(v[lane]));
#endif
}

// The first n < W lanes; the others read as zero and are not written.
#if FASTATTN_SIMD_WIDTH == 64
template <class T>
FASTATTN_INLINE vf load(const T* p, int64_t n) {
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  T lanes[W];
  if constexpr (sizeof(T) == 4) store_as(lanes, _mm512_maskz_loadu_ps(first, p));
  if constexpr (sizeof(T) == 2) store_as(lanes, _mm256_maskz_loadu_epi16(first, p));
  return load(lanes);
}
template <class T>
FASTATTN_INLINE void store(T* p, vf v, int64_t n) {
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1);
  T lanes[W];
  store(lanes, v);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first, load_as<__m512>(lanes));
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, first, load_as<__m256i>(lanes));
}
#else
template <class T>
FASTATTN_INLINE vf load(const T* p, int64_t n) {
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
FASTATTN_INLINE void store(T* p, vf v, int64_t n) {
  T lanes[W];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
#endif

// ---- bf16 pairs: 32-bit words holding two numbers that a dot product multiplies and adds -----------------

#if FASTATTN_HAS_BF16DOT
FASTATTN_INLINE vf dot(vf acc, vf a, vf b) {  // acc + a.lo * b.lo + a.hi * b.hi, in each lane
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
typedef uint16_t vp __attribute__((vector_size(FASTATTN_SIMD_WIDTH)));  // two rows of W bf16
FASTATTN_INLINE vp to_bf16(vf first, vf second) {
  return (vp)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
FASTATTN_INLINE vf pairs(vp rows) {  // each lane's two numbers, side by side
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vf)_mm512_permutexvar_epi16(order, (__m512i)rows);
}
FASTATTN_INLINE void store_halves(bf16* p, int64_t row, vp rows) {
  store_as(p, _mm512_castsi512_si256((__m512i)rows));
  store_as(p + row, _mm512_extracti64x4_epi64((__m512i)rows, 1));
}
FASTATTN_INLINE vf low_half(vf words) { return (vf)((vu)words << 16); }  // the numbers again
FASTATTN_INLINE vf high_half(vf words) { return (vf)((vu)words & 0xffff0000u); }
FASTATTN_INLINE vf pairs(const bf16* lo, const bf16* hi) {
  return (vf)(__builtin_convertvector(load_as<vh>(lo), vu) |
              (__builtin_convertvector(load_as<vh>(hi), vu) << 16));
}
#endif

// ---- functions -------------------------------------------------------------------------------------------

inline constexpr float kShift =
    12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits

// 2^x for x <= 0 (and a little above), 0 below 2^-127, NaN for NaN (but for
// one whose lowest nine bits are set, which no arithmetic makes).  Coefficients: minimax of the relative error of
// 2^r on [-1/2, 1/2] with 2^0 = 1; degree 3 errs 1.0e-4 (bf16 rounds at 2e-3), 6 below one float32 ulp.
template <int Degree>
FASTATTN_INLINE vf exp2(vf x) {
  static_assert(Degree == 3 || Degree == 6);
  x = max(splat(-127.0f), x);                     // where the exponent below comes out as zero
  const vf t = x + kShift, r = x - (t - kShift);  // the low bits of t are round(x)
  vf y;
  if constexpr (Degree == 6) {
    y = r * 0x1.41d334p-13f + 0x1.5f456ap-10f;
    y = y * r + 0x1.3b2dbcp-7f;
    y = y * r + 0x1.c6aed4p-5f;
    y = y * r + 0x1.ebfbdap-3f;
    y = y * r + 0x1.62e430p-1f;
  } else {
    y = r * 0x1.c2a218p-5f + 0x1.f00c4ep-3f;
    y = y * r + 0x1.62f5fap-1f;
  }
  y = y * r + 1.0f;
  return (vf)((vi)y + ((vi)t << 23));
}

// ln x for normal x > 0, within 2 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and ln m = 2 artanh((m - 1) / (m + 1)).
FASTATTN_INLINE vf ln(vf x) {
  const vi e = ((vi)x - 0x3f3504f3) >> 23;  // how many powers of two above sqrt(1/2)
  const vf m = (vf)((vi)x - (e << 23)), s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const vf series = s * t * (((t * (2.0f / 9) + 2.0f / 7) * t + 2.0f / 5) * t + 2.0f / 3);
  const vf power = __builtin_convertvector(e, vf);
  return power * 0.693359375f + (power * -2.12194440e-4f + (series + 2.0f * s)) +
         (x - x);  // NaN for NaN and infinity
}

// tanh x, to 3e-7 of its size: a minimax polynomial of the relative error where 1 - tanh would cancel.
FASTATTN_INLINE vf tanh(vf x) {
  const vf away = (vf)((vi)x & 0x7fffffff), z = x * x;
  vf y = z * -0x1.95001cp-8f + 0x1.582fb0p-6f;
  y = y * z + -0x1.b90946p-5f;
  y = y * z + 0x1.110c72p-3f;
  y = y * z + -0x1.555548p-2f;
  const vf near = x + x * z * y;
  const vf t = exp2<6>(away * -2.8853900817779268f), far = (1.0f - t) / (1.0f + t);
  return select(away < 0.5625f, near, (vf)((vi)far | ((vi)x & splat(INT32_MIN))));
}

// Transpose W vectors of W lanes in place: at distance H, swap the lanes and rows that differ in bit H.
template <int H, int... lane>
FASTATTN_INLINE void exchange(vf& a, vf& b, std::integer_sequence<int, lane...>) {
  const vf first = __builtin_shufflevector(a, b, ((lane & H) ? W + lane - H : lane)...);
  const vf second = __builtin_shufflevector(a, b, ((lane & H) ? W + lane : lane + H)...);
  a = first, b = second;
}
template <int H = W / 2>
FASTATTN_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r)
    if (!(r & H)) exchange<H>(rows[r], rows[r | H], std::make_integer_sequence<int, W>{});
  if constexpr (H > 1) transpose<H / 2>(rows);
}

template <int Half, int... lane>
FASTATTN_INLINE vf upper(vf v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, ((lane + Half) % W)...);
}
template <int Half = W / 2>
FASTATTN_INLINE float sum(vf v) {  // in a fixed order: halves onto each other
  if constexpr (Half == 0)
    return v[0];
  else
    return sum<Half / 2>(v + upper<Half>(v, std::make_integer_sequence<int, W>{}));
}

// x . y of two rows in float64.
typedef double vd __attribute__((vector_size(FASTATTN_SIMD_WIDTH)));
template <int First, int... lane>
FASTATTN_INLINE vd doubles(vf v, std::integer_sequence<int, lane...>) {
  return __builtin_convertvector(__builtin_shufflevector(v, v, (First + lane)...), vd);
}
template <class T>
float dot(const T* x, const T* y, int64_t n) {
  using Half = std::make_integer_sequence<int, W / 2>;
  vd total{};
  for (int64_t d = 0; d < n; d += W) {
    const vf a = n - d >= W ? load(x + d) : load(x + d, n - d),
             c = n - d >= W ? load(y + d) : load(y + d, n - d);
    total += doubles<0>(a, Half{}) * doubles<0>(c, Half{});
    total += doubles<W / 2>(a, Half{}) * doubles<W / 2>(c, Half{});
  }
  double sum = 0;
  for (int lane = 0; lane < W / 2; ++lane) sum += total[lane];
  return static_cast<float>(sum);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
