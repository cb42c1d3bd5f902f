// The functions behind the C interface.
namespace {

enum Kernel { ROWS_F32, ROWS_BF16, ROWS_INT8, PANEL_F32, PANEL_BF16, PANEL_INT8 };

// Products of bf16 pairs are exact, so they serve bf16 inputs, and e4m3 ones, whenever the codes are exact in bf16.
// Values of codes are rounded to bf16 only for bf16 inputs, and only where enough rows make arithmetic the bound.
constexpr int64_t BOUND_BY_ARITHMETIC = 4;

template <class F>
constexpr Kernel kernel_of(int64_t m, int dtype) {
  const bool few = m <= most_rows<F>();
  if (F::ACTIVATIONS == INT8) return few ? ROWS_INT8 : PANEL_INT8;
  const bool narrow = QC_BF16 && (F::ACTIVATIONS == FP8 || dtype == BFLOAT16);
  if (few) return narrow && (F::BF16_EXACT || (dtype == BFLOAT16 && m >= BOUND_BY_ARITHMETIC)) ? ROWS_BF16 : ROWS_F32;
  return narrow && (dtype == BFLOAT16 || !rounds<F>()) ? PANEL_BF16 : PANEL_F32;
}

struct Input {  // x as the caller has it
  const void* x;
  int64_t k, stride;     // elements; elements from a row to the next
  const int32_t* order;  // [k]: which column the weights' i-th one meets; null: the i-th
};

constexpr int64_t TOGETHER = 4;  // rows that share the reading of an order

// The columns of ROWS rows, `step` bytes apart, in their order, to rows that follow each other; none beyond the row is read.
template <class T, int ROWS>
static __attribute__((noinline)) void reorder(const char* from, int64_t step, const int32_t* order, int64_t k, T* to) {
  for (int64_t i = 0; i < k; ++i) {
    const int64_t asked = (uint32_t)order[i], at = asked < k ? asked : k - 1;
    QC_UNROLL for (int r = 0; r < ROWS; ++r) to[r * k + i] = ((const T*)(from + r * step))[at];
  }
}

template <class T>
static void reorder_rows(int64_t count, const char* from, int64_t step, const int32_t* order, int64_t k, char* to) {
  if (count == TOGETHER) return reorder<T, TOGETHER>(from, step, order, k, (T*)to);
  for (int64_t r = 0; r < count; ++r) reorder<T, 1>(from + r * step, step, order, k, (T*)to + r * k);
}

// Everything that is made of x before the products.
template <class F, class D>
struct Prepared {
  using X = typename D::X;
  static constexpr int64_t WORD = 4 / sizeof(X);  // elements in 32 bits
  bool few, direct, sums;
  int width;         // rows interleaved for the kernel of few rows; 1: rows follow each other
  X* x;              // rows of x as D wants them; the caller's own if `direct`
  int32_t* packed;   // [turns][k / WORD][width]
  float *scales, *float_sums, *own;
  int32_t* int_sums;
  char* ordered;     // of each thread: the rows that it takes together, in the weight's order
  int64_t size, together;

  Prepared(const Job& job, const Input& in) {
    few = job.m <= most_rows<F>();
    width = few ? width_of<F>(job.m) : 1;
    sums = needs_sums<D, F>(!few && scaled<F, D>());
    size = job.dtype == FLOAT32 ? 4 : 2;
    together = in.order && job.m >= TOGETHER * job.threads ? TOGETHER : 1;
    direct = F::ACTIVATIONS == AS_GIVEN && !in.order && in.k == job.k && (size_t)in.x % 4 == 0 && in.stride % WORD == 0 &&
             (WORD == 1 ? job.dtype == FLOAT32 : job.dtype == BFLOAT16);
  }

  int64_t turns(const Job& job) const { return (job.m + width - 1) / width; }

  void take(Scratch& scratch, const Job& job, const Input& in) {
    x = direct ? (X*)in.x : scratch.take<X>(job.m * job.k);
    packed = scratch.take<int32_t>(width > 1 ? turns(job) * width * job.k / WORD : 0);
    scales = scratch.take<float>(F::ACTIVATIONS == AS_GIVEN ? 0 : job.m);
    float_sums = scratch.take<float>(sums ? job.m * job.spans : 0);
    int_sums = scratch.take<int32_t>(sums ? job.m * job.spans : 0);
    own = scratch.take<float>(few ? 0 : job.threads * panel_scratch<F, D>());
    ordered = scratch.take<char>(in.order ? job.threads * together * in.k * size : 0);
  }

  // The rows that are taken together, from the m-th on.
  void rows(const Job& job, const Input& in, int64_t m, int64_t thread) {
    const int64_t count = job.m - m < together ? job.m - m : together;
    const char* from = (const char*)in.x + m * in.stride * size;
    int64_t step = in.stride * size;
    if (in.order) {
      char* const to = ordered + thread * together * in.k * size;
      if (size == 4) reorder_rows<uint32_t>(count, from, step, in.order, in.k, to);
      else reorder_rows<uint16_t>(count, from, step, in.order, in.k, to);
      from = to, step = in.k * size;
    }
    for (int64_t i = 0; i < count; ++i) row(job, in, from + i * step, m + i);
  }

  void row(const Job& job, const Input& in, const char* from, int64_t m) {
    X* out = x + m * (direct ? in.stride : job.k);
    if (!direct) {
      const float scale = convert_any(from, in.k, job, out);
      if (F::ACTIVATIONS != AS_GIVEN) scales[m] = scale;
    }
    if (sums) sum_spans(out, span_of<F>(job.k), job.spans, float_sums + m * job.spans, int_sums + m * job.spans);
  }

