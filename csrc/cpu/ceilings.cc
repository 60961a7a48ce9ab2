// The measured limits of a processor: multiply-adds, bf16 dot products, bytes read.
//
// 16 accumulators in flight: a multiply-add has latency 4 and two ports, so 8 would do where nothing else
// runs, and 16 leave room for hiccups; AVX2 and scalar have 16 registers, of which two hold the factors,
// hence 12 there (latency 5 x 2 ports = 10). Reading adds 8 lines of cache at a time into 8 registers.
#define FASTATTN_CPU_FILE "csrc/cpu/ceilings.cc"
#include "csrc/cpu/ceilings.h"

#include "csrc/cpu/isa.h"

#include "csrc/cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

inline constexpr int kAccumulators = FASTATTN_SIMD_WIDTH == 64 ? 16 : 12;
inline constexpr int kTasks = 64;  // shared out among the threads, whatever their number up to this

struct Fma {
  static constexpr int kFlops = 2 * W;
  FASTATTN_INLINE static vf step(vf acc, vf a, vf b) { return acc * a + b; }
};

struct Dot {
#if FASTATTN_HAS_BF16DOT
  static constexpr int kFlops = 4 * W;
  FASTATTN_INLINE static vf step(vf acc, vf a, vf b) { return dot(acc, a, b); }
#else
  static constexpr int kFlops = 0;
  FASTATTN_INLINE static vf step(vf acc, vf, vf) { return acc; }
#endif
};

template <class Step>
struct Compute {
  float* sums;
  int64_t rounds;

  void operator()(int64_t task) { run(task, std::make_integer_sequence<int, kAccumulators>{}); }

  template <
      int... k>  // a fold, not a loop: arrays of vectors stay in registers only when fully unrolled
  void run(int64_t task, std::integer_sequence<int, k...>) {
    vf acc[] = {splat(static_cast<float>(k))...};
    const vf a = splat(0.5f), b = splat(0.25f);
    for (int64_t round = 0; round < rounds; ++round) ((acc[k] = Step::step(acc[k], a, b)), ...);
    sums[task] = ((acc[k][0] + acc[k][W - 1]) + ...);
  }
};

template <class Step>
void compute(const Tensor& sums, double flops) {
  FASTATTN_CHECK(sums.size() == kTasks, "sums is ", text(sums), "; it takes float32[", kTasks, "]");
  if (!Step::kFlops) return;
  Compute<Step> work{View<float, 1>(sums).data,
                     static_cast<int64_t>(flops / (kTasks * kAccumulators * Step::kFlops))};
  parallel_for(kTasks, work);
}

void ceiling_fma(Tensor sums, double flops) { compute<Fma>(sums, flops); }
void ceiling_dot(Tensor sums, double flops) { compute<Dot>(sums, flops); }

struct Read {
  float* sums;
  const float* data;
  int64_t size;

  void operator()(int64_t task) { run(task, std::make_integer_sequence<int, 8>{}); }

  template <int... k>
  void run(int64_t task, std::integer_sequence<int, k...>) {
    vf acc[8] = {};
    const int64_t lines = size / (8 * W), first = lines * task / kTasks,
                  last = lines * (task + 1) / kTasks;
    for (const float* p = data + first * 8 * W; p < data + last * 8 * W; p += 8 * W) {
      ((acc[k] += load(p + k * W)), ...);
    }
    sums[task] = ((acc[k][0] + acc[k][W - 1]) + ...);
  }
};

void ceiling_read(Tensor sums, Tensor data) {
  FASTATTN_CHECK(sums.size() == kTasks, "sums is ", text(sums), "; it takes float32[", kTasks, "]");
  Read work{View<float, 1>(sums).data, View<float, 1>(data).data, data.size()};
  parallel_for(kTasks, work);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
