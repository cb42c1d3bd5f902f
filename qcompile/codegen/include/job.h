// One call for linear layers that share their input, and what happens to x before and to y after the products.
namespace {

using qcompile::Layer;

enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum Activations { AS_GIVEN, INT8, FP8 };

struct Job {
  const Layer* layers;      // y is of dtype, its rows contiguous
  int64_t count;
  int dtype, threads;
  int64_t m, k;             // k is padded: every plane has exactly this many weights in a row
  const int32_t* x;         // m rows of k elements of the dot's type X, zero beyond the layer's own k
  int64_t x_stride;         // 32-bit words from a row of x to the next
  const float* x_scale;     // [m] when activations are quantized, else null
  const float* sums;        // [m, spans] sums of x over each span
  const int32_t* int_sums;  // [m, spans] the same for integer x
  int64_t spans;

  static int64_t parts(const Layer& layer, int64_t width) { return layer.y ? (layer.n + width - 1) / width : 0; }

  // How many times `width` outputs there are, the last of each layer maybe fewer.
  int64_t parts(int64_t width) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += parts(layers[i], width);
    return sum;
  }

  // The layer that the part `at` of all belongs to; `at` becomes its number there.
  const Layer& layer_of(int64_t& at, int64_t width) const {
    const Layer* layer = layers;
    for (; at >= parts(*layer, width); ++layer) at -= parts(*layer, width);
    return *layer;
  }
};

// One allocation cut into arrays, each on a cache line of its own. Without memory it only counts.
struct Scratch {
  char* memory;
  int64_t bytes;
  template <class T>
  T* take(int64_t count) {
    T* part = memory ? (T*)(memory + bytes) : nullptr;
    bytes += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return part;
  }
};

// Where the tokens of a KV cache lie: sequence b has page b, or the pages that its row of `table` numbers.
struct Pages {
  const int64_t* start;  // [batch]: position of the first token of the call
  const int32_t* table;  // [batch, row], or null
  int64_t row, page, count;  // entries of a row, tokens in a page, pages

  int64_t of(int64_t b, int64_t token) const { return table ? table[b * row + token / page] : b; }

  // Whether the tokens of every sequence up to start + length, `most` at most, lie in pages that exist.
  bool hold(int64_t batch, int64_t length, int64_t most) const {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t end = start[b] + length < most ? start[b] + length : most;
      if (end > (table ? row : 1) * page || (!table && b >= count)) return false;
      for (int64_t t = 0; table && t * page < end; ++t)
        if (table[b * row + t] < 0 || table[b * row + t] >= count) return false;
    }
    return true;
  }
};

template <class F>
constexpr int64_t span_of(int64_t k) { return F::SPAN ? F::SPAN : k; }

template <class D, class F>
constexpr bool needs_sums(bool scaled) { return D::INTEGER ? F::GEN_MIN != 0 || F::OFFSET : F::OFFSET && !scaled; }

// Sixteen elements from `from`, those from `count` on as zero.
template <class S>
QC_INLINE vf load_some(const S* from, int64_t count) {
  if (count >= LANES) return load_float(from);
  S part[LANES] = {};
  if (count > 0) memcpy(part, from, (size_t)count * sizeof(S));
  return load_float(part);
}

QC_INLINE vf load_any(const void* from, int dtype, int64_t at, int64_t count) {
  if (dtype == FLOAT32) return load_some((const float*)from + at, count);
  if (dtype == FLOAT16) return load_some((const Half*)from + at, count);
  return load_some((const Bfloat*)from + at, count);
}

template <class S>
QC_INLINE void store_some(S* to, vf value, int64_t count) {
  if (count >= LANES) return store_float(to, value);
  if (count <= 0) return;
  S part[LANES];
  store_float(part, value);
  memcpy(to, part, (size_t)count * sizeof(S));
}

// y[m, 16 t …] = total * x_scale[m] + bias, rounded once.
static __attribute__((noinline)) void finish(const Job& job, const Layer& layer, int64_t m, int64_t t, vf total) {
  const int64_t n = t * LANES, count = layer.n - n;
  if (count <= 0) return;
  if (job.x_scale) total = total * splat(job.x_scale[m]);
  if (layer.bias) total = total + load_any(layer.bias, (int)layer.bias_dtype, n, count);
  const int64_t at = m * layer.n + n;
  if (job.dtype == FLOAT32) store_some((float*)layer.y + at, total, count);
  else if (job.dtype == FLOAT16) store_some((Half*)layer.y + at, total, count);
  else store_some((Bfloat*)layer.y + at, total, count);
}

