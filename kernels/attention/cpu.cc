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
// Calls that are not plain (Options::is_plain) have one plane [J x T] of numbers added to logits, -inf where hidden, and
// one of factors of weights, made for each block and tile before the products (csrc/cpu/terms.h).
// One file because a task, its tile and its tile's weights change together.
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

#include "csrc/core/philox.h"
#include "csrc/core/scores.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/runs.h"
#include "csrc/cpu/terms.h"

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
  const Extras* extras;  // of calls that are not plain
  float *floor,
      *last;  // of each lane, the least logit kept and the last key of that logit (Floors); or null
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
template <class Mul, bool Plain>
struct Weights {
  using Mask = std::conditional_t<Plain, Band, Formula>;
  using Score = std::conditional_t<Plain, Scale, Bent>;
  const Tile& t;
  Words k;
  int64_t words;
  const Mask& mask;
  const Score& score;
  const Clip& clip;
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
    const float* factor = Plain ? nullptr : w.t.extras->factor;
    FASTATTN_INLINE void operator()(int i) const {
      const int v = i % NV * W, r = i / NV * 2;
      vf lo = power<Mul>(load(w.x + r * NV * W + v)),
         hi = power<Mul>(load(w.x + (r + 1) * NV * W + v));
      float* const sum = w.t.block_sum + w.lane + v;
      store(sum, (load(sum) + lo) + hi);
      if constexpr (!Plain) {
        if (w.clip.is_on()) lo = w.clip.weight(lo), hi = w.clip.weight(hi);
        if (factor) {
          const float* const by = factor + (w.waiting + r) * kTile + w.lane + v;
          lo *= load(by), hi *= load(by + kTile);
        }
      }
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

  FASTATTN_INLINE vf logit(vf dot, int64_t r, int v) const {
    if constexpr (Plain) {
      const vf s = settled(score.logit(dot));
      if (!partial) return s;
      return select(visible(mask, static_cast<int>(t.i0) + lane + v * W, static_cast<int>(j0 + r)),
                    s, splat(-kInf));
    } else {
      vf slope;
      const int64_t at = lane + v * W;
      const vf s = settled(score.logit(dot, load(t.extras->added + (row + r) * kTile + at), slope));
      return t.floor ? kept(s, t.floor + at, t.last + at, j0 + r) : s;
    }
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
        acc[r][v] = logit(acc[r][v], r0 + r, v);
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

// The logits of a run, to rows of kTile lanes: what a query chooses its greatest from.
template <class Mul>
struct Logits {
  const Tile& t;
  Words k;
  int64_t words;
  const Bent& score;
  int lane;
  int64_t row;
  float* to;

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {}, slope;
    multiply<Mul>(acc, k.at(r0, 0), t.qt + lane, kTile, words);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = (row + r0 + r) * kTile + lane + v * W;
        store(to + at, settled(score.logit(acc[r][v], load(t.extras->added + at), slope)));
      }
  }
};

// Of each lane of x [n x kTile], the k-th greatest number, and which row is the last to be kept of those equal to it:
// by halving the range of floats, whose bits are in their order.
inline void find_floors(const float* x, int64_t n, int64_t k, int64_t first, float* floor,
                        float* last) {
  const auto ordered = [](vi bits) { return bits ^ ((bits >> 31) & INT32_MAX); };  // and back
  const vi want = splat(static_cast<int>(std::min<int64_t>(k, INT32_MAX)));
  vi lo[kVecs], hi[kVecs], count[kVecs];
  vf at[kVecs];
  const auto count_all = [&](auto compare) {
    for (vi& c : count) c = vi{};
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) count[v] -= compare(load(x + j * kTile + v * W), at[v]);
  };
  for (int v = 0; v < kVecs; ++v)
    lo[v] = ordered((vi)splat(-kInf)), hi[v] = ordered((vi)splat(kInf)) + 1;
  for (bool found = false; !found;) {
    for (int v = 0; v < kVecs; ++v) at[v] = (vf)ordered((lo[v] & hi[v]) + ((lo[v] ^ hi[v]) >> 1));
    count_all([](vf a, vf b) { return a >= b; });
    found = true;
    for (int v = 0; v < kVecs; ++v) {
      const vi middle = ordered((vi)at[v]), enough = count[v] >= want;
      lo[v] = select(enough, middle, lo[v]);
      hi[v] = select(enough, hi[v], middle);
      hi[v] = select(count[v] == want, middle + 1, hi[v]);
      found &= !any(lo[v] + 1 < hi[v]);
    }
  }
  for (int v = 0; v < kVecs; ++v) at[v] = (vf)ordered(lo[v]);
  count_all([](vf a, vf b) { return a > b; });
  for (int v = 0; v < kVecs; ++v) {
    const vi equal = want - count[v];  // as many are kept
    vi met{}, end = splat(INT32_MAX);
    for (int64_t j = 0; j < n; ++j) {
      met -= load(x + j * kTile + v * W) == at[v];
      end = select((met == equal) & (end == INT32_MAX), splat(static_cast<int>(first + j)), end);
    }
    store(floor + v * W, at[v]);
    store(last + v * W, (vf)end);
  }
}

