// A Python module that calls kernels: tensors by their addresses, without the interpreter lock, in less than a
// microsecond. It knows torch by two addresses only, so it is built once for every version.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <vector>

namespace {

using qcompile::Layer;
using qcompile::Linear;

constexpr Py_ssize_t NUMBERS = 8, LAYER_NUMBERS = 4, GROUPED_NUMBERS = 13, MOST_PLANES = 16;

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

// One layer's arguments (y or None, bias or None, bias_dtype, n, *planes); its planes' addresses go to `addresses`.
Layer layer_of(PyObject* const* args, Py_ssize_t planes, const void** addresses) {
  for (Py_ssize_t i = 0; i < planes; ++i) addresses[i] = data_of(args[LAYER_NUMBERS + i]);
  addresses[planes] = nullptr;  // in place of an order of columns, if there is none
  void* const y = args[0] == Py_None ? nullptr : data_of(args[0]);
  const void* const bias = args[1] == Py_None ? nullptr : data_of(args[1]);
  return {y, bias, addresses, PyLong_AsLongLong(args[3]), PyLong_AsLongLong(args[2])};
}

// (function, x, dtype, m, k, padded, stride, count, *arguments of each layer)
PyObject* call(PyObject* const* args, Py_ssize_t count) {
  const long long layers = count > NUMBERS ? PyLong_AsLongLong(args[NUMBERS - 1]) : 0;
  if (PyErr_Occurred()) return nullptr;
  const Py_ssize_t each = layers > 0 ? (count - NUMBERS) / layers : 0, planes = each - LAYER_NUMBERS;
  if (planes < 1 || planes > MOST_PLANES || each * layers != count - NUMBERS) {
    PyErr_Format(PyExc_TypeError, "linear takes %zd arguments, and %zd and 1 to %zd planes for each of its layers; found %zd for %lld",
                 NUMBERS, LAYER_NUMBERS, MOST_PLANES, count, layers);
    return nullptr;
  }
  const Linear function = (Linear)PyLong_AsVoidPtr(args[0]);
  const void* const x = data_of(args[1]);
  int64_t numbers[NUMBERS - 3];
  for (Py_ssize_t i = 0; i < NUMBERS - 3; ++i) numbers[i] = PyLong_AsLongLong(args[2 + i]);
  const auto [dtype, m, k, padded, stride] = numbers;
  const void* addresses[count];  // on the stack: all that a small layer's call takes is a microsecond
  Layer found[layers];
  int64_t n = 0;
  for (long long i = 0; i < layers; ++i) {
    found[i] = layer_of(args + NUMBERS + i * each, planes, &addresses[i * (planes + 1)]);
    n += found[i].n;
  }
  if (PyErr_Occurred()) return nullptr;
  if (m == 0 || n == 0) Py_RETURN_NONE;
  uint32_t threads = 1;
  count_threads(&threads);
  int failed = 0;
  Py_BEGIN_ALLOW_THREADS
  failed = function(found, layers, x, (int)dtype, (int)threads, m, k, padded, stride);
  Py_END_ALLOW_THREADS
  if (failed) {
    PyErr_Format(PyExc_MemoryError, "no scratch memory for a %lldx%lld input and %lld weights, %lldx%lld together", (long long)m,
                 (long long)k, layers, (long long)n, (long long)k);
    return nullptr;
  }
  Py_RETURN_NONE;
}

// Rows of x that meet one expert each, sorted by expert or not.
struct Experts {
  const void* groups;  // ends: [experts], one past the last row of each; else [m], the expert of each row
  bool wide, ends;     // int64, not int32
  int64_t experts, m;

  int64_t at(int64_t i) const { return wide ? ((const int64_t*)groups)[i] : ((const int32_t*)groups)[i]; }

  // Where the rows of each expert begin and end among rows in the order of experts, and in `order` which rows those are.
  std::vector<int64_t> bounds(std::vector<int64_t>& order) const {
    std::vector<int64_t> found(experts + 1, 0);
    if (ends) {
      for (int64_t e = 0; e < experts; ++e) {
        found[e + 1] = at(e);
        if (found[e + 1] < found[e] || found[e + 1] > m) throw std::out_of_range("offsets of experts must rise, up to the number of rows");
      }
      return found;
    }
    std::vector<int64_t> own(m);
    for (int64_t i = 0; i < m; ++i) {
      own[i] = at(i) < 0 ? at(i) + experts : at(i);
      if (own[i] < 0 || own[i] >= experts) throw std::out_of_range("the number of an expert is out of range");
      ++found[own[i] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) found[e + 1] += found[e];
    std::vector<int64_t> next(found);
    order.resize(m);
    for (int64_t i = 0; i < m; ++i) order[next[own[i]]++] = i;
    return found;
  }
};

// One product by each expert that has rows; planes of the others are not touched.
struct Grouped {
  Linear function;
  char* y;
  const char* x;
  int dtype, threads;
  int64_t n, k, padded, stride;  // elements from a row of x to the next
  std::vector<const char*> planes;
  std::vector<int64_t> bytes;  // of one expert's part of each plane

  int64_t size() const { return dtype == 0 ? 4 : 2; }

  int multiply(char* to, const char* from, int64_t step, int64_t rows, int64_t expert) const {
    const void* own[MOST_PLANES + 1] = {};
    for (size_t i = 0; i < planes.size(); ++i) own[i] = planes[i] + expert * bytes[i];
    const Layer layer = {to, nullptr, own, n, 0};
    return function(&layer, 1, from, dtype, threads, rows, k, padded, step);
  }

