// decode, CPU                                                             maths: README.md
//
// o_i = sum_j p_ij v_j / l_i,   p_ij = exp(s_ij - m_i),   over the keys of a cache, each read from memory once.
//
//              one sequence's keys ->                  A task owns kSplit keys of a key head, and all R = group x Nq
//          ┌───────────┬───────────┬─────┐             query rows that read it: blocks of 64 keys go through the second
//  R rows  │  split 0  │  split 1  │ ... │             cache once, while the values of the same block, then the keys of
//          └───────────┴───────────┴─────┘             the next, are fetched.
//           (m, l, o)   (m, l, o)          -> o, lse   Whoever finishes a head's last split adds up all of them, in order.
//
// Splits and blocks lie at multiples of their size, counted from the sequence's first key, so that the order of every sum
// depends on the sequence alone.  A row of the cache is known by its address: pages and strides end there.
// One file because a split is followed from its keys to the row in which it ends.
// Bytes, floor and what is reached: README.md.  Assumes unit stride on the last axes (api.py) and D, Dv <= 1024 (limits).
#define FASTATTN_CPU_FILE "kernels/decode/cpu.cc"
#include "kernels/decode/op.h"

#include "csrc/core/masks.h"
#include "csrc/core/rows.h"
#include "csrc/cpu/isa.h"

#include "csrc/cpu/simd.h"

#include "csrc/core/philox.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/terms.h"

#include "kernels/decode/cpu.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int64_t kSplit = 512;  // keys whose state is kept apart

// What single pairs of a query head say beside the products.
struct Pairs {
  Formula mask;
  Lookup bias[2], weight;

  // W numbers of the query i from key j on; zeros from `end`.
  static vf numbers(const Lookup& x, int i, int j, int end) {
    const int64_t n = std::min(end - j, W);
    if (n <= 0) return vf{};
    if (x.dtype == DType::f32) return x.along_keys<float>(i, j, n);
    return x.dtype == DType::bf16 ? x.along_keys<bf16>(i, j, n) : x.along_keys<f16>(i, j, n);
  }
  vf logits(vf x, int i, int j, int end) const {
    for (const Lookup& b : bias)
      if (b.is_given()) x += numbers(b, i, j, end);
    int32_t shown[W];
    for (int lane = 0; lane < W; ++lane)
      shown[lane] = -static_cast<int>(j + lane < end && mask.visible(i, j + lane));
    return select(load_as<vi>(shown), x, splat(-kInf));
  }
};

// What a dot product becomes before the softmax: natural logits.
struct Logits {
  float scale, softcap, slope;
  Band mask;
  int i, position;  // of the query: among the queries, and in the sequence
  const Pairs*
      pairs;  // of calls with a bias, a weight, or a mask that is no band; then `mask` shows all

  FASTATTN_INLINE vf operator()(vf dot, int j, int end, bool partial) const {
    vf x = dot * scale;
    if (softcap != 0) x = tanh(x * (1.0f / softcap)) * softcap;
    const vi key = iota() + j;
    if (slope != 0) {
      const vi far = key - position;
      x -= __builtin_convertvector(far < 0 ? -far : far, vf) * slope;
    }
    if (pairs) x = pairs->logits(x, i, j, end);
    if (partial) {
      const vi off = key - i;
      x = select((off >= mask.lo) & (off <= mask.hi) & (key < end), x, splat(-kInf));
    }
    return x;
  }
};

template <int Half = W / 2>
FASTATTN_INLINE float largest(vf v) {
  if constexpr (Half == 0)
    return v[0];
  else
    return largest<Half / 2>(max(upper<Half>(v, std::make_integer_sequence<int, W>{}), v));
}
FASTATTN_INLINE vf exponential(vf x) { return exp2<6>(x * 1.4426950408889634f); }

