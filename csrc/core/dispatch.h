// Turns a run-time value into a compile-time one, once, at the top of a kernel.
//
//   inline constexpr auto kHeadDims = values<32, 64, 128>;
//   dispatch(kHeadDims, "head_dim", q.shape[3], forward);            // calls forward(Value<64>{})
//   dispatch(types<float, bf16>, "q.dtype", q.dtype, forward);       // calls forward(Type<float>{})
//
// The functor is a struct with a templated operator(), so that it may hold instructions of one ISA
// (lambdas do not inherit a target region). The list is the only place that says what is compiled:
// a value outside it is refused with the list in the sentence.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/core/check.h"
#include "csrc/core/dtype.h"

namespace fastattn {

template <auto v>
using Value = std::integral_constant<decltype(v), v>;
template <class T>
using Type = std::type_identity<T>;

template <auto... v>
struct Values {};
template <class... T>
struct Types {};
template <auto... v>
inline constexpr Values<v...> values{};
template <class... T>
inline constexpr Types<T...> types{};

template <class Given, class... Listed>
[[noreturn]] void refuse_unlisted(const char* what, const Given& given, const Listed&... listed) {
  std::ostringstream list;
  ((list << ' ' << listed), ...);
  refuse(what, " is ", given, "; compiled for", list.str());
}

template <auto... v, class Given, class F>
void dispatch(Values<v...>, const char* what, const Given& given, F&& f) {
  const bool found = ((given == v && (f(Value<v>{}), true)) || ...);
  if (!found) refuse_unlisted(what, given, v...);
}

template <class... T, class F>
void dispatch(Types<T...>, const char* what, DType given, F&& f) {
  const bool found = ((given == dtype_of<T>() && (f(Type<T>{}), true)) || ...);
  if (!found) refuse_unlisted(what, name(given), name(dtype_of<T>())...);
}

}  // namespace fastattn