  // Rows that do not follow each other are brought together, and their results put where they belong.
  int scattered(const int64_t* rows, int64_t count, int64_t expert) const {
    const int64_t in = k * size(), out = n * size();
    std::vector<char> from(count * in + 64), to(count * out + 64);
    char* const start = from.data() + (64 - (size_t)from.data() % 64) % 64;
    for (int64_t i = 0; i < count; ++i) memcpy(start + i * in, x + rows[i] * stride * size(), in);
    const int failed = multiply(to.data(), start, k, count, expert);
    for (int64_t i = 0; i < count; ++i) memcpy(y + rows[i] * out, to.data() + i * out, out);
    return failed;
  }

  // The number of experts that had rows; -1 without memory.
  int64_t run(const Experts& experts) const {
    std::vector<int64_t> order;
    const std::vector<int64_t> bounds = experts.bounds(order);
    int64_t used = 0;
    for (int64_t e = 0; e < experts.experts; ++e) {
      const int64_t count = bounds[e + 1] - bounds[e];
      if (count == 0) continue;
      const int64_t first = order.empty() ? bounds[e] : order[bounds[e]];
      const bool follow = order.empty() || order[bounds[e + 1] - 1] - first == count - 1;
      const int failed = follow ? multiply(y + first * n * size(), x + first * stride * size(), stride, count, e)
                                : scattered(&order[bounds[e]], count, e);
      if (failed) return -1;
      ++used;
    }
    const int64_t done = bounds[experts.experts];
    memset(y + done * n * size(), 0, (experts.m - done) * n * size());
    return used;
  }
};

// (function, y, x, groups, dtype, wide, ends, m, experts, n, k, padded, stride, *planes, *bytes of each for one expert)
PyObject* grouped_call(PyObject* const* args, Py_ssize_t count) {
  const Py_ssize_t planes = (count - GROUPED_NUMBERS) / 2;
  if (planes < 1 || planes > MOST_PLANES || (count - GROUPED_NUMBERS) % 2) {
    PyErr_Format(PyExc_TypeError, "grouped takes %zd arguments, 1 to %zd planes, and as many sizes; found %zd", GROUPED_NUMBERS,
                 MOST_PLANES, count);
    return nullptr;
  }
  int64_t numbers[GROUPED_NUMBERS - 4];
  for (Py_ssize_t i = 0; i < GROUPED_NUMBERS - 4; ++i) numbers[i] = PyLong_AsLongLong(args[4 + i]);
  const auto [dtype, wide, ends, m, experts, n, k, padded, stride] = numbers;
  uint32_t threads = 1;
  count_threads(&threads);
  Grouped call = {(Linear)PyLong_AsVoidPtr(args[0]), (char*)data_of(args[1]), (const char*)data_of(args[2]), (int)dtype,
                  (int)threads, n, k, padded, stride, {}, {}};
  for (Py_ssize_t i = 0; i < planes; ++i) {
    call.planes.push_back((const char*)data_of(args[GROUPED_NUMBERS + i]));
    call.bytes.push_back(PyLong_AsLongLong(args[GROUPED_NUMBERS + planes + i]));
  }
  const Experts groups = {data_of(args[3]), wide != 0, ends != 0, experts, m};
  if (PyErr_Occurred()) return nullptr;
  if (m == 0 || n == 0) return PyLong_FromLong(0);
  int64_t used = 0;
  const char* refused = nullptr;
  Py_BEGIN_ALLOW_THREADS
  try {
    used = call.run(groups);
  } catch (const std::out_of_range& error) {
    refused = error.what();
  } catch (const std::bad_alloc&) {
    used = -1;
  }
  Py_END_ALLOW_THREADS
  if (refused) {
    PyErr_Format(PyExc_IndexError, "%s (%lld experts, %lld rows)", refused, (long long)experts, (long long)m);
    return nullptr;
  }
  if (used < 0) {
    PyErr_Format(PyExc_MemoryError, "no scratch memory for a %lldx%lld input and %lld experts of %lldx%lld", (long long)m,
                 (long long)k, (long long)experts, (long long)n, (long long)k);
    return nullptr;
  }
  return PyLong_FromLongLong(used);
}

using Call = PyObject* (*)(PyObject* const* args, Py_ssize_t count);

// The same under the eyes of a profiler, which sees the call by its name.
PyObject* observed(Call call, PyObject* name, PyObject* const* args, Py_ssize_t count) {
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

template <Call CALL>
PyObject* entered(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    const bool named = count > 0 && PyUnicode_Check(args[count - 1]);
    count -= named;
    return named && is_observed() ? observed(CALL, args[count], args, count) : CALL(args, count);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"connect", (PyCFunction)(void (*)(void))connect, METH_FASTCALL, 
     "connect(data_of, count_threads, is_observed, observation): addresses in torch, and what a profiler takes names by"},
    {"linear", (PyCFunction)(void (*)(void))entered<call>, METH_FASTCALL,
     "linear(function, x, dtype, m, k, padded, stride, layers, *(y or None, bias or None, bias_dtype, n, *planes)"
     "[, name that profilers see])"},
    {"grouped", (PyCFunction)(void (*)(void))entered<grouped_call>, METH_FASTCALL,
     "grouped(function, y, x, groups, dtype, wide, ends, m, experts, n, k, padded, stride, *planes, *bytes of each for one "
     "expert[, name that profilers see]): how many experts were read"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "call", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_call() { return PyModule_Create(&definition); }
