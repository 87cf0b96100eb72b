/* Strided copies of tiles between files ([heads, tokens, dim]) and paged KV caches.
 *
 * Three ways cover every layout: whole rows where elements of a row are adjacent on both sides; a SIMD
 * transpose where 2-byte elements are adjacent along rows on one side and along columns on the other (vLLM's CPU
 * backend keeps K as [head_dim, block]); and a blocked element-wise copy for everything else.
 *
 * Whole cache lines are streamed (non-temporal stores; x86 only): not fetching the lines that are overwritten makes
 * both directions about 1.3 times as fast, and what was written is read much later, or is more than the caches hold. */
#include "native.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { CACHE_LINE = 64 };

/* Element-wise, in square blocks of one cache line on each side if elements are adjacent there. */
#define DEFINE_STRIDED(bits)                                                                                           \
    static void strided##bits(char *dst, Pitch to, const char *src, Pitch from, int64_t rows, int64_t cols)            \
    {                                                                                                                  \
        enum { SIDE = CACHE_LINE * 8 / bits };                                                                         \
        for (int64_t row = 0; row < rows; row += SIDE)                                                                 \
            for (int64_t col = 0; col < cols; col += SIDE)                                                             \
                for (int64_t c = col; c < cols && c < col + SIDE; c++)                                                 \
                    for (int64_t r = row; r < rows && r < row + SIDE; r++)                                             \
                        memcpy(dst + r * to.row + c * to.col, src + r * from.row + c * from.col, bits / 8);            \
    }

DEFINE_STRIDED(8)
DEFINE_STRIDED(16)
DEFINE_STRIDED(32)
DEFINE_STRIDED(64)

/* Transposes dst[col * to + 2 * row] = src[row * from + 2 * col]; rows must be a multiple of the elements in a vector,
 * cols of 8. A vector holds 128-bit lanes; lane k takes rows 8k..8k+7, so that an 8x8 transpose within lanes (three
 * rounds of interleaving) gives vectors of adjacent rows for each of 8 columns. Whole cache lines of dst (32 rows) are
 * finished before the next 8 columns: streaming stores need that, and ordinary ones are the faster for it. */
#define DEFINE_TRANSPOSE(name, attributes, vec, load, lo16, hi16, lo32, hi32, lo64, hi64, store)                       \
    attributes static void name(char *dst, int64_t to, const char *src, int64_t from, int64_t rows, int64_t cols,      \
                                bool stream)                                                                           \
    {                                                                                                                  \
        enum { WIDE = sizeof(vec) / 2, LINE = CACHE_LINE / 2 };                                                        \
        (void)stream;                                                                                                  \
        for (int64_t line = 0; line < rows; line += LINE)                                                              \
            for (int64_t col = 0; col < cols; col += 8)                                                                \
                for (int64_t row = line; row < rows && row < line + LINE; row += WIDE) {                               \
                    const char *s = src + row * from + 2 * col;                                                        \
                    char *d = dst + col * to + 2 * row;                                                                \
                    vec a0 = load(s, from), a1 = load(s + from, from), a2 = load(s + 2 * from, from);                  \
                    vec a3 = load(s + 3 * from, from), a4 = load(s + 4 * from, from), a5 = load(s + 5 * from, from);   \
                    vec a6 = load(s + 6 * from, from), a7 = load(s + 7 * from, from);                                  \
                    vec b0 = lo16(a0, a1), b1 = hi16(a0, a1), b2 = lo16(a2, a3), b3 = hi16(a2, a3);                    \
                    vec b4 = lo16(a4, a5), b5 = hi16(a4, a5), b6 = lo16(a6, a7), b7 = hi16(a6, a7);                    \
                    a0 = lo32(b0, b2), a1 = hi32(b0, b2), a2 = lo32(b1, b3), a3 = hi32(b1, b3);                        \
                    a4 = lo32(b4, b6), a5 = hi32(b4, b6), a6 = lo32(b5, b7), a7 = hi32(b5, b7);                        \
                    store(d, lo64(a0, a4), stream);                                                                    \
                    store(d + to, hi64(a0, a4), stream);                                                               \
                    store(d + 2 * to, lo64(a1, a5), stream);                                                           \
                    store(d + 3 * to, hi64(a1, a5), stream);                                                           \
                    store(d + 4 * to, lo64(a2, a6), stream);                                                           \
                    store(d + 5 * to, hi64(a2, a6), stream);                                                           \
                    store(d + 6 * to, lo64(a3, a7), stream);                                                           \
                    store(d + 7 * to, hi64(a3, a7), stream);                                                           \
                }                                                                                                      \
    }

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw")))
#define LANE(p) _mm_loadu_si128((const __m128i *)(p))

