// Python tensors as Tensors, with no header of theirs: through DLPack's C exchange table where the type
// has one (recent torch), a tensor's attributes (older torch), or __dlpack__() (NumPy).
//
// A Tensor borrows from its argument: the caller's references keep that alive for the call. Torch's lazy
// negation is invisible here; torch's dispatcher resolves it before it calls a registered op.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "csrc/core/tensor.h"

namespace fastattn::python {

namespace py = pybind11;

struct Where {   // which argument is being read, and for which device
  int argument;  // from 1
  Device device;
};

inline std::ostream& operator<<(std::ostream& out, const Where& at) {
  return out << "argument " << at.argument;
}

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse_type(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw py::type_error(sentence.str());
}

// ---- DLPack's stable structs, as its specification lays them out -----------------------------------

namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Array {
  void* data;
  int32_t device_type, device_index, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *stride;
  uint64_t byte_offset;
};
struct Managed {  // in a capsule named "dltensor"
  Array array;
  void* context;
  void (*deleter)(Managed*);
};
struct ManagedVersioned {  // in a capsule named "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Array array;
};
struct Exchange {  // in a capsule named "dlpack_exchange_api", an attribute of the type
  Version version;
  const Exchange* previous;
  int (*allocate)(Array*, ManagedVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*to_managed)(PyObject*, ManagedVersioned**);
  int (*from_managed)(ManagedVersioned*, PyObject**);
  int (*to_array)(PyObject*, Array*);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

inline constexpr uint32_t kMajor = 1;
inline constexpr uint64_t kReadOnly = 1;

inline constexpr int32_t kCpu = 1, kCuda = 2;
struct Element {
  uint8_t code, bits;
  DType dtype;
};
inline constexpr Element kElements[] = {
    {2, 32, DType::f32}, {4, 16, DType::bf16}, {2, 16, DType::f16},
    {2, 64, DType::f64}, {0, 8, DType::i8},    {1, 8, DType::u8},
    {0, 32, DType::i32}, {0, 64, DType::i64},  {6, 8, DType::b8},
};

}  // namespace dlpack

// ---- Reading one tensor ----------------------------------------------------------------------------

[[noreturn]] inline void refuse_dtype(const Where& at, const std::string& given) {
  std::ostringstream known;
  for (const dlpack::Element& e : dlpack::kElements) known << ' ' << name(e.dtype);
  refuse_type(at, " has dtype ", given, "; it takes", known.str());
}

inline Device device_of(const Where& at, int32_t type) {
  switch (type) {
    case dlpack::kCpu:
    case 3:   // pinned by CUDA
    case 11:  // pinned by ROCm
      return Device::cpu;
    case dlpack::kCuda:
    case 10:  // ROCm
    case 13:  // CUDA, managed
      return Device::cuda;
  }
  refuse_type(at, " is on a device of DLPack type ", type, "; it takes ", name(at.device));
}

inline Tensor from_array(const Where& at, const dlpack::Array& array) {
  Tensor t;
  t.device = device_of(at, array.device_type);
  if (t.device != at.device) refuse(at, " is on ", name(t.device), "; it takes ", name(at.device));
  const dlpack::Element* e = dlpack::kElements;
  while (e != std::end(dlpack::kElements) && (e->code != array.code || e->bits != array.bits)) ++e;
  if (e == std::end(dlpack::kElements) || array.lanes != 1) {
    refuse_dtype(at, "with code " + std::to_string(array.code) + " and " +
                         std::to_string(array.bits) + " bits");
  }
  if (array.ndim > Tensor::kMaxDims)
    refuse(at, " has ", array.ndim, " axes; it takes at most ", Tensor::kMaxDims);
  t.dtype = e->dtype;
  t.data = static_cast<char*>(array.data) + array.byte_offset;
  t.device_index = static_cast<int8_t>(array.device_index);
  t.ndim = static_cast<int8_t>(array.ndim);
  int64_t size = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = array.shape[i];
    t.stride[i] = array.stride ? array.stride[i] : size;  // before DLPack 1.2, NULL when contiguous
    size *= t.shape[i];
  }
  if (!array.data && size) refuse_type(at, " has no memory: it is fake, or wraps another tensor");
  return t;
}

