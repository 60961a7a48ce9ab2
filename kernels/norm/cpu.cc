// add_norm, forward and backward, CPU                                                maths: README.md
//
// s = x + bias + residual,   y = (s - mean) * rstd * weight + beta,   over each row of D.
//
//             D ->                             forward: a row is read once and kept, as float, in h [D];
//   rows ┌──────────────┐  ┐                   the mean, the variance about it and y are three walks over h.
//     |  │ x_i  -> h    │  │ a task            backward: two walks over a row, for its sums and for dx;
//     v  │ ...          │  ┘                   parameter gradients are summed over the kNormBlock rows of a
//        └──────────────┘                      task into partial, then over the tasks in order: the same
//          | | | | |                           sum at any number of threads.
//        dbias dweight dbeta [D]
//
// Lanes run along D, four vectors at a time:
//
//   instruction set      W   a step  sums in flight                why that many
//   avx512bf16, avx512  16   64      4 a sum: 8, then 4 forward,   a sum is a chain of additions, each waiting for the
//   avx2                 8   32      12 backward                   one before: four chains wait side by side, and the
//   scalar               4   16                                    three sums of backward leave 4 of 16 registers
//
// Measured: N 4096 D 1024, 2 threads of Zen 4, of reading as many bytes: forward float32 80-82 %, bfloat16 69-86 %,
// float16 58 %; backward float32 32-49 %, bfloat16 9-40 %, float16 13-38 % (bench/results/epyc-zen4-2-cores.jsonl).
// Not done: rows in pieces, for D whose h outgrows the caches.
// Assumes a dense last axis (api.py makes it so) and float32 parameters; View refuses the rest.
#define FASTATTN_CPU_FILE "kernels/norm/cpu.cc"
#include "kernels/norm/op.h"

#include "csrc/core/rows.h"
#include "csrc/cpu/isa.h"

#include "csrc/cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

using Maybe = std::optional<Tensor>;
enum Kind { kLayer, kRms, kCrms };
constexpr int64_t kElementsPerTask = 32768;  // below it a second thread costs more than it brings

// A vector of a row: whole, or the n lanes that remain of it, where the others read as zero and are not written.
template <bool Whole, class T>
FASTATTN_INLINE vf get(const T* p, int64_t n) {
  return Whole ? load(p) : load(p, n);
}
template <bool Whole, class T>
FASTATTN_INLINE void put(T* p, vf v, int64_t n) {
  Whole ? store(p, v) : store(p, v, n);
}

// A sum along a row, in two levels, so that its error grows with the length of a part and not of the row.
struct Sum {
  static constexpr int64_t kPart = 64 * W;  // elements
  vf total = {}, chain[4] = {};
  FASTATTN_INLINE void part() {
    total += (chain[0] + chain[1]) + (chain[2] + chain[3]);
#pragma GCC unroll 4
    for (vf& c : chain) c = vf{};
  }
  template <int u>
  FASTATTN_INLINE void add(vf v) {
    chain[u] += v;
  }
  FASTATTN_INLINE float value() {
    part();
    return sum(total);
  }
};

// f.at<u, whole>(d, n) for every vector of a row, u = 0..3 in turn.
template <class F>
FASTATTN_INLINE void walk(F& f, int64_t D) {
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) {
    if (d % Sum::kPart == 0) f.part();
    f.template at<0, true>(d, W);
    f.template at<1, true>(d + W, W);
    f.template at<2, true>(d + 2 * W, W);
    f.template at<3, true>(d + 3 * W, W);
  }
  f.part();
  for (; d + W <= D; d += W) f.template at<0, true>(d, W);
  if (d < D) f.template at<1, false>(d, D - d);
}
// ---- Forward ---------------------------------------------------------------------------------------

template <class T>
struct Forward {
  int64_t rows, D, rows_per_task;
  Strided<T> y, s;
  float *mean, *rstd;
  Strided<const T> x, residual;
  const float *bias, *weight, *beta;
  float eps;
  int64_t kind;

