// Codes of checkpoints → the layout of formats/layout.py, sixteen rows at a time. The host is little-endian.
//
// Word (t, w, l) of a part of B bits belongs to row 16t + l and holds codes k = (32/B)w + 4s + j at bits 8j + Bs: the bytes
// of four neighbouring codes, once for each slot s, shifted and put together.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int TILE = 16;

struct Run {  // `count` bytes of a block from `src` on: `bits` bits from `bit` on become bits `to` … of as many bytes of a plane
  int32_t plane, src, dst, count, bit, bits, to;
};

struct Part {  // a stored tensor: `bits` bits of each entry from bit `shift` on; `along` words, bytes or entries of a row
  int32_t plane, code, item, bits, shift;
  uint32_t exponent;  // bits of a float that are all ones if it is infinite or NaN; 0: not looked at
  int64_t along;
  uint8_t* out;
};

uint64_t spread(uint64_t bytes_mask) { return bytes_mask * 0x0101010101010101ull; }

void move_bits(const uint8_t* src, uint8_t* dst, const Run& run) {
  const uint64_t mask = spread((1u << run.bits) - 1);
  int i = 0;
  for (; i + 8 <= run.count; i += 8) {
    uint64_t from, into;
    std::memcpy(&from, src + i, 8);
    std::memcpy(&into, dst + i, 8);
    into |= ((from >> run.bit) & mask) << run.to;
    std::memcpy(dst + i, &into, 8);
  }
  for (; i < run.count; ++i) dst[i] |= ((src[i] >> run.bit) & (uint8_t)mask) << run.to;
}

template <int B>
void code_words(const uint8_t* codes, int64_t words, int shift, uint32_t* out) {
  constexpr uint32_t mask = ((1u << B) - 1) * 0x01010101u;
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word = 0;
    for (int s = 0; s < 8 / B; ++s) {
      uint32_t four;
      std::memcpy(&four, codes + w * (32 / B) + 4 * s, 4);
      word |= ((four >> shift) & mask) << (B * s);
    }
    out[w * TILE] = word;
  }
}

void code_part(const Part& part, const uint8_t* codes, int64_t words, uint32_t* out) {
  switch (part.bits) {
    case 1: return code_words<1>(codes, words, part.shift, out);
    case 2: return code_words<2>(codes, words, part.shift, out);
    case 4: return code_words<4>(codes, words, part.shift, out);
    default: return code_words<8>(codes, words, part.shift, out);
  }
}

// Returns whether a float is infinite or NaN.
bool scale_part(const Part& part, const uint8_t* entries, int64_t count, uint8_t* out) {
  if (part.bits >= 8) {
    bool bad = false;
    for (int64_t x = 0; x < count; ++x) {
      uint32_t value = 0;
      std::memcpy(&value, entries + x * part.item, part.item);
      std::memcpy(out + x * TILE * part.item, &value, part.item);
      bad |= part.exponent && (value & part.exponent) == part.exponent;
    }
    return bad;
  }
  const int each = 8 / part.bits, mask = (1 << part.bits) - 1;
  for (int64_t x = 0; x < count; ++x) {
    int byte = 0;
    for (int s = 0; s < each; ++s) byte |= ((entries[x * each + s] >> part.shift) & mask) << (part.bits * s);
    out[x * TILE] = (uint8_t)byte;
  }
  return false;
}

// Eight codes of `bits` bits out of as many bytes, the lowest first.
void eight(uint64_t stream, int bits, uint8_t* codes) {
  if (bits == 4) {
    uint64_t v = (stream & 0xffff) | ((stream & 0xffff0000ull) << 16);
    v = (v | v << 8) & 0x00ff00ff00ff00ffull;
    v = (v | v << 4) & 0x0f0f0f0f0f0f0f0full;
    std::memcpy(codes, &v, 8);
    return;
  }
  for (int i = 0; i < 8; ++i) codes[i] = (stream >> (bits * i)) & ((1u << bits) - 1);
}

