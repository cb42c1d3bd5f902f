// A Python module that calls kernels: tensors by their addresses, without the interpreter lock, in less than a
// microsecond. It knows torch by two addresses only, so it is built once for every version.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>

namespace {

using Linear = int (*)(void* y, const void* x, const void* bias, int dtype, int bias_dtype, int threads, int64_t m, int64_t n,
                       int64_t k, int64_t padded, int64_t stride, const void* const* planes);

constexpr Py_ssize_t NUMBERS = 11, MOST_PLANES = 16;

void* (*data_of)(PyObject* tensor);  // throws for what is no tensor
int (*count_threads)(uint32_t*);
bool (*is_observed)();  // whether a profiler listens to this thread
PyObject* observation;  // makes a context manager of a name: what the profiler sees

PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "connect takes three addresses and a callable");
    return nullptr;
  }
  data_of = (void* (*)(PyObject*))PyLong_AsVoidPtr(args[0]);
  count_threads = (int (*)(uint32_t*))PyLong_AsVoidPtr(args[1]);
  is_observed = (bool (*)())PyLong_AsVoidPtr(args[2]);
  if (PyErr_Occurred()) return nullptr;
  Py_INCREF(args[3]);
  Py_XSETREF(observation, args[3]);
  Py_RETURN_NONE;
}

// (function, y, x, bias, dtype, bias_dtype, m, n, k, padded, stride, *planes)
PyObject* call(PyObject* const* args, Py_ssize_t count) {
  const Py_ssize_t planes = count - NUMBERS;
  if (planes < 1 || planes > MOST_PLANES) {
    PyErr_Format(PyExc_TypeError, "linear takes %zd arguments and 1 to %zd planes, found %zd", NUMBERS, MOST_PLANES, count);
    return nullptr;
  }
  const Linear function = (Linear)PyLong_AsVoidPtr(args[0]);
  void* const y = data_of(args[1]);
  const void* const x = data_of(args[2]);
  const void* const bias = args[3] == Py_None ? nullptr : data_of(args[3]);
  int64_t numbers[NUMBERS - 4];
  for (Py_ssize_t i = 0; i < NUMBERS - 4; ++i) numbers[i] = PyLong_AsLongLong(args[4 + i]);
  const auto [dtype, bias_dtype, m, n, k, padded, stride] = numbers;
  const void* addresses[MOST_PLANES + 1] = {};  // a null one follows, in place of an order of columns
  for (Py_ssize_t i = 0; i < planes; ++i) addresses[i] = data_of(args[NUMBERS + i]);
  if (PyErr_Occurred()) return nullptr;
  if (m == 0 || n == 0) Py_RETURN_NONE;
  uint32_t threads = 1;
  count_threads(&threads);
  int failed = 0;
  Py_BEGIN_ALLOW_THREADS
  failed = function(y, x, bias, (int)dtype, (int)bias_dtype, (int)threads, m, n, k, padded, stride, addresses);
  Py_END_ALLOW_THREADS
  if (failed) {
    PyErr_Format(PyExc_MemoryError, "no scratch memory for a %lldx%lld input and a %lldx%lld weight", (long long)m,
                 (long long)k, (long long)n, (long long)k);
    return nullptr;
  }
  Py_RETURN_NONE;
}

// The same under the eyes of a profiler, which sees the call by its name.
PyObject* observed(PyObject* name, PyObject* const* args, Py_ssize_t count) {
  PyObject* const guard = PyObject_CallOneArg(observation, name);
  if (!guard) return nullptr;
  PyObject* const entered = PyObject_CallMethod(guard, "__enter__", nullptr);
  PyObject* done = nullptr;
  if (entered) {
    try {
      done = call(args, count);
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject* const left = PyObject_CallMethod(guard, "__exit__", "OOO", Py_None, Py_None, Py_None);
    if (!left) Py_CLEAR(done);
    if (type) PyErr_Restore(type, value, trace);
    Py_XDECREF(left);
  }
  Py_XDECREF(entered);
  Py_DECREF(guard);
  return done;
}

PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    const bool named = count > 0 && PyUnicode_Check(args[count - 1]);
    count -= named;
    return named && is_observed() ? observed(args[count], args, count) : call(args, count);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"connect", (PyCFunction)(void (*)(void))connect, METH_FASTCALL, 
     "connect(data_of, count_threads, is_observed, observation): addresses in torch, and what a profiler takes names by"},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL,
     "linear(function, y, x, bias, dtype, bias_dtype, m, n, k, padded, stride, *planes[, name that profilers see])"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "call", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_call() { return PyModule_Create(&definition); }
