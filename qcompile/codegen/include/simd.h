// Sixteen 32-bit lanes on AVX-512, on AVX2 and on anything else that GCC or Clang compile for.
//
// A Vec is 64 bytes in one, two or four registers. Lanes are the sixteen interleaved rows of a weight tile, so nothing
// here works across lanes. -DQC_GENERIC forces the portable path.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>

#if !defined(QC_GENERIC) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define QC_AVX512 1
#define QC_BYTES 64
#include <immintrin.h>
#elif !defined(QC_GENERIC) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QC_AVX2 1
#define QC_BYTES 32
#include <immintrin.h>
#else
#define QC_BYTES 16
#endif

#define QC_REGISTER_TABLES (QC_BYTES > 16)  // whether lookup() is one or two instructions

#if defined(QC_AVX512) && defined(__AVX512BF16__)
#define QC_BF16 1  // vdpbf16ps: two bf16 products a lane
#else
#define QC_BF16 0
#endif

#define QC_INLINE static inline __attribute__((always_inline))
#define QC_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define QC_UNROLL QC_PRAGMA(clang loop unroll(full))
#else
#define QC_UNROLL QC_PRAGMA(GCC unroll 64)
#endif

namespace {

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

constexpr int LANES = 16;
constexpr int PARTS = 64 / QC_BYTES;

template <class T>
struct Vec {
  typedef T Part __attribute__((vector_size(QC_BYTES)));
  Part p[PARTS];
};
using vf = Vec<float>;
using vi = Vec<int32_t>;
using vu = Vec<uint32_t>;

#define QC_BINARY(op)                                        \
  template <class T>                                         \
  QC_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {         \
    QC_UNROLL for (int i = 0; i < PARTS; ++i) a.p[i] = a.p[i] op b.p[i]; \
    return a;                                                \
  }
QC_BINARY(+)
QC_BINARY(-)
QC_BINARY(*)
QC_BINARY(/)
QC_BINARY(&)
QC_BINARY(|)
QC_BINARY(^)
#undef QC_BINARY

template <class To, class From>
QC_INLINE Vec<To> bits_as(Vec<From> a) {
  Vec<To> r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) r.p[i] = (typename Vec<To>::Part)a.p[i];
  return r;
}

#if defined(QC_AVX512)
QC_INLINE vf splat(float s) { return {{(vf::Part)_mm512_set1_ps(s)}}; }
QC_INLINE vi splat(int32_t s) { return {{(vi::Part)_mm512_set1_epi32(s)}}; }
#elif defined(QC_AVX2)
QC_INLINE vf splat(float s) { return {{(vf::Part)_mm256_set1_ps(s), (vf::Part)_mm256_set1_ps(s)}}; }
QC_INLINE vi splat(int32_t s) { return {{(vi::Part)_mm256_set1_epi32(s), (vi::Part)_mm256_set1_epi32(s)}}; }
#else
template <class T>
QC_INLINE Vec<T> splat(T s) {
  const typename Vec<T>::Part part = {s, s, s, s};
  return {{part, part, part, part}};
}
#endif

QC_INLINE vi operator<<(vi a, int n) {
  QC_UNROLL for (int i = 0; i < PARTS; ++i) a.p[i] = a.p[i] << n;
  return a;
}
QC_INLINE vi operator>>(vi a, int n) {  // arithmetic
  QC_UNROLL for (int i = 0; i < PARTS; ++i) a.p[i] = a.p[i] >> n;
  return a;
}
QC_INLINE vi shift_right(vi a, int n) {  // logical
  QC_UNROLL for (int i = 0; i < PARTS; ++i) a.p[i] = (vi::Part)((vu::Part)a.p[i] >> n);
  return a;
}

// Part by part: a copy of all 64 bytes at once would keep the parts in memory.
template <class T>
QC_INLINE Vec<T> load(const T* from) {
  Vec<T> r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) memcpy(&r.p[i], (const char*)from + i * QC_BYTES, QC_BYTES);
  return r;
}
template <class T>
QC_INLINE void store(T* to, Vec<T> a) {
  QC_UNROLL for (int i = 0; i < PARTS; ++i) memcpy((char*)to + i * QC_BYTES, &a.p[i], QC_BYTES);
}

