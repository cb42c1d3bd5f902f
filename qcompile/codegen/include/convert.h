// Codes to values by tables, and floats of sixteen bits to floats of thirty-two and back.
namespace {

#if QC_BYTES == 16
#define QC_TABLE static __attribute__((noinline))  // sixteen scalar loads: a call costs little, copies much compile time
#else
#define QC_TABLE QC_INLINE
#endif

// table[low four bits of each lane]
QC_TABLE vf lookup(const float* table, vi index) {
#if defined(QC_AVX512)
  return {{(vf::Part)_mm512_permutexvar_ps((__m512i)index.p[0], _mm512_loadu_ps(table))}};
#elif defined(QC_AVX2)
  vf r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) {
    const __m256i at = (__m256i)index.p[i];
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
    r.p[i] = (vf::Part)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
  return r;
#else
  vf r;
  for (int i = 0; i < PARTS; ++i)
    for (int l = 0; l < QC_BYTES / 4; ++l) r.p[i][l] = table[index.p[i][l] & 15];
  return r;
#endif
}

// table[lane] for tables of any length: reads memory, the last resort
static __attribute__((noinline)) vf gather(const float* table, vi index) {
  vf r;
  for (int i = 0; i < PARTS; ++i)
    for (int l = 0; l < QC_BYTES / 4; ++l) r.p[i][l] = table[index.p[i][l]];
  return r;
}

#if QC_BF16
// bf16 entries for bytes j and j + 1 of each lane; the table repeats, so that of each byte only the code's bits matter.
QC_INLINE vi lookup_pair(const uint16_t* table, vi word, int j) {
  const __m512i low = _mm512_broadcast_i32x4(_mm_set_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000));
  const __m512i at = _mm512_shuffle_epi8((__m512i)word.p[0], _mm512_add_epi8(low, _mm512_set1_epi8((char)j)));
  return {{(vi::Part)_mm512_permutexvar_epi16(at, _mm512_loadu_si512(table))}};
}
#endif

#if QC_BF16
// The same for a table of 64 entries and bytes of six bits.
QC_INLINE vi lookup_pair_64(const uint16_t* table, vi word, int j) {
  const __m512i low = _mm512_broadcast_i32x4(_mm_set_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000));
  const __m512i at = _mm512_shuffle_epi8((__m512i)word.p[0], _mm512_add_epi8(low, _mm512_set1_epi8((char)j)));
  return {{(vi::Part)_mm512_permutex2var_epi16(_mm512_loadu_si512(table), at, _mm512_loadu_si512(table + 32))}};
}
#endif

// Bytes of each lane → table bytes; every byte of index is below 16.
QC_TABLE vi lookup_bytes(const uint8_t* table, vi index) {
#if defined(QC_AVX512)
  const __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return {{(vi::Part)_mm512_shuffle_epi8(wide, (__m512i)index.p[0])}};
#elif defined(QC_AVX2)
  const __m256i wide = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  QC_UNROLL for (int i = 0; i < PARTS; ++i) index.p[i] = (vi::Part)_mm256_shuffle_epi8(wide, (__m256i)index.p[i]);
  return index;
#else
  uint8_t bytes[64];
  memcpy(bytes, index.p, 64);
  for (int i = 0; i < 64; ++i) bytes[i] = table[bytes[i]];
  memcpy(index.p, bytes, 64);
  return index;
#endif
}

// The same for tables of any length: reads memory, the last resort.
static __attribute__((noinline)) vi gather_bytes(const uint8_t* table, vi index) {
  uint8_t bytes[64];
  memcpy(bytes, index.p, 64);
  for (int i = 0; i < 64; ++i) bytes[i] = table[bytes[i]];
  memcpy(index.p, bytes, 64);
  return index;
}

// Widening loads and narrowing stores of sixteen floats --------------------------------------------------------------

// Subnormals go through a normal float and a subtraction, so that they survive flush-to-zero.
QC_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
  const bool subnormal = rest < 0x00800000, infinite = rest >= 0x0f800000;
  uint32_t bits = rest + (subnormal ? 0x38800000 : infinite ? 0x70000000 : 0x38000000);
  float value;
  memcpy(&value, &bits, 4);
  if (subnormal) value -= 6.103515625e-05f;  // 2^-14
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

QC_INLINE float bfloat_to_float(Bfloat b) {
  const uint32_t bits = (uint32_t)b.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

QC_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (rest >= 0x38800000) return (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1)) - 0x38000000) >> 13);
  float small;
  memcpy(&small, &rest, 4);
  small = small + 0.5f;  // ulp(0.5) = 2^-24, the quantum of half subnormals
  memcpy(&bits, &small, 4);
  return (uint16_t)(sign | (bits - 0x3f000000));
}

QC_INLINE vf load_float(const float* from) { return load(from); }

QC_INLINE vf load_float(const Bfloat* from) {
#if defined(QC_AVX512)
  return {{(vf::Part)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16)}};
#else
  vi r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i)
    QC_UNROLL for (int l = 0; l < QC_BYTES / 4; ++l) r.p[i][l] = (int32_t)((uint32_t)from[i * (QC_BYTES / 4) + l].bits << 16);
  return bits_as<float>(r);
#endif
}

QC_INLINE vf load_float(const Half* from) {
#if defined(QC_AVX512)
  return {{(vf::Part)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from))}};
