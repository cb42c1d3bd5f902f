// The C interface: qc_linear and qc_decode call these with the planes that the generated prototype names.
namespace {

enum Kernel { ROWS_F32, ROWS_BF16, ROWS_INT8, PANEL_F32, PANEL_BF16, PANEL_INT8 };

// Products of bf16 pairs are exact, so they serve bf16 inputs, and e4m3 ones, whenever the codes are exact in bf16;
// codes that are not are rounded only where many rows make arithmetic the bound.
template <class F>
constexpr Kernel kernel_of(int64_t m, int dtype) {
  const bool few = m <= FEW;
  if (F::ACTIVATIONS == INT8) return few ? ROWS_INT8 : PANEL_INT8;
  const bool narrow = QC_BF16 && (F::ACTIVATIONS == FP8 || dtype == BFLOAT16);
  if (few) return narrow && F::BF16_EXACT ? ROWS_BF16 : ROWS_F32;
  return narrow ? PANEL_BF16 : PANEL_F32;
}

struct Input {  // x as the caller has it
  const void* x;
  int64_t k, stride;  // elements; elements from a row to the next
};

template <class F, class X>
QC_INLINE float convert_any(const Input& in, int dtype, int64_t m, int64_t padded, X* out) {
  if (dtype == FLOAT32) return convert_row<F>((const float*)in.x + m * in.stride, in.k, padded, out);
  if (dtype == FLOAT16) return convert_row<F>((const Half*)in.x + m * in.stride, in.k, padded, out);
  return convert_row<F>((const Bfloat*)in.x + m * in.stride, in.k, padded, out);
}

constexpr int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Returns 0, or 1 when memory ran out.
template <class F, class D>
static int run(Job job, const Input& in, const typename F::Planes& planes) {
  using X = typename D::X;
  const bool few = job.m <= FEW, sums = needs_sums<D, F>(!few && scaled<F, D>());
  const bool direct = F::ACTIVATIONS == AS_GIVEN && in.k == job.k && (size_t)in.x % 4 == 0 &&
                      (sizeof(X) == 4 ? job.dtype == FLOAT32 : job.dtype == BFLOAT16 && in.stride % 2 == 0);
  job.spans = F::SPAN ? job.k / F::SPAN : 1;
  const int64_t x_bytes = direct ? 0 : round_up(job.m * job.k * (int64_t)sizeof(X));
  const int64_t sum_bytes = sums ? round_up(job.m * job.spans * 4) : 0, scale_bytes = round_up(job.m * 4);
  const int64_t own_bytes = few ? 0 : round_up(panel_scratch<F, D>() * 4);
  char* memory = (char*)aligned_alloc(64, (size_t)(x_bytes + 2 * sum_bytes + scale_bytes + job.threads * own_bytes));
  if (!memory) return 1;
  X* x = direct ? (X*)in.x : (X*)memory;
  float* float_sums = (float*)(memory + x_bytes);
  int32_t* int_sums = (int32_t*)(memory + x_bytes + sum_bytes);
  float* scales = (float*)(memory + x_bytes + 2 * sum_bytes);
  float* own = (float*)(memory + x_bytes + 2 * sum_bytes + scale_bytes);
  job.x = (const int32_t*)x;
  job.x_stride = (direct ? in.stride : job.k) * (int64_t)sizeof(X) / 4;
  job.x_scale = F::ACTIVATIONS == AS_GIVEN ? nullptr : scales;
  job.sums = float_sums;
  job.int_sums = int_sums;
#pragma omp parallel num_threads(job.threads)
  {
    if (!direct || sums) {
#pragma omp for
      for (int64_t m = 0; m < job.m; ++m) {
        X* out = direct ? x + m * in.stride : x + m * job.k;
        if (!direct) scales[m] = convert_any<F>(in, job.dtype, m, job.k, out);
        if (sums) sum_spans(out, span_of<F>(job.k), job.spans, float_sums + m * job.spans, int_sums + m * job.spans);
      }
    }
    if (few) few_rows<F, D>(job, planes);
    else many_rows<F, D>(job, planes, own + omp_get_thread_num() * own_bytes / 4);
  }
  free(memory);
  return 0;
}

template <class F>
static int linear(const Job& job, const Input& in, const typename F::Planes& planes) {
  if constexpr (F::ACTIVATIONS == INT8) return run<F, DotI8>(job, in, planes);
  else {
    const Kernel kernel = kernel_of<F>(job.m, job.dtype);
#if QC_BF16
    if (kernel == ROWS_BF16 || kernel == PANEL_BF16) return run<F, DotBF16>(job, in, planes);
#endif
    return run<F, DotF32>(job, in, planes);
  }
}

// The weight itself, row-major: the format's own expression, evaluated in float32 and rounded once.
template <class F>
static void decode(void* out, int dtype, int64_t n, int64_t k, int64_t padded, int threads, const typename F::Planes& planes) {
  const int64_t tiles = (n + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tiles; ++t) {
    const typename F::Planes a = F::tile(planes, t, padded);
    const int64_t rows = n - t * LANES < LANES ? n - t * LANES : LANES;
    for (int64_t at = 0; at < k; at += LANES) {
      float block[LANES][LANES];  // [k][row]
      for (int64_t i = 0; i < LANES; i += F::BLOCK) {
        const typename F::Words w = F::words(a, at + i);
        QC_UNROLL for (int j = 0; j < F::BLOCK; ++j)
          if (i + j < LANES) store(block[i + j], F::value(a, w, at + i, j));
      }
      for (int64_t row = 0; row < rows; ++row) {
        float line[LANES];
        for (int i = 0; i < LANES; ++i) line[i] = block[i][row];
        const int64_t to = (t * LANES + row) * k + at;
        if (dtype == FLOAT32) store_some((float*)out + to, load(line), k - at);
        else if (dtype == FLOAT16) store_some((Half*)out + to, load(line), k - at);
        else store_some((Bfloat*)out + to, load(line), k - at);
      }
    }
  }
}

}  // namespace
