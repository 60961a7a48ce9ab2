// attention, backward, CPU                                                maths: README.md, section 3
//
// The picture is that of cpu.cc, with P recomputed from lse and five products.  One task owns a few blocks of keys,
// with their dK and dV, and walks the tiles of queries:
//
//   S^T = K Q^T, P^T = exp(S^T - lse)       dP^T = V dO^T, dS^T = P^T (dP^T - delta + dlse)     lanes are queries
//   dV += P^T dO                            dK += dS^T Q                                        lanes are columns
//   dQ^T += K^T dS^T                        in order of key blocks, each waiting for its turn, so that the sum is the
//                                           same at any number of threads and no memory is spent on it
//
// A tile of queries is several stripes, each a tile of cpu.cc; all five products are made in the registers of cpu.cc:
//
//   instruction set      W   queries      accumulators  why more queries than forward    from: csrc/cpu/gemm.h
//   avx512bf16, avx512  16  2 x 64 = 128  16 of 32      dK and dV are read and written once a tile of queries:
//   avx2                 8  4 x 24 =  96  12 of 16      the longer the sum over its lanes, the less often
//   scalar               4  4 x 12 =  48  12 of 16
//
// A block is 128 keys, or 256 where Nk >= 1024, to pack less often; a task owns up to four, which share a packed tile.
//
// Measured: N 1024 to 4096, D 64 and 128, 2 threads of Zen 4: float32 79-92 % and float16 65-91 % of the FMA rate,
// bfloat16 67-87 % of the bf16-dot rate, least where causal at N 1024 (bench/results/epyc-zen4-2-cores.jsonl).
// Not done: queries split over threads where blocks of keys are few.  Tried and refused: DESIGN.md.
// Assumes unit stride on the last axis (api.py, op.py) and D, Dv <= 256 (limits); check() and View refuse the rest.
// One file because every part shares the tile.
#define FASTATTN_CPU_FILE "kernels/attention/cpu_backward.cc"
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

// A tile of queries is several stripes of kTile lanes: dK and dV, which are read and written once a tile, then meet
// longer sums.
constexpr int kStripes = FASTATTN_SIMD_WIDTH == 64 ? 2 : 4;
constexpr int kQueries = kStripes * kTile;
constexpr int kMostBlocks = 4;  // of keys in a task: they share what it makes of a tile of queries

// P^T = exp2(score(K Q^T) - lse), 0 where hidden: float32 in `p`, and in `pa` as the left operand of dV += P^T dO.
// As in Weights, the exponentials of a tile are taken between the multiplications of the next.
template <class Mul, class T, class M, class Score>
struct Probabilities {
  float* p;
  T* pa;  // bf16 [J x T] where pairs are multiplied, else unused: p itself serves
  const float *lse,
      *lse_low;  // in Mul's unit; in base 2 its rounding is the second part
  Words k;
  const float* q;
  int64_t words;
  const M& mask;
  const Score& score;
  int i0, j0;
  bool partial;
  float* x;  // the logits that wait, less lse

  int last = 0;         // jobs that wait
  int64_t waiting = 0;  // their first key

  template <int NV>
  struct Jobs {
    const Probabilities& w;
    int first = 0, last = w.last;
    FASTATTN_INLINE void operator()(int i) const {
      const int v = i % NV * W, r = i / NV * 2;
      const vf lo = power<Mul>(load(w.x + r * NV * W + v)),
               hi = power<Mul>(load(w.x + (r + 1) * NV * W + v));
      const int64_t at = (w.waiting + r) * kQueries + v;
      store(w.p + at, lo);
      store(w.p + at + kQueries, hi);
#if FASTATTN_HAS_BF16DOT
      if constexpr (Mul::kPack == 2) store_halves(w.pa + at, kQueries, to_bf16(lo, hi));
#endif
    }
  };
  template <int NV>
  FASTATTN_INLINE void finish() {
    settle(Jobs<NV>{*this});
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
        vf y = logit(score, acc[r][v]) - load(lse + v * W);
        if (Mul::kUnit != 1) y -= load(lse_low + v * W);
        y = min(y, vf{});  // p is at most 1, whatever lse was rounded to
        if (partial)
          y = select(visible(mask, i0 + v * W, static_cast<int>(j0 + r0 + r)), y, splat(-kInf));
        store(x + (r * NV + v) * W, y);
        if constexpr (R == 1) store(x + (NV + v) * W, splat(-kInf));
      }
  }
};

