// What the backward pass makes of a tile of queries and a block of keys: P, dS, delta.  No include guard: isa.h reads
// it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// A tile of queries is several stripes of kTile lanes: dK and dV, which are read and written once a tile, then meet
// longer sums.
constexpr int kStripes = FASTATTN_SIMD_WIDTH == 64 ? 2 : 4;
constexpr int kQueries = kStripes * kTile;
constexpr int kMostBlocks = 4;  // of keys in a task: they share what it makes of a tile of queries

// What calls that are not plain keep of a tile of queries and a block of keys, each [J x kQueries]; absent ones are null.
struct Planes {
  Extras extras;
  float* slope = nullptr;   // of the softcap
  float* values = nullptr;  // what V is multiplied by, where that is not P
  float* ds = nullptr;      // gradients of logits, for biases
  float* dw = nullptr;      // and of the weight
  float* keep = nullptr;    // dropout alone, where dw needs it
};

// P^T = exp2(score(K Q^T) - lse), 0 where hidden: float32 in `p`, and in `pa` as the left operand of dV += P^T dO.
// As in Weights, the exponentials of a tile are taken between the multiplications of the next.
template <class Mul, class T, bool Plain>
struct Probabilities {
  using Mask = std::conditional_t<Plain, Band, Formula>;
  using Score = std::conditional_t<Plain, Scale, Bent>;
  float* p;
  T* pa;  // bf16 [J x T] where pairs are multiplied, else unused: p itself serves
  const float *lse, *lse_low;  // in Mul's unit, in two parts
  Words k;
  const float* q;
  int64_t words;
  const Mask& mask;
  const Score& score;
  const Clip& clip;
  const Planes& planes;
  int64_t plane;  // where the run begins in them
  int i0, j0;
  bool partial;
  const float *floor, *last_key;  // of what each query keeps (cpu.cc), or null
  float* x;                       // the logits that wait, less lse

  int last = 0;         // jobs that wait
  int64_t waiting = 0;  // their first key

  template <int NV>
  struct Jobs {
    const Probabilities& w;
    int first = 0, last = w.last;
    const float* factor = Plain ? nullptr : w.planes.extras.factor;
    float* values = Plain ? nullptr : w.planes.values;
    FASTATTN_INLINE void operator()(int i) const {
      const int v = i % NV * W, r = i / NV * 2;
      vf lo = power<Mul>(load(w.x + r * NV * W + v)),
         hi = power<Mul>(load(w.x + (r + 1) * NV * W + v));
      const int64_t at = (w.waiting + r) * kQueries + v;
      store(w.p + at, lo);
      store(w.p + at + kQueries, hi);
      if constexpr (!Plain) {
        if (w.clip.is_on()) lo = w.clip.weight(lo), hi = w.clip.weight(hi);
        if (factor) {
          lo *= load(factor + w.plane + at), hi *= load(factor + w.plane + at + kQueries);
        }
        if (values) store(values + w.plane + at, lo), store(values + w.plane + at + kQueries, hi);
      }
#if FASTATTN_HAS_BF16DOT
      if constexpr (Mul::kPack == 2) store_halves(w.pa + at, kQueries, to_bf16(lo, hi));
#endif
    }
  };
  template <int NV>
  FASTATTN_INLINE void finish() {
    settle(Jobs<NV>{*this});
  }

  FASTATTN_INLINE vf logit(vf dot, int64_t r, int v) const {
    if constexpr (Plain) {
      return settled(score.logit(dot));
    } else {
      const int64_t at = plane + r * kQueries + v * W;
      vf slope{};
      const vf s = settled(score.logit(dot, load(planes.extras.added + at), slope));
      if (planes.slope) store(planes.slope + at, slope);
      return floor ? kept(s, floor + v * W, last_key + v * W, j0 + r) : s;
    }
  }

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply_beside<Mul>(acc, k.at(r0, 0), q, kTile, words, Jobs<NV>{*this});
    waiting = r0, last = (R + 1) / 2 * NV;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        vf y = logit(acc[r][v], r0 + r, v) - load(lse + v * W);
        y -= load(lse_low + v * W);
        y = min(y, vf{});  // p is at most 1, whatever lse was rounded to
        if (Plain && partial)
          y = select(visible(mask, i0 + v * W, static_cast<int>(j0 + r0 + r)), y, splat(-kInf));
        store(x + (r * NV + v) * W, y);
        if constexpr (R == 1) store(x + (NV + v) * W, splat(-kInf));
      }
  }
};

// dS^T = P^T (V dO^T - delta + dlse), where P^T was: float32, or bf16 twice: by keys for dK, as pairs of keys for dQ.
template <class Mul, class T, bool Plain>
struct LogitGradients {
  float* p;   // P, then dS (Fma) or dS as pairs of keys (Bf16Dot), row j / 2
  T* da;      // dS by keys (Bf16Dot)
  float* db;  // dS as pairs of keys (Bf16Dot)
  const float *delta, *dlse;
  Words v;
  const float* dout;
  int64_t words;
  const Clip& clip;
  const Planes& planes;
  int64_t plane;

  // dL/d(the logit, its slope aside): P is p, and dO.V is dp.
  FASTATTN_INLINE vf gradient(vf p, vf dp, int64_t r, int v) const {
    if constexpr (!Plain) {
      const int64_t at = plane + r * kQueries + v * W;
      if (planes.dw) {
        const vf kept = planes.keep ? load(planes.keep + at) : splat(1.0f);
        store(planes.dw + at, (clip.is_on() ? clip.weight(p) : p) * dp * kept);
      }
      if (planes.extras.factor) dp *= load(planes.extras.factor + at);
      if (clip.is_on()) dp = clip.gradient(p, dp);
    }
    return p * ((dp - load(delta + v * W)) + load(dlse + v * W));
  }
  FASTATTN_INLINE vf bent(vf ds, int64_t r, int v) const {
    if constexpr (!Plain) {
      const int64_t at = plane + r * kQueries + v * W;
      if (planes.ds) store(planes.ds + at, ds);
      if (planes.slope) ds *= load(planes.slope + at);
    }
    return ds;
  }

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply<Mul>(acc, v.at(r0, 0), dout, kTile, words);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[r][v] =
            bent(gradient(load(p + (r0 + r) * kQueries + v * W), acc[r][v], r0 + r, v), r0 + r, v);
#pragma GCC unroll 8
    for (int r = 0; r < R; r += Mul::kPack)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if constexpr (Mul::kPack == 1) store(p + (r0 + r) * kQueries + v * W, acc[r][v]);
#if FASTATTN_HAS_BF16DOT
        if constexpr (Mul::kPack == 2) {  // an odd last key has a partner of zeros
          const vp rounded = to_bf16(acc[r][v], r + 1 < R ? acc[r + 1 < R ? r + 1 : r][v] : vf{});
          store_halves(da + (r0 + r) * kQueries + v * W, kQueries, rounded);
          store(db + (r0 + r) / 2 * kQueries + v * W, pairs(rounded));
        }
#endif
      }
  }
};

// delta_i += sum_j p_ij dp_ij over a block of keys.
template <class Mul, class T>
struct Deltas {
  const LogitGradients<Mul, T, false>& gradients;
  float* delta;

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply<Mul>(acc, gradients.v.at(r0, 0), gradients.dout, kTile, gradients.words);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      vf part{};  // a long sum is summed in parts
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        part += gradients.gradient(load(gradients.p + (r0 + r) * kQueries + v * W), acc[r][v],
                                   r0 + r, v);
      store(delta + v * W, load(delta + v * W) + part);
    }
  }
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