template <class T, bool Plain>
struct Forward {
  using Mul = typename MulOf<T>::type;
  using Mask = typename Weights<Mul, Plain>::Mask;
  using Score = typename Weights<Mul, Plain>::Score;

  View<T, 4> o;
  View<float, 3> lse;
  View<float, 4> rest;
  View<const T, 4> q, k, v;
  const Options& options;
  Score score;
  int64_t D, Dv, tiles_per_task, tasks_per_head;

  void operator()(int64_t task) {
    const Options& o = options;
    const int64_t head = task / tasks_per_head, b = head / o.Hq, h = head % o.Hq,
                  hk = o.key_head(h);
    const Sequence s =
        o.sequences.at(b, task % tasks_per_head, o.sequences.cu_q, tiles_per_task * kTile);
    const int64_t parts = up(s.Nq, tiles_per_task * kTile) / (tiles_per_task * kTile);
    if (s.part >= parts) return;
    const int64_t first = (parts - 1 - s.part) * tiles_per_task;  // longest rows first
    const int64_t words = up(D, Mul::kPack) / Mul::kPack;
    constexpr int kMost = 4;
    constexpr int64_t kPlane = (kKeys + 1) * kTile;
    Carver carver{static_cast<float*>(
        scratch(4 * (kMost * (words + Dv + 3) * kTile + (Plain ? 1 : 3) * kPlane +
                     (o.topk ? (up(s.Nk, kKeys) + 2) * kTile : 0) + kKeys * (up(D, W) + up(Dv, W)) +
                     10 * kTile + 20 * 32)))};
    float *p = carver.take(kPlane), *kc = carver.take(kKeys * up(D, W)),
          *vc = carver.take(kKeys * up(Dv, W)), *block_sum = carver.take(kTile),
          *x = carver.take(8 * kTile);
    Extras extras;
    if constexpr (!Plain) {
      extras.begin(o, s, h);
      extras.added = carver.take(kPlane);
      if (o.has_factor()) extras.factor = carver.take(kPlane);
    }

    const Mask mask = mask_of<Mask>(o, s, h);
    Tile tiles[kMost];
    int count = 0;
    Range keys{s.Nk, 0};
    for (int64_t t = first; t < first + tiles_per_task && t * kTile < s.Nq; ++t) {
      Tile& tile = tiles[count++];
      tile.i0 = t * kTile, tile.i1 = std::min((t + 1) * kTile, s.Nq), tile.Dv = Dv;
      tile.qt = carver.take(words * kTile), tile.ot = carver.take(Dv * kTile), tile.p = p,
      tile.x = x;
      tile.m = carver.take(kTile), tile.limit = carver.take(kTile);
      tile.l = carver.take(kTile), tile.block_sum = block_sum;
      tile.extras = &extras, tile.floor = tile.last = nullptr;
      pack_lanes<Mul>(tile.qt, o.queries(q, s, h), tile.i0, tile.i1, D);
      std::fill_n(tile.ot, Dv * kTile, 0.0f);
      std::fill_n(tile.m, kTile, 0.0f);
      std::fill_n(tile.limit, kTile, -kInf);
      std::fill_n(tile.l, kTile, 0.0f);
      const Range seen = mask.keys(tile.i0, tile.i1);
      keys = {std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
    }

    if constexpr (!Plain)
      if (o.topk)
        for (int t = 0; t < count; ++t) choose(tiles[t], mask, s, h, kc, carver);

    // Clipping takes p itself: then the denominator is found first, and becomes m.
    const bool clips = !Plain && o.clip.is_on();
    for (int pass = clips ? 0 : 1; pass < 2; ++pass) {
      const Strided<const T> ks = o.keys(k, s, hk), vs = o.keys(v, s, hk);
      for (int64_t j0 = keys.begin / kKeys * kKeys; j0 < keys.end;
           j0 += kKeys) {  // blocks lie where they lie for all
        const int64_t j1 = std::min(j0 + kKeys, s.Nk);
        if (!Plain && is_hidden(mask, tiles, count, j0, j1)) continue;
        const Words kw = along_columns<Mul>(kc, ks, j0, j1, D);
        const Words vt = pass ? across_rows<Mul>(vc, vs, j0, j1, Dv) : Words{};
        for (int t = 0; t < count; ++t)
          absorb(tiles[t], mask, pass ? o.clip : Clip{}, kw, vt, j0, j1, words, pass ? Dv : 0);
      }
      for (int t = 0; t < count; ++t) {
        if (pass && clips)
          std::fill_n(p, kTile, 1.0f);
        else
          divide(tiles[t], s, h, p);
        if (!pass)
          settle_weights(tiles[t], s, h);
        else
          unpack_lanes(o.outputs(this->o, s, h), tiles[t].i0, tiles[t].i1, tiles[t].ot, Dv, p);
      }
    }
  }

  // Which logits a tile keeps.
  void choose(Tile& tile, const Mask& mask, const Sequence& s, int64_t h, float* kc,
              Carver carver) {
    const Strided<const T> ks = options.keys(k, s, options.key_head(h));
    const Range keys = mask.keys(tile.i0, tile.i1);
    const int64_t from = keys.begin / kKeys * kKeys, to = std::max(keys.end, from),
                  words = up(D, Mul::kPack) / Mul::kPack;
    float *floor = carver.take(kTile), *last = carver.take(kTile),
          *logits = carver.take((to - from) * kTile);
    std::fill_n(logits, (to - from) * kTile, -kInf);
    for (int64_t j0 = from; j0 < to; j0 += kKeys) {
      const int64_t j1 = std::min(j0 + kKeys, s.Nk);
      const Runs runs = runs_of(mask, tile.i0, tile.i1, j0, j1);
      if (!runs.count) continue;
      const Words kw = along_columns<Mul>(kc, ks, j0, j1, D);
      tile.extras->read(mask, runs, kTile, tile.i0, tile.i1, j0, j1);
      for (const Run& run : runs) {
        Logits<Mul> f{
            tile, kw.at(run.j0, 0), words, score, run.v0 * W, run.j0, logits + (j0 - from) * kTile};
        for_tiles(f, run.keys(), run.vecs());
      }
    }
    find_floors(logits, to - from, options.topk, from, floor, last);
    tile.floor = floor, tile.last = last;
    for (int64_t i = tile.i0; i < tile.i1; ++i) {
      rest(s.row, h, 1, s.q0 + i) = floor[i - tile.i0];
      rest(s.row, h, 2, s.q0 + i) = last[i - tile.i0];
    }
  }

  static bool is_hidden(const Mask& mask, const Tile* tiles, int count, int64_t j0, int64_t j1) {
    if constexpr (!Plain) return mask.seen(tiles[0].i0, tiles[count - 1].i1, j0, j1) == Seen::none;
    return false;
  }

  // One block of keys into one tile of queries.
  void absorb(const Tile& tile, const Mask& mask, const Clip& clip, Words kw, Words vt, int64_t j0,
              int64_t j1, int64_t words, int64_t Dv) {
    const Runs runs = runs_of(mask, tile.i0, tile.i1, j0, j1);
    if (!runs.count) return;
    if constexpr (!Plain) tile.extras->read(mask, runs, kTile, tile.i0, tile.i1, j0, j1);
    std::fill_n(tile.block_sum, kTile, 0.0f);
    for (const Run& run : runs) {
      Weights<Mul, Plain> weights{tile,  kw.at(run.j0, 0), words,  mask,        score,
                                  clip,  run.v0 * W,       run.j0, j0 + run.j0, run.partial,
                                  tile.x};
      for_tiles(weights, run.keys(), run.vecs());
    }
    for (int64_t i = 0; i < kTile; i += W)
      store(tile.l + i, load(tile.l + i) + load(tile.block_sum + i));
    if (!Dv) return;
    for (const Run& run : runs)
      accumulate<Mul>(tile.ot + run.v0 * W, kTile, vt.at(0, run.j0 / Mul::kPack),
                      tile.p + run.j0 / Mul::kPack * kTile + run.v0 * W, kTile,
                      up(run.keys(), Mul::kPack) / Mul::kPack, Dv, run.vecs());
  }

  // lse and the rest of it, and in `factor` what o^T is to be multiplied by.
  void divide(const Tile& tile, const Sequence& s, int64_t h, float* factor) {
    for (int64_t v = 0; tile.i0 + v * W < tile.i1; ++v) {
      const vf l = load(tile.l + v * W), m = load(tile.m + v * W);
      vf by = select(l == 0.0f, vf{}, 1.0f / l);
      vf low{}, log = Mul::kUnit == 1
                          ? sum(m, ln(l), low)
                          : m * 0.693359375f + (m * -2.12194440e-4f + ln(l));  // ln 2 in two parts
      log = select(l == 0.0f, splat(-kInf), log);
      if (!Plain && options.sinks) {
        const vf sink = splat(options.sinks[h]), top = max(log, sink);
        vf rounded, all = sum(top, ln(natural(log - top) + natural(sink - top)), rounded);
        all = select(top == -kInf, top, all);
        const vf share = select(log == -kInf, vf{}, natural(log - all));
        by *= share, log = all, low = low * share + rounded;
      }
      low = select((log - log == 0.0f) & (low == low), low, vf{});
      store(factor + v * W, by);
      const int64_t at = s.q0 + tile.i0 + v * W, left = tile.i1 - tile.i0 - v * W;
      for (auto& [to, x] :
           {std::pair{&lse(s.row, h, at), log}, std::pair{&rest(s.row, h, 0, at), low}})
        left >= W ? store(to, x) : store(to, x, left);
    }
  }
  // a + b, and in `low` what rounding took from it (Knuth).
  static vf sum(vf a, vf b, vf& low) {
    const vf total = a + b, of_b = total - a;
    low = (a - (total - of_b)) + (b - of_b);
    return total;
  }
  static vf natural(vf x) { return exp2<6>(x * 1.4426950408889634f); }

  // The weights to come are those of the softmax itself.
  void settle_weights(const Tile& tile, const Sequence& s, int64_t h) {
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const float log = tile.i0 + lane < tile.i1 ? lse(s.row, h, s.q0 + tile.i0 + lane) : -kInf;
      tile.m[lane] = log == -kInf ? 0.0f : log * Mul::kUnit;
      tile.limit[lane] = kInf;
      tile.l[lane] = 0;
    }
    std::fill_n(tile.ot, Dv * kTile, 0.0f);
  }
};

