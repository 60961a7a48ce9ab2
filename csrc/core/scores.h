// What happens to a logit between q.k and the softmax.  A score returns the logit in the kernel's unit (natural, or
// times log2(e)), which is in its scale; its gradient maps dL/d(natural logit) to dL/d(q.k) / scale: dq and dk are scaled
// once, at the end.
//
// No include guard: the vector types of one instruction set must not be compiled for another, so each target
// region reads this file into its own namespace.
#ifdef FASTATTN_ISA
namespace fastattn::cpu::FASTATTN_ISA {
#else
namespace fastattn::cuda {
#endif

struct Scale {
  float scale;

  template <class F>
  FASTATTN_HD F logit(F dot) const {
    return dot * scale;
  }
  template <class F>
  FASTATTN_HD F gradient(F dlogit) const {
    return dlogit;
  }
};
}
