// attention, forward and backward, CPU                                    maths: README.md
//
// o_i = sum_j p_ij v_j / l_i,   p_ij = exp2(s_ij - m_i),   s_ij = log2(e) scale q_i.k_j,   one pass over j.
//
//            queries i ->  Q^T [D x T]            Everything is held transposed: rows are keys, lanes are queries.
//   keys j   ┌───┐   ┌───────────────┐            K and V are read as they lie, one number broadcast at a time;
//     |      │K_j│ x │               │ = S^T      the softmax of a query never leaves its lane; P^T, stored where
//     v      └───┘   └───────────────┘ [J x T]    S^T was, is the right operand of O^T += V^T P^T without a move.
//   Dv  ┌────────┐   ┌───────────────┐
//       │ V_j^T  │ x │ P^T           │ = O^T [Dv x T], m and l [T]: one task, one tile of T queries (or a few)
//       └────────┘   └───────────────┘
//
// Backward recomputes P from lse and walks the same picture with five products (README.md, section 3): one task
// owns a block of keys with its dK and dV and walks the queries; dQ of a tile is added up in order of key blocks,
// each waiting for its turn, so that the sum is the same at any number of threads and no memory is spent on it.
//
//   numbers        multiplied as                    copied per block of keys
//   float32        Fma, in place                    nothing
//   bfloat16       Bf16Dot (avx512bf16), K in place V as pairs of keys
//   bfloat16 elsewhere, float16    Fma              K and V to float32
//
// A tile is T = 64 (avx512), 24 (avx2) or 12 (scalar) queries; a block is kKeys keys, cut into runs of 16 whose
// visible lanes are the same, so that a causal or windowed edge costs what it shows.
// One file because forward and backward share the picture, the runs and the operands.
// Measured and refused: DESIGN.md.  Assumes unit stride on the last axis (api.py) and D, Dv <= 256 (limits).
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

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kKeys = 128;  // keys in a block; long backward passes take twice as many (BackwardOf)
constexpr float kInf = std::numeric_limits<float>::infinity();

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

template <class T>
Strided<T> head(const View<T, 4>& t, int64_t b, int64_t h) {
  return {t.at(b, h), t.stride[2]};
}

struct Carver {  // hands out consecutive parts of this thread's scratch memory
  float* next;
  float* take(int64_t floats) { return std::exchange(next, next + up(floats, 16)); }
};

// ---- forward --------------------------------------------------------------------------------------------

// S^T = score(K Q^T), -inf where hidden, with the running maximum of each lane.
template <class Mul, class M, class Score>
struct Logits {
  float *s, *m;
  Words k;
  const float* q;
  int64_t words;
  const M& mask;
  const Score& score;
  int i0, j0;
  bool partial;

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply<Mul>(acc, k.at(r0, 0), q, kTile, words);
    vf top[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) top[v] = load(m + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        vf x = score.logit(acc[r][v]);
        if (partial)
          x = select(visible(mask, i0 + v * W, static_cast<int>(j0 + r0 + r)), x, splat(-kInf));
        top[v] = max(top[v], x);
        store(s + (r0 + r) * kTile + v * W, x);
      }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(m + v * W, top[v]);
  }
};

// P = exp2(S - m) over a run, in place (as words of the product to come), with the sum of each lane.
template <class Mul>
void exponentiate(float* s, const float* m, float* l, const Run& run) {
  for (int v = run.v0; v < run.v1; ++v) {
    const vf top = load(m + v * W);
    vf total{};
    float* from = s + run.j0 * kTile + v * W;
    if constexpr (Mul::kPack == 1) {
      for (int j = 0; j < run.keys(); ++j, from += kTile) {
        const vf p = exp2<Mul::kExpDegree>(load(from) - top);
        total += p;
        store(from, p);
      }
    }
#if FASTATTN_HAS_BF16DOT
    if constexpr (Mul::kPack == 2) {
      float* to = s + run.j0 / 2 * kTile + v * W;
      for (int j = 0; j < run.keys(); j += 2, from += 2 * kTile, to += kTile) {
        const vf lo = exp2<Mul::kExpDegree>(load(from) - top);
        const vf hi = j + 1 < run.keys() ? exp2<Mul::kExpDegree>(load(from + kTile) - top) : vf{};
        total += lo + hi;
        store(to, pairs(lo, hi));
      }
    }
#endif
    store(l + v * W, load(l + v * W) + total);
  }
}

