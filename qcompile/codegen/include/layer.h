// What callers of `qc_linear` give it: layers that multiply one input.
#include <cstdint>

namespace qcompile {

struct Layer {
  void* y;                    // [m, n]; null: nobody wants it
  const void* bias;           // [n], or null
  const void* const* planes;  // of the n×k weight, and behind them the order of its columns, or null: the same for all layers
  int64_t n, bias_dtype;
};

// x: m rows of k elements, `stride` elements from one to the next; `padded` is the k of the planes. Returns 1 without memory.
using Linear = int (*)(const Layer* layers, int64_t count, const void* x, int dtype, int threads, int64_t m, int64_t k,
                       int64_t padded, int64_t stride);

}  // namespace qcompile
