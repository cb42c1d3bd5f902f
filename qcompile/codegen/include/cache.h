// Quantizes new keys or values, row by row, into the planes of a cache: lane n % 16 of tile n / 16 is token n.
namespace {

enum Zero { NO_ZERO, ZERO_POINT, ADDED };

// Every `each` neighbouring channels, a power of two, times the Walsh-Hadamard matrix over the root of `each`: its own inverse.
struct Turn {
  int64_t each;
  alignas(64) float within[LANES][LANES];  // the matrix of a vector

  explicit Turn(int64_t each) : each(each) {
    const float size = 1.0f / sqrtf((float)each);
    for (int64_t l = 0; l < LANES; ++l)
      for (int64_t m = 0; m < LANES; ++m)
        within[l][m] = (l ^ m) & -each ? 0.0f : __builtin_parityll(l & m & (each - 1)) ? -size : size;
  }

  void apply(float* x, int64_t dim) const {  // reads and writes whole vectors
    if (each == 1) return;
    for (int64_t i = 0; i < dim; i += LANES) {
      vf sum = splat(0.0f);
      QC_UNROLL for (int l = 0; l < LANES; ++l) sum = fma(splat(x[i + l]), load(within[l]), sum);
      store(x + i, sum);
    }
    for (int64_t half = LANES; half < each; half *= 2)
      for (int64_t i = 0; i < dim; i += LANES) {
        if (i & half) continue;
        const vf a = load(x + i), b = load(x + i + half);
        store(x + i, a + b), store(x + i + half, a - b);
      }
  }
};

struct Append {
  const void* x;  // [batch, heads, length, dim] of dtype, neighbours in the last dimension
  int64_t x_batch, x_head, x_row;
  int64_t batch, heads, length, dim, padded;
  Pages pages;
  int64_t turn;  // channels that are turned together
  int dtype, threads;
};

// Patterns of a float with sign, M mantissa bits and exponents of this bias, nearest to v, ties to even: as normal numbers by
// rounding the bits of a float32, as subnormal ones by counting their quantum.
template <class Q>
QC_INLINE vi minifloat_codes(vf v) {
  constexpr int M = Q::MANTISSA;
  const vi bits = bits_as<int32_t>(v), sign = shift_right(bits, 24) & 0x80;
  const vf most = splat(Q::MOST), size = bits_as<float>(bits & 0x7fffffff);
  const vf held = select(above(most, size), size, most);
  const vi low = shift_right(bits_as<int32_t>(held), 23 - M) & 1;
  const vi normal = shift_right(bits_as<int32_t>(held) + splat((1 << (22 - M)) - 1) + low, 23 - M) - ((127 - Q::BIAS) << M);
  const float quantum = (float)(1 << (Q::BIAS - 1 + M));
  const vi small = bits_as<int32_t>(held * quantum + splat(8388608.0f)) - splat(0x4b000000);
  const vi is_small = above(splat(Q::SMALLEST), held);
  return bits_as<int32_t>(select(is_small, bits_as<float>(small), bits_as<float>(normal))) | sign;
}

// Patterns whose values are nearest to v; NaN gives any.
template <class Q>
QC_INLINE vi nearest_codes(vf v) {
  if constexpr (Q::EVEN_STEPS) {
    const vf at = larger((v - Q::BASE) * (1.0f / Q::STEP), splat(0.0f)), top = splat((float)(Q::COUNT - 1));
    const vf held = select(above(top, at), at, top);
    return (bits_as<int32_t>(held + splat(8388608.0f)) - splat(0x4b000000)) ^ (int32_t)Q::PATTERNS[0];
  } else if constexpr (Q::MANTISSA > 0) {
    return minifloat_codes<Q>(v);
  } else {
    float lanes[LANES];
    int32_t codes[LANES];
    store(lanes, v);
    for (int l = 0; l < LANES; ++l) {
      int low = 0;
      for (int step = Q::HALF; step; step /= 2) low += low + step < Q::COUNT && lanes[l] > Q::BORDERS[low + step - 1] ? step : 0;
      codes[l] = Q::PATTERNS[low];
    }
    return load(codes);
  }
}

QC_INLINE void store_bytes(uint8_t* to, vi a) {
#if defined(QC_AVX512)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)a.p[0]));
#else
  int32_t lanes[LANES];
  store(lanes, a);
  for (int l = 0; l < LANES; ++l) to[l] = (uint8_t)lanes[l];
#endif
}

template <class S>
QC_INLINE float stored_float(S* to, float value) {  // what is read back
  store_some(to, splat(value), 1);
  float lanes[LANES];
  store(lanes, load_some(to, 1));
  return lanes[0];
}

// Scale, zero point or offset, and codes of one group of `count` weights. Without a zero the larger extreme meets that of the
// table; with a zero point the range from the least to the largest, zero included, meets the table's; with an offset the same
// without zero. An element that is not finite makes its group NaN.
template <class Q>
QC_INLINE void quantize_group(const float* x, int64_t count, const typename Q::Planes& a, int64_t k, int lane, uint8_t* codes) {
  float low = Q::ZERO == ADDED ? x[0] : 0.0f, high = low;
  vf least = splat(low), most = splat(high), nothing = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const vf part = load(x + i);
    least = select(above(least, part), part, least), most = larger(part, most), nothing = nothing + part * 0.0f;
  }
  float bad = sum_of_lanes(nothing);  // NaN if any element is NaN or infinite: so becomes the scale
  for (; i < count; ++i) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high, bad += x[i] * 0.0f;
  const float beneath = -largest_lane(splat(0.0f) - least), over = largest_lane(most);
  low = beneath < low ? beneath : low, high = over > high ? over : high;
  float wanted;
  if (Q::ZERO == NO_ZERO) {
    const float up = high / Q::MOST, down = Q::LEAST < 0.0f ? low / Q::LEAST : 0.0f;
    wanted = up > down ? up : down;
  } else {
    wanted = (high - low) / (Q::MOST - Q::LEAST);
  }
  const float scale = Q::store_scale(a, k, lane, bad == 0.0f ? wanted > 0.0f ? wanted : 1.0f : NAN);
  float offset = 0.0f;
  if constexpr (Q::ZERO == ZERO_POINT) offset = Q::store_zero(a, k, lane, Q::LEAST - low / scale);
  if constexpr (Q::ZERO == ADDED) offset = -Q::store_zero(a, k, lane, low - Q::LEAST * scale) / scale;
  for (int64_t i = 0; i < count; i += LANES) store_bytes(codes + i, nearest_codes<Q>(load(x + i) / splat(scale) + offset));
}