template <class T, class M, class Score>
struct Forward {
  using Mul = typename MulOf<T>::type;

  View<T, 4> o;
  View<float, 3> lse;
  View<const T, 4> q, k, v;
  M mask;
  Score score;
  int64_t B, Hq, group, Nq, Nk, D, Dv, tiles_per_task, tasks_per_head;

  struct Tile {  // what one tile of queries keeps while the keys go by
    float *qt, *ot, *m, *l;
    int64_t i0, i1;
  };

  void operator()(int64_t task) {
    const int64_t b = task / tasks_per_head / Hq, h = task / tasks_per_head % Hq, hk = h / group;
    const int64_t first =
        (tasks_per_head - 1 - task % tasks_per_head) * tiles_per_task;  // longest rows first
    const int64_t words = up(D, Mul::kPack) / Mul::kPack;
    constexpr int kMost = 4;
    Carver carver{
        static_cast<float*>(scratch(4 * (kMost * (words + Dv + 3) * kTile +
                                         kKeys * (kTile + up(D, W) + up(Dv, W)) + 16 * 32)))};
    float *s = carver.take(kKeys * kTile), *kc = carver.take(kKeys * up(D, W)),
          *vc = carver.take(kKeys * up(Dv, W));

    Tile tiles[kMost];
    int count = 0;
    Range keys{Nk, 0};
    for (int64_t t = first; t < first + tiles_per_task && t * kTile < Nq; ++t) {
      Tile& tile = tiles[count++];
      tile = {carver.take(words * kTile),
              carver.take(Dv * kTile),
              carver.take(kTile),
              carver.take(kTile),
              t * kTile,
              std::min((t + 1) * kTile, Nq)};
      pack_lanes<Mul>(tile.qt, head(q, b, h), tile.i0, tile.i1, D);
      std::fill_n(tile.ot, Dv * kTile, 0.0f);
      std::fill_n(tile.m, kTile, -kInf);
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
      for (int t = 0; t < count; ++t) absorb(tiles[t], s, kw, vt, j0, j1, words);
    }
    for (int t = 0; t < count; ++t) finish(tiles[t], b, h, s);
  }

  // One block of keys into one tile of queries.
  void absorb(const Tile& tile, float* s, Words kw, Words vt, int64_t j0, int64_t j1,
              int64_t words) {
    const Runs runs = runs_of(mask, tile.i0, tile.i1, j0, j1);
    if (!runs.count) return;
    alignas(64) float m[kTile];
    std::memcpy(m, tile.m, sizeof m);
    for (const Run& run : runs) {
      Logits<Mul, M, Score> logits{s + run.j0 * kTile + run.v0 * W,
                                   m + run.v0 * W,
                                   kw.at(run.j0, 0),
                                   tile.qt + run.v0 * W,
                                   words,
                                   mask,
                                   score,
                                   static_cast<int>(tile.i0 + run.v0 * W),
                                   static_cast<int>(j0 + run.j0),
                                   run.partial};
      for_tiles(logits, run.keys(), run.vecs());
    }
    rescale(tile, m);
    for (const Run& run : runs) exponentiate<Mul>(s, m, tile.l, run);
    for (const Run& run : runs)
      accumulate<Mul>(tile.ot + run.v0 * W, kTile, vt.at(0, run.j0 / Mul::kPack),
                      s + run.j0 / Mul::kPack * kTile + run.v0 * W, kTile,
                      up(run.keys(), Mul::kPack) / Mul::kPack, Dv, run.vecs());
  }

  // The maximum rose from tile.m to m: shrink what was summed, where it rose by more than 2^8; a smaller rise only
  // makes weights larger than 1, which costs no precision.  Leaves in m a number that is safe to subtract.
  void rescale(const Tile& tile, float* m) {
    for (int v = 0; v < kVecs; ++v) {
      const vf before = load(tile.m + v * W), top = load(m + v * W);
      const vf now = select(before + 8.0f < top, top, before);
      store(tile.m + v * W, now);
      const vf safe = select(now == -kInf, vf{}, now);  // a lane that has seen no key yet
      store(m + v * W, safe);
      if (!any(before < now)) continue;
      const vf shrink = exp2<6>(before - safe);
      store(tile.l + v * W, load(tile.l + v * W) * shrink);
      for (int64_t d = 0; d < Dv; ++d)
        store(tile.ot + d * kTile + v * W, load(tile.ot + d * kTile + v * W) * shrink);
    }
  }

