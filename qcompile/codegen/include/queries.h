// A call of attention: where its tensors lie, and which tokens each of its queries sees.
namespace {

constexpr int64_t RUN = 32;          // tiles of tokens whose scores are held at once
constexpr int64_t SPLIT = 1024;      // tokens that a thread takes of a sequence whose queries are few; a multiple of a run
constexpr int MOST_QUERIES = 16;     // queries that share one pass over keys and values
constexpr float NEVER = -1e30f;      // the score of a token that is not seen
constexpr float LOG2_E = 1.44269504f;

enum Mask { NO_MASK, BOOL_MASK, FLOAT_MASK };

struct Attention {
  void* out;                                        // [batch, heads * group, length, value_dim], contiguous
  const void* q;                                    // [batch, heads * group, length, dim], neighbours in the last dimension
  const float* center;                              // [batch, heads, dim]: what every key of a head is stored without, or null
  int64_t q_batch, q_head, q_row;                   // elements from one to the next
  int64_t batch, heads, group, length, dim, padded, value_dim, value_padded;
  Pages pages;
  const void* mask;                                 // bool, or additive floats of mask_dtype
  int64_t mask_batch, mask_head, mask_row, mask_token, mask_tokens;
  int64_t tokens;                                   // no sequence has more
  int64_t window;                                   // tokens that a query sees up to its own; 0: all
  int64_t key_turn, value_turn;                     // channels that are turned together in keys, in values
  float scale, softcap;
  int dtype, mask_kind, mask_dtype, causal, threads;
};

// 2^x for x <= 0, and 0 below 2^-126: Taylor's series of 2^f, |f| <= 1/2, to the seventh power.
QC_INLINE vf exp2_of(vf x) {
  const vf held = larger(x, splat(-126.0f)), nearest = held - 0.5f;
  vi whole;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) whole.p[i] = __builtin_convertvector(nearest.p[i], vi::Part);
  const vf f = held - to_float(whole);
  vf sum = splat(1.5252734e-5f);
  sum = fma(sum, f, splat(1.5403530e-4f));
  sum = fma(sum, f, splat(1.3333558e-3f));
  sum = fma(sum, f, splat(9.6181291e-3f));
  sum = fma(sum, f, splat(5.5504109e-2f));
  sum = fma(sum, f, splat(2.4022651e-1f));
  sum = fma(sum, f, splat(6.9314718e-1f));
  sum = fma(sum, f, splat(1.0f));
  return select(above(x, splat(-126.0f)), sum * bits_as<float>((whole + 127) << 23), splat(0.0f));
}

QC_INLINE vf tanh_of(vf x) {
  const vi sign = bits_as<int32_t>(x) & (int32_t)0x80000000;
  const vf small = exp2_of(bits_as<float>(bits_as<int32_t>(x) | (int32_t)0x80000000) * (2 * LOG2_E));
  return bits_as<float>(bits_as<int32_t>((1.0f - small) / (1.0f + small)) | sign);
}

// The queries of one pass: MR rows of those that share a head of keys, and which tokens each of them sees.
template <int MR>
struct Queries {
  int64_t sequence, head, first, count, from[MR], to[MR];  // rows first … first + count, tokens from … to
  int64_t least, most;                                     // of all rows

  Queries(const Attention& a, int64_t b, int64_t h, int64_t row) : sequence(b), head(h), first(row) {
    const int64_t rows = a.group * a.length, end = a.pages.start[b] + a.length, total = end < a.tokens ? end : a.tokens;
    count = rows - first < MR ? rows - first : MR;
    least = total, most = 0;
    for (int m = 0; m < MR; ++m) {
      const int64_t at = a.pages.start[b] + place(a, m);
      to[m] = a.causal && at + 1 < total ? at + 1 : total;
      from[m] = a.window && at - a.window + 1 > 0 ? at - a.window + 1 : 0;
      least = from[m] < least ? from[m] : least;
      most = to[m] > most ? to[m] : most;
    }
  }
  int64_t row(int m) const { return first + (m < count ? m : count - 1); }
  int64_t place(const Attention& a, int m) const { return row(m) % a.length; }
  int64_t query_head(const Attention& a, int m) const { return head * a.group + row(m) / a.length; }
  int64_t out_row(const Attention& a, int m) const {
    return (sequence * a.heads * a.group + query_head(a, m)) * a.length + place(a, m);
  }

  vf seen(const Attention& a, int m, int64_t token, vf score) const {
    if (a.mask_kind) score = masked(a, m, token, score);
    if (token >= from[m] && token + LANES <= to[m]) return score;
    alignas(64) static const int32_t lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vi at = load(lanes);
    const vi inside = greater(at, splat(clamped(from[m] - token) - 1)) & greater(splat(clamped(to[m] - token)), at);
    return select(inside, score, splat(NEVER));
  }
  static int32_t clamped(int64_t lane) { return (int32_t)(lane < 0 ? 0 : lane > LANES ? LANES : lane); }

  __attribute__((noinline)) vf masked(const Attention& a, int m, int64_t token, vf score) const {
    const int64_t at = sequence * a.mask_batch + query_head(a, m) * a.mask_head + place(a, m) * a.mask_row + token * a.mask_token;
    const int64_t left = a.mask_tokens - token, lanes = left < 0 ? 0 : left < LANES ? left : LANES;
    alignas(64) float added[LANES];
    for (int64_t l = 0; l < LANES; ++l) {
      const int64_t i = at + l * a.mask_token;
      if (l >= lanes) added[l] = NEVER;
      else if (a.mask_kind == BOOL_MASK) added[l] = ((const uint8_t*)a.mask)[i] ? 0.0f : NEVER;
      else if (a.mask_dtype == FLOAT32) added[l] = ((const float*)a.mask)[i] * LOG2_E;
      else if (a.mask_dtype == FLOAT16) added[l] = half_to_float(((const Half*)a.mask)[i].bits) * LOG2_E;
      else added[l] = bfloat_to_float(((const Bfloat*)a.mask)[i]) * LOG2_E;
    }
    return larger(score + load(added), splat(NEVER));
  }
};

}  // namespace
