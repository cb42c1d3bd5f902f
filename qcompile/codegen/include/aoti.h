// Calls of kernels from the C++ that AOTInductor writes: kernels are linked into the model's library by the names that
// `codegen/cpp_object.py` gives them.
#include <torch/csrc/stable/c/shim.h>

namespace qcompile {

inline int threads() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return (int)count;
}

inline void linear(Linear function, const void* x, int dtype, int64_t m, int64_t k, int64_t padded, int64_t stride,
                   std::initializer_list<Layer> layers) {
  if (m == 0) return;
  const int failed = function(layers.begin(), (int64_t)layers.size(), x, dtype, threads(), m, k, padded, stride);
  AOTI_TORCH_CHECK(!failed, "no scratch memory for a packed linear layer");
}

inline const int64_t* checked(const void* rows, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = ((const int64_t*)rows)[i];
    AOTI_TORCH_CHECK(0 <= row && row < n, "embedding: an index is outside of the table");
  }
  return (const int64_t*)rows;
}

}  // namespace qcompile
