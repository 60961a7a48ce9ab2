// attention, forward, CPU                                                 maths: README.md
//
// o_i = sum_j p_ij v_j / l_i,   p_ij = exp(s_ij - m_i),   s_ij = scale q_i.k_j,   one pass over j.
// (Where bf16 pairs are multiplied, logits are in base 2.)
//
//            queries i ->  Q^T [D x T]            Everything is held transposed: rows are keys, lanes are queries.
//   keys j   ┌───┐   ┌───────────────┐            K and V are read as they lie, one number broadcast at a time;
//     |      │K_j│ x │               │ = S^T      the softmax of a query never leaves its lane; P^T, stored where
//     v      └───┘   └───────────────┘ [J x T]    S^T was, is the right operand of O^T += V^T P^T without a move.
//   Dv  ┌────────┐   ┌───────────────┐
//       │ V_j^T  │ x │ P^T           │ = O^T [Dv x T], m and l [T]: one task, one tile of T queries (or a few)
//       └────────┘   └───────────────┘
//
//   numbers                      multiplied as             copied per block of keys
//   float32                      Fma, in place             nothing
//   bfloat16 (avx512bf16)        Bf16Dot, K in place       V as pairs of keys
//   bfloat16 elsewhere, float16  Fma                       K and V to float32
//
// A block is kKeys = 128 keys, cut into runs of 16 whose visible lanes are the same, so that a causal or windowed edge
// costs what it shows.  Its products are tiles of R rows by NV vectors of W lanes, summed in registers:
//
//   instruction set      W   T   R x NV  accumulators  why that many                            from: csrc/cpu/gemm.h
//   avx512bf16, avx512  16  64   4 x 4   16 of 32      1 FMA a cycle x latency 4, and 8 loads to 16 FMAs; the rest
//                                                      serve the exponentials of the tile before, taken meanwhile
//   avx2                 8  24   4 x 3   12 of 16      2 FMAs a cycle x latency 4 = 8; the rest hold operands, and
//                                                      exponentials come first
//   scalar               4  12   4 x 3   12 of 16      as avx2
//
// Measured: N 1024 to 4096, D 64 and 128, 2 threads of Zen 4: float32 78-92 % and float16 74-89 % of the FMA rate,
// bfloat16 70-86 % of the bf16-dot rate, least where causal at N 1024 (bench/results/epyc-zen4-2-cores.jsonl).
// Not done: keys split over threads where queries and heads are few.  Tried and refused: DESIGN.md.
// Assumes unit stride on the last axis (api.py makes it so) and D, Dv <= 256 (limits); check() and View refuse the rest.
#define FASTATTN_CPU_FILE "kernels/attention/cpu.cc"
#include "kernels/attention/op.h"

#include "csrc/core/masks.h"
#include "csrc/core/rows.h"
#include "csrc/cpu/isa.h"

#include "csrc/cpu/simd.h"

#include "csrc/core/scores.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/runs.h"

#include "kernels/attention/cpu.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// What a tile of queries keeps while the keys go by.  A weight is 2^(s - m): m is a logit among the first, renewed where
// one exceeds it by more than kRise (`limit`), which is rare: weights of at most e^8 cost no precision.
constexpr float kRise = 8;
struct Tile {
  float *qt, *ot, *p, *x;  // Q^T, O^T, a block's P^T, and some of its logits
  float *m, *limit;        // of each lane, 0 and -inf before its first key
  float *l, *block_sum;    // of its weights: in all, and in this block
  int64_t i0, i1, Dv;
};

template <class Mul>
FASTATTN_INLINE vf scaled_words(vf words, vf by) {
#if FASTATTN_HAS_BF16DOT
  if constexpr (Mul::kPack == 2) return pairs(to_bf16(low_half(words) * by, high_half(words) * by));
#endif
  return words * by;
}

// The rare part of Weights: in some lanes one of the logits x[rows x lanes] exceeds the limit.  `words` rows of P lie
// in the block.
template <class Mul>
[[gnu::noinline]] void raise(const Tile& t, const float* x, int rows, int lane, int lanes,
                             int64_t words) {
  for (int v = 0; v < lanes; v += W) {
    const vf limit = load(t.limit + lane + v), m = load(t.m + lane + v);
    vf top = limit;
    for (int r = 0; r < rows; ++r) top = max(top, load(x + r * lanes + v));
    const vi rises = top > limit, shrinks = rises & (limit != -kInf);
    const vf now = select(rises, top, m);
    store(t.m + lane + v, now);
    store(t.limit + lane + v, select(rises, now + kRise, limit));
    if (!any(shrinks)) continue;
    const vf by = select(shrinks, power<Mul, 6>(m - now), splat(1.0f));
    for (float* sum : {t.l, t.block_sum}) store(sum + lane + v, load(sum + lane + v) * by);
    for (int64_t d = 0; d < t.Dv; ++d) {
      float* const o = t.ot + d * kTile + lane + v;
      store(o, load(o) * by);
    }
    for (int64_t j = 0; j < words; ++j) {
      float* const p = t.p + j * kTile + lane + v;
      store(p, scaled_words<Mul>(load(p), by));
    }
  }
}

