// Sums over groups of weights under the codes of several candidate scales: formats/moments.py in one pass over memory; and the
// search of formats/search.py, which asks for them, operation by operation the same.
//
// Sixteen groups are sixteen lanes. Terms are added in pairs of neighbours, then these in pairs: the order of PyTorch's version.
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int L = 16;

struct Rule {  // Rounding of formats/moments.py
  float low, high, shift, factor;
  const float* table;
};

typedef float Lanes __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t Cells __attribute__((vector_size(4 * L)));

struct Sums {
  Lanes b, c, a;
};

// To the nearest integer, ties to even; beyond ±2^22, where that fails, every rule clamps.
inline Lanes nearest(Lanes v) { return (v + 12582912.0f) - 12582912.0f; }

inline Sums plus(const Sums& p, const Sums& q) { return {p.b + q.b, p.c + q.c, p.a + q.a}; }

template <bool TABLE, bool WEIGHTED>
struct Block {
  const Rule& rule;
  const float *x, *w;  // [group][L]
  Lanes inverse, offset;

  inline __attribute__((always_inline)) Sums leaf(int64_t at) const {
    const Lanes xs = *(const Lanes*)(x + at * L);
    const Lanes low = Lanes{} + rule.low, high = Lanes{} + rule.high;
    Lanes gen = (xs - offset) * inverse - rule.shift;
    if (TABLE) {
      gen = gen * rule.factor;
      gen = gen > low ? gen : low;
      const Cells cell = __builtin_convertvector(gen < high ? gen : high, Cells);
      for (int l = 0; l < L; ++l) gen[l] = rule.table[cell[l]];
    } else {
      gen = nearest(gen) + rule.shift;
      gen = gen < low ? low : gen;
      gen = gen > high ? high : gen;
    }
    const Lanes weighted = WEIGHTED ? gen * *(const Lanes*)(w + at * L) : gen;
    return {weighted * xs, weighted, weighted * gen};
  }

  inline __attribute__((always_inline)) Sums four(int64_t at) const {
    return plus(plus(leaf(at), leaf(at + 1)), plus(leaf(at + 2), leaf(at + 3)));
  }

  Sums tree(int64_t at, int64_t count) const {
    if (count == 8) return plus(four(at), four(at + 4));
    if (count == 1) return leaf(at);
    int64_t half = 1;
    while (2 * half < count) half *= 2;
    return plus(tree(at, half), tree(at + half, count - half));
  }
};

void lanes_of(const float* rows, int64_t group, int64_t count, float* out) {
  for (int l = 0; l < L; ++l) {
    const float* row = rows + (l < count ? l : 0) * group;
    for (int64_t i = 0; i < group; ++i) out[i * L + l] = row[i];
  }
}

template <bool TABLE, bool WEIGHTED>
void run(const Rule& rule, const float* x, const float* w, const float* inverse, const float* offset, int64_t group,
         int64_t groups, int64_t candidates, float* out, int threads) {
  const int64_t blocks = (groups + L - 1) / L, plane = candidates * groups;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> xs(group * L), ws(WEIGHTED ? group * L : 0);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * L, count = groups - first < L ? groups - first : L;
      lanes_of(x + first * group, group, count, xs.data());
      if (WEIGHTED) lanes_of(w + first * group, group, count, ws.data());
      for (int64_t candidate = 0; candidate < candidates; ++candidate) {
        Block<TABLE, WEIGHTED> at{rule, xs.data(), ws.data(), {}, {}};
        const int64_t from = candidate * groups + first;
        for (int l = 0; l < L; ++l) {
          at.inverse[l] = inverse[from + (l < count ? l : 0)];
          at.offset[l] = offset ? offset[from + (l < count ? l : 0)] : 0.0f;
        }
        const Sums sums = at.tree(0, group);
        for (int64_t l = 0; l < count; ++l) {
          out[from + l] = sums.b[l];
          out[plane + from + l] = sums.c[l];
          out[2 * plane + from + l] = sums.a[l];
        }
      }
    }
  }
}

Lanes where(const Cells& which, const Lanes& a, const Lanes& b) { return which ? a : b; }

// As a plane of floats reads it back: 0 leaves it as it is, else to the nearest f32, bf16 or f16, saturating.
Lanes stored(int kind, Lanes v) {
  if (kind == 0) return v;
  const Lanes most = Lanes{} + (kind == 1 ? 3.4028234663852886e38f : kind == 2 ? 3.3895313892515355e38f : 65504.0f);
  v = where(v > most, most, where(v < -most, -most, v));
  if (kind == 1) return v;
  const int cut = kind == 2 ? 16 : 13;
  union { Lanes f; Cells i; } bits = {v};
  bits.i = (bits.i + ((bits.i >> cut) & 1) + ((1 << (cut - 1)) - 1)) & ~((1 << cut) - 1);
  const Lanes whole = where(v == v, bits.f, v);
  if (kind == 2) return whole;
  const Lanes small = where(v < 0.0f, -((-v + 0.5f) - 0.5f), (v + 0.5f) - 0.5f);  // subnormal below 2^-14: steps of 2^-24
  return where((v < 6.103515625e-05f) & (v > -6.103515625e-05f), small, whole);
}

struct Least {
  Lanes s, o, error;

