// Where the rows of a cache lie, and the two products of decoding: few query rows against keys and values that are
// read where they lie, once.
// One file because a product reads rows by their addresses, and both CPU sources find them here.
// No include guard: isa.h reads it once for each instruction set.
//
//   scores    lanes are d.  A register holds kQuad rows of q side by side, each with W / kQuad words; as many words of
//             a key are loaded and repeated beside them, so that one multiplication serves kQuad rows and what is left
//             to sum across lanes is short:
//
//                 q0 q0 q0 q0 | q1 q1 q1 q1 | q2 q2 q2 q2 | q3 q3 q3 q3        d .. d + 3 of four rows (avx512)
//               x k  k  k  k  | k  k  k  k  | k  k  k  k  | k  k  k  k         one key, repeated by the load
//
//   weighted  lanes are d.  A number of p is broadcast to a vector of a value row.
//
//   ISA, numbers        multiplied as      rows of q a register   accumulators: keys x registers, rows x vectors
//   avx512bf16, bf16    Bf16Dot, in place  1, 2, 4                8 x 2, at most 16
//   avx512, float       Fma, in place      1, 2, 4                8 x 2, at most 16
//   avx2, float         Fma, in place      1, 2                   4 x 2, at most 8
//   scalar, float       Fma, in place      1                      4 x 2, at most 8
//   16 bits elsewhere   Fma                as float; keys of several rows at once are first copied as float32
namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kBlock = 64;              // keys whose weights are held at once
constexpr int kWidest = 1024;           // D and Dv, at most
constexpr int kQuad = W / 4;            // rows of q in a register, at most
constexpr int kStep = W == 16 ? 8 : 4;  // keys scored at once
constexpr int kSums = W == 16 ? 16 : 8;
constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
void widen(float* to, const T* from, const T* next, int64_t D) {
  for (int64_t d = 0; d < D; d += W) {
    __builtin_prefetch(next + d, 0, 2);
    store(to + d, D - d >= W ? load(from + d) : load(from + d, D - d));
  }
}

// ---- The cache -----------------------------------------------------------------------------------------

struct Integers {  // int32 or int64, in one row
  const char* data;
  int64_t step;
  bool wide;
  Integers(const Tensor& t, int64_t row = 0)
      : step(t.stride[t.ndim - 1]), wide(t.dtype == DType::i64) {
    FASTATTN_CHECK(t.dtype == DType::i32 || t.dtype == DType::i64, "a tensor is ", text(t),
                   "; it takes int32 or int64");
    data = static_cast<const char*>(t.data) +
           (t.ndim > 1 ? row * t.stride[0] * static_cast<int64_t>(size_of(t.dtype)) : 0);
  }
  int64_t operator[](int64_t i) const {
    return wide ? reinterpret_cast<const int64_t*>(data)[i * step]
                : reinterpret_cast<const int32_t*>(data)[i * step];
  }
};

// A cache: one place for each sequence, or pages.
struct Room {
  const std::optional<Tensor>& table;
  int64_t page_size, pages, tokens;  // of a page, in all, and of a sequence at most

  Room(const Tensor& cache, const std::optional<Tensor>& table) : table(table) {
    FASTATTN_CHECK(cache.ndim == 4, "k_cache is ", text(cache), "; it takes 4 axes");
    FASTATTN_CHECK(!table || table->ndim == 2, "block_table is ", table ? text(*table) : "",
                   "; it takes 2 axes");
    page_size = cache.shape[table ? 1 : 2], pages = cache.shape[0];
    tokens = table ? table->shape[1] * page_size : page_size;
  }
  // What no kernel may find out by reading: lengths and pages that are not there.
  void check(const Tensor& lengths, int64_t num_new, int64_t B) const {
    FASTATTN_CHECK(lengths.ndim == 1 && lengths.shape[0] == B, "lengths is ", text(lengths),
                   "; it takes [", B, "]");
    FASTATTN_CHECK(!table || table->shape[0] == B, "block_table is ", table ? text(*table) : "",
                   "; it takes ", B, " rows");
    FASTATTN_CHECK(num_new >= 0, "num_new is ", num_new);
    const Integers length(lengths);
    for (int64_t b = 0; b < B; ++b) {
      FASTATTN_CHECK(0 <= length[b] && length[b] <= tokens - num_new, "lengths[", b, "] is ",
                     length[b], "; with ", num_new, " appended, a cache of ", tokens,
                     " takes 0 to ", tokens - num_new);
      if (!table) continue;
      const Integers page(*table, b);
      for (int64_t p = 0; p * page_size < length[b] + num_new; ++p)
        FASTATTN_CHECK(0 <= page[p] && page[p] < pages, "block_table[", b, ", ", p, "] is ",
                       page[p], "; it takes 0 to ", pages - 1);
    }
  }
};

