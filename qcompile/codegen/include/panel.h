// Many rows of x: a panel of weights is decoded once into scratch that stays in the second-level cache, then multiplied
// by all rows in register tiles of MR rows × NT·16 outputs.
namespace {

constexpr int NT = QC_BYTES == 64 ? 4 : 1;
constexpr int MOST = QC_BYTES >= 32 ? 6 : 4;  // rows of a register tile, which fills the registers
constexpr int PANEL = NT * LANES;   // outputs of a panel
constexpr int64_t STEPS = 256;      // 32-bit lanes along k of a panel: 64 KB of scratch on AVX-512
constexpr int64_t EXACT_SPAN = 256; // spans from which scaling sums in float32 is nearly free (a tenth of the time at 32)
constexpr int64_t ROWS = 1024;      // rows of x that a decoded panel serves: 256 KB of sums

constexpr int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// Weights along k of a panel: whole spans and whole blocks.
template <class F, class D>
constexpr int64_t depth() {
  const int64_t whole = F::SPAN ? F::SPAN / gcd(F::SPAN, F::BLOCK) * F::BLOCK : F::BLOCK;
  return whole > STEPS * D::K ? whole : STEPS * D::K / whole * whole;
}

// Whether a panel of bf16 holds rounded values: codes that are not exact, or scales that change too often.
template <class F>
constexpr bool rounds() { return !F::BF16_EXACT || (F::SPAN && F::SPAN < EXACT_SPAN); }

// Scales are multiplied into the panel when it holds floats or rounds anyway; else once per span, in float32.
template <class F, class D>
constexpr bool scaled() { return F::SPAN && !D::INTEGER && (D::K == 1 || rounds<F>()); }
template <class F, class D>
constexpr bool by_span() { return F::SPAN && !scaled<F, D>(); }

struct Panel {
  int32_t* lanes;  // [steps][NT][16]
  float* coeff;    // [spans][NT][16]
  float* offset;
};

template <class F, class D>
QC_INLINE void decode_tile(const typename F::Planes& a, int64_t from, int64_t to, int tile, const Panel& panel) {
  const int64_t span = F::SPAN ? F::SPAN : to - from;
  int32_t* out = panel.lanes + tile * LANES;
  for (int64_t k0 = from, s = 0; k0 < to; k0 += span, ++s) {
    vf coeff, offset = splat(0.0f);
    if (F::SPAN) {
      coeff = F::coeff(a, k0);
      if (F::OFFSET) offset = F::offset(a, k0);
      if (by_span<F, D>()) {
        store(panel.coeff + s * PANEL + tile * LANES, coeff);
        if (F::OFFSET) store(panel.offset + s * PANEL + tile * LANES, offset);
      }
    }
    for (int64_t k = k0; k < k0 + span; k += F::BLOCK) {
      const typename F::Words w = F::words(a, k);
      QC_UNROLL for (int i = 0; i < F::BLOCK; i += D::K, out += PANEL) {
        if constexpr (scaled<F, D>()) store(out, D::template scaled<F>(w, i, coeff, offset));
        else store(out, D::template weight<F>(w, i));
      }
    }
  }
}

// c[m][n] (float, or int32 for whole-row integer sums) += panel × MR rows of x.
// Not inlined: constants of the decoding code must not take registers from the accumulators.
template <class F, class D, int MR>
static __attribute__((noinline)) void micro(const Job& job, const Panel& panel, int64_t from, int64_t to, int64_t first, float* c) {
  constexpr bool SPANS = by_span<F, D>();
  using Acc = Vec<typename D::Lane>;
  const int64_t span = SPANS ? F::SPAN : to - from;
  const int32_t* x = job.x + first * job.x_stride + from / D::K;
  const int32_t* w = panel.lanes;
  for (int64_t k = from, s = 0; k < to; k += span, ++s) {
    Acc acc[MR][NT];
    const int64_t at = first * job.spans + k / (F::SPAN ? F::SPAN : job.k);
    QC_UNROLL for (int m = 0; m < MR; ++m) QC_UNROLL for (int t = 0; t < NT; ++t) {
      if (SPANS) acc[m][t] = D::start(D::INTEGER && F::GEN_MIN ? F::GEN_MIN * job.int_sums[at + m * job.spans] : 0);
      else if (from) acc[m][t] = load((const typename D::Lane*)c + m * PANEL + t * LANES);
      else acc[m][t] = D::start(0);
    }
    for (int64_t step = span / D::K; step > 0; --step, w += PANEL, ++x) {
      if ((step & 15) == 0) QC_UNROLL for (int m = 0; m < MR; ++m) __builtin_prefetch(x + (m + MR) * job.x_stride);
      vi lanes[NT];
      QC_UNROLL for (int t = 0; t < NT; ++t) lanes[t] = load(w + t * LANES);
      QC_UNROLL for (int m = 0; m < MR; ++m) {
        const vi xm = splat(x[m * job.x_stride]);
        QC_UNROLL for (int t = 0; t < NT; ++t) acc[m][t] = D::dot(acc[m][t], lanes[t], xm);
      }
    }
    QC_UNROLL for (int t = 0; t < NT; ++t) {
      vf coeff, offset;
      if (SPANS) coeff = load(panel.coeff + s * PANEL + t * LANES);
      if (SPANS && F::OFFSET) offset = load(panel.offset + s * PANEL + t * LANES);
      QC_UNROLL for (int m = 0; m < MR; ++m) {
        float* to_c = c + m * PANEL + t * LANES;
        if (!SPANS) {
          store((typename D::Lane*)to_c, acc[m][t]);
          continue;
        }
        vf total = fma(coeff, as_float(acc[m][t]), k ? load(to_c) : splat(0.0f));
        if (F::OFFSET) total = fma(offset, splat(job.sums[at + m * job.spans]), total);
        store(to_c, total);
      }
    }
  }
}

// Codes of the panel that is decoded next, fetched into the second-level cache while this one is multiplied.
template <class F>
struct Ahead {
  const typename F::Planes* a;
  int64_t from, to, at;
  QC_INLINE void fetch(Ahead& self, int64_t blocks) {
    for (; blocks > 0 && self.at < (self.to - self.from) / F::BLOCK * NT; --blocks, ++self.at)
      F::template prefetch<0>(self.a[self.at % NT], self.from + self.at / NT * F::BLOCK);
  }
};

// The smallest register tile that an even split of more than most_rows() rows can ask for.
template <class F>
constexpr int64_t least() {
  int64_t least = MOST;
  for (int64_t count = most_rows<F>() + 1; count <= most_rows<F>() + 2 * MOST; ++count) {
    const int64_t tile = count / ((count + MOST - 1) / MOST);
    if (tile < least) least = tile;
  }
  return least;
}

template <class F, class D, int MR = MOST>
QC_INLINE void micro_of(int64_t rows, const Job& job, const Panel& panel, int64_t from, int64_t to, int64_t first, float* c) {
  if (rows == MR) return micro<F, D, MR>(job, panel, from, to, first, c);
  if constexpr (MR > least<F>()) micro_of<F, D, MR - 1>(rows, job, panel, from, to, first, c);
}

// Rows first … first + count of one panel, in register tiles as equal as can be.
template <class F, class D>
QC_INLINE void multiply(const Job& job, const Panel& panel, int64_t from, int64_t to, int64_t first, int64_t count, float* c,
                        Ahead<F> ahead) {
  int64_t left = (count + MOST - 1) / MOST;
  const int64_t share = ((ahead.to - ahead.from) / F::BLOCK * NT + left - 1) / left;
  for (; left > 0; --left) {
    const int64_t rows = (count + left - 1) / left;
    Ahead<F>::fetch(ahead, share);
    micro_of<F, D>(rows, job, panel, from, to, first, c);
    first += rows, count -= rows, c += rows * PANEL;
  }
}

// Sums of rows first … first + count become outputs of type S. Row by row, so that a cache line of y is written once:
// rows of y often lie a power of two apart.
template <class F, class D, class S>
static __attribute__((noinline)) void finish_panel(const Job& job, const Layer& layer, const typename F::Planes* a, int64_t tile,
                                                   int64_t first, int64_t count, const float* c) {
  constexpr bool row = F::SPAN == 0;
  vf coeff[NT], offset[NT], bias[NT];
  QC_UNROLL for (int t = 0; t < NT; ++t) {
    const int64_t n = (tile + t) * LANES;
    coeff[t] = row ? F::coeff(a[t], 0) : splat(1.0f);
    offset[t] = row && F::OFFSET ? F::offset(a[t], 0) : splat(0.0f);
    bias[t] = layer.bias ? load_any(layer.bias, (int)layer.bias_dtype, n, layer.n - n) : splat(0.0f);
  }
  for (int64_t m = first; m < first + count; ++m, c += PANEL) {
    const vf scale = splat(job.x_scale ? job.x_scale[m] : 1.0f);
    QC_UNROLL for (int t = 0; t < NT; ++t) {
      auto sum = load((const typename D::Lane*)c + t * LANES);
      if (row && D::INTEGER && F::GEN_MIN) sum = sum + D::start(F::GEN_MIN * job.int_sums[m]);
      vf total = row ? coeff[t] * as_float(sum) : bits_as<float>(sum);
      if (row && F::OFFSET) total = fma(offset[t], splat(job.sums[m]), total);
      const int64_t n = (tile + t) * LANES;
      store_some((S*)layer.y + m * layer.n + n, total * scale + bias[t], layer.n - n);
    }
  }
}

template <class F, class D>
QC_INLINE void finish_as(const Job& job, const Layer& layer, const typename F::Planes* a, int64_t tile, int64_t first, int64_t count,
                         const float* c) {
  if (job.dtype == FLOAT32) finish_panel<F, D, float>(job, layer, a, tile, first, count, c);
  else if (job.dtype == FLOAT16) finish_panel<F, D, Half>(job, layer, a, tile, first, count, c);
  else finish_panel<F, D, Bfloat>(job, layer, a, tile, first, count, c);
}

// Floats of scratch that one thread needs.
template <class F, class D>
constexpr int64_t panel_scratch() {
  const int64_t spans = by_span<F, D>() ? depth<F, D>() / F::SPAN : 0;
  return depth<F, D>() / D::K * PANEL + 2 * spans * PANEL + ROWS * PANEL;
}

// Called by every thread of a parallel region, with scratch of its own.
template <class F, class D>
static void many_rows(const Job& job, float* scratch) {
  const int64_t panels = job.parts(PANEL);
  int64_t blocks = (job.m + ROWS - 1) / ROWS;
  while (panels * blocks < 2 * job.threads && job.m / (blocks + 1) >= 32) ++blocks;
  const int64_t spans = by_span<F, D>() ? depth<F, D>() / F::SPAN : 0;
  const Panel panel = {(int32_t*)scratch, scratch + depth<F, D>() / D::K * PANEL,
                       scratch + depth<F, D>() / D::K * PANEL + spans * PANEL};
  float* c = panel.offset + spans * PANEL;
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < panels * blocks; ++task) {
    int64_t own = task / blocks;
    const Layer& layer = job.layer_of(own, PANEL);
    const typename F::Planes planes = F::of(layer.planes);
    const int64_t tile = own * NT, tiles = Job::parts(layer, LANES), block = task % blocks;
    const int64_t first = job.m * block / blocks, count = job.m * (block + 1) / blocks - first;
    typename F::Planes a[NT], later[NT];
    for (int t = 0; t < NT; ++t) {
      const int64_t next = tile + NT * job.threads + t;
      a[t] = F::tile(planes, tile + t < tiles ? tile + t : tiles - 1, job.k);
      later[t] = F::tile(planes, next < tiles ? next : tiles - 1, job.k);
    }
    for (int64_t k = 0; k < job.k; k += depth<F, D>()) {
      const int64_t end = k + depth<F, D>() < job.k ? k + depth<F, D>() : job.k;
      for (int t = 0; t < NT; ++t) decode_tile<F, D>(a[t], k, end, t, panel);
      const bool more = end < job.k;
      const int64_t start = more ? end : 0, stop = start + depth<F, D>() < job.k ? start + depth<F, D>() : job.k;
      multiply<F, D>(job, panel, k, end, first, count, c, {more ? a : later, start, stop, 0});
    }
    finish_as<F, D>(job, layer, a, tile, first, count, c);
  }
}

}  // namespace