// The exchange table of a type, or NULL; remembered, and with it the type, whose address must not be
// taken by another. Few types are ever passed, so the memory is a list.
inline const dlpack::Exchange* exchange_of(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::Exchange* table;
  };
  static auto& known = *new std::vector<Entry>;
  for (const Entry& entry : known) {
    if (entry.type == type) return entry.table;
  }
  const dlpack::Exchange* table = nullptr;
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  if (const py::object capsule = py::getattr(handle, "__dlpack_c_exchange_api__", py::none());
      !capsule.is_none()) {
    table = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw py::error_already_set();
    while (table && (table->version.major != dlpack::kMajor || !table->to_array))
      table = table->previous;
  }
  known.push_back({type, table});
  handle.inc_ref();
  return table;
}

inline Tensor from_attributes(const Where& at, py::handle object) {
  const py::tuple shape = object.attr("shape"), stride = object.attr("stride")();
  int64_t sizes[Tensor::kMaxDims], strides[Tensor::kMaxDims];
  dlpack::Array array{};
  array.ndim = static_cast<int32_t>(shape.size());
  array.shape = sizes, array.stride = strides, array.lanes = 1;
  for (int i = 0; i < std::min(array.ndim, Tensor::kMaxDims); ++i) {
    sizes[i] = shape[i].cast<int64_t>(), strides[i] = stride[i].cast<int64_t>();
  }
  const py::object device = object.attr("device"), index = device.attr("index");
  const std::string kind = device.attr("type").cast<std::string>();
  array.device_type = kind == "cpu" ? dlpack::kCpu : kind == "cuda" ? dlpack::kCuda : -1;
  if (array.device_type < 0) refuse_type(at, " is on ", kind, "; it takes ", name(at.device));
  array.device_index = index.is_none() ? 0 : index.cast<int32_t>();
  const std::string dtype = py::str(object.attr("dtype"));
  for (const dlpack::Element& e : dlpack::kElements) {
    if (dtype == std::string("torch.") + name(e.dtype)) array.code = e.code, array.bits = e.bits;
  }
  if (!array.bits) refuse_dtype(at, dtype);
  array.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  return from_array(at, array);
}

// The capsule, whose destructor gives the memory back, is left in `keep`.
inline Tensor from_dlpack(const Where& at, py::handle object, py::object& keep) {
  const py::object method = object.attr("__dlpack__");
  try {
    keep = method(py::arg("max_version") = py::make_tuple(dlpack::kMajor, 0));
  } catch (py::error_already_set& e) {
    if (!e.matches(PyExc_TypeError)) throw;  // a producer older than DLPack 1.0 knows no version
    keep = method();
  }
  if (PyCapsule_IsValid(keep.ptr(), "dltensor")) {
    return from_array(
        at, static_cast<dlpack::Managed*>(PyCapsule_GetPointer(keep.ptr(), "dltensor"))->array);
  }
  const auto* managed = static_cast<dlpack::ManagedVersioned*>(
      PyCapsule_GetPointer(keep.ptr(), "dltensor_versioned"));
  if (!managed) throw py::error_already_set();
  if (managed->version.major != dlpack::kMajor) {
    refuse_type(at, " speaks DLPack ", managed->version.major, "; it takes DLPack ",
                dlpack::kMajor);
  }
  if (managed->flags & dlpack::kReadOnly) refuse_type(at, " is read-only; pass a copy");
  return from_array(at, managed->array);
}

// What a library raised while it described its tensor, in one line and with the place.
[[noreturn]] inline void refuse_undescribed(const Where& at, py::handle object,
                                            py::error_already_set& e) {
  const std::string reason = py::str(e.value());
  refuse_type(at, " is a ", Py_TYPE(object.ptr())->tp_name,
              " that cannot be read: ", reason.substr(0, reason.find('\n')));
}

inline Tensor read_tensor(const Where& at, py::handle object, py::object& keep) {
  try {
    if (const dlpack::Exchange* table = exchange_of(Py_TYPE(object.ptr()))) {
      dlpack::Array array;
      if (table->to_array(object.ptr(), &array)) throw py::error_already_set();
      return from_array(at, array);
    }
    if (py::hasattr(object, "data_ptr")) return from_attributes(at, object);
    if (py::hasattr(object, "__dlpack__")) return from_dlpack(at, object, keep);
  } catch (py::error_already_set& e) {
    refuse_undescribed(at, object, e);
  }
  refuse_type(at, " must be a tensor, got ", Py_TYPE(object.ptr())->tp_name);
}

}  // namespace fastattn::python
