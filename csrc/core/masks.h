// Which pairs of query i and key j may attend.  `visible` is the definition, shared by the SIMD kernels (which call it
// in a loop over lanes), the CUDA kernels and the tests; `seen` says what a rectangle of pairs shows, and `keys` which
// range may be visible at all, so that a kernel can skip what no pair needs.
//
// A mask crosses from Python (fastattn/masks.py) and into Triton (triton_masks.py) as a formula in postfix order, six
// integers a node, the first its kind.  A single band is a type of its own: it is the fast case.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "csrc/core/check.h"
#include "csrc/core/dtype.h"
#include "csrc/core/tensor.h"

namespace fastattn {

struct Range {
  int64_t begin, end;
  FASTATTN_HD bool empty() const { return begin >= end; }
};

enum class Seen { none, some, all };  // in this order: `and` is the least of two, `or` the greatest

inline constexpr int kMaskWidth = 6;  // integers a node
inline constexpr int kMaskNodes = 16;
enum class MaskKind { band, dilated, prefix, blocks, dense, both, either };  // fastattn.masks.KINDS

// Keys j with lo <= j - i <= hi.  Full, causal and windowed masks, and all of their intersections.
struct Band {
  int lo, hi, num_q, num_k;

  Band() = default;
  Band(std::span<const int64_t> bounds, int64_t num_q, int64_t num_k)
      : num_q(static_cast<int>(num_q)), num_k(static_cast<int>(num_k)) {
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
  FASTATTN_HD Seen seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (all(i0, i1, j0, j1)) return Seen::all;
    return lo <= hi && j1 - 1 - i0 >= lo && j0 - (i1 - 1) <= hi ? Seen::some : Seen::none;
  }
};

// Keys at most `reach` from the query's position, and a multiple of `step` from it.
struct Dilated {
  int reach, step, shift;
  FASTATTN_HD bool visible(int i, int j) const {
    const int away = j - i - shift;
    return (away <= reach) & (away >= -reach) & (away % step == 0);
  }
  FASTATTN_HD Seen seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    const int64_t least = j0 - (i1 - 1) - shift, most = j1 - 1 - i0 - shift;
    if (least > reach || most < -reach) return Seen::none;
    return step == 1 && least >= -reach && most <= reach ? Seen::all : Seen::some;
  }
};

// Blocks of size x size pairs, those of a layout [rows, columns] of one head.
struct Blocks {
  const bool* layout;
  int rows, columns, size;
  FASTATTN_HD bool visible(int i, int j) const {
    return i / size < rows && j / size < columns &&
           layout[static_cast<int64_t>(i / size) * columns + j / size];
  }
  FASTATTN_HD Seen seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    bool any = false, all = true;
    for (int64_t r = i0 / size; r * size < i1 && (all || !any); ++r)
      for (int64_t c = j0 / size; c * size < j1 && (all || !any); ++c) {
        const bool shown = r < rows && c < columns && layout[r * columns + c];
        any |= shown, all &= shown;
      }
    return !any ? Seen::none : all ? Seen::all : Seen::some;
  }
};

// A bool for every pair of one batch and head.
struct Dense {
  const bool* base;
  int64_t row, column;  // strides, 0 where one stands for all
  int last;             // query: lanes past it read its row
  FASTATTN_HD bool visible(int i, int j) const {
    return base[(i < last ? i : last) * row + j * column];
  }
  FASTATTN_HD Seen seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (row == 0) i1 = i0 + 1;
    if (column == 0) j1 = j0 + 1;
    bool any = false, all = true;
    for (int64_t i = i0; i < i1 && (all || !any); ++i)
      for (int64_t j = j0; j < j1; ++j) {
        const bool shown = base[i * row + j * column];
        any |= shown, all &= shown;
      }
    return !any ? Seen::none : all ? Seen::all : Seen::some;
  }
};

