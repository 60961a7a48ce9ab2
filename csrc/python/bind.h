// bind<cpu::attention_fwd>(m, "attention_fwd"): one line makes a kernel callable from Python, once for
// each instruction set it is compiled for: m.avx2.attention_fwd(*outputs, *inputs).
//
// Supplies what a binding usually repeats: reading each argument by its C++ type, refusals that name the
// function and the argument, the GIL released while the kernel runs, and C++ exceptions as Python's. The
// function is a bare METH_FASTCALL one: pybind11's own dispatcher takes half as long again, and refuses
// with a list of signatures.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "csrc/core/declare.h"
#include "csrc/python/caster.h"

namespace fastattn::python {

// ---- Arguments: one reader for each type a kernel may take -----------------------------------------

template <class T>
struct Argument;

// How many of Python's arguments a type takes: several stand for an array of optional tensors.
template <class T>
inline constexpr size_t kArity = 1;
template <size_t N>
inline constexpr size_t kArity<std::array<Maybe, N>> = N;

template <class T>
void read_argument(Argument<T>& argument, size_t at, PyObject* const* args) {
  if constexpr (kArity<T> == 1)
    argument.read(Where{static_cast<int>(at) + 1, Device::cpu}, args[at]);
  else
    argument.read(static_cast<int>(at) + 1, args + at);
}

template <>
struct Argument<Tensor> {
  Tensor value;
  py::object keep;
  void read(const Where& at, PyObject* object) { value = read_tensor(at, object, keep); }
};

template <>
struct Argument<std::optional<Tensor>> {
  std::optional<Tensor> value;
  py::object keep;
  void read(const Where& at, PyObject* object) {
    if (object != Py_None) value = read_tensor(at, object, keep);
  }
};

template <size_t N>
struct Argument<std::array<Maybe, N>> {
  std::array<Maybe, N> value;
  py::object keep[N];
  void read(int first, PyObject* const* objects) {
    for (size_t i = 0; i < N; ++i)
      if (objects[i] != Py_None)
        value[i] =
            read_tensor(Where{first + static_cast<int>(i), Device::cpu}, objects[i], keep[i]);
  }
};

template <std::floating_point T>
struct Argument<T> {
  T value;
  void read(const Where& at, PyObject* object) {
    const double x = PyFloat_AsDouble(object);
    if (x == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      refuse_type(at, " must be a number, got ", Py_TYPE(object)->tp_name);
    }
    value = static_cast<T>(x);
  }
};

inline int64_t read_int(const Where& at, PyObject* object) {
  const int64_t x = PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
  if (x == -1 && (PyErr_Occurred() || !PyLong_Check(object))) {
    PyErr_Clear();
    refuse_type(at, " must be an int of 64 bits, got ", py::repr(object).cast<std::string>());
  }
  return x;
}

template <>
struct Argument<int64_t> {
  int64_t value;
  void read(const Where& at, PyObject* object) { value = read_int(at, object); }
};

template <>
struct Argument<bool> {
  bool value;
  void read(const Where& at, PyObject* object) {
    if (!PyBool_Check(object)) refuse_type(at, " must be a bool, got ", Py_TYPE(object)->tp_name);
    value = object == Py_True;
  }
};

template <>
struct Argument<std::string_view> {
  std::string_view value;
  void read(const Where& at, PyObject* object) {
    Py_ssize_t length;
    const char* text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &length) : nullptr;
    if (!text) {
      PyErr_Clear();
      refuse_type(at, " must be a str, got ", Py_TYPE(object)->tp_name);
    }
    value = {text, static_cast<size_t>(length)};
  }
};

// A list or tuple of what Argument<T> reads.
template <class T>
struct Argument<std::span<const T>> {
  std::span<const T> value;
  std::unique_ptr<T[]> own;
  void read(const Where& at, PyObject* object) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) {
      refuse_type(at, " must be a list, got ", Py_TYPE(object)->tp_name);
    }
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(object);
    own = std::make_unique<T[]>(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      Argument<T> element;
      element.read(at, PySequence_Fast_GET_ITEM(object, i));
      own[i] = element.value;
    }
    value = {own.get(), static_cast<size_t>(size)};
  }
};

// ---- The call --------------------------------------------------------------------------------------

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

template <class... P>
struct Bound {
  PyMethodDef method;
  void (*kernel)(P...);

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t given) {
    const auto& bound = *static_cast<Bound*>(PyCapsule_GetPointer(self, nullptr));
    PyObject* type = PyExc_RuntimeError;
    std::string sentence;
    try {
      return bound.run(args, given, std::index_sequence_for<P...>());
    } catch (py::error_already_set& e) {
      e.restore();
      return nullptr;
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    } catch (const py::type_error& e) {
      type = PyExc_TypeError, sentence = e.what();
    } catch (const std::invalid_argument& e) {
      type = PyExc_ValueError, sentence = e.what();
    } catch (const std::exception& e) {
      sentence = e.what();
    }
    return PyErr_Format(type, "%s: %s", bound.method.ml_name, sentence.c_str());
  }

  template <size_t... i>
  PyObject* run(PyObject* const* args, Py_ssize_t given, std::index_sequence<i...>) const {
    constexpr size_t takes = (kArity<P> + ...);
    if (given != takes) refuse_type("it takes ", takes, " arguments, got ", given);
    std::tuple<Argument<P>...> read;
    size_t at = 0;
    ((read_argument<P>(std::get<i>(read), at, args), at += kArity<P>), ...);
    {
      const WithoutGil released;
      kernel(std::get<i>(read).value...);
    }
    Py_RETURN_NONE;
  }
};

template <class... P>
void bind(py::module_ m, const char* name, void (*kernel)(P...)) {
  auto* bound =
      new Bound<P...>{{name, nullptr, METH_FASTCALL, nullptr}, kernel};  // lives as long as Python
  bound->method.ml_meth =
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Bound<P...>::call));
  const py::capsule self(bound);
  const py::str module = m.attr("__name__");
  m.add_object(name, py::reinterpret_steal<py::object>(
                         PyCFunction_NewEx(&bound->method, self.ptr(), module.ptr())));
}

template <class Kernel>
void bind(py::module_ m, const char* name) {
  for (size_t isa = 0; isa < std::size(kIsas); ++isa) {
    bind(m.attr(kIsas[isa]).cast<py::module_>(), name, Kernel::compiled[isa]);
  }
}

}  // namespace fastattn::python