#elif defined(QC_AVX2)
  vf r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) r.p[i] = (vf::Part)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8 * i)));
  return r;
#else
  vf r;
  for (int i = 0; i < PARTS; ++i)
    for (int l = 0; l < QC_BYTES / 4; ++l) r.p[i][l] = half_to_float(from[i * (QC_BYTES / 4) + l].bits);
  return r;
#endif
}

// The half whose bits are the low sixteen of each lane.
QC_INLINE vf half_lanes(vi a) {
#if defined(QC_AVX512)
  return {{(vf::Part)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)a.p[0]))}};
#elif defined(QC_AVX2)
  vf r;
  a = a & 0xffff;
  QC_UNROLL for (int i = 0; i < PARTS; ++i) {
    const __m256i part = (__m256i)a.p[i];
    r.p[i] = (vf::Part)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(part), _mm256_extracti128_si256(part, 1)));
  }
  return r;
#else
  const vi rest = (a & 0x7fff) << 13, sign = (a & 0x8000) << 16;
  const vf normal = bits_as<float>(rest + splat(0x38000000)), infinite = bits_as<float>(rest + splat(0x70000000));
  const vf subnormal = bits_as<float>(rest + splat(0x38800000)) - splat(6.103515625e-05f);
  const vf finite = select(greater(splat(0x00800000), rest), subnormal, normal);
  const vf value = select(greater(rest, splat(0x0f7fffff)), infinite, finite);
  return bits_as<float>(bits_as<int32_t>(value) | sign);
#endif
}

// Scales: one for each lane, or one for all of them.
template <class S>
QC_INLINE vf load_lanes(const S* from) { return load_float(from); }
QC_INLINE vi load_lanes(const uint8_t* from) {
#if defined(QC_AVX512)
  return {{(vi::Part)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from))}};
#else
  vi r;
  QC_UNROLL for (int i = 0; i < PARTS; ++i)
    QC_UNROLL for (int l = 0; l < QC_BYTES / 4; ++l) r.p[i][l] = from[i * (QC_BYTES / 4) + l];
  return r;
#endif
}
QC_INLINE vi load_lanes(const int8_t* from) { return (load_lanes((const uint8_t*)from) << 24) >> 24; }
QC_INLINE vf load_one(const float* from) { return splat(*from); }
QC_INLINE vf load_one(const Half* from) { return splat(half_to_float(from->bits)); }
QC_INLINE vf load_one(const Bfloat* from) { return bits_as<float>(splat((int32_t)((uint32_t)from->bits << 16))); }
QC_INLINE vi load_one(const uint8_t* from) { return splat((int32_t)*from); }
QC_INLINE vi load_one(const int8_t* from) { return splat((int32_t)*from); }

// 2^(code - 127): the bits of a float without its mantissa. Code 0 is a subnormal, code 255 stands for NaN.
QC_INLINE vf e8m0(vi code) {
  const vf value = select(equals(code, 0), bits_as<float>(splat(0x00400000)), bits_as<float>(code << 23));
  return select(equals(code, 255), splat(NAN), value);
}

// The half with the sign, exponent and mantissa fields of an 8-bit float of `mantissa` bits.
QC_INLINE vf half_of(vi code, int mantissa) {
  return half_lanes(((code & 0x80) << 8) | ((code & 0x7f) << (10 - mantissa)));
}

QC_INLINE vi round_to_bf16(vf a) {  // bits in the high half of each lane, to nearest even; NaN stays NaN
  const vi bits = bits_as<int32_t>(a);
  const vi rounded = bits + splat(0x7fff) + (shift_right(bits, 16) & 1);
  const vi nan = greater(bits & 0x7fffffff, splat(0x7f800000));
  return bits_as<int32_t>(select(nan, bits_as<float>(bits | 0x400000), bits_as<float>(rounded))) & (int32_t)0xffff0000;
}

// bf16 of `even` in the low halves and of `odd` in the high halves: _exact drops bits that are known to be zero.
QC_INLINE vi pair_exact(vf even, vf odd) {
  return shift_right(bits_as<int32_t>(even), 16) | (bits_as<int32_t>(odd) & (int32_t)0xffff0000);
}
#if QC_BF16
QC_INLINE vi pair_rounded(vf even, vf odd) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd.p[0], (__m512)even.p[0]);
  return {{(vi::Part)_mm512_permutexvar_epi16(_mm512_load_si512(order), both)}};
}
#endif

QC_INLINE void store_float(float* to, vf a) { store(to, a); }

QC_INLINE void store_float(Bfloat* to, vf a) {
#if defined(QC_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)round_to_bf16(a).p[0], 16)));
#else
  int32_t lanes[LANES];
  store(lanes, round_to_bf16(a));
  for (int l = 0; l < LANES; ++l) to[l].bits = (uint16_t)((uint32_t)lanes[l] >> 16);
#endif
}

QC_INLINE void store_float(Half* to, vf a) {
#if defined(QC_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)a.p[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(QC_AVX2)
  QC_UNROLL for (int i = 0; i < PARTS; ++i)
    _mm_storeu_si128((__m128i*)(to + 8 * i), _mm256_cvtps_ph((__m256)a.p[i], _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[LANES];
  store(lanes, a);
  for (int l = 0; l < LANES; ++l) to[l].bits = float_to_half(lanes[l]);
#endif
}

}  // namespace
