/* codec_encode(): one stream from KV. The parameters of a stream are chosen by integer arithmetic on sums taken in a
 * fixed order, so that all instruction sets, and the reference in Python, write the same bytes. */
#include "codec_cpu.h"

#include <stdlib.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    BINS = 32,                 /* exponents that are counted, down from HEADROOM above a channel's mean exponent */
    HEADROOM = 8,
    EXCEPTION_COST = 48 * 256, /* 256 times the bits of an exception */
    MOST_HALVINGS = 3,         /* of a token's step */
    LEAST_VARIANCE = 16 * 256, /* below the largest of a stream: 256 log2 of the smallest variance that counts */
    ALL_ZERO = -125 * 256,     /* codec_log2() of what is taken for zero */
};

typedef struct CodecScratch {
    float *value;     /* [rows][channels of a section] */
    int16_t *symbol;  /* [rows][channels] */
    uint8_t *words;   /* written downwards from words_end */
    uint8_t *words_end;
    uint8_t *exceptions;
    int16_t (*counts)[2 * BINS]; /* [channels][signs, exponents] */
    uint32_t n_exceptions;
    uint32_t state[CODEC_LANES];
    uint32_t table[CODEC_MAX_CHANNELS]; /* of a channel's symbol 0 in codec_symbols */
    int16_t reach[CODEC_MAX_CHANNELS];
    float mean[CODEC_MAX_CHANNELS], scale[CODEC_MAX_CHANNELS];
    float sum[CODEC_MAX_TOKENS], by_token[CODEC_MAX_TOKENS]; /* sum is of channels too, which are fewer */
    int32_t log[CODEC_MAX_TOKENS]; /* of channels too */
    int16_t octave[CODEC_MAX_CHANNELS], flip[CODEC_MAX_CHANNELS], row[CODEC_MAX_CHANNELS];
} Encoder;

static void except(Encoder *work, int32_t t, int32_t channel, int32_t symbol)
{
    const uint16_t exception[3] = {(uint16_t)t, (uint16_t)channel, (uint16_t)symbol};
    memcpy(work->exceptions + (size_t)CODEC_EXCEPTION * work->n_exceptions++, exception, sizeof exception);
}

static inline __attribute__((always_inline)) int32_t clamp(int32_t x, int32_t low, int32_t high)
{
    return x < low ? low : x > high ? high : x;
}

/* IEEE half to float32, exactly. */
static inline __attribute__((always_inline)) float from_half(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    const float scaled = codec_float(rest) * 0x1p112f; /* right for all but infinities and NaN */
    return codec_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : codec_bits(scaled)));
}

/* Element c of a row as an integer. */
static inline __attribute__((always_inline)) uint32_t element(const char *row, int32_t c, int32_t bytes)
{
    uint32_t value = 0;
    memcpy(&value, row + (int64_t)c * bytes, (size_t)bytes);
    return value;
}

#define TARGET
#define NAME(x) x##_generic
#include "codec_encode_isa.h"
#undef TARGET
#undef NAME

#if defined(__x86_64__)
/* Bytes of gather_top[mask]: the lanes of the mask in order, the last one at byte 7. */
static uint64_t gather_top[256];

__attribute__((constructor)) static void gather_top_init(void)
{
    for (unsigned mask = 0; mask < 256; mask++)
        for (unsigned i = 0, place = 8 - (unsigned)__builtin_popcount(mask); i < 8; i++)
            if (mask >> i & 1)
                gather_top[mask] |= (uint64_t)i << 8 * place++;
}

#define TARGET __attribute__((target("avx2")))
#define NAME(x) x##_avx2
#define LANES_AVX2
#include "codec_encode_isa.h"
#undef TARGET
#undef NAME
#undef LANES_AVX2

#define TARGET __attribute__((target("avx512f,avx512bw")))
#define NAME(x) x##_avx512
#define LANES_AVX512
#include "codec_encode_isa.h"
#undef TARGET
#undef NAME
#undef LANES_AVX512

#define KERNEL(f, ...) \
    (isa_current == ISA_AVX512 ? f##_avx512(__VA_ARGS__) \
     : isa_current == ISA_AVX2 ? f##_avx2(__VA_ARGS__)   \
                               : f##_generic(__VA_ARGS__))
#else
#define KERNEL(f, ...) f##_generic(__VA_ARGS__)
#endif

static bool finite(float f)
{
    return (codec_bits(f) & 0x7f800000u) != 0x7f800000u;
}

/* The element with n / 2 smaller ones before it in order. */
static int32_t median_of(const int32_t *values, int32_t n)
{
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
        const int32_t middle = (int32_t)((low + high) >> 1);
        int32_t count = 0;
        for (int32_t i = 0; i < n; i++)
            count += values[i] <= middle;
        if (count > n / 2)
            high = middle;
        else
            low = (int64_t)middle + 1;
    }
    return (int32_t)low;
}

