// Attention over packed keys and values: sixteen tokens in the lanes of a vector, as sixteen rows of a weight.
//
// Scores of a tile of tokens are a product with few rows. Weighted values are summed lane by lane over a run of tiles and
// across lanes once a run. Softmax is online, in powers of two; a run's sums are added up apart from those of the runs before.
namespace {

// What one thread works in: queries as the dot wants them, scores of a run, unscaled outputs.
template <class FK, class D, int MR>
struct Desk {
  float* row;     // [padded]: a query
  int32_t* x;     // [padded / D::K][MR]
  float* sums;    // [spans][MR]
  float* scores;  // [MR][RUN][16]
  float* out;     // [MR][value_padded]
  float top[MR], total[MR];
  float central[MR];  // product of a query and the center of its keys

  Desk(Scratch& scratch, const Attention& a) {
    row = scratch.take<float>(a.padded);
    x = scratch.take<int32_t>(a.padded / D::K * MR);
    sums = scratch.take<float>(a.padded / span_of<FK>(a.padded) * MR);
    scores = scratch.take<float>(MR * RUN * LANES);
    out = scratch.take<float>(MR * a.value_padded);
  }

  void load_queries(const Attention& a, const Turn& turn, const Queries<MR>& rows) {
    typename D::X operands[LANES];
    memset(sums, 0, sizeof(float) * MR * (a.padded / span_of<FK>(a.padded)));
    for (int m = 0; m < MR; ++m) {
      const int64_t center = (rows.sequence * a.heads + rows.head) * a.dim;
      vf common = splat(0.0f);
      const int64_t at = rows.sequence * a.q_batch + rows.query_head(a, m) * a.q_head + rows.place(a, m) * a.q_row;
      for (int64_t k = 0; k < a.padded; k += LANES) {
        const vf part = load_any(a.q, a.dtype, at + k, a.dim - k);
        if (a.center) common = fma(part, load_any(a.center, FLOAT32, center + k, a.dim - k), common);
        store(row + k, part);
      }
      turn.apply(row, a.dim);
      for (int64_t k = 0; k < a.padded; k += LANES) {
        const vf part = load(row + k);
        if (FK::OFFSET) sums[k / span_of<FK>(a.padded) * MR + m] += sum_of_lanes(part);
        put(operands, part);
        for (int i = 0; i < LANES / D::K; ++i) memcpy(x + (k / D::K + i) * MR + m, operands + i * D::K, 4);
      }
      central[m] = a.center ? sum_of_lanes(common) : 0.0f;
    }
    for (int m = 0; m < MR; ++m) top[m] = NEVER, total[m] = 0.0f;
    memset(out, 0, sizeof(float) * MR * a.value_padded);
  }
};

// Σ over dimensions of key · query for sixteen tokens, at every run's length from `out` on.
template <class FK, class D, int MR>
QC_INLINE void score_tile(const Attention& a, const Desk<FK, D, MR>& desk, const typename FK::Planes& keys, float* out) {
  constexpr int CH = MR > 8 ? 1 : chains(MR, FK::BLOCK / D::K, FK::SPAN / D::K);
  const int64_t span = span_of<FK>(a.padded);
  const int32_t* x = desk.x;
  vf score[MR];
  QC_UNROLL for (int m = 0; m < MR; ++m) score[m] = splat(0.0f);
  for (int64_t k = 0, s = 0; k < a.padded; k += span, ++s, x += span / D::K * MR) {
    vf acc[MR][CH];
    QC_UNROLL for (int m = 0; m < MR; ++m) QC_UNROLL for (int c = 0; c < CH; ++c) acc[m][c] = splat(0.0f);
    add_span<FK, D, MR, CH>(keys, x, k, k + span, acc);
    const vf coeff = FK::coeff(keys, k);
    QC_UNROLL for (int m = 0; m < MR; ++m) {
      QC_UNROLL for (int c = 1; c < CH; ++c) acc[m][0] = acc[m][0] + acc[m][c];
      score[m] = fma(coeff, acc[m][0], score[m]);
      if (FK::OFFSET) score[m] = fma(FK::offset(keys, k), splat(desk.sums[s * MR + m]), score[m]);
    }
  }
  QC_UNROLL for (int m = 0; m < MR; ++m) store(out + m * RUN * LANES, score[m]);
}

// out[m][k + SUB … k + BLOCK] += Σ over the run of p · gen, times coeff where it is one for all dimensions no longer.
// Not inlined: it is the same for every type of queries.
template <class FV, int MR, int SUB = 0>
static __attribute__((noinline)) void add_values(const typename FV::Planes* tiles, int64_t count, const float* p, int64_t k, float* out, int64_t stride) {
  constexpr int DIMS = MR * FV::BLOCK <= 16 ? FV::BLOCK : MR < 16 ? 16 / MR : 1;
  vf acc[DIMS][MR];
  QC_UNROLL for (int d = 0; d < DIMS; ++d) QC_UNROLL for (int m = 0; m < MR; ++m) acc[d][m] = splat(0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const typename FV::Words w = FV::words(tiles[t], k);
    vf coeff;
    if (FV::SPAN || FV::OFFSET) coeff = FV::coeff(tiles[t], k);
    vf weight[MR];
    QC_UNROLL for (int m = 0; m < MR; ++m) {
      weight[m] = load(p + (m * RUN + t) * LANES);
      if (FV::SPAN || FV::OFFSET) weight[m] = weight[m] * coeff;
    }
    QC_UNROLL for (int d = 0; d < DIMS; ++d) {
      const vf gen = FV::gen(w, SUB + d);
      QC_UNROLL for (int m = 0; m < MR; ++m) acc[d][m] = fma(gen, weight[m], acc[d][m]);
    }
  }
  QC_UNROLL for (int d = 0; d < DIMS; ++d)
    QC_UNROLL for (int m = 0; m < MR; ++m) out[m * stride + k + SUB + d] += sum_of_lanes(acc[d][m]);
  if constexpr (SUB + DIMS < FV::BLOCK) add_values<FV, MR, SUB + DIMS>(tiles, count, p, k, out, stride);
}

template <class FV, int MR>
static __attribute__((noinline)) void add_offsets(const typename FV::Planes* tiles, int64_t count, const float* p, const Attention& a, float* out) {
  const int64_t span = span_of<FV>(a.value_padded);
  for (int64_t k = 0; k < a.value_padded; k += span)
    for (int m = 0; m < MR; ++m) {
      vf acc = splat(0.0f);
      for (int64_t t = 0; t < count; ++t) acc = fma(load(p + (m * RUN + t) * LANES), FV::offset(tiles[t], k), acc);
      const float sum = sum_of_lanes(acc);
      for (int64_t d = 0; d < span; ++d) out[m * a.value_padded + k + d] += sum;
    }
}

// Scores of row m over the run become weights 2^(score - top); what was summed under an older top is brought to the new one.
template <class FV, class Desk>
static __attribute__((noinline)) void soften(const Attention& a, Desk& desk, const typename FV::Planes* tiles, int64_t count, int m, vf best) {
  float* p = desk.scores + m * RUN * LANES;
  const float top = largest_lane(best), before = desk.top[m];
  if (top > before) desk.top[m] = top;
  const float base = desk.top[m] > NEVER / 2 ? desk.top[m] : 0.0f;
  if (top > before && desk.total[m] != 0.0f) {
    const float less = sum_of_lanes(exp2_of(splat(before - base))) / LANES;
    desk.total[m] *= less;
    for (int64_t d = 0; d < a.value_padded; d += LANES) {
      float* out = desk.out + m * a.value_padded + d;
      store(out, load(out) * less);
    }
  }
  vf sum = splat(0.0f);
  for (int64_t t = 0; t < count; ++t) {
    vf weight = exp2_of(load(p + t * LANES) - base);
    sum = sum + weight;
    if (!FV::SPAN && !FV::OFFSET) weight = weight * FV::coeff(tiles[t], 0);
    store(p + t * LANES, weight);
  }
  desk.total[m] += sum_of_lanes(sum);
}

template <class F>
QC_INLINE typename F::Planes tile_of(const Attention& a, const typename F::Planes& planes, int64_t b, int64_t h, int64_t token,
                                     int64_t padded) {
  const int64_t page = a.pages.of(b, token), each = a.pages.page;
  return F::tile(planes, ((page * a.heads + h) * each + token % each) / LANES, padded);
}

// A product of query and key as a power of two's exponent.
QC_INLINE vf capped(const Attention& a, vf product) {
  if (a.softcap > 0.0f) return tanh_of(product * (a.scale / a.softcap)) * (a.softcap * LOG2_E);
  return product * (a.scale * LOG2_E);
}

// Tokens from … to of the queries' sequence.
template <class FK, class FV, class D, int MR>
static __attribute__((noinline)) void attend_to(const Attention& a, const typename FK::Planes& keys, const typename FV::Planes& values,
                                                const Queries<MR>& rows, int64_t from, int64_t to, Desk<FK, D, MR>& desk) {
  typename FV::Planes tiles[RUN];
  for (int64_t token = from / LANES * LANES; token < to; token += RUN * LANES) {
    const int64_t left = (to - token + LANES - 1) / LANES, count = left < RUN ? left : RUN;
    vf best[MR];
    for (int m = 0; m < MR; ++m) best[m] = splat(NEVER);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = token + t * LANES;
      tiles[t] = tile_of<FV>(a, values, rows.sequence, rows.head, at, a.value_padded);
      for (int64_t k = 0; k < a.value_padded; k += FV::BLOCK) FV::template prefetch<0>(tiles[t], k);
      score_tile<FK, D, MR>(a, desk, tile_of<FK>(a, keys, rows.sequence, rows.head, at, a.padded), desk.scores + t * LANES);
      for (int m = 0; m < MR; ++m) {
        float* place = desk.scores + (m * RUN + t) * LANES;
        const vf score = rows.seen(a, m, at, capped(a, load(place) + desk.central[m]));
        best[m] = larger(score, best[m]);
        store(place, score);
      }
    }
    for (int m = 0; m < MR; ++m) soften<FV>(a, desk, tiles, count, m, best[m]);
    for (int64_t k = 0; k < a.value_padded; k += FV::BLOCK)
      add_values<FV, MR>(tiles, count, desk.scores, k, desk.out, a.value_padded);
    if (FV::OFFSET) add_offsets<FV, MR>(tiles, count, desk.scores, a, desk.out);
  }
}