// The largest |x| of a row; NaN and infinity win, because magnitudes are compared as integers.
template <class S>
QC_INLINE float largest(const S* x, int64_t k) {
  vi top = splat((int32_t)0);
  for (int64_t i = 0; i < k; i += LANES) {
    const vi bits = bits_as<int32_t>(load_some(x + i, k - i)) & 0x7fffffff;
    top = bits_as<int32_t>(select(greater(bits, top), bits_as<float>(bits), bits_as<float>(top)));
  }
  int32_t lanes[LANES], best = 0;
  store(lanes, top);
  for (int l = 0; l < LANES; ++l) best = lanes[l] > best ? lanes[l] : best;
  float value;
  memcpy(&value, &best, 4);
  return value;
}

// Nearest e4m3 value, ties to even, of |v| <= 448 (OCP 8-bit Floating Point Specification): three mantissa bits down
// to 2^-6, the quantum 2^-9 below; adding 2^14, whose ulp is 2^-9, rounds to that quantum.
QC_INLINE vf round_to_e4m3(vf v) {
  const vi bits = bits_as<int32_t>(v), magnitude = bits & 0x7fffffff, sign = bits & (int32_t)0x80000000;
  const vi normal = (magnitude + splat(0x7ffff) + (shift_right(magnitude, 20) & 1)) & (int32_t)0xfff00000;
  const vf small = bits_as<float>(magnitude) + splat(16384.0f) - splat(16384.0f);
  const vf rounded = select(greater(splat(0x3c800000), magnitude), small, bits_as<float>(normal));
  return bits_as<float>(bits_as<int32_t>(rounded) | sign);
}

// Writes sixteen elements of type X; values fit X exactly or are rounded to nearest even.
QC_INLINE void put(float* to, vf v) { store_float(to, v); }
QC_INLINE void put(Bfloat* to, vf v) { store_float(to, v); }
QC_INLINE void put(int8_t* to, vf v) {  // |v| <= 127; 1.5 * 2^23 has ulp 1 and leaves the integer in the low bits
  const vi integer = bits_as<int32_t>(v + splat(12582912.0f)) - splat(0x4b400000);
#if defined(QC_AVX512)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)integer.p[0]));
#else
  int32_t lanes[LANES];
  store(lanes, integer);
  for (int l = 0; l < LANES; ++l) to[l] = (int8_t)lanes[l];
#endif
}

// One row of x as the dot wants it: [k] elements of type S become [padded] of type X. Returns the row's scale:
// max|x| / 127 or / 448; 1 for a row of zeros; NaN, which spreads to the whole row of y, if x is not finite.
template <class F, class X, class S>
static __attribute__((noinline)) float convert_row(const S* x, int64_t k, int64_t padded, X* out) {
  float scale = 1.0f;
  if (F::ACTIVATIONS != AS_GIVEN) {
    const float top = largest(x, k);
    scale = top == 0.0f ? 1.0f : top - top == 0.0f ? top / (F::ACTIVATIONS == INT8 ? 127.0f : 448.0f) : NAN;
    if (scale == 0.0f) scale = 1.401298464e-45f;  // the quotient underflowed; the smallest float keeps x / scale finite
  }
  const vf divisor = splat(scale), limit = splat(F::ACTIVATIONS == INT8 ? 127.0f : 448.0f);
  for (int64_t i = 0; i < padded; i += LANES) {
    vf v = load_some(x + i, k - i);
    if (F::ACTIVATIONS != AS_GIVEN) {
      v = v / divisor;
      v = select(greater(bits_as<int32_t>(v) & 0x7fffffff, bits_as<int32_t>(limit)),
                 bits_as<float>(bits_as<int32_t>(limit) | (bits_as<int32_t>(v) & (int32_t)0x80000000)), v);
      if (F::ACTIVATIONS == FP8) v = round_to_e4m3(v);
    }
    put(out + i, v);
  }
  return scale;
}

template <class X>
QC_INLINE float sum_of(const X* x, int64_t count) {  // floats and bf16; count is a multiple of 4
  vf lanes = splat(0.0f);
  for (int64_t i = 0; i < count; i += LANES) lanes = lanes + load_some(x + i, count - i);
  float part[LANES], sum = 0.0f;
  store(part, lanes);
  for (int l = 0; l < LANES; ++l) sum += part[l];
  return sum;
}

QC_INLINE void sum_spans(const int8_t* x, int64_t span, int64_t spans, float* sums, int32_t* int_sums) {
  for (int64_t s = 0; s < spans; ++s) {
    int32_t sum = 0;
    for (int64_t i = 0; i < span; ++i) sum += x[s * span + i];
    int_sums[s] = sum;
    sums[s] = (float)sum;
  }
}

template <class X>
QC_INLINE void sum_spans(const X* x, int64_t span, int64_t spans, float* sums, int32_t*) {
  for (int64_t s = 0; s < spans; ++s) sums[s] = sum_of(x + s * span, span);
}

}  // namespace