/* Tables of a lossy section's channels, from the sums of their symbols' squares. */
static void choose_tables(Encoder *work, const CodecShape *shape, int32_t first, int32_t n, uint8_t *out)
{
    for (int32_t c = 0; c < n; c++) {
        const int32_t table = codec_table_of(work->sum[c] / (float)(shape->tokens - shape->raw_tokens));
        out[c] = (uint8_t)table;
        work->table[first + c] = (uint32_t)table * 256 + 128;
        work->reach[first + c] = codec_reach[table];
    }
}

/* A section with a step and a mean for each channel: step ~ sqrt(sigma * geometric mean of all sigmas). */
static bool by_channel(Encoder *work, const CodecShape *shape, int32_t which, int32_t first, const char *in,
                       const float *rotation, int32_t log_step, uint8_t *side)
{
    const int32_t n = shape->section[which].channels, rows = shape->tokens - shape->raw_tokens;
    int32_t largest = INT32_MIN;
    int64_t total = 0;

    KERNEL(centre, work, shape, which, in, rotation);
    for (int32_t c = 0; c < n; c++) {
        if (!finite(work->sum[c]))
            return false;
        work->log[c] = codec_log2(work->sum[c] / (float)rows);
        largest = work->log[c] > largest ? work->log[c] : largest;
    }
    for (int32_t c = 0; c < n; c++) {
        work->log[c] = clamp(work->log[c], largest - LEAST_VARIANCE, largest);
        total += work->log[c];
    }
    const int32_t mean_log = (int32_t)((total + ((int64_t)n << 20)) / n) - (1 << 20); /* rounded down */
    for (int32_t c = 0; c < n; c++) {
        const int32_t wanted = ((4 * log_step + mean_log + work->log[c] + 64) >> 7) + CODEC_STEP_ONE;
        const int32_t code = clamp(wanted, 0, 255);
        const uint16_t mean = (uint16_t)(codec_bits(work->mean[c]) >> 16);
        if (wanted < 0 && largest > ALL_ZERO)
            return false; /* finer than any step there is */
        memcpy(side + 2 * c, &mean, sizeof mean);
        side[2 * n + c] = (uint8_t)code;
        work->scale[c] = codec_step((uint32_t)(256 - code));
    }
    if (!KERNEL(quantise, work, shape, which, first, NULL))
        return false;
    choose_tables(work, shape, first, n, side + 3 * n);
    return true;
}

/* A section with one step for all channels, halved up to three times for tokens whose norm is below the median. */
static bool by_token(Encoder *work, const CodecShape *shape, int32_t which, int32_t first, const char *in,
                     int32_t log_step, uint8_t *side)
{
    const int32_t n = shape->section[which].channels, rows = shape->tokens - shape->raw_tokens;

    int32_t largest = INT32_MIN;

    KERNEL(energies, work, shape, which, in);
    for (int32_t t = 0; t < rows; t++) {
        if (!finite(work->sum[t]))
            return false;
        work->log[t] = codec_log2(work->sum[t]);
        largest = work->log[t] > largest ? work->log[t] : largest;
    }
    const int32_t median = median_of(work->log, rows);
    const int32_t wanted = ((2 * log_step + median + 32) >> 6) + CODEC_STEP_ONE, code = clamp(wanted, 0, 255);
    if (wanted < 0 && largest > ALL_ZERO)
        return false; /* finer than any step there is */
    memset(side + n, 0, 4 + 4 * (size_t)((rows + 15) / 16));
    side[n] = (uint8_t)code;
    for (int32_t t = 0; t < rows; t++) {
        const int32_t halvings = clamp(-((work->log[t] - median + 256) >> 9), 0, MOST_HALVINGS);
        side[n + 4 + (t >> 2)] |= (uint8_t)(halvings << (t & 3) * 2);
        work->by_token[t] = (float)(1 << halvings);
    }
    for (int32_t c = 0; c < n; c++)
        work->scale[c] = codec_step((uint32_t)(256 - code));
    if (!KERNEL(quantise, work, shape, which, first, work->by_token))
        return false;
    choose_tables(work, shape, first, n, side);
    return true;
}