#define LOAD_SSE2(p, pitch) LANE(p)
#define STORE_SSE2(p, v, stream) ((stream) ? _mm_stream_si128((__m128i *)(p), v) : _mm_storeu_si128((__m128i *)(p), v))
DEFINE_TRANSPOSE(transpose8, , __m128i, LOAD_SSE2, _mm_unpacklo_epi16, _mm_unpackhi_epi16, _mm_unpacklo_epi32,
                 _mm_unpackhi_epi32, _mm_unpacklo_epi64, _mm_unpackhi_epi64, STORE_SSE2)

#define LOAD_AVX2(p, pitch) _mm256_inserti128_si256(_mm256_castsi128_si256(LANE(p)), LANE((p) + 8 * (pitch)), 1)
#define STORE_AVX2(p, v, stream)                                                                                       \
    ((stream) ? _mm256_stream_si256((__m256i *)(p), v) : _mm256_storeu_si256((__m256i *)(p), v))
DEFINE_TRANSPOSE(transpose16, AVX2, __m256i, LOAD_AVX2, _mm256_unpacklo_epi16, _mm256_unpackhi_epi16,
                 _mm256_unpacklo_epi32, _mm256_unpackhi_epi32, _mm256_unpacklo_epi64, _mm256_unpackhi_epi64, STORE_AVX2)

#define LOAD_AVX512(p, pitch)                                                                                          \
    _mm512_inserti64x4(_mm512_castsi256_si512(LOAD_AVX2(p, pitch)), LOAD_AVX2((p) + 16 * (pitch), pitch), 1)
#define STORE_AVX512(p, v, stream) ((stream) ? _mm512_stream_si512((void *)(p), v) : _mm512_storeu_si512(p, v))
DEFINE_TRANSPOSE(transpose32, AVX512, __m512i, LOAD_AVX512, _mm512_unpacklo_epi16, _mm512_unpackhi_epi16,
                 _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_unpacklo_epi64, _mm512_unpackhi_epi64,
                 STORE_AVX512)

#elif defined(__aarch64__)

#define ZIP(which, bits, a, b)                                                                                         \
    vreinterpretq_u8_u##bits(vzip##which##q_u##bits(vreinterpretq_u##bits##_u8(a), vreinterpretq_u##bits##_u8(b)))
#define LO16(a, b) ZIP(1, 16, a, b)
#define HI16(a, b) ZIP(2, 16, a, b)
#define LO32(a, b) ZIP(1, 32, a, b)
#define HI32(a, b) ZIP(2, 32, a, b)
#define LO64(a, b) ZIP(1, 64, a, b)
#define HI64(a, b) ZIP(2, 64, a, b)
#define LOAD_NEON(p, pitch) vld1q_u8((const uint8_t *)(p))
#define STORE_NEON(p, v, stream) vst1q_u8((uint8_t *)(p), v)
DEFINE_TRANSPOSE(transpose8, , uint8x16_t, LOAD_NEON, LO16, HI16, LO32, HI32, LO64, HI64, STORE_NEON)

#else

static void transpose8(char *dst, int64_t to, const char *src, int64_t from, int64_t rows, int64_t cols, bool stream)
{
    (void)stream;
    strided16(dst, (Pitch){2, to}, src, (Pitch){from, 2}, rows, cols);
}

#endif

/* Any number of rows and columns; what does not fill 8x8 squares goes element-wise. */
static void transpose_ragged(char *dst, int64_t to, const char *src, int64_t from, int64_t rows, int64_t cols)
{
    int64_t r8 = rows - rows % 8, c8 = cols - cols % 8;
    const Pitch to_pitch = {2, to}, from_pitch = {from, 2};

    transpose8(dst, to, src, from, r8, c8, false);
    strided16(dst + 2 * r8, to_pitch, src + r8 * from, from_pitch, rows - r8, c8);
    strided16(dst + c8 * to, to_pitch, src + 2 * c8, from_pitch, rows, cols - c8);
}