// dS^T = P^T (V dO^T - delta + dlse), where P^T was: float32, or bf16 twice: by keys for dK, as pairs of keys for dQ.
template <class Mul, class T, class Score>
struct LogitGradients {
  float* p;   // P, then dS (Fma) or dS as pairs of keys (Bf16Dot), row j / 2
  T* da;      // dS by keys (Bf16Dot)
  float* db;  // dS as pairs of keys (Bf16Dot)
  const float *delta, *dlse;
  Words v;
  const float* dout;
  int64_t words;
  const Score& score;

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply<Mul>(acc, v.at(r0, 0), dout, kTile, words);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[r][v] = score.gradient(load(p + (r0 + r) * kQueries + v * W) *
                                   ((acc[r][v] - load(delta + v * W)) + load(dlse + v * W)));
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

// Floats of workspace a head: dQ by tiles, delta, and a turn for each tile.
inline int64_t work_size(int64_t Nq, int64_t D) {
  static_assert(kTile <= 64);
  return ((Nq + 64) * D + Nq + Nq / 8 + 16) / 16 * 16;
}

template <class T, class M>
struct Backward {
  using Mul = typename MulOf<T>::type;

  View<T, 4> dq, dk, dv;
  View<float, 3> work;
  View<const T, 4> q, k, v, dout;
  View<const float, 3> lse;
  const M& mask;
  Scale score;
  float scale;
  int64_t Hk, group, Nq, Nk, D, Dv, block, blocks, blocks_per_task, heads, heads_at_once;
  std::optional<View<const float, 3>> dlse;

  // A head's part of the workspace: dQ by tiles, delta, and whose turn it is in each tile.
  float* dq_tiles(int64_t b, int64_t h) const { return work.at(b, h); }
  float* delta(int64_t b, int64_t h) const { return work.at(b, h) + (Nq + 64) * D; }
  std::atomic_ref<int32_t> turn(int64_t b, int64_t h, int64_t t) const {
    return std::atomic_ref<int32_t>(reinterpret_cast<int32_t*>(delta(b, h) + Nq)[t]);
  }

  // The key blocks that a tile of queries sees: they add to its dQ in this order.
  Range blocks_of(int64_t i0, int64_t i1) const {
    const Range keys = mask.keys(i0, i1);
    return keys.empty() ? Range{0, 0} : Range{keys.begin / block, (keys.end + block - 1) / block};
  }

  struct Block {  // what one block of keys keeps while the queries go by
    Words k, v, kt;
    float *dk, *dv;
    int64_t index, j0, j1;
  };
  struct
      Tile {  // q and do by lanes (each stripe of its own) and by rows; of each lane; and of one block, P and dS
    float *qt, *dot, *qr, *dor, *lse, *lse_low, *delta, *dlse, *p, *db, *x;
    T *pa, *da;
  };

  void operator()(int64_t task) {
    // A few heads at a time, block after block: by the time a block's turn comes, the one before it is long done.
    const int64_t tasks_per_head = up(blocks, blocks_per_task) / blocks_per_task,
                  set = task / (heads_at_once * tasks_per_head) * heads_at_once,
                  at_once = std::min(heads_at_once, heads - set);
    const int64_t in_set = task - set * tasks_per_head, head_index = set + in_set % at_once,
                  first = in_set / at_once * blocks_per_task,
                  count = std::min(blocks_per_task, blocks - first);
    const int64_t b = head_index / Hk, hk = head_index % Hk;
    const int64_t wide = up(D, W), wide_v = up(Dv, W);
    Carver carver{static_cast<float*>(
        scratch(4 * (count * 3 * block * (wide + wide_v) + 2 * kQueries * (wide + wide_v) +
                     ((block + 1) * 4 + 4) * kQueries + 8 * kTile + (count + 1) * 16 * 32)))};
    const Strided<const T> ks = head(k, b, hk), vs = head(v, b, hk);
    Block held[kMostBlocks];
    for (int64_t i = 0; i < count; ++i) {
      Block& x = held[i];
      x.index = first + i, x.j0 = x.index * block, x.j1 = std::min(x.j0 + block, Nk);
      x.k = along_columns<Mul>(carver.take(block * wide), ks, x.j0, x.j1, D);
      x.v = along_columns<Mul>(carver.take(block * wide_v), vs, x.j0, x.j1, Dv);
      x.kt = across_rows<Mul>(carver.take(block * wide), ks, x.j0, x.j1, D);
      x.dk = carver.take(block * wide), x.dv = carver.take(block * wide_v);
      std::fill_n(x.dk, block * wide, 0.0f);
      std::fill_n(x.dv, block * wide_v, 0.0f);
    }
    Tile tile;
    for (float** part : {&tile.qt, &tile.qr}) *part = carver.take(wide * kQueries);
    for (float** part : {&tile.dot, &tile.dor}) *part = carver.take(wide_v * kQueries);
    for (float** part : {&tile.lse, &tile.lse_low, &tile.delta, &tile.dlse})
      *part = carver.take(kQueries);
    for (float** part : {&tile.p, &tile.db}) *part = carver.take((block + 1) * kQueries);
    for (T** part : {&tile.pa, &tile.da})
      *part = reinterpret_cast<T*>(carver.take((block + 1) * kQueries));
    tile.x = carver.take(8 * kTile);

    const Range seen = mask.queries(held[0].j0, held[count - 1].j1);
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t t = (seen.end + kQueries - 1) / kQueries; t-- > seen.begin / kQueries;) {
        const Range order = blocks_of(t * kQueries, std::min((t + 1) * kQueries, Nq));
        const int64_t from = std::max(order.begin, first), to = std::min(order.end, first + count);
        if (from < to) fetch(tile, b, h, t);
        for (int64_t i = from; i < to; ++i) absorb(held[i - first], tile, b, h, t, order);
      }