void stream_row(const uint8_t* row, int64_t bytes, int64_t k, int bits, uint8_t* codes) {
  for (int64_t g = 0; 8 * g < k; ++g) {
    uint64_t stream = 0;
    const int64_t left = bytes - g * bits;
    if (left > 0) std::memcpy(&stream, row + g * bits, left < bits ? left : bits);
    eight(stream, bits, codes + 8 * g);
  }
}

// Nibbles 0 … 7 of a word → nibble j and j + 4 in byte j: the stored order of eight codes.
uint32_t eight_nibbles(uint32_t x) {
  uint32_t low = x & 0xffff, high = x >> 16;
  low = (low | low << 8) & 0x00ff00ffu, high = (high | high << 8) & 0x00ff00ffu;
  return ((low | low << 4) & 0x0f0f0f0fu) | ((high | high << 4) & 0x0f0f0f0fu) << 4;
}

struct Source {
  int32_t kind, bits, flip, reserved;
  int64_t n, k, stride;  // stride: bytes of a row, or words of a line
  const uint8_t* data;
  const int32_t* order;
};

enum Kind { BYTES, STREAM, NIBBLES_HIGH, PADDED, COLUMNS, OUTPUTS };

void row_codes(const Source& s, int64_t row, uint8_t* codes) {
  const uint8_t* data = s.data + row * s.stride;
  if (s.kind == BYTES) std::memcpy(codes, data, s.k);
  if (s.kind == STREAM) stream_row(data, s.stride, s.k, s.bits, codes);
  if (s.kind == NIBBLES_HIGH)
    for (int64_t i = 0; i < s.k / 2; ++i) codes[2 * i] = data[i] >> 4, codes[2 * i + 1] = data[i] & 15;
  if (s.kind == PADDED) {
    const int each = 32 / s.bits;
    for (int64_t i = 0; i < s.k; ++i) {
      uint32_t word;
      std::memcpy(&word, data + i / each * 4, 4);
      codes[i] = (word >> (i % each * s.bits)) & ((1u << s.bits) - 1);
    }
  }
}

// Words [K·bits/32, N]: a column is the stream of an output's codes.
void column_codes(const Source& s, int64_t row, int64_t rows, int64_t cols, uint8_t* codes) {
  const uint32_t* words = (const uint32_t*)s.data;
  for (int64_t g = 0; 32 * g < s.k; ++g) {
    uint8_t lines[TILE][36] = {};
    for (int b = 0; b < s.bits && (g * s.bits + b) * 32 < s.k * s.bits; ++b)
      for (int64_t l = 0; l < rows; ++l) std::memcpy(&lines[l][4 * b], words + (g * s.bits + b) * s.stride + row + l, 4);
    for (int64_t l = 0; l < rows; ++l)
      for (int e = 0; e < 4 && 32 * g + 8 * e < s.k; ++e) {
        uint64_t stream = 0;
        std::memcpy(&stream, &lines[l][e * s.bits], s.bits);
        eight(stream, s.bits, codes + l * cols + 32 * g + 8 * e);
      }
  }
}

// Words [K, N/8]: nibble i belongs to output (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight.
void output_codes(const Source& s, int64_t row, int64_t rows, int64_t cols, uint8_t* codes) {
  static const int nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  const uint32_t* words = (const uint32_t*)s.data;
  for (int64_t k = 0; k < s.k; k += 8) {
    const int64_t count = s.k - k < 8 ? s.k - k : 8;
    for (int64_t half = 0; half < rows; half += 8) {
      uint32_t line[8];
      for (int64_t i = 0; i < count; ++i) line[i] = words[(k + i) * s.stride + (row + half) / 8];
      for (int l = 0; l < 8; ++l)
        for (int64_t i = 0; i < count; ++i) codes[(half + l) * cols + k + i] = (line[i] >> (4 * nibble[l])) & 15;
    }
  }
}

// Whether stored words follow from words of the source one by one.
bool word_by_word(const Source& s, int32_t part_count, int part_bits, const uint8_t* seen) {
  if (s.order || seen || part_count != 1 || part_bits != s.bits) return false;
  if (s.kind == BYTES) return s.bits == 8 && s.k % 4 == 0 && !s.flip;
  return s.bits == 4 && s.k % 8 == 0 && !s.flip && (s.kind == STREAM || s.kind == NIBBLES_HIGH || s.kind == COLUMNS);
}

