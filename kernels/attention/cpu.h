// What forward and backward share.  No include guard: isa.h reads it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kKeys = 128;  // keys in a block
constexpr float kInf = std::numeric_limits<float>::infinity();

// How numbers of a type are multiplied.
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

// exp of a difference of logits in Mul's unit.
template <class Mul, int Degree = Mul::kExpDegree>
FASTATTN_INLINE vf power(vf x) {
  return exp2<Degree>(x * (1.4426950408889634f / Mul::kUnit));
}

// The logit as forward and backward both have it: rounded, not fused into what follows.
template <class Score>
FASTATTN_INLINE vf logit(const Score& score, vf dot) {
  return settled(score.logit(dot));
}

struct Carver {  // hands out consecutive parts of this thread's scratch memory
  float* next;
  float* take(int64_t floats) { return std::exchange(next, next + up(floats, 16)); }
};

// What api.py promises and torch.ops does not: no shape may lead a kernel out of its tensors.
inline void check(const Tensor& q, const Tensor& k, const Tensor& v, Ints mask) {
  FASTATTN_CHECK(q.ndim == 4 && k.ndim == 4 && v.ndim == 4, "q, k, v are ", text(q), ", ", text(k),
                 ", ", text(v), "; they take 4 axes");
  FASTATTN_CHECK(q.shape[3] <= 256 && v.shape[3] <= 256, "D is ", q.shape[3], " and Dv is ",
                 v.shape[3], "; at most 256");
  FASTATTN_CHECK(q.shape[1] == k.shape[1] || (k.shape[1] > 0 && q.shape[1] % k.shape[1] == 0),
                 "Hq is ", q.shape[1], " and Hk is ", k.shape[1], "; Hq must be a multiple of Hk");
  FASTATTN_CHECK(mask.size() == 5, "mask has ", mask.size(), " numbers; it takes 5");
}

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
}  // namespace fastattn::cpu::FASTATTN_ISA