    for (int64_t i = 0; i < count; ++i) {
      store_rows(head(dk, b, hk), held[i].j0, held[i].j1, held[i].dk, D, scale);
      store_rows(head(dv, b, hk), held[i].j0, held[i].j1, held[i].dv, Dv, 1);
    }
  }

  void fetch(const Tile& x, int64_t b, int64_t h, int64_t t) {
    const int64_t i0 = t * kQueries, i1 = std::min(i0 + kQueries, Nq);
    const Strided<const T> qs = head(q, b, h), dos = head(dout, b, h);
    for (int64_t i = 0; i0 + i < i1; i += kTile) {
      pack_lanes<Mul>(x.qt + i * up(D, W), qs, i0 + i, std::min(i0 + i + kTile, i1), D);
      pack_lanes<Mul>(x.dot + i * up(Dv, W), dos, i0 + i, std::min(i0 + i + kTile, i1), Dv);
    }
    pack_rows<Mul>(x.qr, qs, i0, i1, up(i1 - i0, W), D);
    pack_rows<Mul>(x.dor, dos, i0, i1, up(i1 - i0, W), Dv);
    for (int i = 0; i < kQueries;
         ++i) {  // lanes past the end, and rows that see nothing, have P = 0
      const double l = i0 + i < i1 ? lse(b, h, i0 + i) * static_cast<double>(Mul::kUnit) : -kInf;
      x.lse[i] = l == -kInf ? kInf : static_cast<float>(l);
      x.lse_low[i] = l == -kInf ? 0.0f : static_cast<float>(l - x.lse[i]);
      x.delta[i] = i0 + i < i1 ? delta(b, h)[i0 + i] : 0.0f;
      x.dlse[i] = dlse && i0 + i < i1 ? (*dlse)(b, h, i0 + i) : 0.0f;
    }
  }

