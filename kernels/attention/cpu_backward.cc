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
//
// Calls that are not plain (Options::is_plain) read biases, masks that are no bands and factors from planes [J x T] beside
// the products, and leave the gradients of biases and factors in such planes (csrc/cpu/terms.h).  Where gradients are
// sums along a query, numbers have 16 bits or weights are clipped, delta takes a pass with two more products.
// One file because every part shares the tile.
#define FASTATTN_CPU_FILE "kernels/attention/cpu_backward.cc"
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
#include "kernels/attention/cpu_backward.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Floats of workspace a head: dQ by tiles, delta, and a turn for each tile.
inline int64_t work_rows(const Sequences& s) { return s.Nq + 64 * (s.is_packed() ? s.num : 1); }
inline int64_t work_size(const Sequences& s, int64_t D) {
  static_assert(kTile <= 64);
  const int64_t rows = work_rows(s);
  return (rows * D + rows + rows / 8 + 16 * (s.is_packed() ? s.num : 1) + 16) / 16 * 16;
}

template <class T, bool Plain>
struct Backward {
  using Mul = typename MulOf<T>::type;
  using Mask = typename Probabilities<Mul, T, Plain>::Mask;
  using Score = typename Probabilities<Mul, T, Plain>::Score;

  View<T, 4> dq, dk, dv;
  View<float, 3> work;
  View<const T, 4> q, k, v, o, dout;
  View<const float, 3> lse;
  View<const float, 4> rest;
  const Options& options;
  Score score;
  float scale;
  TermGradient dbias[2], dweight;
  bool needs_dq, needs_dk, needs_dv, needs_dsinks;
  int64_t D, Dv, block, blocks_per_task, tasks_per_head, heads, heads_at_once;
  std::optional<View<const float, 3>> dlse;
  std::optional<View<float, 4>> dq_parts, dk_parts,
      dv_parts;  // by slot, of tokens in several groups

  bool needs_ds() const {
    return needs_dq || needs_dk || dbias[0].is_needed() || dbias[1].is_needed() ||
           dweight.is_needed();
  }
  const Sequences& sequences() const { return options.sequences; }

  // A sequence's part of the workspace: dQ by tiles, delta, and whose turn it is in each tile.
  float* dq_tiles(const Sequence& s, int64_t h) const {
    return work.at(s.row, h) + sequences().first_part(s, s.q0, kTile) * kTile * D;
  }
  float* delta(const Sequence& s, int64_t h) const {
    return work.at(s.row, h) + work_rows(sequences()) * D + s.q0;
  }
  std::atomic_ref<int32_t> turn(const Sequence& s, int64_t h, int64_t t) const {
    float* const turns = work.at(s.row, h) + work_rows(sequences()) * (D + 1);
    return std::atomic_ref<int32_t>(
        reinterpret_cast<int32_t*>(turns)[sequences().first_part(s, s.q0, kQueries) + t]);
  }

  // The key blocks that a tile of queries sees: they add to its dQ in this order.
  Range blocks_of(const Mask& mask, int64_t i0, int64_t i1) const {
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
    float *qt, *dot, *qr, *dor, *lse, *lse_low, *delta, *dlse, *floor, *last, *p, *db, *x;
    T *pa, *da;
    Planes planes;
  };
  static constexpr int64_t kPlane =
      (kKeys + 1) * kQueries;  // calls that are not plain have blocks of kKeys

