// Numbers for pairs (i, j): biases of logits and factors of weights, brought into tiles whose rows are keys and whose
// lanes are queries, and their gradients, summed from such tiles.
//
//   form      lies in memory as                      its gradient is summed
//   pairs     [B|1, Hq|1, Nq, Nk], any strides       where it lies, by turns of the heads that share it
//   keys      [B|1, Hq|1, 1, Nk]                     in a row a head: by a task in a buffer of its own, then by
//   queries   [B|1, Hq|1, Nq, 1]                     turns of the tasks of a head; at last over the heads
//   one       [B|1, Hq|1, 1, 1]                      that share it
//   offset    [Hq|1, 2 L - 1], of j - (i + Nk - Nq)
//   index     [Hq|1, T], of index [Nq, Nk]
//
// Every sum has one order, whatever the threads.
// No include guard: isa.h reads it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {

enum class Form { none, pairs, keys, queries, one, offset, index };

// The numbers of one batch and head.
struct Lookup {
  Form form = Form::none;
  DType dtype;
  const char* base;
  int64_t row, column;   // strides in numbers; of a table, `column` from one number to the next
  const int32_t* index;  // of pair (0, 0)
  int64_t index_row, size;

  bool is_given() const { return form != Form::none; }
  template <class T>
  float number(int64_t at) const {
    return static_cast<float>(reinterpret_cast<const T*>(base)[at]);
  }
  template <class T>
  vf along_keys(int64_t i, int64_t j,
                int64_t n) const {  // n <= W numbers from (i, j) on, then zeros
    float x[W] = {};
    if (form == Form::index) {
      const int32_t* const at = index + i * index_row + j;
      for (int64_t c = 0; c < n; ++c)
        x[c] = number<T>(std::clamp<int64_t>(at[c], 0, size - 1) * column);
      return load(x);
    }
    const T* const p = reinterpret_cast<const T*>(base) + i * row + j * column;
    if (column == 1) return n >= W ? load(p) : load(p, n);
    for (int64_t c = 0; c < n; ++c) x[c] = static_cast<float>(p[c * column]);
    return load(x);
  }
};

struct Term {
  Form form = Form::none;
  DType dtype;
  const char* base;
  int64_t shape[4], stride[4];  // of a table: head, number; strides are 0 where one stands for all
  const int32_t* index = nullptr;
  int64_t index_shape[2], index_row;

  Term() = default;
  // `B` counts sequences, `in_row` those of one batch: numbers are of each, of each of a batch, or of all.
  Term(const char* what, const Maybe& values, const Maybe& given_index, int64_t B, int64_t Hq,
       int64_t in_row) {
    if (!values) return;
    const Tensor& t = *values;
    FASTATTN_CHECK(t.ndim == 2 || (t.ndim == 4 && !given_index), what, " is ", text(t),
                   "; it takes 4 axes, or 2 for a table");
    FASTATTN_CHECK(t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16, what,
                   " is ", text(t), "; it takes float32, bfloat16 or float16");
    dtype = t.dtype, base = static_cast<const char*>(t.data);
    for (int axis = 0; axis < t.ndim; ++axis)
      shape[axis] = t.shape[axis], stride[axis] = t.shape[axis] == 1 ? 0 : t.stride[axis];
    const int64_t heads = t.ndim == 4 ? shape[1] : shape[0];
    FASTATTN_CHECK((heads == 1 || heads == Hq) &&
                       (t.ndim == 2 || shape[0] == 1 || shape[0] == B || shape[0] == in_row),
                   what, " is ", text(t), "; B is ", B, " and Hq is ", Hq);
    if (t.ndim == 4) {
      form = shape[2] > 1   ? shape[3] > 1 ? Form::pairs : Form::queries
             : shape[3] > 1 ? Form::keys
                            : Form::one;
      return;
    }
    form = given_index ? Form::index : Form::offset;
    stride[1] = t.stride[1];
    if (!given_index) return;
    const View<const int32_t, 2> at(*given_index);
    FASTATTN_CHECK(at.stride[1] == 1 || at.shape[1] < 2, what, "'s index has stride ", at.stride[1],
                   " on its last axis; it must be 1");
    FASTATTN_CHECK(shape[1] > 0, what, " is ", text(t), "; a table has at least one row");
    index = at.data, index_row = at.stride[0];
    index_shape[0] = at.shape[0], index_shape[1] = at.shape[1];
  }