// Rows of one head of one sequence.
template <class T>
struct Head {
  T* base;
  int64_t page_size, page_step, step;
  std::optional<Integers> page;

  Head(const View<T, 4>& cache, const Room& room, int64_t b, int64_t h)
      : base(room.table ? cache.at(0, 0, h) : cache.at(b, h)),
        page_size(room.page_size),
        page_step(cache.stride[0]),
        step(cache.stride[room.table ? 1 : 2]) {
    if (room.table) page.emplace(*room.table, b);
  }
  T* operator[](int64_t j) const {
    return page ? base + (*page)[j / page_size] * page_step + j % page_size * step
                : base + j * step;
  }
  // The rows j0 .. j1, then the last one again up to kBlock.
  void point(T** to, int64_t j0, int64_t j1) const {
    int64_t i = 0;
    while (j0 + i < j1) {
      const int64_t room = page ? page_size - (j0 + i) % page_size : kBlock,
                    end = std::min(j1 - j0, i + room);
      for (T* row = (*this)[j0 + i]; i < end; ++i, row += step) to[i] = row;
    }
    for (; i < kBlock; ++i) to[i] = to[j1 - j0 - 1];
  }
};

// ---- Loads ---------------------------------------------------------------------------------------------

// W / Rows words, repeated Rows times.
template <int Rows, class T>
FASTATTN_INLINE vf repeated(const T* p) {
  if constexpr (Rows == 1) return load_as<vf>(p);
#if FASTATTN_SIMD_WIDTH == 64
  if constexpr (Rows == 2) return (vf)_mm512_broadcast_f32x8(load_as<__m256>(p));
  if constexpr (Rows == 4) return (vf)_mm512_broadcast_f32x4(load_as<__m128>(p));
#elif FASTATTN_SIMD_WIDTH == 32
  if constexpr (Rows == 2) return (vf)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
}

// The first n numbers, then zeros, to fill a vector of words.
template <class Mul, class T>
FASTATTN_INLINE vf some_words(const T* p, int64_t n) {
  if constexpr (Mul::kPack == 1) return load(p, n);
#if FASTATTN_HAS_BF16DOT
  if constexpr (Mul::kPack == 2)
    return (vf)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
#endif
}

// A part of a key: the words that stand beside one register of q, whole or (n < all) filled up with zeros.
template <class T, int Rows>
struct Part {
  using Mul = typename MulOf<T>::type;
  static constexpr bool kInPlace = Mul::kPack == 2 || std::is_same_v<T, float>;
  static constexpr int kSize = W / Rows * Mul::kPack;  // numbers

  FASTATTN_INLINE static vf whole(const T* p) {
    if constexpr (kInPlace)
      return repeated<Rows>(p);
    else
      return load(p);
  }
  FASTATTN_INLINE static vf some(const T* p, int64_t n) {
    if constexpr (Rows == 1) {
      return some_words<Mul>(p, n);
    } else {
      T filled[kSize] = {};
      std::memcpy(filled, p, n * sizeof(T));
      return whole(filled);
    }
  }
};

// ---- Scores --------------------------------------------------------------------------------------------

template <int... lane>
FASTATTN_INLINE vf zipped(vf a, vf b,
                          std::integer_sequence<int, lane...>) {  // a0 b0 a1 b1 of each four
  return __builtin_shufflevector(a, b, (lane / 4 * 4 + lane % 4 / 2 + (lane % 2) * W)...);
}
template <int... lane>
FASTATTN_INLINE vf zipped_high(vf a, vf b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane / 4 * 4 + 2 + lane % 4 / 2 + (lane % 2) * W)...);
}
template <int Half, int... lane>
FASTATTN_INLINE vf halves(vf a, vf b, std::integer_sequence<int, lane...>) {  // two of a, two of b
  return __builtin_shufflevector(a, b, (lane / 4 * 4 + Half * 2 + lane % 2 + lane % 4 / 2 * W)...);
}
template <int H, int... lane>
FASTATTN_INLINE vf crossed(vf v,
                           std::integer_sequence<int, lane...>) {  // lanes that differ in bit H
  return __builtin_shufflevector(v, v, (lane ^ H)...);
}

// Sums of a, b, c, d over the lanes of each row: in the first four of a row's lanes, that of a, of b, of c, of d.
template <int Rows>
FASTATTN_INLINE vf sums(vf a, vf b, vf c, vf d) {
  constexpr std::make_integer_sequence<int, W> all{};
  const vf ab = zipped(a, b, all) + zipped_high(a, b, all),
           cd = zipped(c, d, all) + zipped_high(c, d, all);
  vf sum = halves<0>(ab, cd, all) + halves<1>(ab, cd, all);
  if constexpr (W / Rows >= 8) sum += crossed<4>(sum, all);
  if constexpr (W / Rows >= 16) sum += crossed<8>(sum, all);
  return sum;
}

