// Sums over groups of weights under the codes of several candidate scales: formats/moments.py in one pass over memory.
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

}  // namespace

extern "C" __attribute__((visibility("default"))) void qc_moments(
    float low, float high, float shift, float factor, const float* table, const float* x, const float* w, const float* inverse,
    const float* offset, int64_t group, int64_t groups, int64_t candidates, float* out, int threads) {
  const Rule rule{low, high, shift, factor, table};
  const auto chosen = table ? (w ? run<true, true> : run<true, false>) : (w ? run<false, true> : run<false, false>);
  chosen(rule, x, w, inverse, offset, group, groups, candidates, out, threads);
}