// A new mask is a struct like those above, a kind, a member here, and a case in each function below and in runs.h.
struct MaskNode {
  MaskKind kind;
  union {
    Band band;
    Dilated dilated;
    int prefix;
    Blocks blocks;
    Dense dense;
  };
  FASTATTN_HD MaskNode() {}
  FASTATTN_HD bool visible(int i, int j) const {
    switch (kind) {
      case MaskKind::band:
        return band.visible(i, j);
      case MaskKind::dilated:
        return dilated.visible(i, j);
      case MaskKind::prefix:
        return j < prefix;
      case MaskKind::blocks:
        return blocks.visible(i, j);
      default:
        return dense.visible(i, j);
    }
  }
  FASTATTN_HD Seen seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    switch (kind) {
      case MaskKind::band:
        return band.seen(i0, i1, j0, j1);
      case MaskKind::dilated:
        return dilated.seen(i0, i1, j0, j1);
      case MaskKind::prefix:
        return j1 <= prefix ? Seen::all : j0 < prefix ? Seen::some : Seen::none;
      case MaskKind::blocks:
        return blocks.seen(i0, i1, j0, j1);
      default:
        return dense.seen(i0, i1, j0, j1);
    }
  }
  FASTATTN_HD Range keys(int64_t i0, int64_t i1) const {  // not beyond: clamped by Formula
    switch (kind) {
      case MaskKind::band:
        return band.keys(i0, i1);
      case MaskKind::dilated:
        return {i0 + dilated.shift - dilated.reach, i1 + dilated.shift + dilated.reach};
      case MaskKind::prefix:
        return {0, prefix};
      case MaskKind::blocks:
        return {0, static_cast<int64_t>(blocks.columns) * blocks.size};
      default:
        return {0, int64_t{1} << 31};
    }
  }
};

// The tensors that formulas name, and which head of which batch is meant.
struct MaskTensors {
  const bool *blocks = nullptr, *dense = nullptr;
  int64_t num_blocks = 0, dense_shape[4] = {}, dense_stride[4] = {};

  static MaskTensors of(const std::optional<Tensor>& dense, const std::optional<Tensor>& blocks) {
    MaskTensors x;
    if (blocks) {
      const View<const bool, 1> t(*blocks);
      FASTATTN_CHECK(t.stride[0] == 1 || t.shape[0] < 2, "blocks must be contiguous");
      x.blocks = t.data, x.num_blocks = t.shape[0];
    }
    if (dense) {
      const View<const bool, 4> t(*dense);
      x.dense = t.data;
      std::copy_n(t.shape, 4, x.dense_shape);
      std::copy_n(t.stride, 4, x.dense_stride);
    }
    return x;
  }
};

// The tokens that the slots of a group hold, -1 for none, and their labels: tokens see each other where those are equal.
// The mask speaks of tokens.  Absent ones are null; without tokens, a slot is one.
struct Slots {
  const int32_t *q = nullptr, *k = nullptr, *q_label = nullptr, *k_label = nullptr;
  int num_q = 0, num_k = 0;
};

struct Formula {
  int count = 0, num_k;
  Slots slots;
  MaskNode nodes[kMaskNodes];

  Formula(std::span<const int64_t> code, int64_t num_q, int64_t num_k,
          const MaskTensors& given = {}, int64_t b = 0, int64_t h = 0, const Slots& slots = {})
      : num_k(static_cast<int>(num_k)), slots(slots) {
    FASTATTN_CHECK(
        !code.empty() && code.size() % kMaskWidth == 0 && code.size() <= kMaskWidth * kMaskNodes,
        "mask has ", code.size(), " numbers; it takes ", kMaskWidth, " a node, at most ",
        kMaskNodes, " nodes");
    int depth = 0;
    for (; code.size(); code = code.subspan(kMaskWidth)) {
      FASTATTN_CHECK(code[0] >= 0 && code[0] <= static_cast<int64_t>(MaskKind::either),
                     "mask kind is ", code[0], "; compiled for 0 to ",
                     static_cast<int64_t>(MaskKind::either));
      MaskNode& node = nodes[count++];
      node.kind = static_cast<MaskKind>(code[0]);
      depth += node.kind >= MaskKind::both ? -1 : 1;
      FASTATTN_CHECK(depth > 0, "mask joins two parts where there are not two");
      read(node, code.subspan(1), num_q, given, b, h);
    }
    FASTATTN_CHECK(depth == 1, "mask leaves ", depth, " parts; they must be joined to one");
  }