// The weights of a block for one row: s becomes p as `weighted` reads it.  Behind o [width] lie W parts of l.
template <class T>
void softmax(float* s, float* m, float* o, int64_t width, const Logits& logits, int j0, int n,
             bool partial) {
  partial |= n < kBlock;
  float* const l = o + width;
  vf top = splat(-kInf);
  for (int j = 0; j < kBlock; j += W) {
    const vf x = logits(load(s + j), j0 + j, j0 + n, partial);
    store(s + j, x);
    top = max(top, x);
  }
  const float now = std::max(*m, largest(top));
  if (now > *m) {
    if (*m > -kInf) {
      const vf by = exponential(splat(*m - now));
      store(l, load(l) * by);
      for (int64_t d = 0; d < width; d += W) store(o + d, load(o + d) * by);
    }
    *m = now;
  }
  const vf origin = splat(now == -kInf ? 0.0f : now);  // where all is hidden, any number
  vf total{};
  for (int j = 0; j < kBlock; j += W) {
    vf p = exponential(load(s + j) - origin);
    total += p;
    if (logits.pairs && logits.pairs->weight.is_given())
      p *= Pairs::numbers(logits.pairs->weight, logits.i, j0 + j, j0 + n);
    if constexpr (Values<T>::kPack == 2)
      store(reinterpret_cast<bf16*>(s) + j, p);
    else
      store(s + j, p);
  }
  store(l, load(l) + total);
}

// Rows of zeros, the partner of a last key.
template <class T>
constexpr T kZeros[kWidest + 64] = {};

template <class T>
struct Decode {
  View<T, 4> o;
  View<float, 3> lse;
  View<const T, 4> q, k, v;
  Room room;
  Integers lengths;
  const float *sinks, *slopes;
  Term bias[2], weight;
  MaskTensors tensors;
  int64_t num_new;
  Ints mask;
  float scale, softcap;
  int64_t num_splits;
  int64_t B, Hq, Hk, group, Nq, D, Dv;

  int64_t R = group * Nq;                        // query rows that read a key head
  int64_t quads = R / kQuad + (R % kQuad == 3);  // registers of q with kQuad of them; then one with
  int64_t rest = R % kQuad == 3 ? 0 : R % kQuad;  // 0, 1 or 2
  int64_t words = up(D, 2 * W);
  int64_t width = up(Dv, Values<T>::kSize), state_size = width + W;

  struct Sequence {
    Band mask;
    Range keys;            // that some query sees
    int64_t tokens, size;  // in all, and of a split
    int64_t first, count;  // splits that hold those keys; at least one
    int64_t index;         // of the first split of the first head, among all
  };
  Sequence* sequences = nullptr;
  std::atomic<int32_t>* waits =
      nullptr;              // for each head of each sequence: splits that are not done
  float* states = nullptr;  // for each split R rows of o [width], l and m
  static constexpr int64_t kPairs = (sizeof(Pairs) + 63) / 64 * 16;  // floats
  int64_t num_splits_in_all = 0, run = 1;  // so many splits in a row are a task

  static constexpr int64_t kAll[] = {1 << 30, 1 << 30, 1 << 30, 1 << 30};
  bool is_plain() const {
    return is_band(mask) && bias[0].form == Form::none && weight.form == Form::none;
  }
  Pairs pairs(const Sequence& seq, int64_t b, int64_t h) const {
    const int64_t N = seq.tokens;
    return {Formula(mask, Nq, N, tensors, b, h),
            {bias[0].at("bias", b, h, Nq, N), bias[1].at("bias2", b, h, Nq, N)},
            weight.at("weight", b, h, Nq, N)};
  }

  Sequence sequence(int64_t b, int64_t index) const {
    const int64_t tokens = lengths[b] + num_new;
    const Band band = is_plain() ? Band(mask.subspan(1), Nq, tokens) : Band(kAll, Nq, tokens);
    const int64_t size =
        num_splits ? up(std::max<int64_t>((tokens + num_splits - 1) / num_splits, 1), kBlock)
                   : kSplit;
    Range keys = band.keys(0, Nq);
    if (!is_plain()) keys = Formula(mask, Nq, tokens, tensors, b, 0).keys(0, Nq);
    if (keys.empty()) keys = {0, 0};
    const int64_t first = keys.begin / size;
    return {band, keys,  tokens,
            size, first, std::max<int64_t>(up(keys.end, size) / size - first, 1),
            index};
  }

