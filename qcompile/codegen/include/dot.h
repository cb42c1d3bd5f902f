// The three ways to multiply: a 32-bit lane holds one float, two bf16 or four bytes, and so do 32 bits of x.
//
// A dot's static members: K, the weights of a row in one lane; Lane, the type of a sum; X, the element type that x is brought to;
// weight(words, k), the lanes of weights k … k + K - 1 without scales; scaled(…), the same with scale and offset in;
// start(value), an accumulator (floats start at zero); dot(acc, w, x).
namespace {

struct DotF32 {
  static constexpr int K = 1;
  static constexpr bool INTEGER = false;
  using Lane = float;
  using X = float;
  template <class F>
  QC_INLINE vi weight(const typename F::Words& w, int k) { return bits_as<int32_t>(F::gen(w, k)); }
  template <class F>
  QC_INLINE vi scaled(const typename F::Words& w, int k, vf coeff, vf offset) {
    const vf gen = F::gen(w, k);
    return bits_as<int32_t>(F::OFFSET ? fma(coeff, gen, offset) : coeff * gen);
  }
  QC_INLINE vf start(int32_t) { return splat(0.0f); }
  QC_INLINE vf dot(vf acc, vi w, vi x) { return fma(bits_as<float>(w), bits_as<float>(x), acc); }
};

#if QC_BF16
struct DotBF16 {
  static constexpr int K = 2;
  static constexpr bool INTEGER = false;
  using Lane = float;
  using X = Bfloat;
  template <class F>
  QC_INLINE vi weight(const typename F::Words& w, int k) { return F::pair(w, k); }
  template <class F>
  QC_INLINE vi scaled(const typename F::Words& w, int k, vf coeff, vf offset) {
    return pair_rounded(bits_as<float>(DotF32::scaled<F>(w, k, coeff, offset)),
                        bits_as<float>(DotF32::scaled<F>(w, k + 1, coeff, offset)));
  }
  QC_INLINE vf start(int32_t) { return splat(0.0f); }
  QC_INLINE vf dot(vf acc, vi w, vi x) {
    return {{(vf::Part)_mm512_dpbf16_ps((__m512)acc.p[0], (__m512bh)w.p[0], (__m512bh)x.p[0])}};
  }
};
#endif

// Unsigned weight bytes times signed activation bytes, summed in int32 without saturation.
struct DotI8 {
  static constexpr int K = 4;
  static constexpr bool INTEGER = true;
  using Lane = int32_t;
  using X = int8_t;
  template <class F>
  QC_INLINE vi weight(const typename F::Words& w, int k) { return F::quad(w, k); }
  QC_INLINE vi start(int32_t value) { return splat(value); }
  QC_INLINE vi dot(vi acc, vi w, vi x) {
#if defined(QC_AVX512) && defined(__AVX512VNNI__)
    return {{(vi::Part)_mm512_dpbusd_epi32((__m512i)acc.p[0], (__m512i)w.p[0], (__m512i)x.p[0])}};
#elif defined(QC_AVX2) && defined(__AVXVNNI__)
    QC_UNROLL for (int i = 0; i < PARTS; ++i)
      acc.p[i] = (vi::Part)_mm256_dpbusd_avx_epi32((__m256i)acc.p[i], (__m256i)w.p[i], (__m256i)x.p[i]);
    return acc;
#elif defined(QC_AVX2)
    // vpmaddubsw would saturate at 16 bits, so even and odd bytes are widened first.
    QC_UNROLL for (int i = 0; i < PARTS; ++i) {
      const __m256i wi = (__m256i)w.p[i], xi = (__m256i)x.p[i];
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(wi, _mm256_set1_epi16(255)),
                                             _mm256_srai_epi16(_mm256_slli_epi16(xi, 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(wi, 8), _mm256_srai_epi16(xi, 8));
      acc.p[i] = (vi::Part)_mm256_add_epi32((__m256i)acc.p[i], _mm256_add_epi32(even, odd));
    }
    return acc;
#else
    QC_UNROLL for (int j = 0; j < 4; ++j) acc = acc + (shift_right(w, 8 * j) & 255) * ((x << (24 - 8 * j)) >> 24);
    return acc;
#endif
  }
};

}  // namespace
