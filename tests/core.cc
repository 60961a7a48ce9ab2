// What csrc/core and csrc/cpu/parallel.h promise; compiled and run by test_native.py. Prints the first broken promise.
#include <cstdio>
#include <limits>
#include <vector>

#include "csrc/core/dispatch.h"
#include "csrc/core/tensor.h"
#include "csrc/cpu/parallel.h"

using namespace fastattn;

void expect(bool kept, const char* promise) {
  if (kept) return;
  std::printf("broken: %s\n", promise);
  std::exit(1);
}

template <class F>
std::string refusal(F f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

// ---- The 16-bit floats, at compile time ----------------------------------------------------------

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

static_assert(f16(1.0f).bits == 0x3c00 && f16(-2.0f).bits == 0xc000 && f16(-0.0f).bits == 0x8000);
static_assert(f16(65504.0f).bits == 0x7bff && f16(65519.0f).bits == 0x7bff,
              "the largest, and what rounds to it");
static_assert(f16(65520.0f).bits == 0x7c00 && f16(-kInf).bits == 0xfc00);
static_assert(f16(0x1p-24f).bits == 1 && f16(0x1p-25f).bits == 0 && f16(0x1.8p-24f).bits == 2,
              "ties to even");
static_assert(f16(0x1.ffcp-15f).bits == 0x0400, "the largest denormal rounds up to a normal");
static_assert(float(f16(0x1p-24f)) == 0x1p-24f && float(f16(0x1.554p-3f)) == 0x1.554p-3f);
static_assert(float(f16(kNan)) != float(f16(kNan)) && float(f16(kInf)) == kInf);
static_assert(bf16(1.0f).bits == 0x3f80 && bf16(0x1.01p0f).bits == 0x3f80 &&
              bf16(0x1.03p0f).bits == 0x3f82);
static_assert(bf16(std::numeric_limits<float>::max()).bits == 0x7f80 && bf16(-kInf).bits == 0xff80);
static_assert(float(bf16(kNan)) != float(bf16(kNan)) && float(bf16(3.0f)) == 3.0f);
static_assert(float(bf16(std::bit_cast<float>(0x7f800001u))) != kInf,
              "a NaN whose bits lie low stays one");

// ---- Dispatch --------------------------------------------------------------------------------------

struct Record {
  int64_t& seen;
  template <int64_t n>
  void operator()(Value<n>) const {
    seen = n;
  }
  template <class T>
  void operator()(Type<T>) const {
    seen = sizeof(T);
  }
};

void dispatch_calls_with_the_constant_or_lists_what_there_is() {
  int64_t seen = 0;
  constexpr auto widths = values<int64_t{32}, int64_t{64}>;
  dispatch(widths, "head_dim", 64, Record{seen});
  expect(seen == 64, "the value given is the one called with");
  dispatch(types<float, bf16>, "dtype", DType::bf16, Record{seen});
  expect(seen == 2, "the type given is the one called with");
  expect(refusal([&] { dispatch(widths, "head_dim", 48, Record{seen}); }) ==
             "head_dim is 48; compiled for 32 64",
         "a value outside the list is refused with the list");
  expect(refusal([&] { dispatch(types<float, f16>, "x", DType::i8, Record{seen}); }) ==
             "x is int8; compiled for float32 float16",
         "a dtype outside the list is refused with the list");
}

// ---- Views -----------------------------------------------------------------------------------------

void views_check_and_index() {
  std::vector<float> data(24);
  for (int i = 0; i < 24; ++i) data[i] = static_cast<float>(i);
  const Tensor t{data.data(), DType::f32, Device::cpu, 0, 2, {3, 4}, {8, 1}};
  const View<const float, 2> v(t);
  expect(v(2, 3) == 19 && v.at(1) == &data[8], "a view goes by strides");
  expect(refusal([&] { View<bf16, 2>{t}; }) ==
             "a tensor is float32[3, 4]; this kernel takes bfloat16 with 2 axes",
         "a view of another type is refused");
  expect(refusal([&] { View<float, 2>("k", t, {3, 5}); }) == "k is float32[3, 4]; axis 1 must be 5",
         "a view of another shape is refused");
}

// ---- Threads ---------------------------------------------------------------------------------------

struct Claims {
  std::atomic<int64_t> begun{0};
  std::atomic<bool> in_order{true};
  std::vector<int> count = std::vector<int>(1000);
  void operator()(int64_t i) {
    ++count[i];
    // Whoever holds task i knows that every smaller one was taken before: at most one a thread is not counted yet.
    if (begun.fetch_add(1) + cpu::num_threads() < i) in_order = false;
  }
};

struct Throws {
  void operator()(int64_t i) const {
    if (i == 5) throw std::invalid_argument("five");
  }
};

struct Waits {  // for the task before, which fails
  void operator()(int64_t i) const {
    if (i == 0) throw std::invalid_argument("zero");
    for (int spins = 0;; ++spins) cpu::relax(spins);
  }
};

void loops_run_each_task_once_and_pass_on_what_it_throws() {
  Claims claims;
  cpu::parallel_for(1000, claims);
  for (int n : claims.count) expect(n == 1, "each task runs once");
  expect(claims.in_order, "tasks are claimed in ascending order");
  Throws throws;
  expect(refusal([&] { cpu::parallel_for(100, throws); }) == "five",
         "an exception crosses the parallel region");
  expect(refusal([&] { cpu::parallel_for(4, throws); }).empty(),
         "the loop works after an exception");
  Waits waits;
  expect(refusal([&] { cpu::parallel_for(8, waits); }) == "zero",
         "whoever waits for a task that failed stops");
}

void scratch_is_aligned_and_poisoned() {
  float* p = static_cast<float*>(cpu::scratch(100));
  expect(reinterpret_cast<uintptr_t>(p) % 64 == 0, "scratch memory is aligned to 64 bytes");
  p[0] = p[24] = 1;
  cpu::poison = true;
  p = static_cast<float*>(cpu::scratch(50));
  expect(p[0] != p[0] && p[24] != p[24], "poisoned scratch memory is NaN at each acquisition");
  p = static_cast<float*>(cpu::scratch(1 << 20));
  expect(p[(1 << 18) - 1] != p[(1 << 18) - 1], "also where it has grown");
}

int main() {
  dispatch_calls_with_the_constant_or_lists_what_there_is();
  views_check_and_index();
  loops_run_each_task_once_and_pass_on_what_it_throws();
  scratch_is_aligned_and_poisoned();
}