  int64_t room(int64_t count) const {
    const int64_t wide = up(D, W), wide_v = up(Dv, W);
    int64_t floats = count * 3 * block * (wide + wide_v) + 2 * kQueries * (wide + wide_v) +
                     ((block + 1) * 4 + 6) * kQueries + 8 * kTile + (count + 2) * 16 * 32;
    if (!Plain) {
      floats += 7 * kPlane;
      for (const TermGradient* g : {&dbias[0], &dbias[1], &dweight})
        floats += g->by_rows() ? 2 * g->length + 16 : 0;
    }
    return floats;
  }
  void carve(Tile& tile, Carver& carver) const {
    const int64_t wide = up(D, W), wide_v = up(Dv, W);
    for (float** part : {&tile.qt, &tile.qr}) *part = carver.take(wide * kQueries);
    for (float** part : {&tile.dot, &tile.dor}) *part = carver.take(wide_v * kQueries);
    for (float** part :
         {&tile.lse, &tile.lse_low, &tile.delta, &tile.dlse, &tile.floor, &tile.last})
      *part = carver.take(kQueries);
    for (float** part : {&tile.p, &tile.db}) *part = carver.take((block + 1) * kQueries);
    for (T** part : {&tile.pa, &tile.da})
      *part = reinterpret_cast<T*>(carver.take((block + 1) * kQueries));
    tile.x = carver.take(8 * kTile);
    if constexpr (!Plain) {
      Planes& planes = tile.planes;
      planes.extras.added = carver.take(kPlane);
      if (options.has_factor()) planes.extras.factor = carver.take(kPlane);
      if (options.softcap != 0) planes.slope = carver.take(kPlane);
      if (Mul::kPack == 1 && (options.has_factor() || options.clip.is_on()))
        planes.values = carver.take(kPlane);
      if (dbias[0].is_needed() || dbias[1].is_needed()) planes.ds = carver.take(kPlane);
      if (dweight.is_needed()) planes.dw = carver.take(kPlane);
      if (dweight.is_needed() && options.dropout != 0) planes.keep = carver.take(kPlane);
    }
  }

  void operator()(int64_t task) {
    // A few heads at a time, block after block: by the time a block's turn comes, the one before it is long done.
    const int64_t set = task / (heads_at_once * tasks_per_head) * heads_at_once,
                  at_once = std::min(heads_at_once, heads - set);
    const int64_t in_set = task - set * tasks_per_head, head_index = set + in_set % at_once;
    const int64_t Hk = options.Hk, hk = head_index % Hk;
    const Sequence s = sequences().at(head_index / Hk, in_set / at_once, sequences().cu_k,
                                      block * blocks_per_task);
    const int64_t blocks = up(s.Nk, block) / block, first = s.part * blocks_per_task,
                  count = std::min(blocks_per_task, blocks - first);
    if (count <= 0) return;
    const int64_t wide = up(D, W), wide_v = up(Dv, W);
    Carver carver{static_cast<float*>(scratch(4 * room(count)))};
    const Strided<const T> ks = options.keys(k, s, hk), vs = options.keys(v, s, hk);
    Block held[kMostBlocks];
    for (int64_t i = 0; i < count; ++i) {
      Block& x = held[i];
      x.index = first + i, x.j0 = x.index * block, x.j1 = std::min(x.j0 + block, s.Nk);
      x.k = along_columns<Mul>(carver.take(block * wide), ks, x.j0, x.j1, D);
      x.v = along_columns<Mul>(carver.take(block * wide_v), vs, x.j0, x.j1, Dv);
      x.kt = across_rows<Mul>(carver.take(block * wide), ks, x.j0, x.j1, D);
      x.dk = carver.take(block * wide), x.dv = carver.take(block * wide_v);
      std::fill_n(x.dk, block * wide, 0.0f);
      std::fill_n(x.dv, block * wide_v, 0.0f);
    }
    Tile tile;
    carve(tile, carver);

    const int64_t tiles = up(s.Nq, kQueries) / kQueries;
    for (int64_t h = 0; h < options.Hq; ++h) {
      if (options.key_head(h) != hk) continue;
      const Mask mask = mask_of<Mask>(options, s, h);
      double* rows[3] = {};
      Carver own = carver;
      if constexpr (!Plain) {
        tile.planes.extras.begin(options, s, h);
        for (int g = 0; g < 3; ++g)
          if (gradient(g).by_rows()) {
            rows[g] = reinterpret_cast<double*>(own.take(2 * gradient(g).length));
            std::fill_n(rows[g], gradient(g).length, 0.0);
          }
      }
      for (int64_t t = tiles; t-- > 0;) {
        const int64_t i0 = t * kQueries, i1 = std::min(i0 + kQueries, s.Nq);
        const Range order = blocks_of(mask, i0, i1);
        const int64_t from = std::max(order.begin, first), to = std::min(order.end, first + count);
        bool is_fetched = false;
        for (int64_t i = first; i < first + count; ++i) {
          const Block& x = held[i - first];
          const Runs runs = i < from || i >= to ? Runs{} : runs_of(mask, i0, i1, x.j0, x.j1);
          if (runs.count && !is_fetched) fetch(tile, s, h, t), is_fetched = true;
          if (runs.count) absorb(x, tile, mask, runs, i0, i1);
          if constexpr (!Plain) add_terms(x, tile, s, h, runs, t, i0, i1, rows);
          if (i >= from && i < to && needs_dq) add_dq(x, tile, s, h, runs, t, order);
        }
      }
      if constexpr (!Plain)
        for (int g = 0; g < 3; ++g)
          if (rows[g]) gradient(g).flush(rows[g], s.b, h, s.part);
    }

    for (int64_t i = 0; i < count; ++i) {
      if (needs_dk) store_rows(dk, dk_parts, s, hk, held[i].j0, held[i].j1, held[i].dk, D, scale);
      if (needs_dv) store_rows(dv, dv_parts, s, hk, held[i].j0, held[i].j1, held[i].dv, Dv, 1);
    }
  }