  // One tile of queries into one block of keys, and the block's share of the tile's dQ.
  void absorb(const Block& x, const Tile& tile, int64_t b, int64_t h, int64_t t, Range order) {
    const int64_t i0 = t * kQueries, i1 = std::min(i0 + kQueries, Nq), wide = up(D, W),
                  wide_v = up(Dv, W);
    const Runs runs = runs_of(mask, i0, i1, x.j0, x.j1);
    for (const Run& run : runs) {
      const int64_t first = run.v0 * W / Mul::kPack,
                    lanes = run.vecs() * W / Mul::kPack;  // words of the queries
      for (int v = run.v0; v < run.v1; v = next(run, v)) {
        const int64_t lane = v * W, at = run.j0 * kQueries + lane;
        Probabilities<Mul, T, M, Scale> probabilities{tile.p + at,
                                                      tile.pa + at,
                                                      tile.lse + lane,
                                                      tile.lse_low + lane,
                                                      x.k.at(run.j0, 0),
                                                      in_stripe(tile.qt, wide, v),
                                                      up(D, Mul::kPack) / Mul::kPack,
                                                      mask,
                                                      score,
                                                      static_cast<int>(i0 + lane),
                                                      static_cast<int>(x.j0 + run.j0),
                                                      run.partial,
                                                      tile.x};
        for_tiles(probabilities, run.keys(), next(run, v) - v);
      }
      accumulate<Mul>(x.dv + run.j0 * wide_v, wide_v, left(tile.p, tile.pa).at(run.j0, first),
                      tile.dor + first * wide_v, wide_v, lanes, run.keys(),
                      static_cast<int>(wide_v / W));
      for (int v = run.v0; v < run.v1; v = next(run, v)) {
        const int64_t lane = v * W, at = run.j0 * kQueries + lane;
        LogitGradients<Mul, T, Scale> gradients{tile.p + at,
                                                tile.da + at,
                                                tile.db + run.j0 / 2 * kQueries + lane,
                                                tile.delta + lane,
                                                tile.dlse + lane,
                                                x.v.at(run.j0, 0),
                                                in_stripe(tile.dot, wide_v, v),
                                                up(Dv, Mul::kPack) / Mul::kPack,
                                                score};
        for_tiles(gradients, run.keys(), next(run, v) - v);
      }
      accumulate<Mul>(x.dk + run.j0 * wide, wide, left(tile.p, tile.da).at(run.j0, first),
                      tile.qr + first * wide, wide, lanes, run.keys(), static_cast<int>(wide / W));
    }

    // dQ is a sum over key blocks, in their order whichever thread holds them: wait for the turn.  Tasks begin in
    // order (parallel_for), so the block waited for is always being worked on.
    const std::atomic_ref<int32_t> turn = this->turn(b, h, t);
    for (int spins = 0; turn.load(std::memory_order_acquire) != x.index - order.begin; ++spins)
      relax(spins);
    float* const sum = dq_tiles(b, h) + i0 * D;
    if (x.index == order.begin) std::fill_n(sum, up(i1 - i0, kTile) * D, 0.0f);
    const float* const ds = Mul::kPack == 1 ? tile.p : tile.db;
    for (const Run& run : runs)
      for (int v = run.v0; v < run.v1; v = next(run, v))
        accumulate<Mul>(in_stripe(sum, D, v), kTile, x.kt.at(0, run.j0 / Mul::kPack),
                        ds + run.j0 / Mul::kPack * kQueries + v * W, kQueries,
                        up(run.keys(), Mul::kPack) / Mul::kPack, D, next(run, v) - v);
    if (x.index == order.end - 1) {
      alignas(64) float factor[kTile];
      std::fill_n(factor, kTile, scale);
      for (int64_t i = 0; i0 + i < i1; i += kTile)
        unpack_lanes(head(dq, b, h), i0 + i, std::min(i0 + i + kTile, i1), sum + i * D, D, factor);
    }
    turn.store(static_cast<int32_t>(x.index - order.begin + 1), std::memory_order_release);
  }

  // A run's vectors, a stripe at a time: where the next stripe begins, and where a vector lies in [stripes][D][kTile].
  static int next(const Run& run, int v) { return std::min(run.v1, (v / kVecs + 1) * kVecs); }
  static float* in_stripe(float* stripes, int64_t D, int v) {
    return stripes + v / kVecs * kTile * D + v % kVecs * W;
  }

  static Words left(const float* wide,
                    const T* narrow) {  // P or dS, to be broadcast along the queries
    if constexpr (Mul::kPack == 1) return {reinterpret_cast<const char*>(wide), kQueries * 4, 4};
    return {reinterpret_cast<const char*>(narrow), kQueries * 2, 4};
  }

  static void store_rows(Strided<T> to, int64_t j0, int64_t j1, const float* from, int64_t D,
                         float scale) {
    for (int64_t j = j0; j < j1; ++j, from += up(D, W))
      for (int64_t d = 0; d < D; d += W) {
        const vf x = load(from + d) * scale;
        D - d >= W ? store(to[j] + d, x) : store(to[j] + d, x, D - d);
      }
  }
};

// Before the keys: delta_i = do_i . o_i, nobody's turn yet, and dq = 0 where no key is seen.  dS is P times a small
// difference of dP and delta.  In float32 delta is summed as dP is, term by term, so that they are equal where a
// query's weight is on one key; beside 16-bit numbers, in float64.
template <class T, class M>
struct Prepare {
  const Backward<T, M>& f;
  View<const T, 4> o;
  int64_t Hq, tiles;

