// decode, new tokens, CPU                                                 maths: README.md
//
// k_cache[b, h, lengths_b + i] = k_new[b, h, i], and v alike: rows are copied, one head of one sequence a task.
//
// Nothing is written before every length and page is known to lie inside the cache.
#define FASTATTN_CPU_FILE "kernels/decode/cpu_append.cc"
#include "kernels/decode/op.h"

#include "csrc/core/rows.h"
#include "csrc/cpu/isa.h"

#include "csrc/cpu/simd.h"

#include "csrc/cpu/gemm.h"
#include "csrc/cpu/pack.h"

#include "kernels/decode/cpu.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

template <class T>
struct Append {
  View<T, 4> cache;
  View<const T, 4> fresh;
  Room room;
  Integers lengths;
  void operator()(int64_t task) const {
    const int64_t Hk = fresh.shape[1], b = task / Hk, h = task % Hk;
    const Head<T> rows(cache, room, b, h);
    for (int64_t i = 0; i < fresh.shape[2]; ++i)
      std::memcpy(rows[lengths[b] + i], fresh.at(b, h, i), fresh.shape[3] * sizeof(T));
  }
};

struct AppendOf {
  Tensor cache, fresh, lengths;
  const std::optional<Tensor>& table;
  const char* names[2];
  template <class T>
  void operator()(Type<T>) const {
    const Room room(cache, table);
    const int64_t B = fresh.shape[0], Hk = fresh.shape[1], N = fresh.shape[2], D = fresh.shape[3];
    Append<T> f{table ? View<T, 4>(names[0], cache, {room.pages, room.page_size, Hk, D})
                      : View<T, 4>(names[0], cache, {B, Hk, room.page_size, D}),
                View<const T, 4>(names[1], fresh, {B, Hk, N, D}), room, Integers(lengths)};
    if (fresh.size() < 1 << 15) {  // less work than to wake other threads
      for (int64_t task = 0; task < B * Hk; ++task) f(task);
    } else {
      parallel_for(B * Hk, f);
    }
  }
};

}  // namespace

void attention_decode_append(Tensor k_cache, Tensor v_cache, Tensor k_new, Tensor v_new,
                             Tensor lengths, std::optional<Tensor> block_table) {
  FASTATTN_CHECK(k_new.ndim == 4 && v_new.ndim == 4, "k_new and v_new are ", text(k_new), " and ",
                 text(v_new), "; they take 4 axes");
  FASTATTN_CHECK(k_new.shape[0] == v_new.shape[0] && k_new.shape[1] == v_new.shape[1] &&
                     k_new.shape[2] == v_new.shape[2],
                 "k_new is ", text(k_new), " and v_new ", text(v_new),
                 "; they differ before the last axis");
  for (const Tensor& cache : {k_cache, v_cache})
    Room(cache, block_table).check(lengths, k_new.shape[2], k_new.shape[0]);
  dispatch(types<float, bf16, f16>, "k_cache.dtype", k_cache.dtype,
           AppendOf{k_cache, k_new, lengths, block_table, {"k_cache", "k_new"}});
  dispatch(types<float, bf16, f16>, "v_cache.dtype", v_cache.dtype,
           AppendOf{v_cache, v_new, lengths, block_table, {"v_cache", "v_new"}});
}

}  // namespace fastattn::cpu::FASTATTN_ISA