  void finish(const Tile& tile, int64_t b, int64_t h, float* s) {
    for (int64_t v = 0; tile.i0 + v * W < tile.i1; ++v) {
      const vf l = load(tile.l + v * W), m = load(tile.m + v * W);
      store(s + v * W, select(l == 0.0f, vf{}, 1.0f / l));
      const vf log = m * 0.693359375f + (m * -2.12194440e-4f + ln(l));  // ln 2 in two parts
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
    Forward<T, M, Scale> f{View<T, 4>(o),
                           View<float, 3>(lse),
                           View<const T, 4>(q),
                           View<const T, 4>(k),
                           View<const T, 4>(v),
                           mask,
                           Scale{scale},
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

// ---- backward -------------------------------------------------------------------------------------------

// P^T = exp2(score(K Q^T) - lse), 0 where hidden: float32 in `p`, and in `pa` as the left operand of dV += P^T dO.
template <class Mul, class T, class M, class Score>
struct Probabilities {
  float* p;
  T* pa;  // bf16 [J x T] where pairs are multiplied, else unused: p itself serves
  const float *lse,
      *lse_low;  // log2(e) lse in two parts: rounding it to one would be most of P's error
  Words k;
  const float* q;
  int64_t words;
  const M& mask;
  const Score& score;
  int i0, j0;
  bool partial;

  template <int R, int NV>
  FASTATTN_INLINE void tile(int64_t r0) {
    vf acc[R][NV] = {};
    multiply<Mul>(acc, k.at(r0, 0), q, kTile, words);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        vf x = exp2<Mul::kExpDegree>((score.logit(acc[r][v]) - load(lse + v * W)) -
                                     load(lse_low + v * W));
        if (partial) x = select(visible(mask, i0 + v * W, static_cast<int>(j0 + r0 + r)), x, vf{});
        store(p + (r0 + r) * kTile + v * W, x);
        if constexpr (Mul::kPack == 2) store(pa + (r0 + r) * kTile + v * W, x);
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
        acc[r][v] = score.gradient(load(p + (r0 + r) * kTile + v * W) *
                                   (acc[r][v] - load(delta + v * W) + load(dlse + v * W)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if constexpr (Mul::kPack == 1) store(p + (r0 + r) * kTile + v * W, acc[r][v]);
#if FASTATTN_HAS_BF16DOT
        if constexpr (Mul::kPack == 2) {
          store(da + (r0 + r) * kTile + v * W, acc[r][v]);
          if (r % 2 == 0)  // an odd last key has a partner of zeros
            store(db + (r0 + r) / 2 * kTile + v * W,
                  pairs(acc[r][v], r + 1 < R ? acc[r + 1 < R ? r + 1 : r][v] : vf{}));
        }
#endif
      }
  }
};

template <class T, class M>
struct Backward {
  using Mul = typename MulOf<T>::type;
  static constexpr int64_t kLanes = kTile / Mul::kPack;  // words in a row of P

  View<T, 4> dq, dk, dv;
  View<float, 3> delta;
  View<float, 4> dq_tiles;
  View<int32_t, 3> turns;
  View<const T, 4> q, k, v, dout;
  View<const float, 3> lse;
  const M& mask;
  Scale score;
  int64_t Hk, group, Nq, Nk, D, Dv, block, blocks, heads, heads_at_once;
  std::optional<View<const float, 3>> dlse;

  // The key blocks that a tile of queries sees: they add to its dQ in this order.
  Range blocks_of(int64_t i0, int64_t i1) const {
    const Range keys = mask.keys(i0, i1);
    return keys.empty() ? Range{0, 0} : Range{keys.begin / block, (keys.end + block - 1) / block};
  }

  struct Block {  // what one block of keys keeps while the queries go by
    Words k, v, kt;
    float *dk, *dv;
    float *qt, *dot, *qr, *dor;  // a tile's q and do: by lanes, and by rows
    float *p, *db, *lse, *lse_low, *delta, *dlse;
    T *pa, *da;
    int64_t index, j0, j1;
  };

  void operator()(int64_t task) {
    // A few heads at a time, block after block: by the time a block's turn comes, the one before it is long done.
    const int64_t set = task / (heads_at_once * blocks) * heads_at_once,
                  at_once = std::min(heads_at_once, heads - set);
    const int64_t in_set = task - set * blocks, head_index = set + in_set % at_once,
                  index = in_set / at_once;
    const int64_t b = head_index / Hk, hk = head_index % Hk;
    const int64_t wide = up(D, W), wide_v = up(Dv, W);
    Carver carver{
        static_cast<float*>(scratch(4 * (3 * block * (wide + wide_v) + 2 * kTile * (wide + wide_v) +
                                         (block * 4 + 4) * kTile + 16 * 32)))};
    Block x;
    x.index = index, x.j0 = index * block, x.j1 = std::min(x.j0 + block, Nk);
    const Strided<const T> ks = head(k, b, hk), vs = head(v, b, hk);
    x.k = along_columns<Mul>(carver.take(block * wide), ks, x.j0, x.j1, D);
    x.v = along_columns<Mul>(carver.take(block * wide_v), vs, x.j0, x.j1, Dv);
    x.kt = across_rows<Mul>(carver.take(block * wide), ks, x.j0, x.j1, D);
    x.dk = carver.take(block * wide), x.dv = carver.take(block * wide_v);
    x.qt = carver.take(wide * kTile), x.dot = carver.take(wide_v * kTile);
    x.qr = carver.take(wide * kTile), x.dor = carver.take(wide_v * kTile);
    x.p = carver.take(block * kTile), x.db = carver.take(block * kTile);
    x.pa = reinterpret_cast<T*>(carver.take(block * kTile)),
    x.da = reinterpret_cast<T*>(carver.take(block * kTile));
    x.lse = carver.take(kTile), x.lse_low = carver.take(kTile), x.delta = carver.take(kTile),
    x.dlse = carver.take(kTile);
    std::fill_n(x.dk, block * wide, 0.0f);
    std::fill_n(x.dv, block * wide_v, 0.0f);

    const Range seen = mask.queries(x.j0, x.j1);
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t t = (seen.end + kTile - 1) / kTile; t-- > seen.begin / kTile;)
        absorb(x, b, h, t);

    store_rows(head(dk, b, hk), x.j0, x.j1, x.dk, D);
    store_rows(head(dv, b, hk), x.j0, x.j1, x.dv, Dv);
  }

  // One tile of queries into one block of keys, and the block's share of the tile's dQ.
  void absorb(const Block& x, int64_t b, int64_t h, int64_t t) {
    const int64_t i0 = t * kTile, i1 = std::min(i0 + kTile, Nq), wide = up(D, W),
                  wide_v = up(Dv, W);
    const Range order = blocks_of(i0, i1);
    if (x.index < order.begin || x.index >= order.end) return;
    const Runs runs = runs_of(mask, i0, i1, x.j0, x.j1);
    const Strided<const T> qs = head(q, b, h), dos = head(dout, b, h);
    pack_lanes<Mul>(x.qt, qs, i0, i1, D);
    pack_lanes<Mul>(x.dot, dos, i0, i1, Dv);
    pack_rows<Mul>(x.qr, qs, i0, i1, up(i1 - i0, W), D);
    pack_rows<Mul>(x.dor, dos, i0, i1, up(i1 - i0, W), Dv);
    for (int i = 0; i < kTile; ++i) {  // lanes past the end, and rows that see nothing, have P = 0
      const double l = i0 + i < i1 ? lse(b, h, i0 + i) * 1.4426950408889634 : -kInf;
      x.lse[i] = l == -kInf ? kInf : static_cast<float>(l);
      x.lse_low[i] = l == -kInf ? 0.0f : static_cast<float>(l - x.lse[i]);
      x.delta[i] = i0 + i < i1 ? delta(b, h, i0 + i) : 0.0f;
      x.dlse[i] = dlse && i0 + i < i1 ? (*dlse)(b, h, i0 + i) : 0.0f;
    }

    for (const Run& run : runs) {
      const int64_t lane = run.v0 * W, at = run.j0 * kTile + lane;
      Probabilities<Mul, T, M, Scale> probabilities{x.p + at,
                                                    x.pa + at,
                                                    x.lse + lane,
                                                    x.lse_low + lane,
                                                    x.k.at(run.j0, 0),
                                                    x.qt + lane,
                                                    up(D, Mul::kPack) / Mul::kPack,
                                                    mask,
                                                    score,
                                                    static_cast<int>(i0 + lane),
                                                    static_cast<int>(x.j0 + run.j0),
                                                    run.partial};
      for_tiles(probabilities, run.keys(), run.vecs());
      const int64_t first = run.v0 * W / Mul::kPack,
                    lanes = run.vecs() * W / Mul::kPack;  // words of the queries
      accumulate<Mul>(x.dv + run.j0 * wide_v, wide_v, left(x.p, x.pa).at(run.j0, first),
                      x.dor + first * wide_v, wide_v, lanes, run.keys(),
                      static_cast<int>(wide_v / W));
      LogitGradients<Mul, T, Scale> gradients{x.p + at,
                                              x.da + at,
                                              x.db + run.j0 / 2 * kTile + lane,
                                              x.delta + lane,
                                              x.dlse + lane,
                                              x.v.at(run.j0, 0),
                                              x.dot + lane,
                                              up(Dv, Mul::kPack) / Mul::kPack,
                                              score};
      for_tiles(gradients, run.keys(), run.vecs());
      accumulate<Mul>(x.dk + run.j0 * wide, wide, left(x.p, x.da).at(run.j0, first),
                      x.qr + first * wide, wide, lanes, run.keys(), static_cast<int>(wide / W));
    }

    // dQ is a sum over key blocks, in their order whichever thread holds them: wait for the turn.  Tasks begin in
    // order (parallel_for), so the block waited for is always being worked on.
    std::atomic_ref<int32_t> turn(turns(b, h, t));
    for (int spins = 0; turn.load(std::memory_order_acquire) != x.index - order.begin; ++spins)
      relax(spins);
    float* const sum = dq_tiles.at(b, h) + t * kTile * D;
    if (x.index == order.begin) std::fill_n(sum, D * kTile, 0.0f);
    for (const Run& run : runs)
      accumulate<Mul>(sum + run.v0 * W, kTile, x.kt.at(0, run.j0 / Mul::kPack),
                      (Mul::kPack == 1 ? x.p : x.db) + run.j0 / Mul::kPack * kTile + run.v0 * W,
                      kTile, up(run.keys(), Mul::kPack) / Mul::kPack, D, run.vecs());
    if (x.index == order.end - 1) {
      std::fill_n(x.delta, kTile, 1.0f);
      unpack_lanes(head(dq, b, h), i0, i1, sum, D, x.delta);
    }
    turn.store(static_cast<int32_t>(x.index - order.begin + 1), std::memory_order_release);
  }

  static Words left(const float* wide,
                    const T* narrow) {  // P or dS, to be broadcast along the queries
    if constexpr (Mul::kPack == 1) return {reinterpret_cast<const char*>(wide), kTile * 4, 4};
    return {reinterpret_cast<const char*>(narrow), kTile * 2, 4};
  }

  static void store_rows(Strided<T> to, int64_t j0, int64_t j1, const float* from, int64_t D) {
    for (int64_t j = j0; j < j1; ++j, from += up(D, W))
      for (int64_t d = 0; d < D; d += W)
        D - d >= W ? store(to[j] + d, load(from + d)) : store(to[j] + d, load(from + d), D - d);
  }
};

// Before the keys: delta_i = do_i . o_i, nobody's turn yet, and dq = 0 where no key is seen.  dS is P times a small
// difference of dP and delta, so delta is summed with its rounding errors carried along (Dekker, Knuth).
template <class T, class M>
struct Prepare {
  const Backward<T, M>& f;
  View<const T, 4> o;
  int64_t Hq, tiles;

  void operator()(int64_t task) {
    const int64_t b = task / tiles / Hq, h = task / tiles % Hq, t = task % tiles;
    const int64_t i0 = t * kTile, i1 = std::min(i0 + kTile, f.Nq);
    f.turns(b, h, t) = 0;
    float* const a = static_cast<float*>(scratch(4 * 2 * up(f.Dv, W) * kTile));
    float* const c = a + up(f.Dv, W) * kTile;
    pack_lanes<Fma>(a, head(f.dout, b, h), i0, i1, f.Dv);
    pack_lanes<Fma>(c, head(o, b, h), i0, i1, f.Dv);
    for (int64_t v = 0; i0 + v * W < i1; ++v) {
      vf total{}, low{};
      for (int64_t d = 0; d < f.Dv; ++d) {
        const vf x = load(a + d * kTile + v * W), y = load(c + d * kTile + v * W);
        const vf product = settled(x * y), next = total + product, part = next - total;
        low += (x * y - product) + ((total - (next - part)) + (product - part));
        total = next;
      }
      total += low;
      float* const to = &f.delta(b, h, i0 + v * W);
      const int64_t left = i1 - i0 - v * W;
      left >= W ? store(to, total) : store(to, total, left);
    }
    if (!f.blocks_of(i0, i1).empty()) return;
    for (int64_t i = i0; i < i1; ++i) std::memset(f.dq.at(b, h, i), 0, f.D * sizeof(T));
  }
};

struct BackwardOf {
  Tensor dq, dk, dv, delta, dq_tiles, turns, dout;
  std::optional<Tensor> dlse;
  Tensor q, k, v, o, lse;
  float scale;
  template <class T, class M>
  void operator()(Type<T>, const M& mask) const {
    const int64_t Hq = q.shape[1], Hk = k.shape[1], Nq = q.shape[2], Nk = k.shape[2],
                  tiles = up(Nq, kTile) / kTile;
    const int64_t block =
        Nk < 1024 ? kKeys
                  : kMaxKeys;  // longer amortises a tile's packing, shorter feeds more threads
    Backward<T, M> f{View<T, 4>(dq),
                     View<T, 4>(dk),
                     View<T, 4>(dv),
                     View<float, 3>(delta),
                     View<float, 4>(dq_tiles),
                     View<int32_t, 3>(turns),
                     View<const T, 4>(q),
                     View<const T, 4>(k),
                     View<const T, 4>(v),
                     View<const T, 4>(dout),
                     View<const float, 3>(lse),
                     mask,
                     Scale{scale},
                     Hk,
                     Hq / std::max<int64_t>(Hk, 1),
                     Nq,
                     Nk,
                     q.shape[3],
                     v.shape[3],
                     block,
                     up(Nk, block) / block,
                     q.shape[0] * Hk,
                     2 * num_threads(),
                     {}};
    if (dlse) f.dlse.emplace(*dlse);
    Prepare<T, M> prepare{f, View<const T, 4>(o), Hq, tiles};
    parallel_for(q.shape[0] * Hq * tiles, prepare);
    parallel_for(q.shape[0] * Hk * f.blocks, f);
  }
};

// Run-time values become types here, once: `run` is called with the element type and the mask.
template <class Run>
struct WithMask {
  const Run& run;
  DType dtype;

  template <class M>
  struct WithType {
    const Run& run;
    const M& mask;
    template <class T>
    void operator()(Type<T> type) const {
      run(type, mask);
    }
  };
  template <class M>
  void operator()(const M& mask) const {
    dispatch(types<float, bf16, f16>, "q.dtype", dtype, WithType<M>{run, mask});
  }
};

}  // namespace

void attention_fwd(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Ints mask, double scale) {
  const ForwardOf run{o, lse, q, k, v, static_cast<float>(scale)};
  std::visit(WithMask<ForwardOf>{run, q.dtype}, make_mask(mask, q.shape[2], k.shape[2]));
}

void attention_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor dq_tiles, Tensor turns,
                   Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor o,
                   Tensor lse, Ints mask, double scale) {
  const BackwardOf run{dq,   dk, dv, delta, dq_tiles, turns, dout,
                       dlse, q,  k,  v,     o,        lse,   static_cast<float>(scale)};
  std::visit(WithMask<BackwardOf>{run, q.dtype}, make_mask(mask, q.shape[2], k.shape[2]));
}

}  // namespace fastattn::cpu::FASTATTN_ISA