  const TermGradient& gradient(int g) const { return g < 2 ? dbias[g] : dweight; }

  // What a tile adds to the gradients of biases and weight.
  void add_terms(const Block& x, Tile& tile, const Sequence& s, int64_t h, const Runs& runs,
                 int64_t t, int64_t i0, int64_t i1, double* const* rows) const {
    for (int g = 0; g < 3; ++g) {
      const TermGradient& sum = gradient(g);
      if (!sum.is_needed()) continue;
      float* const plane = g < 2 ? tile.planes.ds : tile.planes.dw;
      if (sum.form == Form::pairs) {
        const bool is_whole = runs.count == 1 && runs.run[0].keys() == x.j1 - x.j0 &&
                              runs.run[0].v0 == 0 && runs.run[0].v1 * W >= i1 - i0;
        if (!is_whole && (g != 1 || !dbias[0].is_needed())) clear_outside(plane, runs, x.j1 - x.j0);
        sum.add_pairs(plane, kQueries, s.b, h, i0, i1, x.j0, x.j1, t, x.index,
                      rank(sum, s, h, i0, x.j0));
        continue;
      }
      const Lookup& lookup = g < 2 ? tile.planes.extras.bias[g] : tile.planes.extras.weight;
      for (const Run& run : runs)
        sum.add_row(rows[g], lookup, plane + run.j0 * kQueries + run.v0 * W, kQueries,
                    i0 + run.v0 * W, std::min(i1, i0 + run.v1 * W), x.j0 + run.j0, x.j0 + run.j1,
                    s.Nk - s.Nq);
    }
  }
  static void clear_outside(float* plane, const Runs& runs, int64_t keys) {
    const Run* run = runs.begin();
    for (int64_t j = 0; j < keys; ++j) {
      while (run != runs.end() && run->j1 <= j) ++run;
      const bool inside = run != runs.end() && run->j0 <= j;
      float* const row = plane + j * kQueries;
      std::fill_n(row, inside ? run->v0 * W : kQueries, 0.0f);
      if (inside) std::fill_n(row + run->v1 * W, kQueries - run->v1 * W, 0.0f);
    }
  }
  // How many add to this tile of a shared gradient before: in the order in which tasks begin.
  int64_t rank(const TermGradient& sum, const Sequence& s, int64_t h, int64_t i0,
               int64_t j0) const {
    const int64_t all = sum.shape[1] == 1 ? options.Hq : 1,
                  before = sum.shape[1] == 1 ? options.rank(h) : 0;
    if (sum.shape[0] == sequences().count()) return before;
    int64_t others = 0;  // sequences of a batch that share it and hold this tile
    if (sum.shape[0] == 1 && sequences().is_even) {
      others = s.in_row;
    } else if (sum.shape[0] == 1) {
      for (int64_t x = 0; x < s.in_row; ++x) {
        const Sequence other = sequences().packed(0, x);
        others += other.Nq > i0 && other.Nk > j0;
      }
    }
    return (others * sequences().B + s.row) * all + before;
  }