// P^T = exp2(score(K Q^T) - m), 0 where hidden, as words of the product to come, with the sums of its lanes.  The
// exponentials of a tile are taken between the multiplications of the next: job i takes two keys of one vector.
template <class Mul, class M, class Score>
struct Weights {
  const Tile& t;
  Words k;
  int64_t words;
  const M& mask;
  const Score& score;
  int lane;         // the run's first, in the tile
  int64_t row, j0;  // its first key, in the block and in all
  bool partial;
  float* x;  // the logits that wait, less m

  int first = 0, last = 0;  // jobs that wait
  int64_t waiting = 0;      // their first key, in the block

  template <int NV>
  struct Jobs {
    const Weights& w;
    int first = w.first, last = w.last;
    float* p = w.t.p + w.waiting / Mul::kPack * kTile + w.lane;
    FASTATTN_INLINE void operator()(int i) const {
      const int v = i % NV * W, r = i / NV * 2;
      const vf lo = power<Mul>(load(w.x + r * NV * W + v)),
               hi = power<Mul>(load(w.x + (r + 1) * NV * W + v));
      float* const sum = w.t.block_sum + w.lane + v;
      store(sum, (load(sum) + lo) + hi);
      if constexpr (Mul::kPack == 1) {
        store(p + r * kTile + v, lo);
        store(p + (r + 1) * kTile + v, hi);
      }
#if FASTATTN_HAS_BF16DOT
      if constexpr (Mul::kPack == 2) store(p + r / 2 * kTile + v, pairs(to_bf16(lo, hi)));
#endif
    }
  };
  template <int NV>
  FASTATTN_INLINE void finish() {
    settle(Jobs<NV>{*this});
    first = last = 0;
  }

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply_beside<Mul>(acc, k.at(r0, 0), t.qt + lane, kTile, words, Jobs<NV>{*this});
    first = last = 0, waiting = row + r0;
    // Four keys at a time whatever R is: which m a weight is taken with must not depend on the shape of the tile.
#pragma GCC unroll 2
    for (int g = 0; g < R; g += 4) weigh<(R < 4 ? R : 4), NV>(acc + g, r0 + g, x + g * NV * W);
  }

  template <int R, int NV>
  FASTATTN_INLINE void weigh(vf (*acc)[NV], int64_t r0, float* to) {
    vi rises{};
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const vf limit = load(t.limit + lane + v * W);
      vf top = limit;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r][v] = logit(score, acc[r][v]);
        if (partial)
          acc[r][v] = select(
              visible(mask, static_cast<int>(t.i0) + lane + v * W, static_cast<int>(j0 + r0 + r)),
              acc[r][v], splat(-kInf));
        top = max(top, acc[r][v]);
      }
      rises |= top > limit;
    }
    if (any(rises)) [[unlikely]] {
      settle(Jobs<NV>{*this});
      first = last;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(to + (r * NV + v) * W, acc[r][v]);
      raise<Mul>(t, to, R, lane, NV * W, (row + r0) / Mul::kPack);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const vf m = load(t.m + lane + v * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store(to + (r * NV + v) * W, acc[r][v] - m);
      if constexpr (R == 1)
        store(to + (NV + v) * W, splat(-kInf));  // a last key's partner weighs nothing
    }
    last += (R + 1) / 2 * NV;
  }
};

template <class T, class M, class Score>
struct Forward {
  using Mul = typename MulOf<T>::type;

  View<T, 4> o;
  View<float, 3> lse;
  View<const T, 4> q, k, v;
  M mask;
  Score score;
  int64_t B, Hq, group, Nq, Nk, D, Dv, tiles_per_task, tasks_per_head;