template <int First>
FASTATTN_INLINE void store_four(float* to, vf v) {
  typedef float four __attribute__((vector_size(16)));
  const four x = __builtin_shufflevector(v, v, First, First + 1, First + 2, First + 3);
  store_as(to, x);
}
template <int Rows, int... row>
FASTATTN_INLINE void store_rows(float* to, vf v, std::integer_sequence<int, row...>) {
  (store_four<row*(W / Rows)>(to + row * kBlock, v), ...);
}

FASTATTN_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second cache

// s [Rows x kBlock] = q k for keys [0, n) rounded up to kStep; what rows[n ...] name is read too.  q holds Count registers
// of Rows rows for each part of D.  Meanwhile the rows of `next` are fetched, one line for each line of keys that is
// multiplied, and once more the keys kAgain rows ahead: the processor drops fetches when many are on their way, and a key
// that was dropped costs a wait (float32, 4 rows, one thread: 15.5 GB/s without, 20 with).
constexpr int kAgain = 16;
template <class T, int Rows, int Count, bool InPlace>
void scores(float* s, const float* q, const T* const* rows, int n, int64_t D,
            const void* const* next, int64_t bytes) {
  using P = Part<T, Rows>;
  constexpr int kBytes = P::kSize * sizeof(T);                // of a key, in a step
  constexpr int kFetched = std::max(kStep * kBytes / 64, 1);  // lines, in a step
  constexpr int kTurns = kStep / kFetched;  // steps in which each key had its turn
  for (int j = 0; j < n; j += kStep) {
    vf acc[kStep][Count] = {};
    const T* k[kStep];
    const bool again = InPlace && j + kAgain < n;
#pragma GCC unroll 8
    for (int key = 0; key < kStep; ++key) k[key] = rows[j + key];
    const float* part = q;
    int64_t d = 0, fetched = 0;
    int turn = 0;
    for (; d + P::kSize <= D; d += P::kSize, part += Count * W) {
      if (next && fetched < bytes) {
#pragma GCC unroll 8
        for (int key = 0; key < kFetched; ++key) {
          const int at = j + turn * kFetched + key;
          fetch(static_cast<const char*>(next[at]) + fetched);
          if (again)
            fetch(reinterpret_cast<const char*>(rows[std::min(at + kAgain, kBlock - 1)]) + fetched);
        }
        if (++turn == kTurns) turn = 0, fetched += 64;
      }
      vf qs[Count];
#pragma GCC unroll 2
      for (int c = 0; c < Count; ++c) qs[c] = load(part + c * W);
#pragma GCC unroll 8
      for (int key = 0; key < kStep; ++key) {
        const vf x = P::whole(k[key] + d);
#pragma GCC unroll 2
        for (int c = 0; c < Count; ++c) acc[key][c] = P::Mul::mac(acc[key][c], x, qs[c]);
      }
    }
    if (d < D)
#pragma GCC unroll 8
      for (int key = 0; key < kStep; ++key) {
        const vf x = P::some(k[key] + d, D - d);
#pragma GCC unroll 2
        for (int c = 0; c < Count; ++c)
          acc[key][c] = P::Mul::mac(acc[key][c], x, load(part + c * W));
      }
    if (next)  // what values have beyond the keys' width
      for (; fetched < bytes; fetched += 64)
        for (int key = 0; key < kStep; ++key)
          fetch(static_cast<const char*>(next[j + key]) + fetched);
#pragma GCC unroll 2
    for (int c = 0; c < Count; ++c)
#pragma GCC unroll 2
      for (int g = 0; g < kStep; g += 4)
        store_rows<Rows>(s + c * Rows * kBlock + j + g,
                         sums<Rows>(acc[g][c], acc[g + 1][c], acc[g + 2][c], acc[g + 3][c]),
                         std::make_integer_sequence<int, Rows>{});
  }
}

// Query rows as scores<S, Rows> reads them: for each part of D, `count` registers of Rows rows; zeros past D and past
// row `given`.
template <class S, int Rows, class T>
void pack_queries(float* to, const T* const* q, int count, int64_t given, int64_t D) {
  using P = Part<S, Rows>;
  using Word = std::conditional_t<P::Mul::kPack == 2, T, float>;
  Word wide[kWidest + 64];
  const int64_t parts = up(D, P::kSize) / P::kSize;
  for (int r = 0; r < count * Rows; ++r) {
    std::memset(wide, 0, parts * P::kSize * sizeof(Word));
    if (r < given) {
      if constexpr (std::is_same_v<T, Word>)
        std::memcpy(wide, q[r], D * sizeof(T));
      else
        widen(wide, q[r], q[r], D);
    }
    for (int64_t part = 0; part < parts; ++part)
      std::memcpy(to + (part * count + r / Rows) * W + r % Rows * (W / Rows),
                  wide + part * P::kSize, W / Rows * 4);
  }
}