  void operator()(int64_t task) {
    const int64_t b = task / tiles / Hq, h = task / tiles % Hq, t = task % tiles;
    const int64_t i0 = t * kTile, i1 = std::min(i0 + kTile, f.Nq);
    f.turn(b, h, t).store(0, std::memory_order_relaxed);
    if constexpr (std::is_same_v<T, float>) {
      float* const a = static_cast<float*>(scratch(4 * 2 * up(f.Dv, W) * kTile));
      float* const c = a + up(f.Dv, W) * kTile;
      pack_lanes<Fma>(a, head(f.dout, b, h), i0, i1, f.Dv);
      pack_lanes<Fma>(c, head(o, b, h), i0, i1, f.Dv);
      for (int64_t v = 0; i0 + v * W < i1; ++v) {
        vf total{};
        for (int64_t d0 = 0; d0 < f.Dv; d0 += kChunk) {
          vf part{};
          for (int64_t d = d0; d < std::min(f.Dv, d0 + kChunk); ++d)
            part = Fma::mac(part, load(c + d * kTile + v * W), load(a + d * kTile + v * W));
          total = d0 ? total + part : part;
        }
        float* const to = f.delta(b, h) + i0 + v * W;
        const int64_t left = i1 - i0 - v * W;
        left >= W ? store(to, total) : store(to, total, left);
      }
    } else {
      for (int64_t i = i0; i < i1; ++i)
        f.delta(b, h)[i] = dot(f.dout.at(b, h, i), o.at(b, h, i), f.Dv);
    }
    if (!f.blocks_of(i0, i1).empty()) return;
    for (int64_t i = i0; i < i1; ++i) std::memset(f.dq.at(b, h, i), 0, f.D * sizeof(T));
  }
};

struct BackwardOf {
  Tensor dq, dk, dv, work, dout;
  std::optional<Tensor> dlse;
  Tensor q, k, v, o, lse;
  float scale;
  template <class T, class M>
  void operator()(Type<T>, const M& mask) const {
    const int64_t Hq = q.shape[1], Hk = k.shape[1], Nq = q.shape[2], Nk = k.shape[2],
                  tiles = up(Nq, kTile) / kTile;
    const int64_t block =
        Nk < 1024 ? kKeys : kMaxKeys;  // longer amortises, shorter feeds more threads
    const int64_t blocks = up(Nk, block) / block, heads = q.shape[0] * Hk;
    const int64_t per_task =
        std::clamp<int64_t>(heads * blocks / (4 * num_threads()), 1, kMostBlocks);
    const int64_t B = q.shape[0], D = q.shape[3], Dv = v.shape[3];
    Backward<T, M> f{View<T, 4>("dq", dq, {B, Hq, Nq, D}),
                     View<T, 4>("dk", dk, {B, Hk, Nk, D}),
                     View<T, 4>("dv", dv, {B, Hk, Nk, Dv}),
                     View<float, 3>("work", work, {B, Hq, work_size(Nq, D)}),
                     View<const T, 4>("q", q, {B, Hq, Nq, D}),
                     View<const T, 4>("k", k, {B, Hk, Nk, D}),
                     View<const T, 4>("v", v, {B, Hk, Nk, Dv}),
                     View<const T, 4>("do", dout, {B, Hq, Nq, Dv}),
                     View<const float, 3>("lse", lse, {B, Hq, Nq}),
                     mask,
                     Scale{scale * MulOf<T>::type::kUnit},
                     scale,
                     Hk,
                     Hq / std::max<int64_t>(Hk, 1),
                     Nq,
                     Nk,
                     q.shape[3],
                     v.shape[3],
                     block,
                     blocks,
                     per_task,
                     heads,
                     2 * num_threads(),
                     {}};
    if (dlse) f.dlse = View<const float, 3>("dlse", *dlse, {B, Hq, Nq});
    Prepare<T, M> prepare{f, View<const T, 4>("o", o, {B, Hq, Nq, Dv}), Hq, tiles};
    parallel_for(q.shape[0] * Hq * tiles, prepare);
    parallel_for(heads * (up(blocks, per_task) / per_task), f);
  }
};

}  // namespace

void attention_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor work, Tensor dout,
                   std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,
                   Ints mask, double scale) {
  check(q, k, v, mask);
  const BackwardOf run{dq, dk, dv, work, dout, dlse, q, k, v, o, lse, static_cast<float>(scale)};
  std::visit(WithMask<BackwardOf>{run, q.dtype}, make_mask(mask, q.shape[2], k.shape[2]));
}

}  // namespace fastattn::cpu::FASTATTN_ISA