  void operator()(int64_t task) const {
    float* h = static_cast<float*>(scratch((D + 2 * W) * sizeof(float)));
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t i = task * rows_per_task; i < end; ++i) normalise(i, h);
  }

  void normalise(int64_t i, float* h) const {
    Gather gather{*this, i, h};
    walk(gather, D);

    // Statistics.  The variance is summed about the mean: as a difference of two sums it would cancel.
    float centre = 0, power;
    if (kind == kLayer) {
      centre = gather.total.value() / D;
      Deviate deviate{h, centre};
      walk(deviate, D);
      power = deviate.squares.value() / D;
    } else if (kind == kRms) {
      power = gather.squares.value() / D;
    } else {
      const float total = gather.total.value();
      power = (gather.squares.value() + total * total) / (D + 1);
    }
    const float scale = 1 / std::sqrt(power + eps);
    mean[i] = centre, rstd[i] = scale;

    Normalise write{*this, i, h, centre, scale};
    walk(write, D);
  }

  struct Gather {     // add, round, keep
    const Forward f;  // a copy: what is stored cannot change it
    int64_t i;
    float* h;
    Sum total = {}, squares = {};
    FASTATTN_INLINE void part() { total.part(), squares.part(); }
    template <int u, bool Whole>
    FASTATTN_INLINE void at(int64_t d, int64_t n) {
      vf v = get<Whole>(f.x[i] + d, n);
      if (f.bias) v += get<Whole>(f.bias + d, n);
      if (f.residual.base) v += get<Whole>(f.residual[i] + d, n);
      if (f.s.base) {
        put<Whole>(f.s[i] + d, v, n);
        if (!std::is_same_v<T, float>) v = get<Whole>(f.s[i] + d, n);
      }
      store(h + d, v);
      total.template add<u>(v), squares.template add<u>(v * v);
    }
  };
  struct Deviate {
    const float* h;
    float centre;
    Sum squares = {};
    FASTATTN_INLINE void part() { squares.part(); }
    template <int u, bool Whole>
    FASTATTN_INLINE void at(int64_t d, int64_t n) {
      vf v = load(h + d) - centre;
      if (!Whole) v = select(iota() < static_cast<int>(n), v, vf{});
      squares.template add<u>(v * v);
    }
  };
  struct Normalise {
    const Forward f;  // a copy: what is stored cannot change it
    int64_t i;
    const float* h;
    float centre, scale;
    FASTATTN_INLINE void part() {}
    template <int u, bool Whole>
    FASTATTN_INLINE void at(int64_t d, int64_t n) {
      vf v = (load(h + d) - centre) * scale;
      if (f.weight) v *= get<Whole>(f.weight + d, n);
      if (f.beta) v += get<Whole>(f.beta + d, n);
      put<Whole>(f.y[i] + d, v, n);
    }
  };
};

// ---- Backward --------------------------------------------------------------------------------------

// With g = dy * weight and xhat = (s - mean) * rstd:
//
//   ds = rstd * (g - a - (xhat + x0) * c)
//
//   layer  a = average of g   x0 = 0             c = average of g * xhat
//   rms    a = 0              x0 = 0             c = average of g * xhat
//   crms   a = 0              x0 = sum of xhat   c = sum of g * xhat / (D + 1)
template <class T>
struct Backward {
  int64_t rows, D;
  Strided<T> dx;
  float *dbias, *dweight, *dbeta, *partial;
  Strided<const T> dy, ds, s;
  const float *weight, *mean, *rstd;
  int64_t kind;

  void operator()(int64_t block) const {
    float* sums = partial + block * 3 * D;
    std::fill_n(sums, 3 * D, 0.0f);
    const int64_t end = std::min(rows, (block + 1) * kNormBlock);
    for (int64_t i = block * kNormBlock; i < end; ++i)
      differentiate(i, sums, sums + D, sums + 2 * D);
  }