  void operator()(int64_t task) {
    if (std::is_same_v<T, float> || MulOf<T>::type::kPack == 2 || R == 1)
      walk<T>(task * run, std::min((task + 1) * run, num_splits_in_all));
    else
      walk<float>(task * run, std::min((task + 1) * run, num_splits_in_all));
  }

  struct Split {
    int64_t b, h, number;  // among the splits of its head
    int64_t j0, j1;        // keys
  };
  Split split(int64_t index) const {
    int64_t b = 0;  // the last sequence whose splits begin here or before
    for (int64_t step = std::bit_floor(static_cast<uint64_t>(B)); step; step /= 2)
      if (b + step < B && sequences[b + step].index <= index) b += step;
    const Sequence& seq = sequences[b];
    const int64_t h = (index - seq.index) / seq.count, number = (index - seq.index) % seq.count;
    return {b, h, number, std::max((seq.first + number) * seq.size, seq.keys.begin),
            std::min((seq.first + number + 1) * seq.size, seq.keys.end)};
  }

  // This thread's memory: q as `scores` reads it, a block's logits, m of each row, a block's keys as float.
  struct Own {
    float *qs, *s, *m, *copy;
    Pairs* pairs;  // of each query head
    const T *k_rows[2][kBlock], *v_rows[kBlock + 1];
    int now = 0;  // which k_rows are this block's
  };

  // The splits [first, last), one after another.  Keys are multiplied as numbers of type S, float after a copy.
  template <class S>
  void walk(int64_t first, int64_t last) const {
    Carver carver{
        static_cast<float*>(scratch(4 * ((quads * kQuad + 2) * words + R * kBlock + kQuad * kBlock +
                                         R + W + kBlock * words + 64 + kPairs * group)))};
    Own own{carver.take((quads * kQuad + 2) * words),
            carver.take((R + kQuad) * kBlock),
            carver.take(R),
            carver.take(std::is_same_v<S, T> ? 0 : kBlock * words),
            reinterpret_cast<Pairs*>(carver.take(kPairs * group)),
            {},
            {}};
    Split at = split(first), before{-1, -1, 0, 0, 0};
    if (point(own.k_rows[0], at))  // nobody fetched them
      for (int j = 0; j < kBlock; ++j)
        for (int64_t d = 0; d < D; d += 64 / static_cast<int>(sizeof(T)))
          fetch(own.k_rows[0][j] + d);
    for (int64_t index = first; index < last; ++index) {
      const Split next = index + 1 < last ? split(index + 1) : Split{0, 0, 0, 0, 0};
      if (at.b != before.b || at.h != before.h) {
        pack<S>(own.qs, at.b, at.h);
        if (!is_plain())
          for (int64_t g = 0; g < group; ++g)
            ::new (own.pairs + g) Pairs(pairs(sequences[at.b], at.b, at.h * group + g));
      }
      float* const state = states + index * R * state_size;
      absorb<S>(own, state, at, next);
      if (waits[at.b * Hk + at.h].fetch_sub(1, std::memory_order_acq_rel) == 1)
        for (int64_t r = 0; r < R; ++r)
          finish(sequences[at.b], state + (r - at.number * R) * state_size, at.b, at.h, r);
      before = at, at = next;
    }
  }

  // The keys of a split's first block, if it has any.
  bool point(const T** rows, const Split& at) const {
    if (at.j0 >= at.j1) return false;
    Head<const T>(k, room, at.b, at.h).point(rows, at.j0, std::min(up(at.j0 + 1, kBlock), at.j1));
    return true;
  }

