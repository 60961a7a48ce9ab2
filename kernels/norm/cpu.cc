// add_norm, forward and backward, CPU                                                maths: README.md
//
// s = x + bias + residual,   y = (s - mean) * rstd * weight + beta,   over each row of D.
//
//             D ->                             forward: a row is read once and kept, as float, in h [D];
//   rows ┌──────────────┐  ┐                   the mean, the variance about it and y are three walks over h.
//     |  │ x_i  -> h    │  │ a task            backward: two walks over a row, for its two sums and for dx;
//     v  │ ...          │  ┘                   parameter gradients are summed over the kNormBlock rows of a
//        └──────────────┘                      task into partial, then over the tasks in order: the same
//          | | | | |                           sum at any number of threads.
//        dbias dweight dbeta [D]
//
// Lanes run along D. A row is read from memory once, so memory is the limit: one sum in flight is enough.
// Assumes a dense last axis; else refused.
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

// Vectors of a row, of which n lanes remain: the others read as zero and are not written.
template <class T>
FASTATTN_INLINE vf get(const T* p, int64_t n) {
  return n >= W ? load(p) : load(p, n);
}
template <class T>
FASTATTN_INLINE void put(T* p, vf v, int64_t n) {
  n >= W ? store(p, v) : store(p, v, n);
}
// A sum along a row, in two levels, so that its error grows with the length of a part and not of the row.
struct Sum {
  static constexpr int64_t kPart = 16 * W;  // elements
  vf total = {}, part = {};
  FASTATTN_INLINE void begin(int64_t d) {
    if (d % kPart == 0) total += part, part = vf{};
  }
  FASTATTN_INLINE void add(vf v) { part += v; }
  FASTATTN_INLINE float value() const { return sum(total + part); }
};

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
    // Add, round, keep.
    Sum total, squares;
    for (int64_t d = 0; d < D; d += W) {
      const int64_t n = D - d;
      total.begin(d), squares.begin(d);
      vf v = get(x[i] + d, n);
      if (bias) v += get(bias + d, n);
      if (residual.base) v += get(residual[i] + d, n);
      if (s.base) {
        put(s[i] + d, v, n);
        v = get(s[i] + d, n);
      }
      store(h + d, v);
      total.add(v), squares.add(v * v);
    }

    // Statistics. The variance is summed about the mean: as a difference of two sums it would cancel.
    float centre = 0, power;
    if (kind == kLayer) {
      centre = total.value() / D;
      store(h + D, splat(centre));  // what lies past the row adds nothing
      Sum deviations;
      for (int64_t d = 0; d < D; d += W) {
        deviations.begin(d);
        const vf v = load(h + d) - centre;
        deviations.add(v * v);
      }
      power = deviations.value() / D;
    } else if (kind == kRms) {
      power = squares.value() / D;
    } else {
      power = (squares.value() + total.value() * total.value()) / (D + 1);
    }
    const float scale = 1 / std::sqrt(power + eps);
    mean[i] = centre, rstd[i] = scale;

    // Normalise.
    for (int64_t d = 0; d < D; d += W) {
      const int64_t n = D - d;
      vf v = (load(h + d) - centre) * scale;
      if (weight) v *= get(weight + d, n);
      if (beta) v += get(beta + d, n);
      put(y[i] + d, v, n);
    }
  }
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
    // The two or three sums of the row, and its part of the parameters' gradients.
    Sum g_total, gx_total, x_total;
    for (int64_t d = 0; d < D; d += W) {
      const int64_t n = D - d;
      g_total.begin(d), gx_total.begin(d), x_total.begin(d);
      const vf dy_v = get(dy[i] + d, n), xhat = (get(s[i] + d, n) - mean[i]) * rstd[i];
      if (dweight) put(dweight_sum + d, get(dweight_sum + d, n) + dy_v * xhat, n);
      if (dbeta) put(dbeta_sum + d, get(dbeta_sum + d, n) + dy_v, n);
      const vf g = weight ? dy_v * get(weight + d, n) : dy_v;
      g_total.add(g), gx_total.add(g * xhat), x_total.add(xhat);
    }
    const float a = kind == kLayer ? g_total.value() / D : 0;
    const float x0 = kind == kCrms ? x_total.value() : 0;
    const float c = gx_total.value() / (kind == kCrms ? D + 1 : D);

    for (int64_t d = 0; d < D; d += W) {
      const int64_t n = D - d;
      const vf dy_v = get(dy[i] + d, n), xhat = (get(s[i] + d, n) - mean[i]) * rstd[i];
      const vf g = weight ? dy_v * get(weight + d, n) : dy_v;
      vf v = (g - a) * rstd[i] - (xhat + x0) * (c * rstd[i]);
      if (ds.base) v += get(ds[i] + d, n);
      put(dx[i] + d, v, n);
      if (dbias) put(dbias_sum + d, get(dbias_sum + d, n) + v, n);
    }
  }
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
          total += get(partial + (block * 3 + which) * D + d, end - d);
        }
        put(gradients[which] + d, total, end - d);
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