// ---- Weighted sums of values ---------------------------------------------------------------------------

// How value rows are read: kSize numbers as kVecs vectors, for kPack keys at a time.
template <class T>
struct Values {
  using Mul = typename MulOf<T>::type;
  static constexpr int kPack = Mul::kPack, kVecs = kPack, kSize = W * kPack;

  template <bool Whole>
  FASTATTN_INLINE static void read(vf* to, const T* const* rows, int64_t d, int64_t n) {
    if constexpr (kPack == 1) to[0] = Whole ? load(rows[0] + d) : load(rows[0] + d, n);
#if FASTATTN_HAS_BF16DOT
    if constexpr (
        kPack ==
        2) {  // pairs of keys, in the order of unpack: 0..3 8..11 16.. 24.., then 4..7 12..15 ...
      const __m512i a = (__m512i)(Whole ? load_as<vf>(rows[0] + d)
                                        : some_words<Mul>(rows[0] + d, n)),
                    b = (__m512i)(Whole ? load_as<vf>(rows[1] + d)
                                        : some_words<Mul>(rows[1] + d, n));
      to[0] = (vf)_mm512_unpacklo_epi16(a, b);
      to[1] = (vf)_mm512_unpackhi_epi16(a, b);
    }
#endif
  }
  // Vectors of sums in the order of d.
  FASTATTN_INLINE static void sort(vf* v) {
    if constexpr (kPack == 2) {
      constexpr std::make_integer_sequence<int, W> all{};
      const vf a = v[0], b = v[1];
      v[0] = mixed<0>(a, b, all), v[1] = mixed<W / 2>(a, b, all);
    }
  }
  template <int First, int... lane>
  FASTATTN_INLINE static vf mixed(vf a, vf b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b,
                                   ((First + lane / 2) / 4 * 4 + lane % 4 + lane / 4 % 2 * W)...);
  }
};

// o [R x ldo] += p v, for U units of d.  p [R x kBlock] are numbers of type P: float, or bf16 in pairs of keys.
template <class T, int R, int U, bool Whole>
FASTATTN_INLINE void weigh(float* o, int64_t ldo, const float* p, const T* const* rows, int n,
                           int64_t d, int64_t left, const T* const* next) {
  using V = Values<T>;
  vf acc[R][U * V::kVecs] = {};
  for (int j = 0; j < n; j += V::kPack) {
    if (next)
#pragma GCC unroll 2
      for (int key = 0; key < V::kPack; ++key)
#pragma GCC unroll 8
        for (int x = 0; x < U * V::kSize * int(sizeof(T)); x += 64)
          fetch(reinterpret_cast<const char*>(next[j + key] + d) + x);
    vf v[U * V::kVecs];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
      V::template read<Whole>(v + u * V::kVecs, rows + j, d + u * V::kSize, left);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf w = splat(p[r * kBlock + j / V::kPack]);
#pragma GCC unroll 8
      for (int c = 0; c < U * V::kVecs; ++c) acc[r][c] = V::Mul::mac(acc[r][c], w, v[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      V::sort(acc[r] + u * V::kVecs);
#pragma GCC unroll 2
      for (int c = 0; c < V::kVecs; ++c) {
        float* const to = o + r * ldo + d + u * V::kSize + c * W;
        store(to, load(to) + acc[r][u * V::kVecs + c]);
      }
    }
}

// The same for any Dv, which ldo holds rounded up.  rows[n] must name a row of zeros.  Of `next` those bytes are fetched that
// lie as far from the start of a row as those that are read, then the others.
template <class T, int R>
[[gnu::noinline]] void weighted(float* o, int64_t ldo, const float* p, const T* const* rows, int n,
                                int64_t Dv, const T* const* next, int64_t D) {
  using V = Values<T>;
  constexpr int kMost = std::max(1, std::min(8, kSums / R) / V::kVecs);
  int64_t d = 0;
  for (; d + kMost * V::kSize <= Dv; d += kMost * V::kSize)
    weigh<T, R, kMost, true>(o, ldo, p, rows, n, d, 0, d < D ? next : nullptr);
  for (; d + V::kSize <= Dv; d += V::kSize)
    weigh<T, R, 1, true>(o, ldo, p, rows, n, d, 0, d < D ? next : nullptr);
  if (d < Dv) weigh<T, R, 1, false>(o, ldo, p, rows, n, d, Dv - d, d < D ? next : nullptr);
  if (next)
    for (int64_t rest = up(Dv, V::kSize); rest < D; rest += 64 / static_cast<int>(sizeof(T)))
      for (int j = 0; j < n; ++j) fetch(next[j] + rest);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