  void differentiate(int64_t i, float* dbias_sum, float* dweight_sum, float* dbeta_sum) const {
    Sums sums{*this, i, dweight_sum, dbeta_sum};
    walk(sums, D);
    const float a = kind == kLayer ? sums.g.value() / D : 0;
    const float x0 = kind == kCrms ? sums.x.value() : 0;
    const float c = sums.gx.value() / (kind == kCrms ? D + 1 : D);
    Write write{*this, i, dbias_sum, a, x0, c * rstd[i]};
    walk(write, D);
  }

  template <bool Whole>
  FASTATTN_INLINE static void accumulate(float* sum, vf v, int64_t n) {
    put<Whole>(sum, get<Whole>(sum, n) + v, n);
  }

  struct Sums {  // the row's two or three sums, and its part of the parameters' gradients
    const Backward f;
    int64_t i;
    float *dweight_sum, *dbeta_sum;
    Sum g = {}, gx = {}, x = {};
    FASTATTN_INLINE void part() { g.part(), gx.part(), x.part(); }
    template <int u, bool Whole>
    FASTATTN_INLINE void at(int64_t d, int64_t n) {
      const vf dy_v = get<Whole>(f.dy[i] + d, n);
      vf xhat = (get<Whole>(f.s[i] + d, n) - f.mean[i]) * f.rstd[i];
      if (!Whole) xhat = select(iota() < static_cast<int>(n), xhat, vf{});
      if (f.dweight) accumulate<Whole>(dweight_sum + d, dy_v * xhat, n);
      if (f.dbeta) accumulate<Whole>(dbeta_sum + d, dy_v, n);
      const vf v = f.weight ? dy_v * get<Whole>(f.weight + d, n) : dy_v;
      g.template add<u>(v), gx.template add<u>(v * xhat), x.template add<u>(xhat);
    }
  };
  struct Write {
    const Backward f;
    int64_t i;
    float* dbias_sum;
    float a, x0, c;
    FASTATTN_INLINE void part() {}
    template <int u, bool Whole>
    FASTATTN_INLINE void at(int64_t d, int64_t n) {
      const vf dy_v = get<Whole>(f.dy[i] + d, n),
               xhat = (get<Whole>(f.s[i] + d, n) - f.mean[i]) * f.rstd[i];
      const vf v = f.weight ? dy_v * get<Whole>(f.weight + d, n) : dy_v;
      vf dx_v = (v - a) * f.rstd[i] - (xhat + x0) * c;
      if (f.ds.base) dx_v += get<Whole>(f.ds[i] + d, n);
      put<Whole>(f.dx[i] + d, dx_v, n);
      if (f.dbias) accumulate<Whole>(dbias_sum + d, dx_v, n);
    }
  };
};

// The sums over blocks, in order, for kColumns columns a task.
struct SumBlocks {
  static constexpr int64_t kColumns = 256;
  int64_t blocks, D;
  const float* partial;
  float* gradients[3];

  void operator()(int64_t task) const {
    const int64_t end = std::min(D, (task + 1) * kColumns);
    for (int which = 0; which < 3; ++which) {
      if (!gradients[which]) continue;
      for (int64_t d = task * kColumns; d < end; d += W) {
        vf total = {};
        for (int64_t block = 0; block < blocks; ++block) {
          const float* const from = partial + (block * 3 + which) * D + d;
          total += end - d >= W ? load(from) : load(from, end - d);
        }
        float* const to = gradients[which] + d;
        end - d >= W ? store(to, total) : store(to, total, end - d);
      }
    }
  }
};

// ---- From tensors to pointers ----------------------------------------------------------------------