  Lookup at(const char* what, int64_t b, int64_t h, int64_t Nq, int64_t Nk) const {
    if (form == Form::none) return {};
    const int64_t item = dtype == DType::f32 ? 4 : 2;
    Lookup x{form, dtype, base, 0, 0, index, 0, 0};
    if (form == Form::offset || form == Form::index) {
      x.base += (h * stride[0]) * item, x.size = shape[1];
      x.column = stride[1];
      if (form == Form::index) {
        FASTATTN_CHECK(index_shape[0] >= Nq && index_shape[1] >= Nk, what, "'s index is [",
                       index_shape[0], ", ", index_shape[1], "]; Nq is ", Nq, " and Nk is ", Nk);
        x.index_row = index_row;
      } else {
        FASTATTN_CHECK((shape[1] + 1) / 2 >= std::max(Nq, Nk), what, " has ", shape[1],
                       " offsets; Nq is ", Nq, " and Nk is ", Nk);
        x.base += ((shape[1] - 1) / 2 - (Nk - Nq)) * x.column * item;
        x.row = -x.column;
      }
      return x;
    }
    FASTATTN_CHECK((shape[2] == 1 || shape[2] >= Nq) && (shape[3] == 1 || shape[3] >= Nk), what,
                   " is [.., ", shape[2], ", ", shape[3], "]; Nq is ", Nq, " and Nk is ", Nk);
    x.base += (b % shape[0] * stride[0] + h * stride[1]) * item, x.row = stride[2],
                                                                 x.column = stride[3];
    return x;
  }
};

// tile[j - j0][lane of i] = or += the numbers of [i0, i1) x [j0, j1); lanes past i1 are 0.
template <class T>
void fill(const Lookup& x, float* tile, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
          bool first) {
  const bool by_rows = x.form == Form::index || (x.row != 0 && x.column != 0);
  for (int64_t i = i0; i < i1; i += W) {
    float* const to = tile + (i - i0);
    const int64_t rows = std::min<int64_t>(i1 - i, W);
    if (!by_rows) {
      vf lane{};
      if (x.row != 0 || x.column == 0) {
        float numbers[W] = {};
        for (int64_t r = 0; r < rows; ++r) numbers[r] = x.template number<T>((i + r) * x.row);
        lane = load(numbers);
      }
      for (int64_t j = j0; j < j1; ++j) {
        float* const at = to + (j - j0) * ld;
        const vf v = x.column != 0 ? splat(x.template number<T>(j * x.column)) : lane;
        store(at, first ? v : load(at) + v);
      }
      continue;
    }
    for (int64_t j = j0; j < j1; j += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        block[r] =
            r < rows ? x.template along_keys<T>(i + r, j, std::min<int64_t>(j1 - j, W)) : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        if (j + r < j1) {
          float* const at = to + (j + r - j0) * ld;
          store(at, first ? block[r] : load(at) + block[r]);
        }
    }
  }
}
inline void fill(const Lookup& x, float* tile, int64_t ld, int64_t i0, int64_t i1, int64_t j0,
                 int64_t j1, bool first) {
  if (x.dtype == DType::f32) fill<float>(x, tile, ld, i0, i1, j0, j1, first);
  if (x.dtype == DType::bf16) fill<bf16>(x, tile, ld, i0, i1, j0, j1, first);
  if (x.dtype == DType::f16) fill<f16>(x, tile, ld, i0, i1, j0, j1, first);
}

// Dropout: which weights of one batch and head stay, and by what they grow.
struct Keep {
  int64_t seed;
  uint32_t threshold, b, h;
  float grown;

  // tile[j - j0][lane of i] = or *= 0 or `grown`; j0 is a multiple of 4.
  void fill(float* tile, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
            bool first) const {
    for (int64_t i = i0; i < i1; i += W)
      for (int64_t j = j0; j < j1; j += 4) {
        const vu zero{};
        vu x[4] = {zero + static_cast<uint32_t>(j / 4), (vu)(static_cast<int>(i) + iota()),
                   zero + h, zero + b};
        philox(seed, x);
        for (int word = 0; word < 4 && j + word < j1; ++word) {
          float* const at = tile + (j + word - j0) * ld + (i - i0);
          const vf kept = select((vi)(x[word] >= threshold), splat(grown), vf{});
          store(at, first ? kept : load(at) * kept);
        }
      }
  }
};