  bool visible(int i, int j) const {
    if (slots.q) {
      if (slots.q[i] < 0 || slots.k[j] < 0 ||
          (slots.q_label && slots.q_label[i] != slots.k_label[j]))
        return false;
      i = slots.q[i], j = slots.k[j];
    }
    uint32_t stack = 0;  // a bit each, the last in the lowest
    for (int n = 0; n < count; ++n)
      if (nodes[n].kind == MaskKind::both)
        stack = (stack >> 1) & (stack | ~uint32_t{1});
      else if (nodes[n].kind == MaskKind::either)
        stack = (stack >> 1) | (stack & 1);
      else
        stack = stack << 1 | nodes[n].visible(i, j);
    return stack & 1;
  }
  Seen seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (!slots.q) return seen_tokens(i0, i1, j0, j1);
    const Held i = held(slots.q, i0, i1), j = held(slots.k, j0, j1);
    if (i.last < 0 || j.last < 0) return Seen::none;
    const Seen most = i.has_holes || j.has_holes || slots.q_label ? Seen::some : Seen::all;
    return std::min(most, seen_tokens(i.first, i.last + 1, j.first, j.last + 1));
  }
  Seen seen_tokens(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    Seen stack[kMaskNodes];
    int at = 0;
    for (int n = 0; n < count; ++n)
      if (nodes[n].kind == MaskKind::both)
        --at, stack[at - 1] = std::min(stack[at - 1], stack[at]);
      else if (nodes[n].kind == MaskKind::either)
        --at, stack[at - 1] = std::max(stack[at - 1], stack[at]);
      else
        stack[at++] = nodes[n].seen(i0, i1, j0, j1);
    return stack[0];
  }
  Range keys(int64_t i0, int64_t i1) const {
    if (slots.q) return {0, slots.num_k};
    Range stack[kMaskNodes];
    int at = 0;
    for (int n = 0; n < count; ++n) {
      if (nodes[n].kind < MaskKind::both) {
        stack[at++] = nodes[n].keys(i0, i1);
        continue;
      }
      const Range b = stack[--at];
      Range& a = stack[at - 1];
      if (nodes[n].kind == MaskKind::both)
        a = {std::max(a.begin, b.begin), std::min(a.end, b.end)};
      else if (a.empty())
        a = b;
      else if (!b.empty())
        a = {std::min(a.begin, b.begin), std::max(a.end, b.end)};
    }
    return {std::max<int64_t>(stack[0].begin, 0), std::min<int64_t>(stack[0].end, num_k)};
  }

 private:
  struct Held {  // the first and last token of some slots
    int first, last;
    bool has_holes;
  };
  static Held held(const int32_t* token, int64_t from, int64_t to) {
    Held x{INT32_MAX, -1, false};
    for (int64_t at = from; at < to; ++at) {
      x.last = std::max(x.last, token[at]);
      token[at] < 0 ? void(x.has_holes = true) : void(x.first = std::min(x.first, token[at]));
    }
    return x;
  }
  void read(MaskNode& node, std::span<const int64_t> p, int64_t num_q, const MaskTensors& given,
            int64_t b, int64_t h) const {
    constexpr int64_t far = int64_t{1} << 30;
    switch (node.kind) {
      case MaskKind::band:
        node.band = Band(p, num_q, num_k);
        break;
      case MaskKind::dilated:
        FASTATTN_CHECK(p[0] >= 0 && p[0] <= far && p[1] >= 1 && p[1] <= far,
                       "a dilated mask reaches ", p[0], " in steps of ", p[1]);
        node.dilated = {static_cast<int>(p[0]), static_cast<int>(p[1]),
                        static_cast<int>(num_k - num_q)};
        break;
      case MaskKind::prefix:
        node.prefix = static_cast<int>(std::clamp<int64_t>(p[0], 0, far));
        break;
      case MaskKind::blocks: {
        const int64_t heads = p[1], rows = p[2], columns = p[3];
        FASTATTN_CHECK(
            p[0] >= 0 && heads >= 0 && rows >= 0 && columns >= 0 && rows <= far && columns <= far &&
                p[4] >= 1 && p[4] <= far &&
                (rows == 0 || columns == 0 || heads <= (given.num_blocks - p[0]) / rows / columns),
            "a block layout [", heads, ", ", rows, ", ", columns, "] in blocks of ", p[4],
            " does not lie in the ", given.num_blocks, " given");
        FASTATTN_CHECK(heads == 1 || h < heads, "a block layout has ", heads, " heads; head ", h,
                       " asks");
        node.blocks = {given.blocks + p[0] + (heads == 1 ? 0 : h) * rows * columns,
                       static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(p[4])};
        break;
      }
      case MaskKind::dense: {
        FASTATTN_CHECK(given.dense, "the mask names a bool tensor that is not given");
        const int64_t want[4] = {b + 1, h + 1, num_q, num_k};
        int64_t stride[4];
        for (int axis = 0; axis < 4; ++axis) {
          FASTATTN_CHECK(given.dense_shape[axis] == 1 || given.dense_shape[axis] >= want[axis],
                         "axis ", axis, " of the bool mask is ", given.dense_shape[axis],
                         "; at least ", want[axis], " is asked for");
          stride[axis] = given.dense_shape[axis] == 1 ? 0 : given.dense_stride[axis];
        }
        node.dense = {given.dense + b * stride[0] + h * stride[1], stride[2], stride[3],
                      static_cast<int>(num_q - 1)};
        break;
      }
      default:
        break;
    }
  }
};

inline bool is_band(std::span<const int64_t> code) {
  return code.size() == kMaskWidth && code[0] == static_cast<int64_t>(MaskKind::band);
}

}  // namespace fastattn