template <class T>
Strided<T> matrix(const char* what, const Tensor& t, const Tensor& like) {
  const View<T, 2> view(what, t, {like.shape[0], like.shape[1]});
  return {view.data, view.stride[0]};
}
template <class T>
Strided<T> matrix(const char* what, const Maybe& t, const Tensor& like) {
  return t ? matrix<T>(what, *t, like) : Strided<T>{};
}
template <class T = const float>
T* vector(const char* what, const Tensor& t, int64_t n) {
  return View<T, 1>(what, t, {n}).data;
}
const float* vector(const char* what, const Maybe& t, int64_t n) {
  return t ? vector(what, *t, n) : nullptr;
}
float* gradient(const char* what, const Tensor& t, const Maybe& of, int64_t n) {
  return of ? vector<float>(what, t, n) : nullptr;
}
void check_kind(const Tensor& s, int64_t kind) {
  FASTATTN_CHECK(s.ndim == 2, "x is ", text(s), "; it takes rows, D");
  FASTATTN_CHECK(kind >= kLayer && kind <= kCrms, "kind is ", kind,
                 "; it takes 0 (layer), 1 (rms) or 2 (crms)");
}

struct ForwardCall {
  Tensor y, s, mean, rstd, x;
  Maybe residual, bias, weight, beta;
  double eps;
  int64_t kind;

  template <class T>
  void operator()(Type<T>) const {
    const int64_t rows = x.shape[0], D = x.shape[1];
    const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, D));
    Forward<T> forward{rows,
                       D,
                       rows_per_task,
                       matrix<T>("y", y, x),
                       residual || bias ? matrix<T>("s", s, x) : Strided<T>{},
                       vector<float>("mean", mean, rows),
                       vector<float>("rstd", rstd, rows),
                       matrix<const T>("x", x, x),
                       matrix<const T>("residual", residual, x),
                       vector("bias", bias, D),
                       vector("weight", weight, D),
                       vector("beta", beta, D),
                       static_cast<float>(eps),
                       kind};
    parallel_for((rows + rows_per_task - 1) / rows_per_task, forward);
  }
};

struct BackwardCall {
  Tensor dx, dbias, dweight, dbeta, partial, dy;
  Maybe ds;
  Tensor s;
  Maybe bias, weight, beta;
  Tensor mean, rstd;
  int64_t kind;

  template <class T>
  void operator()(Type<T>) const {
    const int64_t rows = s.shape[0], D = s.shape[1], blocks = (rows + kNormBlock - 1) / kNormBlock;
    Backward<T> backward{rows,
                         D,
                         matrix<T>("dx", dx, s),
                         gradient("dbias", dbias, bias, D),
                         gradient("dweight", dweight, weight, D),
                         gradient("dbeta", dbeta, beta, D),
                         View<float, 3>("partial", partial, {blocks, 3, D}).data,
                         matrix<const T>("dy", dy, s),
                         matrix<const T>("ds", ds, s),
                         matrix<const T>("s", s, s),
                         vector("weight", weight, D),
                         vector("mean", mean, rows),
                         vector("rstd", rstd, rows),
                         kind};
    parallel_for(blocks, backward);
    SumBlocks reduce{
        blocks, D, backward.partial, {backward.dbias, backward.dweight, backward.dbeta}};
    parallel_for((D + SumBlocks::kColumns - 1) / SumBlocks::kColumns, reduce);
  }
};

}  // namespace

void add_norm_fwd(Tensor y, Tensor s, Tensor mean, Tensor rstd, Tensor x, Maybe residual,
                  Maybe bias, Maybe weight, Maybe beta, double eps, int64_t kind) {
  check_kind(x, kind);
  dispatch(kNormDtypes, "x.dtype", x.dtype,
           ForwardCall{y, s, mean, rstd, x, residual, bias, weight, beta, eps, kind});
}

void add_norm_bwd(Tensor dx, Tensor dbias, Tensor dweight, Tensor dbeta, Tensor partial, Tensor dy,
                  Maybe ds, Tensor s, Maybe bias, Maybe weight, Maybe beta, Tensor mean,
                  Tensor rstd, double /*eps: it is in rstd*/, int64_t kind) {
  check_kind(s, kind);
  dispatch(kNormDtypes, "s.dtype", s.dtype,
           BackwardCall{dx, dbias, dweight, dbeta, partial, dy, ds, s, bias, weight, beta, mean,
                        rstd, kind});
}

}  // namespace fastattn::cpu::FASTATTN_ISA