  // A split into a state of its own.  While its last values are multiplied, the first keys of `after` are fetched.
  template <class S>
  void absorb(Own& own, float* state, const Split& at, const Split& after) const {
    constexpr bool kCopied = !std::is_same_v<S, T>;
    const Sequence& seq = sequences[at.b];
    for (int64_t r = 0; r < R; ++r) {
      own.m[r] = -kInf;
      std::fill_n(state + r * state_size, state_size, 0.0f);
    }
    const Head<const T> keys(k, room, at.b, at.h), values(v, room, at.b, at.h);
    const S* scored[kBlock];
    float* const s = own.s;
    for (int64_t j = at.j0, end; j < at.j1; j = end, own.now ^= 1) {
      end = std::min(up(j + 1, kBlock), at.j1);
      const int n = static_cast<int>(end - j);
      const T *const *const k_rows = own.k_rows[own.now], **const v_rows = own.v_rows,
                            **const next_rows = own.k_rows[own.now ^ 1];
      values.point(v_rows, j, end);
      bool is_next = end < at.j1;
      if (is_next)
        keys.point(next_rows, end, std::min(end + kBlock, at.j1));
      else
        is_next = point(next_rows, after);
      for (int i = 0; i < kBlock; ++i) {
        if constexpr (kCopied) {
          scored[i] = own.copy + std::min(i, n - 1) * words;
          if (i < n) widen(own.copy + i * words, k_rows[i], k_rows[std::min(i + kAgain, n - 1)], D);
        } else {
          scored[i] = k_rows[i];
        }
      }
      all_scores<S>(s, own.qs, scored, n, v_rows);
      const bool partial = !seq.mask.all(0, Nq, j, end);
      for (int64_t r = 0; r < R; ++r) {
        const int i = static_cast<int>(r % Nq);
        if (is_next)
          for (int64_t key = r * kBlock / R; key < (r + 1) * kBlock / R; ++key)
            fetch(next_rows[key]);
        const Logits logits{scale,
                            softcap,
                            slopes ? slopes[at.h * group + r / Nq] : 0.0f,
                            seq.mask,
                            i,
                            static_cast<int>(seq.tokens - Nq) + i,
                            is_plain() ? nullptr : own.pairs + r / Nq};
        softmax<T>(s + r * kBlock, own.m + r, state + r * state_size, width, logits,
                   static_cast<int>(j), n, partial);
      }
      v_rows[n] = kZeros<T>;
      int64_t r = 0;
      const T* const* next = is_next ? next_rows : nullptr;
      add<8>(r, state, s, v_rows, n, next);
      add<4>(r, state, s, v_rows, n, next);
      add<2>(r, state, s, v_rows, n, next);
      add<1>(r, state, s, v_rows, n, next);
    }
    for (int64_t r = 0; r < R; ++r) {
      float* const l = state + r * state_size + width;
      l[0] = sum(load(l)), l[1] = own.m[r];
    }
  }

  // Numbers that are converted as they are read (S is T, and R is 1) stand alone in their register.
  template <class S>
  static constexpr bool kSideBySide = kQuad == 1 || Part<S, kQuad>::kInPlace;

  template <class S>
  void pack(float* qs, int64_t b, int64_t h) const {
    const T* rows[2 * kQuad];
    int64_t r = 0;
    if constexpr (kSideBySide<S>)
      for (int64_t quad = 0; quad < quads; quad += 2) {
        const int count = static_cast<int>(std::min<int64_t>(quads - quad, 2));
        int known = 0;
        for (; known < count * kQuad && r < R; ++r) rows[known++] = query(b, h, r);
        pack_queries<S, kQuad>(qs + quad * kQuad * words, rows, count, known, D);
      }
    if (!rest || kQuad == 1) return;
    rows[0] = query(b, h, r), rows[1] = query(b, h, R - 1);
    float* const to = qs + quads * kQuad * words;
    if (rest == 1) pack_queries<S, 1>(to, rows, 1, 1, D);
    if constexpr (kQuad == 4 && kSideBySide<S>)
      if (rest == 2) pack_queries<S, 2>(to, rows, 1, 2, D);
  }
  const T* query(int64_t b, int64_t h, int64_t r) const {
    return q.at(b, h * group + r / Nq, r % Nq);
  }

