// fastattn._cpu: the table of contents of the CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/core/masks.h"
#include "csrc/cpu/ceilings.h"
#include "csrc/cpu/parallel.h"
#include "csrc/python/bind.h"
#include "kernels/attention/op.h"
#include "kernels/decode/op.h"
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

// A mask as C++ sees it, for tests; layouts are the bools of its blocks.
struct SeenMask {
  std::vector<int64_t> code;
  std::unique_ptr<bool[]> blocks;
  Formula formula;

  SeenMask(std::vector<int64_t> code, const std::vector<bool>& layouts, int num_q, int num_k, int h)
      : code(std::move(code)),
        blocks(std::make_unique<bool[]>(layouts.size())),
        formula(this->code, num_q, num_k,
                {.blocks = blocks.get(), .num_blocks = std::ssize(layouts)}, 0, h) {
    std::copy(layouts.begin(), layouts.end(), blocks.get());
  }
  bool visible(int i, int j) const { return formula.visible(i, j); }
  int seen(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return static_cast<int>(formula.seen(i0, i1, j0, j1));
  }
  std::pair<int64_t, int64_t> keys(int64_t i0, int64_t i1) const {
    const Range keys = formula.keys(i0, i1);
    return {keys.begin, keys.end};
  }
};

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
  py::class_<SeenMask>(m, "SeenMask", "A mask as C++ sees it, for tests.")
      .def(py::init<std::vector<int64_t>, std::vector<bool>, int, int, int>())
      .def("visible", &SeenMask::visible)
      .def("seen", &SeenMask::seen)
      .def("keys", &SeenMask::keys);
  cpu::is_forked();  // from here on, forks are noticed

  bind<cpu::add_norm_fwd>(m, "add_norm_fwd");
  bind<cpu::add_norm_bwd>(m, "add_norm_bwd");
  bind<cpu::attention_fwd>(m, "attention_fwd");
  bind<cpu::attention_bwd>(m, "attention_bwd");
  bind<cpu::attention_decode_append>(m, "attention_decode_append");
  bind<cpu::attention_decode_fwd>(m, "attention_decode_fwd");
  bind<cpu::ceiling_dot>(m, "ceiling_dot");
  bind<cpu::ceiling_fma>(m, "ceiling_fma");
  bind<cpu::ceiling_read>(m, "ceiling_read");
}
