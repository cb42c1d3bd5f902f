// Quantizes new keys or values, row by row, into the planes of a cache: lane n % 16 of tile n / 16 is token n.
namespace {

enum Zero { NO_ZERO, ZERO_POINT, ADDED };

struct Append {
  const void* x;  // [batch, heads, length, dim] of dtype, neighbours in the last dimension
  int64_t x_batch, x_head, x_row;
  int64_t batch, heads, length, dim, padded;
  Pages pages;
  int dtype, threads;
};

// The pattern whose value is nearest to v.
template <class Q>
QC_INLINE int nearest_code(float v) {
  if constexpr (Q::EVEN_STEPS) {
    const float at = nearbyintf((v - Q::BASE) / Q::STEP);
    const float held = at > 0.0f ? at < Q::COUNT - 1 ? at : (float)(Q::COUNT - 1) : 0.0f;  // NaN: the first
    return Q::PATTERNS[(int)held];
  }
  int low = 0;
  for (int step = Q::HALF; step; step /= 2) low += low + step < Q::COUNT && v > Q::BORDERS[low + step - 1] ? step : 0;
  return Q::PATTERNS[low];
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
// without zero.
template <class Q>
QC_INLINE void quantize_group(const float* x, int64_t count, const typename Q::Planes& a, int64_t k, int lane, uint8_t* codes) {
  float low = Q::ZERO == ADDED ? x[0] : 0.0f, high = low;
  for (int64_t i = 0; i < count; ++i) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  float wanted;
  if (Q::ZERO == NO_ZERO) {
    const float up = high / Q::MOST, down = Q::LEAST < 0.0f ? low / Q::LEAST : 0.0f;
    wanted = up > down ? up : down;
  } else {
    wanted = (high - low) / (Q::MOST - Q::LEAST);
  }
  const float scale = Q::store_scale(a, k, lane, wanted > 0.0f ? wanted : 1.0f);
  float offset = 0.0f;
  if constexpr (Q::ZERO == ZERO_POINT) offset = Q::store_zero(a, k, lane, Q::LEAST - low / scale);
  if constexpr (Q::ZERO == ADDED) offset = -Q::store_zero(a, k, lane, low - Q::LEAST * scale) / scale;
  for (int64_t i = 0; i < count; ++i) codes[i] = (uint8_t)nearest_code<Q>(x[i] / scale + offset);
}

// Returns false, having written nothing, when the tokens do not lie in pages that exist.
template <class Q>
static bool append(const Append& job, const typename Q::Planes& planes) {
  if (!job.pages.hold(job.batch, job.length, INT64_MAX)) return false;
  for (int64_t b = 0; b < job.batch; ++b)
    if (job.pages.start[b] < 0) return false;
#pragma omp parallel num_threads(job.threads)
  {
    float* row = (float*)aligned_alloc(64, (size_t)job.padded * 8);
    uint8_t* codes = (uint8_t*)(row + job.padded);
#pragma omp for
    for (int64_t i = 0; i < job.batch * job.heads * job.length; ++i) {
      const int64_t b = i / job.length / job.heads, h = i / job.length % job.heads, l = i % job.length;
      const int64_t token = job.pages.start[b] + l, at = b * job.x_batch + h * job.x_head + l * job.x_row;
      const int64_t place = (job.pages.of(b, token) * job.heads + h) * job.pages.page + token % job.pages.page;
      const typename Q::Planes tile = Q::tile(planes, place / LANES, job.padded);
      for (int64_t k = 0; k < job.padded; k += LANES) store(row + k, load_any(job.x, job.dtype, at + k, job.dim - k));
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