  void fetch(Tile& x, const Sequence& s, int64_t h, int64_t t) const {
    const int64_t i0 = t * kQueries, i1 = std::min(i0 + kQueries, s.Nq);
    const Strided<const T> qs = options.queries(q, s, h), dos = options.outputs(dout, s, h);
    for (int64_t i = 0; i0 + i < i1; i += kTile) {
      pack_lanes<Mul>(x.qt + i * up(D, W), qs, i0 + i, std::min(i0 + i + kTile, i1), D);
      pack_lanes<Mul>(x.dot + i * up(Dv, W), dos, i0 + i, std::min(i0 + i + kTile, i1), Dv);
    }
    pack_rows<Mul>(x.qr, qs, i0, i1, up(i1 - i0, W), D);
    pack_rows<Mul>(x.dor, dos, i0, i1, up(i1 - i0, W), Dv);
    for (int i = 0; i < kQueries;
         ++i) {  // lanes past the end, and rows that see nothing, have P = 0
      const bool inside = i0 + i < i1;
      const int64_t at = s.q0 + i0 + i;
      const double l =
          inside ? (lse(s.row, h, at) + static_cast<double>(rest(s.row, h, 0, at))) * Mul::kUnit
                 : -kInf;
      x.lse[i] = l == -kInf ? kInf : static_cast<float>(l);
      x.lse_low[i] = l == -kInf ? 0.0f : static_cast<float>(l - x.lse[i]);
      x.delta[i] = inside ? delta(s, h)[i0 + i] : 0.0f;
      if (options.topk) {
        x.floor[i] = inside ? rest(s.row, h, 1, at) : 0.0f;
        x.last[i] = inside ? rest(s.row, h, 2, at) : 0.0f;
      }
      x.dlse[i] = dlse && inside ? (*dlse)(s.row, h, s.q0 + i0 + i) : 0.0f;
    }
  }

  Probabilities<Mul, T, Plain> probabilities(const Block& x, const Tile& tile, const Mask& mask,
                                             const Run& run, int v, int64_t i0) const {
    const int64_t lane = v * W, at = run.j0 * kQueries + lane;
    return {tile.p + at,
            tile.pa + at,
            tile.lse + lane,
            tile.lse_low + lane,
            x.k.at(run.j0, 0),
            in_stripe(tile.qt, up(D, W), v),
            up(D, Mul::kPack) / Mul::kPack,
            mask,
            score,
            options.clip,
            tile.planes,
            at,
            static_cast<int>(i0 + lane),
            static_cast<int>(x.j0 + run.j0),
            run.partial,
            options.topk ? tile.floor + lane : nullptr,
            options.topk ? tile.last + lane : nullptr,
            tile.x};
  }
  LogitGradients<Mul, T, Plain> logit_gradients(const Block& x, const Tile& tile, const Run& run,
                                                int v) const {
    const int64_t lane = v * W, at = run.j0 * kQueries + lane;
    return {tile.p + at,
            tile.da + at,
            tile.db + run.j0 / 2 * kQueries + lane,
            tile.delta + lane,
            tile.dlse + lane,
            x.v.at(run.j0, 0),
            in_stripe(tile.dot, up(Dv, W), v),
            up(Dv, Mul::kPack) / Mul::kPack,
            options.clip,
            tile.planes,
            at};
  }
  void read(const Block& x, Tile& tile, const Mask& mask, const Runs& runs, int64_t i0,
            int64_t i1) const {
    if constexpr (!Plain) {
      tile.planes.extras.read(mask, runs, kQueries, i0, i1, x.j0, x.j1);
      if (tile.planes.keep)
        tile.planes.extras.keep.fill(tile.planes.keep, kQueries, i0, i1, x.j0, x.j1, true);
    }
  }

