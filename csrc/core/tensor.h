// What a kernel is given. A Tensor is what the host is told; a View is what a kernel indexes.
//
// Neither owns memory: outputs and workspaces are allocated in Python and passed in, outputs first.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "csrc/core/check.h"
#include "csrc/core/dtype.h"

namespace fastattn {

enum class Device : int8_t { cpu, cuda };

constexpr const char* name(Device d) { return d == Device::cpu ? "cpu" : "cuda"; }

struct Tensor {  // borrowed, untyped, strided; valid for one call
  static constexpr int kMaxDims = 6;
  void* data;
  DType dtype;
  Device device;
  int8_t device_index, ndim;
  int64_t shape[kMaxDims], stride[kMaxDims];  // strides in elements

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

inline std::string text(const Tensor& t) {  // "float32[2, 8, 64]", for sentences
  std::string s = std::string(name(t.dtype)) + "[";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + "]";
}

template <class T, int N>
struct View {  // typed and ranked: v(b, h, i, d)
  T* data;
  int64_t shape[N], stride[N];

  View() = default;
  explicit View(const Tensor& t) : data(static_cast<T*>(t.data)) {
    constexpr DType dtype = dtype_of<std::remove_const_t<T>>();
    FASTATTN_CHECK(t.dtype == dtype && t.ndim == N, "a tensor is ", text(t), "; this kernel takes ",
                   name(dtype), " with ", N, " axes");
    for (int i = 0; i < N; ++i) shape[i] = t.shape[i], stride[i] = t.stride[i];
  }
  // The same, refused unless it has this shape and a dense last axis.
  View(const char* what, const Tensor& t, const int64_t (&expected)[N]) : View(t) {
    for (int i = 0; i < N; ++i) {
      FASTATTN_CHECK(shape[i] == expected[i], what, " is ", text(t), "; axis ", i, " must be ",
                     expected[i]);
    }
    FASTATTN_CHECK(stride[N - 1] == 1 || shape[N - 1] < 2, what, " has stride ", stride[N - 1],
                   " on its last axis; it must be 1");
  }

  // Fewer indices than axes give the start of a slice: v(b, h) + i * v.stride[2].
  template <class... I>
  FASTATTN_HD T* at(I... i) const {
    static_assert(sizeof...(I) <= N);
    const int64_t index[] = {static_cast<int64_t>(i)..., 0};
    int64_t offset = 0;
    for (unsigned axis = 0; axis < sizeof...(I); ++axis) offset += index[axis] * stride[axis];
    return data + offset;
  }
  template <class... I>
  FASTATTN_HD T& operator()(I... i) const {
    static_assert(sizeof...(I) == N);
    return *at(i...);
  }
};

}  // namespace fastattn
