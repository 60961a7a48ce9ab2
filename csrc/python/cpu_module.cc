// fastattn._cpu: the table of contents of the CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/core/masks.h"
#include "csrc/cpu/ceilings.h"
#include "csrc/cpu/parallel.h"
#include "csrc/python/bind.h"
#include "kernels/attention/op.h"
#include "kernels/norm/op.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastattn::python {

// Whether this processor, with the register state its operating system saves, runs kIsas[isa].
bool runs(std::string_view isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == "scalar";
}

std::vector<std::vector<bool>> mask_visible(const std::vector<int64_t>& code, int num_q,
                                            int num_k) {
  const Mask mask = make_mask(code, num_q, num_k);
  std::vector<std::vector<bool>> rows(num_q, std::vector<bool>(num_k));
  for (int i = 0; i < num_q; ++i)
    for (int j = 0; j < num_k; ++j)
      rows[i][j] = std::visit([&](const auto& m) { return m.visible(i, j); }, mask);
  return rows;
}

std::pair<int64_t, int64_t> mask_keys(const std::vector<int64_t>& code, int num_q, int num_k,
                                      int64_t i0, int64_t i1) {
  const Range keys =
      std::visit([&](const auto& m) { return m.keys(i0, i1); }, make_mask(code, num_q, num_k));
  return {keys.begin, keys.end};
}

}  // namespace fastattn::python

PYBIND11_MODULE(_cpu, m) {
  using namespace fastattn;
  using namespace fastattn::python;

  py::list compiled, isas;
  for (const char* isa : kIsas) {
    m.def_submodule(isa);
    compiled.append(isa);
    if (runs(isa)) isas.append(isa);
  }
  m.attr("compiled") = py::tuple(compiled);
  m.attr("isas") = py::tuple(isas);  // what this processor runs, best first
  m.attr("version") = FASTATTN_VERSION;
#ifdef __clang__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.def(
      "set_poison", [](bool on) { cpu::poison = on; },
      "Fill scratch memory with NaN each time it is taken.");
  m.def("num_threads", &cpu::num_threads);
  m.def("mask_visible", &mask_visible,
        "The dense mask as C++ sees it, for tests: list of rows of bool.");
  m.def("mask_keys", &mask_keys,
        "(begin, end) of the keys that queries [i0, i1) may see, for tests.");
  cpu::is_forked();  // from here on, forks are noticed

  bind<cpu::add_norm_fwd>(m, "add_norm_fwd");
  bind<cpu::add_norm_bwd>(m, "add_norm_bwd");
  bind<cpu::attention_fwd>(m, "attention_fwd");
  bind<cpu::attention_bwd>(m, "attention_bwd");
  bind<cpu::ceiling_dot>(m, "ceiling_dot");
  bind<cpu::ceiling_fma>(m, "ceiling_fma");
  bind<cpu::ceiling_read>(m, "ceiling_read");
}