  // One tile of queries into one block of keys.
  void absorb(const Block& x, Tile& tile, const Mask& mask, const Runs& runs, int64_t i0,
              int64_t i1) const {
    const int64_t wide = up(D, W), wide_v = up(Dv, W);
    read(x, tile, mask, runs, i0, i1);
    for (const Run& run : runs) {
      const int64_t first = run.v0 * W / Mul::kPack,
                    lanes = run.vecs() * W / Mul::kPack;  // words of the queries
      for (int v = run.v0; v < run.v1; v = next(run, v)) {
        auto f = probabilities(x, tile, mask, run, v, i0);
        for_tiles(f, run.keys(), next(run, v) - v);
      }
      if (needs_dv)
        accumulate<Mul>(
            x.dv + run.j0 * wide_v, wide_v,
            left(tile.planes.values ? tile.planes.values : tile.p, tile.pa).at(run.j0, first),
            tile.dor + first * wide_v, wide_v, lanes, run.keys(), static_cast<int>(wide_v / W));
      if (!needs_ds()) continue;
      for (int v = run.v0; v < run.v1; v = next(run, v)) {
        auto f = logit_gradients(x, tile, run, v);
        for_tiles(f, run.keys(), next(run, v) - v);
      }
      if (needs_dk)
        accumulate<Mul>(x.dk + run.j0 * wide, wide, left(tile.p, tile.da).at(run.j0, first),
                        tile.qr + first * wide, wide, lanes, run.keys(),
                        static_cast<int>(wide / W));
    }
  }

