// Which pairs of query i and key j may attend, as two questions: is this pair visible, and which range
// can be visible at all.  `visible` is the definition, shared by the SIMD kernels (which call it in a loop over
// lanes), the CUDA kernels and the tests.  The ranges let a kernel skip what no pair of a block needs.
//
// The same numbers cross from Python (fastattn/masks.py) and into Triton (triton_masks.py):
//   [kind, left, right, left_top, right_top]            kind 0 is Band
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <variant>

#include "csrc/core/check.h"
#include "csrc/core/dtype.h"

namespace fastattn {

struct Range {
  int64_t begin, end;
  FASTATTN_HD bool empty() const { return begin >= end; }
};

// Keys j with lo <= j - i <= hi.  Full, causal and windowed masks, and all of their intersections.
struct Band {
  int lo, hi, num_q, num_k;

  Band(std::span<const int64_t> bounds, int64_t num_q, int64_t num_k)
      : num_q(static_cast<int>(num_q)), num_k(static_cast<int>(num_k)) {
    FASTATTN_CHECK(bounds.size() == 4, "a band mask has 4 bounds, got ", bounds.size());
    const int64_t shift = num_k - num_q,
                  far = int64_t{1} << 30;  // the last query stands at the last key
    lo = static_cast<int>(std::clamp(std::max(shift - bounds[0], -bounds[2]), -far, far));
    hi = static_cast<int>(std::clamp(std::min(shift + bounds[1], bounds[3]), -far, far));
  }

  FASTATTN_HD bool visible(int i, int j) const { return (j - i >= lo) & (j - i <= hi); }
  FASTATTN_HD Range keys(int64_t i0,
                         int64_t i1) const {  // some of them visible to some of [i0, i1)
    return {i0 + lo > 0 ? i0 + lo : 0, i1 + hi < num_k ? i1 + hi : num_k};
  }
  FASTATTN_HD Range queries(int64_t j0, int64_t j1) const {  // some of them seeing some of [j0, j1)
    return {j0 - hi > 0 ? j0 - hi : 0, j1 - lo < num_q ? j1 - lo : num_q};
  }
  FASTATTN_HD bool all(int64_t i0, int64_t i1, int64_t j0,
                       int64_t j1) const {  // every pair is visible
    return j0 - (i1 - 1) >= lo && j1 - 1 - i0 <= hi;
  }
};

// A new mask is a struct with these members, one name in this list, and one `case` below.
using Mask = std::variant<Band>;

inline Mask make_mask(std::span<const int64_t> code, int64_t num_q, int64_t num_k) {
  FASTATTN_CHECK(!code.empty() && code[0] == 0, "mask kind is ", code.empty() ? -1 : code[0],
                 "; compiled for 0 (band)");
  return Band(code.subspan(1), num_q, num_k);
}

}  // namespace fastattn