  // Words from … to of every row, interleaved; rows that only fill up the width are zero. Threads divide words, not
  // rows, because neighbours in `packed` share cache lines.
  void interleave(const Job& job, const Input& in, int64_t from, int64_t to) {
    const int64_t stride = (direct ? in.stride : job.k) / WORD;
    for (int64_t first = 0; first < job.m; first += width) {
      int32_t* out = packed + (first * (job.k / WORD)) + from * width;
      for (int64_t i = from; i < to; ++i)
        for (int64_t m = first; m < first + width; ++m) *out++ = m < job.m ? ((const int32_t*)x)[m * stride + i] : 0;
    }
  }

  static float convert_any(const void* from, int64_t k, const Job& job, X* out) {
    if (job.dtype == FLOAT32) return convert_row<F>((const float*)from, k, job.k, out);
    if (job.dtype == FLOAT16) return convert_row<F>((const Half*)from, k, job.k, out);
    return convert_row<F>((const Bfloat*)from, k, job.k, out);
  }
};

// Returns 0, or 1 when memory ran out.
template <class F, class D>
static int run(Job job, const Input& in) {
  job.spans = F::SPAN ? job.k / F::SPAN : 1;
  Prepared<F, D> p(job, in);
  Scratch scratch = {nullptr, 0};
  p.take(scratch, job, in);
  scratch = {(char*)aligned_alloc(64, (size_t)scratch.bytes + 64), 0};
  if (!scratch.memory) return 1;
  p.take(scratch, job, in);
  job.x = p.width > 1 ? p.packed : (const int32_t*)p.x;
  job.x_stride = (p.direct ? in.stride : job.k) / p.WORD;
  job.x_scale = F::ACTIVATIONS == AS_GIVEN ? nullptr : p.scales;
  job.sums = p.float_sums;
  job.int_sums = p.int_sums;
#pragma omp parallel num_threads(job.threads)
  {
    if (!p.direct || p.sums) {
#pragma omp for
      for (int64_t m = 0; m < job.m; m += p.together) p.rows(job, in, m, omp_get_thread_num());
    }
    if (p.width > 1) {
      const int64_t words = job.k / p.WORD, chunk = 64;
#pragma omp for
      for (int64_t i = 0; i < words; i += chunk) p.interleave(job, in, i, i + chunk < words ? i + chunk : words);
    }
    if (p.few) few_rows<F, D>(job);
    else many_rows<F, D>(job, p.own + omp_get_thread_num() * panel_scratch<F, D>());
  }
  free(scratch.memory);
  return 0;
}

template <class F>
static int linear(const Job& job, const Input& in) {
  if constexpr (F::ACTIVATIONS == INT8) return run<F, DotI8>(job, in);
  else {
    const Kernel kernel = kernel_of<F>(job.m, job.dtype);
#if QC_BF16
    if (kernel == ROWS_BF16 || kernel == PANEL_BF16) return run<F, DotBF16>(job, in);
#endif
    return run<F, DotF32>(job, in);
  }
}

// Sixteen weights of the sixteen rows of a tile, [k][row]: coeff * gen + offset as written, in float32.
template <class F>
QC_INLINE void decode_block(const typename F::Planes& a, int64_t at, float (&block)[LANES][LANES]) {
  for (int64_t i = 0; i < LANES; i += F::BLOCK) {
    const typename F::Words w = F::words(a, at + i);
    const vf coeff = F::exact_coeff(a, at + i), offset = F::OFFSET ? F::offset(a, at + i) : splat(0.0f);
    QC_UNROLL for (int j = 0; j < F::BLOCK; ++j)
      if (i + j < LANES) {
        const vf value = coeff * F::exact_gen(w, j);
        store(block[i + j], F::OFFSET ? value + offset : value);
      }
  }
}

// Weights at … at + 16 of one lane of a block to out.
QC_INLINE void store_line(void* out, int dtype, int64_t to, const float (&block)[LANES][LANES], int64_t lane, int64_t count) {
  float line[LANES];
  for (int i = 0; i < LANES; ++i) line[i] = block[i][lane];
  if (dtype == FLOAT32) store_some((float*)out + to, load(line), count);
  else if (dtype == FLOAT16) store_some((Half*)out + to, load(line), count);
  else store_some((Bfloat*)out + to, load(line), count);
}

// The weight itself, row-major, rounded once.
template <class F>
static void decode(void* out, int dtype, int64_t n, int64_t k, int64_t padded, int threads, const typename F::Planes& planes) {
  const int64_t tiles = (n + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tiles; ++t) {
    const typename F::Planes a = F::tile(planes, t, padded);
    const int64_t rows = n - t * LANES < LANES ? n - t * LANES : LANES;
    for (int64_t at = 0; at < k; at += LANES) {
      float block[LANES][LANES];
      decode_block<F>(a, at, block);
      for (int64_t row = 0; row < rows; ++row) store_line(out, dtype, (t * LANES + row) * k + at, block, row, k - at);
    }
  }
}

// Rows of the weight by number.
template <class F>
static void gather_rows(void* out, int dtype, const int64_t* rows, int64_t count, int64_t k, int64_t padded, int threads,
                        const typename F::Planes& planes) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const typename F::Planes a = F::tile(planes, rows[i] / LANES, padded);
    for (int64_t at = 0; at < k; at += LANES) {
      float block[LANES][LANES];
      decode_block<F>(a, at, block);
      store_line(out, dtype, i * k + at, block, rows[i] % LANES, k - at);
    }
  }
}

}  // namespace