/* The widest kernel that this CPU has and the rows fill; rows and cols must be multiples of 8. */
static void transpose_even(char *dst, int64_t to, const char *src, int64_t from, int64_t rows, int64_t cols,
                           bool stream)
{
#if defined(__x86_64__)
    if (isa_current == ISA_AVX512 && rows % 32 == 0)
        transpose32(dst, to, src, from, rows, cols, stream);
    else if (isa_current >= ISA_AVX2 && rows % 16 == 0)
        transpose16(dst, to, src, from, rows, cols, stream);
    else
#endif
        transpose8(dst, to, src, from, rows, cols, stream);
}

/* Splits a transpose into the rows before dst's first cache line, those that fill lines, and the rest. Columns of 8 or
 * 16 rows without a gap between them (whole pages of so many tokens) fill lines together: those are not split. */
static void transpose(char *dst, int64_t to, const char *src, int64_t from, int64_t rows, int64_t cols)
{
    const bool packed = to == 2 * rows && (rows == 8 || rows == 16) && (uintptr_t)dst % CACHE_LINE == 0;
    int64_t lead = (int64_t)(-(uintptr_t)dst % CACHE_LINE / 2), c8 = cols - cols % 8;
    lead = to % CACHE_LINE || lead > rows ? 0 : lead;
    const int64_t lines = packed ? rows : (rows - lead) - (rows - lead) % (CACHE_LINE / 2), tail = lead + lines;
    char *d = dst + 2 * lead;
    const char *s = src + lead * from;

    bool stream = packed || ((uintptr_t)d | (uintptr_t)to) % CACHE_LINE == 0;
    transpose_ragged(dst, to, src, from, lead, cols);
    transpose_even(d, to, s, from, lines, c8, stream);
    transpose_ragged(d + c8 * to, to, s + 2 * c8, from, lines, cols - c8);
    transpose_ragged(dst + 2 * tail, to, src + tail * from, from, rows - tail, cols);
}

/* memcpy that does not read the lines it overwrites, nor leave them in the cache. */
static void stream_copy(char *dst, const char *src, int64_t nbytes)
{
#if defined(__x86_64__)
    int64_t lead = (int64_t)(-(uintptr_t)dst % CACHE_LINE);
    if (lead < nbytes) {
        memcpy(dst, src, (size_t)lead);
        for (dst += lead, src += lead, nbytes -= lead; nbytes >= CACHE_LINE;
             dst += CACHE_LINE, src += CACHE_LINE, nbytes -= CACHE_LINE) {
            __m128i a = LANE(src), b = LANE(src + 16), c = LANE(src + 32), d = LANE(src + 48);
            STORE_SSE2(dst, a, true);
            STORE_SSE2(dst + 16, b, true);
            STORE_SSE2(dst + 32, c, true);
            STORE_SSE2(dst + 48, d, true);
        }
    }
#endif
    memcpy(dst, src, (size_t)nbytes);
}

void kv_copy(char *dst, Pitch to, const char *src, Pitch from, int64_t rows, int64_t cols, int64_t itemsize)
{
    if (to.col == itemsize && from.col == itemsize) {
        int64_t run = cols * itemsize;
        if (to.row == run && from.row == run)
            run *= rows, rows = 1;
        for (int64_t r = 0; r < rows; r++)
            stream_copy(dst + r * to.row, src + r * from.row, run);
    } else if (itemsize == 2 && to.row == 2 && from.col == 2) {
        transpose(dst, to.col, src, from.row, rows, cols);
    } else if (itemsize == 2 && to.col == 2 && from.row == 2) {
        transpose(dst, to.row, src, from.col, cols, rows);
    } else if (itemsize == 1) {
        strided8(dst, to, src, from, rows, cols);
    } else if (itemsize == 2) {
        strided16(dst, to, src, from, rows, cols);
    } else if (itemsize == 4) {
        strided32(dst, to, src, from, rows, cols);
    } else {
        strided64(dst, to, src, from, rows, cols);
    }
}

void kv_copy_fence(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