  // Products of a block's keys with all rows; the first time they pass, the block's values are fetched.
  template <class S>
  void all_scores(float* s, const float* qs, const S* const* rows, int n,
                  const T* const* values) const {
    const void* const* next = reinterpret_cast<const void* const*>(values);
    const int64_t bytes = Dv * static_cast<int64_t>(sizeof(T));
    float* const last = s + quads * kQuad * kBlock;
    const float* const from = qs + quads * kQuad * words;
    if constexpr (kSideBySide<S>) {
      int64_t quad = 0;
      for (; quad + 2 <= quads; quad += 2, next = nullptr)
        scores<S, kQuad, 2, std::is_same_v<S, T>>(
            s + quad * kQuad * kBlock, qs + quad * kQuad * words, rows, n, D, next, bytes);
      if (quad < quads) {
        scores<S, kQuad, 1, std::is_same_v<S, T>>(
            s + quad * kQuad * kBlock, qs + quad * kQuad * words, rows, n, D, next, bytes);
        next = nullptr;
      }
      if constexpr (kQuad == 4)
        if (rest == 2) scores<S, 2, 1, std::is_same_v<S, T>>(last, from, rows, n, D, next, bytes);
    }
    if constexpr (kQuad > 1)
      if (rest == 1) scores<S, 1, 1, std::is_same_v<S, T>>(last, from, rows, n, D, next, bytes);
  }

  // o += p v for N rows at a time, as long as there are so many; the first time, the next block's keys are fetched.
  template <int N>
  void add(int64_t& r, float* state, const float* s, const T* const* rows, int n,
           const T* const*& next) const {
    for (; r + N <= R; r += N, next = nullptr)
      weighted<T, N>(state + r * state_size, state_size, s + r * kBlock, rows, n, Dv, next, D);
  }

  // All splits of one row, in order.
  void finish(const Sequence& seq, float* state, int64_t b, int64_t h, int64_t r) const {
    const int64_t hq = h * group + r / Nq, next = R * state_size;
    float m = sinks ? sinks[hq] : -kInf;
    for (int64_t n = 0; n < seq.count; ++n) m = std::max(m, state[n * next + width + 1]);
    const vf origin = splat(m == -kInf ? 0.0f : m);
    float l = sinks ? exponential(sinks[hq] - origin)[0] : 0.0f;
    for (int64_t n = 0; n < seq.count; ++n) {
      float* const part = state + n * next;
      const vf by = exponential(part[width + 1] - origin);
      l += part[width] * by[0];
      for (int64_t d = 0; d < width; d += W)
        store(state + d, n ? load(state + d) + load(part + d) * by : load(part + d) * by);
    }
    T* const to = o.at(b, hq, r % Nq);
    const vf by = splat(l == 0 ? 0.0f : 1.0f / l);
    for (int64_t d = 0; d < Dv; d += W)
      Dv - d >= W ? store(to + d, load(state + d) * by)
                  : store(to + d, load(state + d) * by, Dv - d);
    lse(b, hq, r % Nq) = l == 0 ? -kInf : (origin + ln(splat(l)))[0];
  }
};

const float* per_head(const char* what, const std::optional<Tensor>& t, int64_t Hq) {
  return t ? View<const float, 1>(what, *t, {Hq}).data : nullptr;
}

struct DecodeOf {
  Tensor o, lse, q, k, v, lengths;
  const std::optional<Tensor>&table, &sinks, &slopes;
  const DecodeTerms& terms;
  int64_t num_new;
  Ints mask;
  float scale, softcap;
  int64_t num_splits;