QC_INLINE vf operator+(vf a, float s) { return a + splat(s); }
QC_INLINE vf operator-(vf a, float s) { return a - splat(s); }
QC_INLINE vf operator*(vf a, float s) { return a * splat(s); }
QC_INLINE vf operator/(vf a, float s) { return a / splat(s); }
QC_INLINE vf operator+(float s, vf a) { return splat(s) + a; }
QC_INLINE vf operator-(float s, vf a) { return splat(s) - a; }
QC_INLINE vf operator*(float s, vf a) { return splat(s) * a; }
QC_INLINE vf operator/(float s, vf a) { return splat(s) / a; }
QC_INLINE vf operator-(vf a) { return splat(-0.0f) - a; }
QC_INLINE vi operator+(vi a, int32_t s) { return a + splat(s); }
QC_INLINE vi operator-(vi a, int32_t s) { return a - splat(s); }
QC_INLINE vi operator*(vi a, int32_t s) { return a * splat(s); }
QC_INLINE vi operator*(int32_t s, vi a) { return a * splat(s); }
QC_INLINE vi operator+(int32_t s, vi a) { return a + splat(s); }
QC_INLINE vi operator-(int32_t s, vi a) { return splat(s) - a; }
QC_INLINE vi operator|(vi a, int32_t s) { return a | splat(s); }
QC_INLINE vi operator&(vi a, int32_t s) { return a & splat(s); }
QC_INLINE vi operator^(vi a, int32_t s) { return a ^ splat(s); }

QC_INLINE vf to_float(vi a) {
  vf r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) r.p[i] = __builtin_convertvector(a.p[i], vf::Part);
  return r;
}

QC_INLINE vf select(vi mask, vf yes, vf no) {  // mask lanes are 0 or -1
  return bits_as<float>((bits_as<int32_t>(yes) & mask) | (bits_as<int32_t>(no) & (mask ^ -1)));
}
QC_INLINE vi equals(vi a, int32_t s) {
  const vi b = splat(s);
  QC_UNROLL for (int i = 0; i < PARTS; ++i) a.p[i] = a.p[i] == b.p[i];
  return a;
}
QC_INLINE vi greater(vi a, vi b) {
  QC_UNROLL for (int i = 0; i < PARTS; ++i) a.p[i] = a.p[i] > b.p[i];
  return a;
}

QC_INLINE vi above(vf a, vf b) {
  vi r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) r.p[i] = (vi::Part)(a.p[i] > b.p[i]);
  return r;
}
QC_INLINE vf larger(vf a, vf b) { return select(above(a, b), a, b); }  // b where either is NaN

QC_INLINE float sum_of_lanes(vf a) {
#if defined(QC_AVX512)
  return _mm512_reduce_add_ps((__m512)a.p[0]);
#else
  float lanes[LANES], sum = 0.0f;
  memcpy(lanes, a.p, 64);
  for (int l = 0; l < LANES; ++l) sum += lanes[l];
  return sum;
#endif
}
QC_INLINE float largest_lane(vf a) {
  float lanes[LANES];
  memcpy(lanes, a.p, 64);
  float top = lanes[0];
  for (int l = 1; l < LANES; ++l) top = lanes[l] > top ? lanes[l] : top;
  return top;
}

QC_INLINE vf fma(vf a, vf b, vf c) {
#if defined(QC_AVX512)
  return {{(vf::Part)_mm512_fmadd_ps((__m512)a.p[0], (__m512)b.p[0], (__m512)c.p[0])}};
#elif defined(QC_AVX2)
  QC_UNROLL for (int i = 0; i < PARTS; ++i)
    c.p[i] = (vf::Part)_mm256_fmadd_ps((__m256)a.p[i], (__m256)b.p[i], (__m256)c.p[i]);
  return c;
#elif defined(__FP_FAST_FMAF)
  QC_UNROLL for (int i = 0; i < PARTS; ++i)
    QC_UNROLL for (int l = 0; l < QC_BYTES / 4; ++l) c.p[i][l] = __builtin_fmaf(a.p[i][l], b.p[i][l], c.p[i][l]);
  return c;
#else
  return a * b + c;
#endif
}

}  // namespace