// Returns false, having written nothing, when the tokens do not lie in pages that exist.
template <class Q>
static bool append(const Append& job, const typename Q::Planes& planes) {
  if (!job.pages.hold(job.batch, job.length, INT64_MAX)) return false;
  for (int64_t b = 0; b < job.batch; ++b)
    if (job.pages.start[b] < 0) return false;
  const Turn turn(job.turn);
#pragma omp parallel num_threads(job.threads)
  {
    // A group that is no multiple of a vector is read, and its codes written, a little beyond its end.
    float* row = (float*)aligned_alloc(64, (size_t)(job.padded + LANES) * 8);
    uint8_t* codes = (uint8_t*)(row + job.padded + LANES);
    store(row + job.padded, splat(0.0f));
#pragma omp for
    for (int64_t i = 0; i < job.batch * job.heads * job.length; ++i) {
      const int64_t b = i / job.length / job.heads, h = i / job.length % job.heads, l = i % job.length;
      const int64_t token = job.pages.start[b] + l, at = b * job.x_batch + h * job.x_head + l * job.x_row;
      const int64_t place = (job.pages.of(b, token) * job.heads + h) * job.pages.page + token % job.pages.page;
      const typename Q::Planes tile = Q::tile(planes, place / LANES, job.padded);
      for (int64_t k = 0; k < job.padded; k += LANES) store(row + k, load_any(job.x, job.dtype, at + k, job.dim - k));
      turn.apply(row, job.dim);
      const int64_t group = Q::GROUP ? Q::GROUP : job.padded;
      for (int64_t k = 0; k < job.padded; k += group)
        quantize_group<Q>(row + k, group, tile, k, (int)(place % LANES), codes + k);
      Q::store_codes(tile, codes, job.padded, (int)(place % LANES));
    }
    free(row);
  }
  return true;
}

}  // namespace
