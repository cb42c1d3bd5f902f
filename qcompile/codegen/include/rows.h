// Few rows of x: every weight is read once, decoded in registers and multiplied by all rows. Bound by memory.
namespace {

#ifndef QC_AHEAD
#define QC_AHEAD 1024
#endif

// Independent sums for a row of x, so that the latency of an addition is hidden.
constexpr int chains(int rows, int steps) {
  const int wanted = rows == 1 ? 8 : rows <= 4 ? 4 : 2;
  return QC_BYTES < 64 ? 1 + (rows == 1) : wanted < steps ? wanted : steps;
}

template <class F, class D, int MR, int CH>
QC_INLINE void add_span(const typename F::Planes& a, const int32_t* const (&x)[MR], int64_t from, int64_t to,
                        typename D::Acc (&acc)[MR][CH]) {
  for (int64_t k = from; k < to; k += F::BLOCK) {
    const typename F::Words w = F::words(a, k);
    F::template prefetch<QC_AHEAD>(a, k);
    QC_UNROLL for (int i = 0; i < F::BLOCK; i += D::K) {
      const vi lanes = D::template weight<F>(w, i);
      QC_UNROLL for (int m = 0; m < MR; ++m) {
        auto& sum = acc[m][i / D::K % CH];
        sum = D::dot(sum, lanes, splat(x[m][(k + i) / D::K]));
      }
    }
  }
}

QC_INLINE vf as_float(vf a) { return a; }
QC_INLINE vf as_float(vi a) { return to_float(a); }

// Sixteen outputs of MR rows: Σ over spans of coeff * Σ x*gen + offset * Σ x.
template <class F, class D, int MR>
QC_INLINE void row_tile(const Job& job, const typename F::Planes& a, int64_t t, int64_t first) {
  constexpr int CH = chains(MR, F::BLOCK / D::K);
  const int32_t* x[MR];
  int64_t row[MR];
  vf total[MR];
  QC_UNROLL for (int m = 0; m < MR; ++m) {
    row[m] = first + m < job.m ? first + m : job.m - 1;
    x[m] = job.x + row[m] * job.x_stride;
    total[m] = splat(0.0f);
  }
  const int64_t span = span_of<F>(job.k);
  for (int64_t s = 0, k = 0; k < job.k; ++s, k += span) {
    typename D::Acc acc[MR][CH];
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
    if (first + m < job.m) finish(job, first + m, t, total[m]);
}

// Called by every thread of a parallel region.
template <class F, class D, int MR>
static void rows(const Job& job, const typename F::Planes& planes) {
  const int64_t tiles = (job.n + LANES - 1) / LANES;
  const int64_t chunk = tiles / (8 * job.threads) + 1;
#pragma omp for schedule(dynamic, chunk)
  for (int64_t t = 0; t < tiles; ++t) row_tile<F, D, MR>(job, F::tile(planes, t, job.k), t, 0);
}

constexpr int64_t FEW = 8;

template <class F, class D>
static void few_rows(const Job& job, const typename F::Planes& planes) {
  switch (job.m) {
    case 1: return rows<F, D, 1>(job, planes);
    case 2: return rows<F, D, 2>(job, planes);
    case 3: return rows<F, D, 3>(job, planes);
    case 4: return rows<F, D, 4>(job, planes);
    case 5: case 6: return rows<F, D, 6>(job, planes);
    default: return rows<F, D, 8>(job, planes);
  }
}

}  // namespace
