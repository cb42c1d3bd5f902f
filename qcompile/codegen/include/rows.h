// Few rows of x: every weight is read once from memory, decoded in registers and multiplied by all rows. Bound by memory.
namespace {

constexpr int AHEAD = 8192;  // bytes of codes: hardware alone does not look far enough past a page and a tile

// Independent sums for a row of x, so that the latency of an addition is hidden. They are added up after every span:
// short spans overlap each other and need few.
constexpr int chains(int rows, int steps, int64_t dots_of_span) {
  const int wanted = rows == 1 ? 8 : rows <= 4 ? 4 : rows <= 8 ? 2 : 1;
  const int worth = dots_of_span && dots_of_span < 8 * wanted ? (int)(dots_of_span / 8 + 1) : wanted;
  return QC_BYTES < 64 ? 1 + (rows == 1) : worth < steps ? worth : steps;
}

template <class F, class D, int MR, int CH>
QC_INLINE void add_span(const typename F::Planes& a, const int32_t* x, int64_t from, int64_t to,
                        Vec<typename D::Lane> (&acc)[MR][CH]) {
  for (int64_t k = from; k < to; k += F::BLOCK, x += F::BLOCK / D::K * MR) {
    const typename F::Words w = F::words(a, k);
    F::template prefetch<AHEAD>(a, k);
    QC_UNROLL for (int i = 0; i < F::BLOCK; i += D::K) {
      const vi lanes = D::template weight<F>(w, i);
      QC_UNROLL for (int m = 0; m < MR; ++m) {
        auto& sum = acc[m][i / D::K % CH];
        sum = D::dot(sum, lanes, splat(x[i / D::K * MR + m]));
      }
    }
  }
}

QC_INLINE vf as_float(vf a) { return a; }
QC_INLINE vf as_float(vi a) { return to_float(a); }

// Sixteen outputs of MR rows from `first` on: Σ over spans of coeff * Σ x*gen + offset * Σ x.
template <class F, class D, int MR>
QC_INLINE void row_tile(const Job& job, const Layer& layer, const typename F::Planes& a, int64_t t, int64_t first) {
  constexpr int CH = chains(MR, F::BLOCK / D::K, F::SPAN / D::K);
  const int32_t* x = job.x + first * (job.k / D::K);
  int64_t row[MR];
  vf total[MR];
  QC_UNROLL for (int m = 0; m < MR; ++m) {
    row[m] = first + m < job.m ? first + m : job.m - 1;
    total[m] = splat(0.0f);
  }
  const int64_t span = span_of<F>(job.k);
  for (int64_t s = 0, k = 0; k < job.k; ++s, k += span, x += span / D::K * MR) {
    Vec<typename D::Lane> acc[MR][CH];
    QC_UNROLL for (int m = 0; m < MR; ++m) {
      acc[m][0] = D::start(D::INTEGER && F::GEN_MIN ? F::GEN_MIN * job.int_sums[row[m] * job.spans + s] : 0);
      QC_UNROLL for (int c = 1; c < CH; ++c) acc[m][c] = D::start(0);
    }
    add_span<F, D, MR, CH>(a, x, k, k + span, acc);
    const vf coeff = F::coeff(a, k);
    QC_UNROLL for (int m = 0; m < MR; ++m) {
      QC_UNROLL for (int c = 1; c < CH; ++c) acc[m][0] = acc[m][0] + acc[m][c];
      total[m] = fma(coeff, as_float(acc[m][0]), total[m]);
      if (F::OFFSET) total[m] = fma(F::offset(a, k), splat(job.sums[row[m] * job.spans + s]), total[m]);
    }
  }
  QC_UNROLL for (int m = 0; m < MR; ++m)
    if (first + m < job.m) finish(job, layer, first + m, t, total[m]);
}

// Called by every thread of a parallel region.
template <class F, class D, int MR>
static void rows(const Job& job) {
  const int64_t tiles = job.parts(LANES);
  const int64_t chunk = tiles / (8 * job.threads) + 1;
#pragma omp for schedule(dynamic, chunk)
  for (int64_t task = 0; task < tiles; ++task) {
    int64_t t = task;
    const Layer& layer = job.layer_of(t, LANES);
    const typename F::Planes a = F::tile(F::of(layer.planes), t, job.k);
    for (int64_t first = 0; first < job.m; first += MR) row_tile<F, D, MR>(job, layer, a, t, first);
  }
}

// Most rows of x in one turn: what the register file holds, running totals included where scales change.
template <class F>
constexpr int64_t most_at_once() { return QC_BYTES == 64 ? 16 : QC_BYTES == 32 ? (F::SPAN ? 3 : 4) : 2; }

// Most rows of x that this kernel serves. More than fit at once take turns at a tile, which all but the first find in the
// second-level cache.
template <class F>
constexpr int64_t most_rows() { return most_at_once<F>() * (QC_BYTES == 64 ? F::TURNS : 1); }

constexpr int next_width(int width) { return width + (width < 4 ? 1 : width < 8 ? 2 : 4); }

// Rows of a turn when m rows take as few turns as they can: x is interleaved for that many.
template <class F>
constexpr int width_of(int64_t m) {
  const int64_t turns = (m + most_at_once<F>() - 1) / most_at_once<F>();
  int width = 1;
  while (width * turns < m) width = next_width(width);
  return width;
}

template <class F, class D, int MR = 1>
static void few_rows(const Job& job) {
  if (width_of<F>(job.m) == MR) return rows<F, D, MR>(job);
  if constexpr (MR < most_at_once<F>()) few_rows<F, D, next_width(MR)>(job);
}

}  // namespace