struct ForwardOf {
  Tensor o, lse, rest, q, k, v;
  const Options& options;
  template <class T, bool Plain>
  void operator()(Type<T>, Value<Plain>) const {
    const Sequences& sequences = options.sequences;
    const int64_t B = q.shape[0], Hq = q.shape[1], Hk = k.shape[1], Nq = q.shape[2],
                  Nk = k.shape[2], D = q.shape[3], Dv = v.shape[3], slots = sequences.Nq;
    const int64_t share = B * Hq * sequences.parts(slots, kTile) /
                          (4 * num_threads());  // several tiles share the copies of a key block
    const int64_t per_task =
        std::is_same_v<T, float> || options.topk ? 1 : std::clamp<int64_t>(share, 1, 4);
    Forward<T, Plain> f{View<T, 4>("o", o, {B, Hq, options.num_outputs(), Dv}),
                        View<float, 3>("lse", lse, {B, Hq, slots}),
                        View<float, 4>("rest", rest, {B, Hq, options.topk ? 3 : 1, slots}),
                        View<const T, 4>("q", q, {B, Hq, Nq, D}),
                        View<const T, 4>("k", k, {B, Hk, Nk, D}),
                        View<const T, 4>("v", v, {B, Hk, Nk, Dv}),
                        options,
                        {},
                        D,
                        Dv,
                        per_task,
                        sequences.parts(slots, per_task * kTile)};
    f.score = score_of<Plain, typename MulOf<T>::type>(options);
    if (!options.by_slot && !options.slots_q.covers) clear(f.o);
    parallel_for(B * Hq * f.tasks_per_head, f);
  }
};

}  // namespace

void attention_fwd(Tensor o, Tensor lse, Tensor rest, Tensor q, Tensor k, Tensor v,
                   AttentionExtras extras, Ints mask, Floats numbers) {
  const Options options(q, k, v, extras, mask, numbers);
  dispatch_kind(q, options, ForwardOf{o, lse, rest, q, k, v, options});
}

}  // namespace fastattn::cpu::FASTATTN_ISA