constexpr int64_t BLOCK = 16;  // tiles of columns that are read together, so that a page is not visited for each

// Tiles `first` … `last` of columns, 64 lines at a time: a kilobyte of each line, four of each tile.
void words_of_columns(const Source& s, int64_t first, int64_t last, int64_t along, uint32_t* out) {
  const int64_t words = s.k * s.bits / 32;
  for (int64_t from = 0; from < words; from += 64)
    for (int64_t t = first; t < last; ++t) {
      const uint32_t* lines = (const uint32_t*)s.data + t * TILE;
      const int64_t rows = s.n - t * TILE < TILE ? s.n - t * TILE : TILE;
      for (int64_t w = from; w < words && w < from + 64; ++w) {
        uint32_t* into = out + (t * along + w) * TILE;
        if (rows == TILE)  // a known count becomes one vector
          for (int l = 0; l < TILE; ++l) into[l] = eight_nibbles(lines[w * s.stride + l]);
        else
          for (int64_t l = 0; l < TILE; ++l) into[l] = l < rows ? eight_nibbles(lines[w * s.stride + l]) : 0;
      }
    }
  for (int64_t t = first; t < last; ++t) std::memset(out + (t * along + words) * TILE, 0, (along - words) * TILE * 4);
}

void words_of_tile(const Source& s, int64_t row, int64_t rows, int64_t along, uint32_t* out) {
  const int64_t words = s.k * s.bits / 32;
  if (rows < TILE || words < along) std::memset(out, 0, along * TILE * 4);
  for (int64_t from = 0; from < words; from += 64)  // 64 words of sixteen rows stay in the first cache
    for (int64_t l = 0; l < rows; ++l) {
      const uint8_t* data = s.data + (row + l) * s.stride;
      for (int64_t w = from; w < words && w < from + 64; ++w) {
        uint32_t x;
        std::memcpy(&x, data + 4 * w, 4);
        if (s.kind == NIBBLES_HIGH) x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
        out[w * TILE + l] = s.kind == BYTES ? x : eight_nibbles(x);
      }
    }
}

}  // namespace

// Rows of blocks → all parts of all planes. `entries`: bytes that a plane's entries take in a block. Returns whether a scale is
// infinite or NaN.
extern "C" __attribute__((visibility("default"))) int32_t qc_repack_blocks(
    const uint8_t* data, int64_t n, int64_t blocks, int64_t size, const Run* runs, int32_t run_count, const int32_t* entries,
    int32_t planes, const Part* parts, int32_t part_count, int32_t threads) {
  const int64_t tiles = (n + TILE - 1) / TILE;
  int32_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(| : bad)
  for (int64_t t = 0; t < tiles; ++t) {
    uint8_t held[8][512];
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t l = 0; l < TILE; ++l) {
        const int64_t row = t * TILE + l;
        for (int p = 0; p < planes; ++p) std::memset(held[p], 0, entries[p]);
        const uint8_t* block = data + (row * blocks + b) * size;
        for (int r = 0; row < n && r < run_count; ++r) move_bits(block + runs[r].src, held[runs[r].plane] + runs[r].dst, runs[r]);
        for (int i = 0; i < part_count; ++i) {
          const Part& part = parts[i];
          const int64_t each = part.along / blocks;
          uint8_t* out = part.out + ((t * part.along + b * each) * TILE + l) * part.item;
          if (part.code) code_part(part, held[part.plane], each, (uint32_t*)out);
          else bad |= scale_part(part, held[part.plane], each, out);
        }
      }
  }
  return bad;
}

