// What happens to a logit between q.k and the softmax, and to a weight after it.  A logit is in the kernel's unit
// (natural, or times log2(e)); gradients are those of natural logits and of q.k times scale: dq and dk are scaled once,
// at the end.
//
// No include guard: the vector types of one instruction set must not be compiled for another, so each target
// region reads this file into its own namespace.
#ifdef FASTATTN_ISA
namespace fastattn::cpu::FASTATTN_ISA {
#else
namespace fastattn::cuda {
#endif

// s = scale q.k
struct Scale {
  float scale;  // with the unit

  template <class F>
  FASTATTN_HD F logit(F dot) const {
    return dot * scale;
  }
};

// s = cap tanh(scale q.k / cap) + added, where there is a cap.  `slope` is ds / d(scale q.k).
struct Bent {
  float scale, unit, cap, inverse;  // of the cap; 0 without one

  template <class F>
  FASTATTN_INLINE F logit(F dot, F added, F& slope) const {
    F s = dot * scale;
    if (cap != 0.0f) {
      const F t = tanh(s * inverse);
      s = t * cap, slope = 1.0f - t * t;
    }
    return (s + added) * unit;
  }
};

// What the values are multiplied by: p stretched and cut to [0, 1].
struct Clip {
  float low = 0, high = 1;
  bool is_on() const { return low != 0.0f || high != 1.0f; }

  template <class F>
  FASTATTN_INLINE F weight(F p) const {
    const F y = p * (high - low) + low;
    return min(max(y, F{}), F{} + 1.0f);
  }
  template <class F>
  FASTATTN_INLINE F gradient(F p, F dweight) const {
    const F y = p * (high - low) + low;
    return select((y >= 0.0f) & (y <= 1.0f), dweight * (high - low), F{});
  }
};
}
