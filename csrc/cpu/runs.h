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

template <class M>
Runs runs_of(const M& mask, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  Runs runs;
  for (int64_t j = j0; j < j1; j += kRun) {
    const int64_t je = std::min(j + kRun, j1);
    const Range q = mask.queries(j, je);
    const int64_t first = std::max(q.begin, i0), last = std::min(q.end, i1);
    if (first >= last) continue;
    const int v0 = static_cast<int>((first - i0) / W),
              v1 = static_cast<int>((last - i0 + W - 1) / W);
    const bool partial = !mask.all(i0 + v0 * W, std::min(i0 + v1 * W, i1), j, je);
    Run* const before = runs.run + runs.count - 1;
    if (runs.count && before->j1 == j - j0 && before->v0 == v0 && before->v1 == v1 &&
        before->partial == partial)
      before->j1 = static_cast<int>(je - j0);
    else
      runs.run[runs.count++] = {static_cast<int>(j - j0), static_cast<int>(je - j0), v0, v1,
                                partial};
  }
  return runs;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