  void operator()(int64_t task) {
    const int64_t b = task / tasks_per_head / Hq, h = task / tasks_per_head % Hq, hk = h / group;
    const int64_t first =
        (tasks_per_head - 1 - task % tasks_per_head) * tiles_per_task;  // longest rows first
    const int64_t words = up(D, Mul::kPack) / Mul::kPack;
    constexpr int kMost = 4;
    Carver carver{static_cast<float*>(
        scratch(4 * (kMost * (words + Dv + 3) * kTile + kKeys * (kTile + up(D, W) + up(Dv, W)) +
                     10 * kTile + 16 * 32)))};
    float *p = carver.take((kKeys + 1) * kTile), *kc = carver.take(kKeys * up(D, W)),
          *vc = carver.take(kKeys * up(Dv, W)), *block_sum = carver.take(kTile),
          *x = carver.take(8 * kTile);

    Tile tiles[kMost];
    int count = 0;
    Range keys{Nk, 0};
    for (int64_t t = first; t < first + tiles_per_task && t * kTile < Nq; ++t) {
      Tile& tile = tiles[count++];
      tile.i0 = t * kTile, tile.i1 = std::min((t + 1) * kTile, Nq), tile.Dv = Dv;
      tile.qt = carver.take(words * kTile), tile.ot = carver.take(Dv * kTile), tile.p = p,
      tile.x = x;
      tile.m = carver.take(kTile), tile.limit = carver.take(kTile);
      tile.l = carver.take(kTile), tile.block_sum = block_sum;
      pack_lanes<Mul>(tile.qt, head(q, b, h), tile.i0, tile.i1, D);
      std::fill_n(tile.ot, Dv * kTile, 0.0f);
      std::fill_n(tile.m, kTile, 0.0f);
      std::fill_n(tile.limit, kTile, -kInf);
      std::fill_n(tile.l, kTile, 0.0f);
      const Range seen = mask.keys(tile.i0, tile.i1);
      keys = {std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
    }

    const Strided<const T> ks = head(k, b, hk), vs = head(v, b, hk);
    for (int64_t j0 = keys.begin / kKeys * kKeys; j0 < keys.end;
         j0 += kKeys) {  // blocks lie where they lie for all
      const int64_t j1 = std::min(j0 + kKeys, Nk);
      const Words kw = along_columns<Mul>(kc, ks, j0, j1, D);
      const Words vt = across_rows<Mul>(vc, vs, j0, j1, Dv);
      for (int t = 0; t < count; ++t) absorb(tiles[t], kw, vt, j0, j1, words);
    }
    for (int t = 0; t < count; ++t) finish(tiles[t], b, h, p);
  }

  // One block of keys into one tile of queries.
  void absorb(const Tile& tile, Words kw, Words vt, int64_t j0, int64_t j1, int64_t words) {
    const Runs runs = runs_of(mask, tile.i0, tile.i1, j0, j1);
    if (!runs.count) return;
    std::fill_n(tile.block_sum, kTile, 0.0f);
    for (const Run& run : runs) {
      Weights<Mul, M, Score> weights{
          tile,       kw.at(run.j0, 0), words,       mask,        score,
          run.v0 * W, run.j0,           j0 + run.j0, run.partial, tile.x};
      for_tiles(weights, run.keys(), run.vecs());
    }
    for (int64_t i = 0; i < kTile; i += W)
      store(tile.l + i, load(tile.l + i) + load(tile.block_sum + i));
    for (const Run& run : runs)
      accumulate<Mul>(tile.ot + run.v0 * W, kTile, vt.at(0, run.j0 / Mul::kPack),
                      tile.p + run.j0 / Mul::kPack * kTile + run.v0 * W, kTile,
                      up(run.keys(), Mul::kPack) / Mul::kPack, Dv, run.vecs());
  }

  void finish(const Tile& tile, int64_t b, int64_t h, float* s) {
    for (int64_t v = 0; tile.i0 + v * W < tile.i1; ++v) {
      const vf l = load(tile.l + v * W), m = load(tile.m + v * W);
      store(s + v * W, select(l == 0.0f, vf{}, 1.0f / l));
      const vf log = Mul::kUnit == 1
                         ? m + ln(l)
                         : m * 0.693359375f + (m * -2.12194440e-4f + ln(l));  // ln 2 in two parts
      float* const to = &lse(b, h, tile.i0 + v * W);
      const vf result = select(l == 0.0f, splat(-kInf), log);
      tile.i1 - tile.i0 - v* W >= W ? store(to, result)
                                    : store(to, result, tile.i1 - tile.i0 - v * W);
    }
    unpack_lanes(head(o, b, h), tile.i0, tile.i1, tile.ot, Dv, s);
  }
};

struct ForwardOf {
  Tensor o, lse, q, k, v;
  float scale;
  template <class T, class M>
  void operator()(Type<T>, const M& mask) const {
    const int64_t Hq = q.shape[1], Nq = q.shape[2], heads = q.shape[0] * Hq,
                  tiles = up(Nq, kTile) / kTile;
    const int64_t share =
        heads * tiles / (4 * num_threads());  // several tiles share the copies of a key block
    const int64_t per_task = std::is_same_v<T, float> ? 1 : std::clamp<int64_t>(share, 1, 4);
    const int64_t B = q.shape[0], Hk = k.shape[1], Nk = k.shape[2], D = q.shape[3], Dv = v.shape[3];
    Forward<T, M, Scale> f{View<T, 4>("o", o, {B, Hq, Nq, Dv}),
                           View<float, 3>("lse", lse, {B, Hq, Nq}),
                           View<const T, 4>("q", q, {B, Hq, Nq, D}),
                           View<const T, 4>("k", k, {B, Hk, Nk, D}),
                           View<const T, 4>("v", v, {B, Hk, Nk, Dv}),
                           mask,
                           Scale{scale * MulOf<T>::type::kUnit},
                           q.shape[0],
                           Hq,
                           Hq / std::max<int64_t>(k.shape[1], 1),
                           Nq,
                           k.shape[2],
                           q.shape[3],
                           v.shape[3],
                           per_task,
                           up(tiles, per_task) / per_task};
    parallel_for(heads * f.tasks_per_head, f);
  }
};

}  // namespace

void attention_fwd(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Ints mask, double scale) {
  check(q, k, v, mask);
  const ForwardOf run{o, lse, q, k, v, static_cast<float>(scale)};
  std::visit(WithMask<ForwardOf>{run, q.dtype}, make_mask(mask, q.shape[2], k.shape[2]));
}

}  // namespace fastattn::cpu::FASTATTN_ISA