static uint8_t *lossless(Encoder *work, const CodecShape *shape, const char *const *in, uint8_t *out)
{
    const int32_t rows = shape->tokens, channels = shape->channels;

    memset(work->log, 0, sizeof work->log);
    for (int32_t i = 0, first = 0; i < shape->sections; first += shape->section[i++].channels)
        KERNEL(tops, work, shape, i, first, in[i]);
    for (int32_t c = 0; c < channels; c++) {
        work->log[c] = work->log[c] * 256 / rows;
        work->octave[c] = (int16_t)((work->log[c] >> 8) + HEADROOM);
    }
    KERNEL(count, work, shape);
    for (int32_t i = 0, first = 0; i < shape->sections; i++) {
        const int32_t n = shape->section[i].channels;
        for (int32_t c = 0; c < n; c++) {
            uint8_t *octave = out + c, *table = out + n + c;
            KERNEL(choose, work->counts[first + c], rows, work->log[first + c], octave, table);
            work->octave[first + c] = *octave;
            work->flip[first + c] = *table & CODEC_FLIP ? 1 : 0;
            work->table[first + c] = (uint32_t)(CODEC_LOSSY_TABLES + (*table & ~CODEC_FLIP)) * 256 + 128;
        }
        out += 2 * n;
        first += n;
    }
    for (int32_t t = 0; t < rows; t++) {
        KERNEL(octaves, work, shape, t);
        for (int32_t i = 0; i < shape->sections; i++)
            out = KERNEL(fractions, shape, i, in[i] + (int64_t)t * shape->section[i].pitch * shape->bytes, out);
    }
    return out;
}

/* The side information of a lossy stream; NULL if it cannot be one. */
static uint8_t *lossy(Encoder *work, const CodecShape *shape, const int32_t *log_step, const char *const *in,
                      const float *rotation, uint8_t *out)
{
    const int32_t rows = shape->tokens - shape->raw_tokens;
    for (int32_t i = 0; i < shape->sections; i++)
        for (int32_t t = 0; t < shape->raw_tokens; t++) {
            const size_t row = (size_t)(shape->section[i].channels * shape->bytes);
            memcpy(out, in[i] + (int64_t)t * shape->section[i].pitch * shape->bytes, row);
            out += row;
        }
    for (int32_t i = 0, first = 0; i < shape->sections; first += shape->section[i++].channels) {
        const int32_t n = shape->section[i].channels;
        const int32_t kind = shape->section[i].kind;
        const bool channelwise = kind == CODEC_BY_CHANNEL;
        const int32_t size = channelwise ? 4 * n : n + 4 + 4 * ((rows + 15) / 16);
        if (rows == 0)
            memset(out, 0, (size_t)size);
        else if (!(channelwise ? by_channel(work, shape, i, first, in[i], rotation, log_step[kind], out)
                               : by_token(work, shape, i, first, in[i], log_step[kind], out)))
            return NULL;
        out += size;
    }
    for (int32_t t = 0; t < rows; t++)
        KERNEL(clip, work, shape, t);
    return out;
}

static uint64_t symbols_of(const CodecShape *shape)
{
    return (uint64_t)shape->tokens * (uint64_t)shape->channels;
}

CodecScratch *codec_scratch(const CodecShape *shape)
{
    const size_t symbols = symbols_of(shape), words = 2 * symbols + 64, exceptions = CODEC_EXCEPTION * symbols;
    const size_t counts = sizeof(int16_t[2 * BINS]) * CODEC_MAX_CHANNELS;
    Encoder *work = malloc(sizeof *work + 6 * symbols + words + exceptions + counts);
    if (!work)
        return NULL;
    work->value = (float *)(work + 1);
    work->counts = (void *)(work->value + symbols);
    work->symbol = (int16_t *)(work->counts + CODEC_MAX_CHANNELS);
    work->words = (uint8_t *)(work->symbol + symbols);
    work->words_end = work->words + words;
    work->exceptions = work->words_end;
    return work;
}

void codec_scratch_free(CodecScratch *scratch)
{
    free(scratch);
}

uint64_t codec_bound(const CodecShape *shape)
{
    /* counts, raw tokens, sides and states fit what `4 * channels` and a row of exponents leave; 8 bytes a symbol hold
     * a word and an exception, 3 its fraction */
    return 11 * symbols_of(shape) + 4 * CODEC_MAX_CHANNELS + 2 * CODEC_MAX_TOKENS + 4 * CODEC_LANES + 64;
}

uint64_t codec_encode(const CodecShape *shape, const int32_t *log_step, const char *const *in, const float *rotation,
                      CodecScratch *work, uint8_t *out)
{
    uint8_t *at = out + 8;

    work->n_exceptions = 0;
    at = shape->lossless ? lossless(work, shape, in, at) : lossy(work, shape, log_step, in, rotation, at);
    if (!at)
        return 0;
    const uint8_t *words = KERNEL(pack, work, shape, work->words_end);
    const size_t packed = (size_t)(work->words_end - words), exceptions = (size_t)CODEC_EXCEPTION * work->n_exceptions;
    const uint32_t counts[2] = {(uint32_t)(packed / 2), work->n_exceptions};
    memcpy(out, counts, sizeof counts);
    memcpy(at, work->state, sizeof work->state);
    memcpy(at += sizeof work->state, work->exceptions, exceptions);
    memcpy(at += exceptions, words, packed);
    at += packed;
    while ((at - out) % 4)
        *at++ = 0;
    return (uint64_t)(at - out);
}