  void take(const Least& other) {
    const Cells better = other.error < error;
    s = where(better, other.s, s), o = where(better, other.o, o), error = where(better, other.error, error);
  }
};

struct Planes {  // of scale and offset: how they round, whether there is an offset and which sign it has, and the scale's
  int scale, offset, affine, sign, either;
};

template <bool TABLE, bool WEIGHTED>
struct Fitting {  // formats/search.py's, of L groups
  const Rule& rule;
  const Planes& planes;
  const float *x, *w;
  int64_t group;
  Lanes square, first, total;

  Sums moments(const Lanes& s, const Lanes& o) const {
    const Lanes size = where(s < 0.0f, -s, s);
    return Block<TABLE, WEIGHTED>{rule, x, w, where(size >= 1.17549435082228751e-38f, 1.0f / s, Lanes{}), o}.tree(0, group);
  }

  static Lanes ratio(const Lanes& a, const Lanes& b) { return where(b > 1e-30f, a / b, Lanes{} + __builtin_nanf("")); }

  Least at(const Lanes& s, const Lanes& o, const Sums& m) const {
    Lanes error = square - 2.0f * s * m.b + s * s * m.a;
    if (planes.affine) error += o * (2.0f * (s * m.c - first) + o * total);
    Cells usable = (s - s == 0.0f);
    if (!planes.either || planes.affine) usable &= s > 0.0f;
    return {s, o, where(usable, error, Lanes{} + __builtin_inff())};
  }

  Least refined(const Sums& m) const {
    Lanes s = ratio(m.b, m.a), o = {};
    if (planes.affine) {
      const Lanes free = ratio(m.b * total - m.c * first, m.a * total - m.c * m.c);
      o = (first - free * m.c) / total;
      const Cells legal = planes.sign ? (Cells)(o * (float)planes.sign >= 0.0f) : (Cells)(first == first) | -1;
      s = where(legal, free, s), o = where(legal, o, Lanes{});
    }
    s = stored(planes.scale, s), o = stored(planes.offset, o);
    return at(s, o, m);
  }

  // Best of the range (s, o) as it is, what least squares make of it under each share, and of the best of these.
  Least search(const Lanes& s, const Lanes& o, const float* shares, const float* shifts, int64_t count) const {
    Least best = {stored(planes.scale, s), stored(planes.offset, o), {}};
    const Sums whole = moments(best.s, best.o);
    best = at(best.s, best.o, whole);
    for (int64_t i = 0; i < count; ++i) {
      if (shares[i] == 1.0f) {
        best.take(refined(whole));
        continue;
      }
      best.take(refined(moments(stored(planes.scale, s * shares[i]), stored(planes.offset, o + s * shifts[i]))));
    }
    best.take(refined(moments(best.s, best.o)));
    return best;
  }
};

Lanes some(const float* values, int64_t count) {
  Lanes r;
  for (int l = 0; l < L; ++l) r[l] = values[l < count ? l : 0];
  return r;
}

template <bool TABLE, bool WEIGHTED>
void search(const Rule& rule, const Planes& planes, const float* x, const float* w, const float* sums, const float* starts,
            const float* shares, int64_t count, int64_t group, int64_t groups, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> xs(group * L), ws(WEIGHTED ? group * L : 0);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < groups; first += L) {
      const int64_t some_of = groups - first < L ? groups - first : L;
      lanes_of(x + first * group, group, some_of, xs.data());
      if (WEIGHTED) lanes_of(w + first * group, group, some_of, ws.data());
      const auto row = [&](const float* rows, int64_t i) { return some(rows + i * groups + first, some_of); };
      const Fitting<TABLE, WEIGHTED> fitting{rule, planes, xs.data(), ws.data(), group,
                                             row(sums, 0), row(sums, 1), row(sums, 2)};
      const Least best = fitting.search(row(starts, 0), row(starts, 1), shares, shares + count, count);
      for (int64_t l = 0; l < some_of; ++l) out[first + l] = best.s[l], out[groups + first + l] = best.o[l];
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void qc_moments(
    float low, float high, float shift, float factor, const float* table, const float* x, const float* w, const float* inverse,
    const float* offset, int64_t group, int64_t groups, int64_t candidates, float* out, int threads) {
  const Rule rule{low, high, shift, factor, table};
  const auto chosen = table ? (w ? run<true, true> : run<true, false>) : (w ? run<false, true> : run<false, false>);
  chosen(rule, x, w, inverse, offset, group, groups, candidates, out, threads);
}

// sums [3, groups]: Σ w·x², Σ w·x, Σ w; starts [2, groups]: scale and offset; shares [2, count]: factors of the scale, and of it in
// the offset; out [2, groups]
extern "C" __attribute__((visibility("default"))) void qc_search(
    float low, float high, float shift, float factor, const float* table, const float* x, const float* w, const float* sums,
    const float* starts, const float* shares, int64_t count, int64_t group, int64_t groups, const int* planes, float* out,
    int threads) {
  const Rule rule{low, high, shift, factor, table};
  const Planes stored{planes[0], planes[1], planes[2], planes[3], planes[4]};
  const auto chosen =
      table ? (w ? search<true, true> : search<true, false>) : (w ? search<false, true> : search<false, false>);
  chosen(rule, stored, x, w, sums, starts, shares, count, group, groups, out, threads);
}