// A row of the result: sums, turned back, over total; zero where nothing was seen.
static void finish_row(const Attention& a, const Turn& turn, int64_t row, float* out, float total) {
  turn.apply(out, a.value_dim);
  const vf share = splat(total > 0.0f ? 1.0f / total : 0.0f);
  for (int64_t d = 0; d < a.value_dim; d += LANES) {
    const vf value = load(out + d) * share;
    const int64_t at = row * a.value_dim + d, count = a.value_dim - d;
    if (a.dtype == FLOAT32) store_some((float*)a.out + at, value, count);
    else if (a.dtype == FLOAT16) store_some((Half*)a.out + at, value, count);
    else store_some((Bfloat*)a.out + at, value, count);
  }
}

// Parts of a row by different splits, in their order: [splits] of value_padded sums, top, total.
static void merge_row(const Attention& a, const Turn& turn, int64_t row, float* parts, int64_t splits, int64_t stride) {
  float top = NEVER, total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) top = parts[s * stride + a.value_padded] > top ? parts[s * stride + a.value_padded] : top;
  for (int64_t s = 0; s < splits; ++s) {
    float* part = parts + s * stride;
    const float share = part[a.value_padded + 1] > 0.0f ? exp2f(part[a.value_padded] - top) : 0.0f;
    total += share * part[a.value_padded + 1];
    for (int64_t d = 0; d < a.value_padded; d += LANES) {
      const vf own = load(part + d) * share;
      store(parts + d, s ? load(parts + d) + own : own);
    }
  }
  finish_row(a, turn, row, parts, total);
}