// Where the gradient of a term is summed.
struct TermGradient {
  Form form = Form::none;
  Tensor out;
  float*
      sums;  // pairs: [b][h][Nq][Nk], `out` itself where it is float32; else a row of `length` for each batch and head
  int32_t* turns;          // pairs: of each tile of each matrix; else of each batch and head
  bool is_direct = false;  // pairs: to `out`, which no other head shares
  bool is_ragged;          // sequences of several lengths: `out` was cleared
  int64_t B, Hq, length, shape[4];
  int64_t tiles, blocks;  // pairs: of each matrix
  const Term* term;

  // `work` is what api.py allocates (_sums); queries come in tiles of `lanes`, keys in blocks of `block`.
  TermGradient(const char* what, const Tensor& out, const Tensor& work, const Term& term,
               bool is_needed, int64_t B, int64_t Hq, bool is_ragged, int64_t lanes, int64_t block)
      : out(out), is_ragged(is_ragged), B(B), Hq(Hq), term(&term) {
    if (!is_needed || term.form == Form::none) return;
    form = term.form;
    const int64_t axes = form == Form::offset || form == Form::index ? 2 : 4;
    FASTATTN_CHECK(out.ndim == axes && out.dtype == term.dtype, "the gradient of ", what, " is ",
                   text(out));
    int64_t size = 1;
    for (int64_t axis = axes; axis-- > 0; size *= shape[axis]) {
      shape[axis] = term.shape[axis];
      FASTATTN_CHECK(
          out.shape[axis] == shape[axis] && (out.stride[axis] == size || shape[axis] < 2),
          "the gradient of ", what, " is ", text(out), "; it must be contiguous, and of its shape");
    }
    const View<float, 1> room(work);
    sums = room.data;
    if (form == Form::pairs) {
      tiles = (shape[2] + lanes - 1) / lanes, blocks = (shape[3] + block - 1) / block;
      const bool is_shared = shape[0] < B || (shape[1] == 1 && Hq > 1);
      is_direct = !is_shared;
      turns = reinterpret_cast<int32_t*>(sums + size);
      FASTATTN_CHECK(room.shape[0] >= size + shape[0] * shape[1] * tiles * blocks,
                     "the workspace of ", what, " has ", room.shape[0], " floats");
      if (is_shared && out.dtype == DType::f32) sums = static_cast<float*>(out.data);
      return;
    }
    length = axes == 2 ? shape[1] : std::max(shape[2], shape[3]);
    turns = reinterpret_cast<int32_t*>(sums + B * Hq * length);
    FASTATTN_CHECK(room.shape[0] >= B * Hq * (length + 1), "the workspace of ", what, " has ",
                   room.shape[0], " floats");
  }

  bool is_needed() const { return form != Form::none; }
  bool by_rows() const { return form != Form::none && form != Form::pairs; }

  void begin() const {  // before any task
    if (!is_needed()) return;
    const int64_t matrices = shape[0] * shape[1];
    std::memset(turns, 0, 4 * (form == Form::pairs ? matrices * tiles * blocks : B * Hq));
    if (form != Form::pairs) return;
    const int64_t size = matrices * shape[2] * shape[3],
                  bytes = size * (out.dtype == DType::f32 ? 4 : 2);
    expect_writes(out.data, bytes);
    if (!is_ragged) return;
    std::memset(out.data, 0, bytes);
    if (!is_direct) std::memset(sums, 0, size * 4);
  }