  template <class T>
  void operator()(Type<T>) const {
    const Room room(k, table);
    const int64_t B = q.shape[0], Hq = q.shape[1], Nq = q.shape[2], D = q.shape[3], Dv = v.shape[3],
                  Hk = k.shape[table ? 2 : 1];
    FASTATTN_CHECK(D <= kWidest && Dv <= kWidest, "D is ", D, " and Dv is ", Dv, "; at most ",
                   kWidest);
    FASTATTN_CHECK(Hq == Hk || (Hk > 0 && Hq % Hk == 0), "Hq is ", Hq, " and Hk is ", Hk,
                   "; Hq must be a multiple of Hk");
    const auto& [bias, bias_index, bias2, bias2_index, weight, weight_index, visible, blocks] =
        terms;
    FASTATTN_CHECK(num_splits >= 0, "num_splits is ", num_splits, "; it takes 0 or more");
    const int64_t outer = table ? room.pages : B;
    Decode<T> f{
        View<T, 4>("o", o, {B, Hq, Nq, Dv}),
        View<float, 3>("lse", lse, {B, Hq, Nq}),
        View<const T, 4>("q", q, {B, Hq, Nq, D}),
        table ? View<const T, 4>("k_cache", k, {outer, room.page_size, Hk, D})
              : View<const T, 4>("k_cache", k, {outer, Hk, room.page_size, D}),
        table ? View<const T, 4>("v_cache", v, {outer, room.page_size, Hk, Dv})
              : View<const T, 4>("v_cache", v, {outer, Hk, room.page_size, Dv}),
        room,
        Integers(lengths),
        per_head("sinks", sinks, Hq),
        per_head("alibi_slopes", slopes, Hq),
        {Term("bias", bias, bias_index, B, Hq, B), Term("bias2", bias2, bias2_index, B, Hq, B)},
        Term("weight", weight, weight_index, B, Hq, B),
        MaskTensors::of(visible, blocks),
        num_new,
        mask,
        scale,
        softcap,
        num_splits,
        B,
        Hq,
        Hk,
        Hq / std::max<int64_t>(Hk, 1),
        Nq,
        D,
        Dv};
    room.check(lengths, num_new, B);
    if (B * Hk * f.R == 0) return;
    int64_t total = 0;
    const int64_t listed = up(B * static_cast<int64_t>(sizeof(typename Decode<T>::Sequence)), 64),
                  counted = up(B * Hk * 4, 64);
    for (int64_t b = 0; b < B; ++b) total += Hk * f.sequence(b, 0).count;
    char* const memory =
        static_cast<char*>(scratch<1>(listed + counted + total * f.R * f.state_size * 4));
    f.sequences = reinterpret_cast<typename Decode<T>::Sequence*>(memory);
    f.waits = reinterpret_cast<std::atomic<int32_t>*>(memory + listed);
    f.states = reinterpret_cast<float*>(memory + listed + counted);
    f.num_splits_in_all = total;
    total = 0;
    for (int64_t b = 0; b < B; ++b) {
      const auto& seq = *::new (f.sequences + b) typename Decode<T>::Sequence(f.sequence(b, total));
      for (int64_t h = 0; h < Hk; ++h)
        ::new (f.waits + b * Hk + h) std::atomic<int32_t>(static_cast<int32_t>(seq.count));
      total += Hk * seq.count;
    }
    f.run = std::clamp<int64_t>(total / (8 * num_threads()), 1, 16);
    parallel_for(up(total, f.run) / f.run, f);
  }
};

}  // namespace

void attention_decode_fwd(Tensor o, Tensor lse, Tensor q, Tensor k_cache, Tensor v_cache,
                          Tensor lengths, std::optional<Tensor> block_table,
                          std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                          DecodeTerms terms, int64_t num_new, Ints mask, double scale,
                          double softcap, int64_t num_splits) {
  FASTATTN_CHECK(q.ndim == 4 && k_cache.ndim == 4 && v_cache.ndim == 4, "q, k_cache, v_cache are ",
                 text(q), ", ", text(k_cache), ", ", text(v_cache), "; they take 4 axes");
  const DecodeOf run{o,
                     lse,
                     q,
                     k_cache,
                     v_cache,
                     lengths,
                     block_table,
                     sinks,
                     alibi_slopes,
                     terms,
                     num_new,
                     mask,
                     static_cast<float>(scale),
                     static_cast<float>(softcap),
                     num_splits};
  dispatch(types<float, bf16, f16>, "q.dtype", q.dtype, run);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