  // The block's share of the tile's dQ, which is a sum over key blocks in their order, whichever thread holds them: wait
  // for the turn.  Tasks begin in order (parallel_for), so the block waited for is always being worked on.
  void add_dq(const Block& x, const Tile& tile, const Sequence& s, int64_t h, const Runs& runs,
              int64_t t, Range order) const {
    const int64_t i0 = t * kQueries, i1 = std::min(i0 + kQueries, s.Nq);
    const std::atomic_ref<int32_t> turn = this->turn(s, h, t);
    for (int spins = 0; turn.load(std::memory_order_acquire) != x.index - order.begin; ++spins)
      relax(spins);
    float* const sum = dq_tiles(s, h) + i0 * D;
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
      for (int64_t i = 0; i0 + i < i1; i += kTile) {
        const int64_t end = std::min(i0 + i + kTile, i1);
        if (dq_parts)
          unpack_lanes(rows_of(*dq_parts, s, h, s.q0), i0 + i, end, sum + i * D, D, factor);
        else
          unpack_lanes(options.queries(dq, s, h), i0 + i, end, sum + i * D, D, factor);
      }
    }
    turn.store(static_cast<int32_t>(x.index - order.begin + 1), std::memory_order_release);
  }

  // Whether delta takes a pass of its own: clipped weights do not make it do.o, and gradients that are sums along a query
  // would show what o was rounded to; in 16 bits, every gradient of a bias would.
  bool has_delta_pass() const {
    bool sums = needs_dsinks;
    for (const TermGradient& bias : dbias)
      sums |=
          std::is_same_v<T, float> ? bias.by_rows() && bias.form != Form::keys : bias.is_needed();
    return options.clip.is_on() || sums;
  }
  // delta of a tile by that pass.
  void find_deltas(const Sequence& s, int64_t h, int64_t t) const {
    if constexpr (!Plain) {
      const int64_t i0 = t * kQueries, i1 = std::min(i0 + kQueries, s.Nq), hk = options.key_head(h);
      Carver carver{static_cast<float*>(scratch(4 * (room(1) + 2 * kQueries)))};
      Tile tile;
      carve(tile, carver);
      tile.planes.dw = nullptr;
      tile.planes.extras.begin(options, s, h);
      float *sums = carver.take(kQueries), *kc = carver.take(block * up(D, W)),
            *vc = carver.take(block * up(Dv, W));
      std::fill_n(sums, kQueries, 0.0f);
      fetch(tile, s, h, t);
      std::fill_n(tile.dlse, kQueries, 0.0f);
      std::fill_n(tile.delta, kQueries, 0.0f);
      const Mask mask = mask_of<Mask>(options, s, h);
      const Range order = blocks_of(mask, i0, i1);
      for (int64_t index = order.begin; index < order.end; ++index) {
        Block x{};
        x.j0 = index * block, x.j1 = std::min(x.j0 + block, s.Nk);
        x.k = along_columns<Mul>(kc, options.keys(k, s, hk), x.j0, x.j1, D);
        x.v = along_columns<Mul>(vc, options.keys(v, s, hk), x.j0, x.j1, Dv);
        const Runs runs = runs_of(mask, i0, i1, x.j0, x.j1);
        if (!runs.count) continue;
        read(x, tile, mask, runs, i0, i1);
        for (const Run& run : runs)
          for (int v = run.v0; v < run.v1; v = next(run, v)) {
            auto f = probabilities(x, tile, mask, run, v, i0);
            for_tiles(f, run.keys(), next(run, v) - v);
            const auto gradients = logit_gradients(x, tile, run, v);
            Deltas<Mul, T> sum{gradients, sums + v * W};
            for_tiles(sum, run.keys(), next(run, v) - v);
          }
      }
      std::copy_n(sums, i1 - i0, delta(s, h) + i0);
    }
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

  void store_rows(const View<T, 4>& all, const std::optional<View<float, 4>>& parts,
                  const Sequence& s, int64_t hk, int64_t j0, int64_t j1, const float* from,
                  int64_t D, float scale) const {
    if (parts)
      store_rows(rows_of(*parts, s, hk, s.k0), j0, j1, from, D, scale);
    else
      store_rows(options.keys(all, s, hk), j0, j1, from, D, scale);
  }
  template <class U>
  static void store_rows(Strided<U> to, int64_t j0, int64_t j1, const float* from, int64_t D,
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
template <class T, bool Plain>
struct Prepare {
  const Backward<T, Plain>& f;
  int64_t tiles;  // parts of a head

  void operator()(int64_t task) {
    const int64_t Hq = f.options.Hq, b = task / tiles / Hq, h = task / tiles % Hq;
    const Sequence s = f.sequences().at(b, task % tiles, f.sequences().cu_q, kQueries);
    const int64_t i0 = s.part * kQueries, i1 = std::min(i0 + kQueries, s.Nq);
    if (i0 >= i1) return;
    f.turn(s, h, s.part).store(0, std::memory_order_relaxed);
    if (!Plain && f.has_delta_pass())
      f.find_deltas(s, h, s.part);
    else
      for (int64_t i = i0; i < i1; i += kTile) sum(s, h, i, std::min(i + kTile, i1));
    if (f.needs_dq &&
        !f.blocks_of(mask_of<typename Backward<T, Plain>::Mask>(f.options, s, h), i0, i1).empty())
      return;
    if (f.dq_parts)
      clear(rows_of(*f.dq_parts, s, h, s.q0), i0, i1);
    else
      clear(f.options.queries(f.dq, s, h), i0, i1);
  }

  template <class U>
  void clear(Strided<U> rows, int64_t i0, int64_t i1) const {
    for (int64_t i = i0; i < i1; ++i) std::fill_n(rows[i], f.D, U(0.0f));
  }

  void sum(const Sequence& s, int64_t h, int64_t i0, int64_t i1) const {
    const Strided<const T> os = f.options.outputs(f.o, s, h), dos = f.options.outputs(f.dout, s, h);
    if constexpr (std::is_same_v<T, float>) {
      float* const a = static_cast<float*>(scratch(4 * 2 * up(f.Dv, W) * kTile));
      float* const c = a + up(f.Dv, W) * kTile;
      pack_lanes<Fma>(a, dos, i0, i1, f.Dv);
      pack_lanes<Fma>(c, os, i0, i1, f.Dv);
      for (int64_t v = 0; i0 + v * W < i1; ++v) {
        vf total{};
        for (int64_t d0 = 0; d0 < f.Dv; d0 += kChunk) {
          vf part{};
          for (int64_t d = d0; d < std::min(f.Dv, d0 + kChunk); ++d)
            part = Fma::mac(part, load(c + d * kTile + v * W), load(a + d * kTile + v * W));
          total = d0 ? total + part : part;
        }
        float* const to = f.delta(s, h) + i0 + v * W;
        const int64_t left = i1 - i0 - v * W;
        left >= W ? store(to, total) : store(to, total, left);
      }
    } else {
      for (int64_t i = i0; i < i1; ++i) f.delta(s, h)[i] = dot(dos[i], os[i], f.Dv);
    }
  }
};

// dsink_h = sum over queries of p_sink (dlse - delta), with p_sink = exp(sink - lse).
template <class T, bool Plain>
struct SinkGradients {
  const Backward<T, Plain>& f;
  float* out;
  void operator()(int64_t h) const {
    double total = 0;
    const Sequences& all = f.sequences();
    const double sink = f.options.sinks[h];
    for (int64_t b = 0; b < all.count(); ++b) {
      const Sequence s = all.whole(b);
      for (int64_t i = 0; i < s.Nq; ++i) {
        const double log = f.lse(s.row, h, s.q0 + i) +
                           static_cast<double>(f.rest(s.row, h, 0, s.q0 + i)),
                     dlse = f.dlse ? (*f.dlse)(s.row, h, s.q0 + i) : 0.0f;
        if (log != -kInf) total += std::exp(sink - log) * (dlse - f.delta(s, h)[i]);
      }
    }
    out[h] = static_cast<float>(total);
  }
};

// The gradients of tokens that several slots hold: of each the sum, in the order of slots.
template <class T>
struct Gather {
  View<T, 4> to;
  View<float, 4> parts;
  const TokenSlots& slots;
  void operator()(int64_t task) const {
    const int64_t H = to.shape[1], N = to.shape[2], D = to.shape[3], b = task / H, h = task % H;
    float* const sum = static_cast<float*>(scratch(4 * (N * D + 1)));
    std::fill_n(sum, N * D, 0.0f);
    const int32_t* const token = slots.at({0, b, 0, 0, 0, 0, 0, 0}, h, 0);
    for (int64_t t = 0; t < parts.shape[2]; ++t) {
      if (token[t] < 0) continue;
      const float* const from = parts.at(b, h, t);
      float* const at = sum + token[t] * D;
      for (int64_t d = 0; d < D; ++d) at[d] += from[d];
    }
    for (int64_t n = 0; n < N; ++n)
      for (int64_t d = 0; d < D; ++d) to.at(b, h, n)[d] = static_cast<T>(sum[n * D + d]);
  }
};

struct BackwardOf {
  Tensor dq, dk, dv, dterms[3], dsinks, work, works[3], parts_q, parts_k, parts_v, dout;
  Maybe dlse;
  Tensor q, k, v, o, lse, rest;
  const Options& options;
  Bools needs;

  template <class T, bool Plain>
  void operator()(Type<T>, Value<Plain>) const {
    const Sequences& sequences = options.sequences;
    const int64_t B = q.shape[0], Hq = q.shape[1], Hk = k.shape[1], Nq = q.shape[2],
                  Nk = k.shape[2], D = q.shape[3], Dv = v.shape[3], num = sequences.count(),
                  slots_q = sequences.Nq, slots_k = sequences.Nk, outputs = options.num_outputs();
    // Longer ones amortise, shorter ones feed more threads.
    const int64_t block = !Plain || slots_k < 1024 ? kKeys : kMaxKeys;
    const int64_t heads = B * Hk;
    const int64_t per_task = std::clamp<int64_t>(
        heads * sequences.parts(slots_k, block) / (4 * num_threads()), 1, kMostBlocks);
    const bool is_packed = sequences.is_packed();
    Backward<T, Plain> f{View<T, 4>("dq", dq, {B, Hq, Nq, D}),
                         View<T, 4>("dk", dk, {B, Hk, Nk, D}),
                         View<T, 4>("dv", dv, {B, Hk, Nk, Dv}),
                         View<float, 3>("work", work, {B, Hq, work_size(sequences, D)}),
                         View<const T, 4>("q", q, {B, Hq, Nq, D}),
                         View<const T, 4>("k", k, {B, Hk, Nk, D}),
                         View<const T, 4>("v", v, {B, Hk, Nk, Dv}),
                         View<const T, 4>("o", o, {B, Hq, outputs, Dv}),
                         View<const T, 4>("do", dout, {B, Hq, outputs, Dv}),
                         View<const float, 3>("lse", lse, {B, Hq, slots_q}),
                         View<const float, 4>("rest", rest, {B, Hq, options.topk ? 3 : 1, slots_q}),
                         options,
                         score_of<Plain, typename MulOf<T>::type>(options),
                         static_cast<float>(options.scale),
                         {{"bias", dterms[0], works[0], options.bias[0], needs[3], num, Hq,
                           is_packed, kQueries, block},
                          {"bias2", dterms[1], works[1], options.bias[1], needs[4], num, Hq,
                           is_packed, kQueries, block}},
                         {"weight", dterms[2], works[2], options.weight, needs[5], num, Hq,
                          is_packed, kQueries, block},
                         needs[0],
                         needs[1],
                         needs[2],
                         options.sinks && needs[6],
                         D,
                         Dv,
                         block,
                         per_task,
                         sequences.parts(slots_k, block * per_task),
                         heads,
                         is_packed ? heads : 2 * num_threads(),
                         {},
                         {},
                         {},
                         {}};
    if (dlse) f.dlse = View<const float, 3>("dlse", *dlse, {B, Hq, slots_q});
    if (options.slots_q.repeats)
      f.dq_parts = View<float, 4>("parts_q", parts_q, {B, Hq, slots_q, D});
    if (options.slots_k.repeats) {
      f.dk_parts = View<float, 4>("parts_k", parts_k, {B, Hk, slots_k, D});
      f.dv_parts = View<float, 4>("parts_v", parts_v, {B, Hk, slots_k, Dv});
    }
    for (int g = 0; g < 3; ++g) f.gradient(g).begin();
    if (!options.slots_q.covers) clear(f.dq);
    if (!needs[1] || !options.slots_k.covers) clear(f.dk);
    if (!needs[2] || !options.slots_k.covers) clear(f.dv);
    Prepare<T, Plain> prepare{f, sequences.parts(slots_q, kQueries)};
    parallel_for(B * Hq * prepare.tiles, prepare);
    parallel_for(heads * f.tasks_per_head, f);
    const auto gather = [](const View<T, 4>& to, const auto& parts, const TokenSlots& slots) {
      if (!parts) return;
      const Gather<T> all{to, *parts, slots};
      parallel_for(to.shape[0] * to.shape[1], all);
    };
    gather(f.dq, f.dq_parts, options.slots_q);
    if (needs[1]) gather(f.dk, f.dk_parts, options.slots_k);
    if (needs[2]) gather(f.dv, f.dv_parts, options.slots_k);
    for (int g = 0; g < 3; ++g) f.gradient(g).end();
    if (f.needs_dsinks) {
      const SinkGradients<T, Plain> sinks{f, View<float, 1>("dsinks", dsinks, {Hq}).data};
      parallel_for(Hq, sinks);
    }
  }
};

}  // namespace

void attention_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dbias2, Tensor dweight,
                   Tensor dsinks, Tensor work, Tensor bias_work, Tensor bias2_work,
                   Tensor weight_work, Tensor parts_q, Tensor parts_k, Tensor parts_v, Tensor dout,
                   Maybe dlse, Tensor q, Tensor k, Tensor v, AttentionExtras extras, Tensor o,
                   Tensor lse, Tensor rest, Ints mask, Floats numbers, Bools needs) {
  const Options options(q, k, v, extras, mask, numbers);
  FASTATTN_CHECK(needs.size() == 7, "needs has ", needs.size(), " answers; it takes 7");
  const BackwardOf run{dq,
                       dk,
                       dv,
                       {dbias, dbias2, dweight},
                       dsinks,
                       work,
                       {bias_work, bias2_work, weight_work},
                       parts_q,
                       parts_k,
                       parts_v,
                       dout,
                       dlse,
                       q,
                       k,
                       v,
                       o,
                       lse,
                       rest,
                       options,
                       needs};
  dispatch_kind(q, options, run);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
