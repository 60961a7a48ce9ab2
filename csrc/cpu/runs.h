// Runs: a block of keys cut where the queries of a tile that see them change, 16 keys at a time.  What a mask hides
// from whole vectors of queries is not computed, and what it shows whole is not masked.
// No include guard: isa.h reads it once for each instruction set.
namespace fastattn::cpu::FASTATTN_ISA {

inline constexpr int kMaxKeys = 256;  // keys in a block, at most
inline constexpr int kRun = 16;       // keys that share their visible lanes

struct Run {
  int j0, j1;  // keys, counted from the block's start
  int v0, v1;  // vectors of the tile that see some of them
  bool partial;
  int keys() const { return j1 - j0; }
  int vecs() const { return v1 - v0; }
};

struct Runs {
  int count = 0;
  Run run[kMaxKeys / kRun];
  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
};

// The vectors of queries [i0, i1) that keys [j0, j1) concern: of a band by its edges, of a formula by asking each.
FASTATTN_INLINE Run run_of(const Band& mask, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Range q = mask.queries(j0, j1);
  const int64_t first = std::max(q.begin, i0), last = std::min(q.end, i1);
  if (first >= last) return {0, 0, 0, 0, false};
  const int v0 = static_cast<int>((first - i0) / W), v1 = static_cast<int>((last - i0 + W - 1) / W);
  return {0, 0, v0, v1, !mask.all(i0 + v0 * W, std::min(i0 + v1 * W, i1), j0, j1)};
}
inline Run run_of(const Formula& mask, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  Run run{0, 0, 0, 0, false};
  for (int v = 0; i0 + v * W < i1; ++v) {
    const Seen seen = mask.seen(i0 + v * W, std::min(i0 + (v + 1) * W, i1), j0, j1);
    if (seen == Seen::none) continue;
    if (!run.v1) run.v0 = v;
    run.partial |= seen == Seen::some || (run.v1 && run.v1 < v);
    run.v1 = v + 1;
  }
  return run;
}

template <class M>
Runs runs_of(const M& mask, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  Runs runs;
  if constexpr (std::is_same_v<M, Formula>) {
    const Seen seen = mask.seen(i0, i1, j0, j1);
    if (seen != Seen::some) {
      if (seen == Seen::all)
        runs.run[runs.count++] = {0, static_cast<int>(j1 - j0), 0,
                                  static_cast<int>((i1 - i0 + W - 1) / W), false};
      return runs;
    }
  }
  for (int64_t j = j0; j < j1; j += kRun) {
    const int64_t je = std::min(j + kRun, j1);
    const Run run = run_of(mask, i0, i1, j, je);
    if (run.v0 >= run.v1) continue;
    Run* const before = runs.run + runs.count - 1;
    if (runs.count && before->j1 == j - j0 && before->v0 == run.v0 && before->v1 == run.v1 &&
        before->partial == run.partial)
      before->j1 = static_cast<int>(je - j0);
    else
      runs.run[runs.count++] = {static_cast<int>(j - j0), static_cast<int>(je - j0), run.v0, run.v1,
                                run.partial};
  }
  return runs;
}

// Lanes are queries i0, i0 + 1, ...: all bits set where the mask lets them see key j.
FASTATTN_INLINE vi remainder_is_zero(vi x, int by) {  // of any x, by > 0
  const float inverse = 1.0f / static_cast<float>(by);
  for (int pass = 0; pass < 3; ++pass)  // a float quotient errs by 2^-23 of itself
    x -= __builtin_convertvector(__builtin_convertvector(x, vf) * inverse, vi) * by;
  return (x == 0) | (x == by) | (x == -by);
}
inline vi visible(const MaskNode& node, vi i, int j) {
  switch (node.kind) {
    case MaskKind::band:
      return (j - i >= node.band.lo) & (j - i <= node.band.hi);
    case MaskKind::dilated: {
      const vi away = j - node.dilated.shift - i;
      return (away <= node.dilated.reach) & (away >= -node.dilated.reach) &
             remainder_is_zero(away, node.dilated.step);
    }
    case MaskKind::prefix:
      return splat(-static_cast<int>(j < node.prefix));
    default: {
      int32_t seen[W];
      for (int lane = 0; lane < W; ++lane) seen[lane] = -static_cast<int>(node.visible(i[lane], j));
      return load_as<vi>(seen);
    }
  }
}
inline vi visible(const Formula& mask, int i0, int j) {
  const Slots& slots = mask.slots;
  vi i = i0 + iota(), held = splat(-1);
  if (slots.q) {
    int32_t token[W], label[W] = {};
    for (int lane = 0; lane < W; ++lane) {
      const int at = std::min(i0 + lane, slots.num_q - 1);
      token[lane] = slots.q[at];
      if (slots.q_label) label[lane] = slots.q_label[at];
    }
    if (slots.k[j] < 0) return vi{};
    i = load_as<vi>(token), held = i >= 0;
    if (slots.q_label) held &= load_as<vi>(label) == slots.k_label[j];
    i &= held, j = slots.k[j];
  }
  vi stack[kMaskNodes];
  int at = 0;
  for (int n = 0; n < mask.count; ++n)
    if (mask.nodes[n].kind == MaskKind::both)
      --at, stack[at - 1] &= stack[at];
    else if (mask.nodes[n].kind == MaskKind::either)
      --at, stack[at - 1] |= stack[at];
    else
      stack[at++] = visible(mask.nodes[n], i, j);
  return stack[0] & held;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