enum Failure { NO_FAILURE, NO_MEMORY, NO_PAGE };

// Results do not depend on the number of threads.
template <class FK, class FV, class D, int MR>
static int attend_rows(const Attention& a, const typename FK::Planes& keys, const typename FV::Planes& values) {
  const int64_t rows = a.group * a.length, blocks = (rows + MR - 1) / MR;
  const int64_t splits = rows > MOST_QUERIES || a.tokens <= SPLIT ? 1 : (a.tokens + SPLIT - 1) / SPLIT;
  const int64_t stride = (a.value_padded + 2 + LANES - 1) / LANES * LANES;
  Scratch counted = {nullptr, 0};
  Desk<FK, D, MR> size(counted, a);
  const int64_t each = counted.bytes, parts = splits > 1 ? a.batch * a.heads * rows * splits * stride * 4 : 0;
  char* memory = (char*)aligned_alloc(64, (size_t)(a.threads * each + parts + 64) / 64 * 64);
  if (!memory) return NO_MEMORY;
  float* merged = (float*)(memory + a.threads * each);
  const Turn turn(a.key_turn), turn_back(a.value_turn);
#pragma omp parallel num_threads(a.threads)
  {
    Scratch scratch = {memory + omp_get_thread_num() * each, 0};
    Desk<FK, D, MR> desk(scratch, a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.batch * a.heads * blocks * splits; ++task) {
      const int64_t split = task % splits, block = task / splits % blocks, head = task / splits / blocks;
      const Queries<MR> queries(a, head / a.heads, head % a.heads, block * MR);
      const int64_t begin = splits > 1 && split * SPLIT > queries.least ? split * SPLIT : queries.least;
      const int64_t end = splits > 1 && (split + 1) * SPLIT < queries.most ? (split + 1) * SPLIT : queries.most;
      desk.load_queries(a, turn, queries);
      if (begin < end) attend_to<FK, FV, D, MR>(a, keys, values, queries, begin, end, desk);
      for (int m = 0; m < queries.count; ++m) {
        float* out = desk.out + m * a.value_padded;
        if (splits == 1) {
          finish_row(a, turn_back, queries.out_row(a, m), out, desk.total[m]);
          continue;
        }
        float* part = merged + ((head * rows + queries.row(m)) * splits + split) * stride;
        memcpy(part, out, sizeof(float) * a.value_padded);
        part[a.value_padded] = desk.top[m], part[a.value_padded + 1] = desk.total[m];
      }
    }
    if (splits > 1) {
#pragma omp for
      for (int64_t i = 0; i < a.batch * a.heads * rows; ++i) {
        const Queries<1> query(a, i / rows / a.heads, i / rows % a.heads, i % rows);
        merge_row(a, turn_back, query.out_row(a, 0), merged + i * splits * stride, splits, stride);
      }
    }
  }
  free(memory);
  return NO_FAILURE;
}

template <class FK, class FV, class D, int MR = 1>
static int attend_with(const Attention& a, const typename FK::Planes& keys, const typename FV::Planes& values) {
  if constexpr (MR < MOST_QUERIES && MR < QC_BYTES / 4) {
    if (a.group * a.length > MR) return attend_with<FK, FV, D, MR == 1 ? 4 : 2 * MR>(a, keys, values);
  }
  return attend_rows<FK, FV, D, MR>(a, keys, values);
}

template <class FK, class FV>
static int attend(const Attention& a, const typename FK::Planes& keys, const typename FV::Planes& values) {
  if (!a.pages.hold(a.batch, a.length, a.tokens)) return NO_PAGE;
#if QC_BF16
  if (a.dtype == BFLOAT16 && FK::BF16_EXACT) return attend_with<FK, FV, DotBF16>(a, keys, values);
#endif
  return attend_with<FK, FV, DotF32>(a, keys, values);
}

}  // namespace