// Codes of a source → the parts of the one plane of codes, `cols` of them in a row. `seen` (256 bytes, or null): which codes occur.
extern "C" __attribute__((visibility("default"))) void qc_repack_codes(
    const Source* source, int64_t cols, const Part* parts, int32_t part_count, uint8_t* seen, int32_t threads) {
  const Source& s = *source;
  const int64_t tiles = (s.n + TILE - 1) / TILE;
  const bool words = word_by_word(s, part_count, parts[0].bits, seen);
  if (words && s.kind == COLUMNS) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t t = 0; t < tiles; t += BLOCK)
      words_of_columns(s, t, t + BLOCK < tiles ? t + BLOCK : tiles, parts[0].along, (uint32_t*)parts[0].out);
    return;
  }
  if (words) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t rows = s.n - t * TILE < TILE ? s.n - t * TILE : TILE;
      words_of_tile(s, t * TILE, rows, parts[0].along, (uint32_t*)parts[0].out + t * parts[0].along * TILE);
    }
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> held(TILE * (cols + 64)), moved(s.order ? cols : 0);
#pragma omp for schedule(dynamic, 8)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * TILE, rows = s.n - row < TILE ? s.n - row : TILE;
      std::fill(held.begin(), held.end(), 0);
      if (s.kind == COLUMNS) column_codes(s, row, rows, cols, held.data());
      else if (s.kind == OUTPUTS) output_codes(s, row, rows, cols, held.data());
      else
        for (int64_t l = 0; l < rows; ++l) {
          row_codes(s, row + l, held.data() + l * cols);
          std::memset(held.data() + l * cols + s.k, 0, cols - s.k < 8 ? cols - s.k : 8);  // a last group of eight may be whole
        }
      for (int64_t l = 0; l < TILE; ++l) {
        uint8_t* codes = held.data() + l * cols;
        if (s.flip && l < rows)
          for (int64_t i = 0; i < s.k; ++i) codes[i] ^= s.flip;
        if (seen && l < rows)
          for (int64_t i = 0; i < s.k; ++i) seen[codes[i]] = 1;
        if (s.order && l < rows) {
          for (int64_t i = 0; i < s.k; ++i) moved[i] = codes[s.order[i]];
          codes = moved.data();
        }
        for (int i = 0; i < part_count; ++i)
          code_part(parts[i], codes, parts[i].along, (uint32_t*)parts[i].out + t * parts[i].along * TILE + l);
      }
    }
  }
}

// Entries of a plane of scales, [n, count] with strides in bytes, → its parts. Returns whether one is infinite or NaN.
extern "C" __attribute__((visibility("default"))) int32_t qc_repack_entries(
    const uint8_t* data, int64_t n, int64_t count, int64_t row_stride, int64_t column_stride, const Part* parts, int32_t part_count,
    int32_t threads) {
  const int64_t tiles = (n + TILE - 1) / TILE;
  int32_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(| : bad)
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = t * TILE, rows = n - row < TILE ? n - row : TILE;
    for (int i = 0; i < part_count; ++i) {
      const Part& part = parts[i];
      const int each = part.bits < 8 ? 8 / part.bits : 1;
      const uint32_t mask = (1u << (part.bits & 7)) - 1;
      uint8_t* out = part.out + t * part.along * TILE * part.item;
      std::memset(out, 0, part.along * TILE * part.item);
      for (int64_t e = 0; e < count && e / each < part.along; ++e)
        for (int64_t l = 0; l < rows; ++l) {
          const uint8_t* from = data + (row + l) * row_stride + e * column_stride;
          if (part.bits < 8) {
            out[e / each * TILE + l] |= ((*from >> part.shift) & mask) << (part.bits * (e % each));
          } else {
            uint32_t value = 0;
            std::memcpy(&value, from, part.item);
            bad |= part.exponent && (value & part.exponent) == part.exponent;
            std::memcpy(out + (e * TILE + l) * part.item, &value, part.item);
          }
        }
    }
  }
  return bad;
}

// Codes of a source of rows → bytes [n, k].
extern "C" __attribute__((visibility("default"))) void qc_unpack(const Source* source, uint8_t* out, int32_t threads) {
  const Source& s = *source;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> held(s.k + 64);
#pragma omp for schedule(dynamic, 8)
    for (int64_t row = 0; row < s.n; ++row) {
      row_codes(s, row, held.data());
      std::memcpy(out + row * s.k, held.data(), s.k);
    }
  }
}