  // ---- pairs: one tile of one batch and head.  ds is [keys of the block][lanes].
  template <class T>
  void add_rows(T* to, const float* ds, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                bool first) const {
    for (int64_t i = i0; i < i1; i += W)
      for (int64_t j = j0; j < j1; j += W) {
        vf block[W];
        const int64_t n = j1 - j;
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
          block[r] = r < n ? load(ds + (j - j0 + r) * ld + (i - i0)) : vf{};
        transpose(block);
        for (int r = 0; r < W && i + r < i1; ++r) {
          T* const at = to + (i + r) * shape[3] + j;
          if (n >= W)
            store(at, first ? block[r] : load(at) + block[r]);
          else
            store(at, first ? block[r] : load(at, n) + block[r], n);
        }
      }
  }
  // `rank` of those that share the matrix added before.
  void add_pairs(const float* ds, int64_t ld, int64_t b, int64_t h, int64_t i0, int64_t i1,
                 int64_t j0, int64_t j1, int64_t tile, int64_t block, int64_t rank) const {
    const int64_t matrix = b % shape[0] * shape[1] + (shape[1] == 1 ? 0 : h),
                  offset = matrix * shape[2] * shape[3];
    if (is_direct) {
      if (out.dtype == DType::f32)
        add_rows(static_cast<float*>(out.data) + offset, ds, ld, i0, i1, j0, j1, true);
      if (out.dtype == DType::bf16)
        add_rows(static_cast<bf16*>(out.data) + offset, ds, ld, i0, i1, j0, j1, true);
      if (out.dtype == DType::f16)
        add_rows(static_cast<f16*>(out.data) + offset, ds, ld, i0, i1, j0, j1, true);
      return;
    }
    const std::atomic_ref<int32_t> turn(turns[(matrix * tiles + tile) * blocks + block]);
    for (int spins = 0; turn.load(std::memory_order_acquire) != rank; ++spins) relax(spins);
    add_rows(sums + offset, ds, ld, i0, i1, j0, j1, rank == 0 && !is_ragged);
    turn.store(static_cast<int32_t>(rank + 1), std::memory_order_release);
  }

  // ---- the others: into a task's own row, in double: it is a sum of very many, over the pairs that a run holds
  void add_row(double* row, const Lookup& x, const float* ds, int64_t ld, int64_t i0, int64_t i1,
               int64_t j0, int64_t j1, int64_t shift) const {
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = i0; i < i1; i += W) {
        const vf v = load(ds + (j - j0) * ld + (i - i0));
        const int64_t n = std::min<int64_t>(i1 - i, W);
        switch (form) {
          case Form::keys:
            row[j] += sum(v);
            break;
          case Form::one:
            row[0] += sum(v);
            break;
          case Form::queries:
            for (int64_t lane = 0; lane < n; ++lane) row[i + lane] += v[lane];
            break;
          case Form::offset: {
            double* const at = row + (length - 1) / 2 - shift + j - i;  // of lane 0; lanes go back
            for (int64_t lane = 0; lane < n; ++lane) at[-lane] += v[lane];
            break;
          }
          default: {
            const int32_t* const at = x.index + i * x.index_row + j;
            for (int64_t lane = 0; lane < n; ++lane)
              row[std::clamp<int64_t>(at[lane * x.index_row], 0, length - 1)] += v[lane];
          }
        }
      }
  }
  // A task's row of a batch and head, when `order` tasks have added theirs.
  void flush(const double* row, int64_t b, int64_t h, int64_t order) const {
    const std::atomic_ref<int32_t> turn(turns[b * Hq + h]);
    for (int spins = 0; turn.load(std::memory_order_acquire) != order; ++spins) relax(spins);
    float* const to = sums + (b * Hq + h) * length;
    for (int64_t x = 0; x < length; ++x)
      to[x] = static_cast<float>(order ? to[x] + row[x] : row[x]);
    turn.store(static_cast<int32_t>(order + 1), std::memory_order_release);
  }

  void end() const {  // after all tasks
    if (!is_needed() || is_direct) return;
    if (out.dtype == DType::f32) write<float>();
    if (out.dtype == DType::bf16) write<bf16>();
    if (out.dtype == DType::f16) write<f16>();
  }
  template <class T>
  void write() const {
    T* const to = static_cast<T*>(out.data);
    if (form == Form::pairs) {
      const int64_t size = shape[0] * shape[1] * shape[2] * shape[3];
      if (static_cast<void*>(to) != sums)
        for (int64_t x = 0; x < size; ++x) to[x] = static_cast<T>(sums[x]);
      return;
    }
    const bool is_table = form == Form::offset || form == Form::index;
    const int64_t batches = is_table ? 1 : shape[0], heads = shape[is_table ? 0 : 1];
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t x = 0; x < length; ++x) {
          double total = 0;
          for (int64_t c = b; c < B; c += batches)
            for (int64_t g = heads == 1 ? 0 : h; g < (heads == 1 ? Hq : h + 1); ++g)
              if (turns[c * Hq + g]) total += sums[(c * Hq + g) * length + x];
          to[(b * heads + h) * length + x] = static_cast<T>(static_cast<float>(total));
        }
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
