/* codec_decode(): streams to KV, by the kernel of the best instruction set. */
#include "codec_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* A stream being decoded. What is known of its channels lies side by side in `memory`, as many numbers as there are
 * channels, so that a row touches few lines. */
typedef struct {
    uint32_t state[CODEC_LANES] __attribute__((aligned(64)));
    uint32_t memory[4 * CODEC_MAX_CHANNELS + 2 * CODEC_LANES] __attribute__((aligned(64)));
    uint32_t *table;   /* first entry of a channel's table in codec_lut */
    int32_t *symbol;   /* of the row */
    float *step;       /* by token: the one step of all channels */
    float *mean;
    uint16_t *octave, *flip; /* lossless: in place of step and mean */
    uint8_t tail[4 * (CODEC_MAX_CHANNELS + CODEC_LANES)]; /* the last words, with zeros after them */
    bool in_tail;
    const uint8_t *words, *end;
    uint32_t exceptions_done;
    const float *rotation;
    char *const *out;
    CodecStream stream;
    int error;
} Lane;

static int lane_fail(Lane *lane, int error)
{
    lane->error = error;
    return false;
}

/* Whether a row can be decoded. One that might read beyond the stream is read from a copy, which then says by its length
 * whether there were enough words. */
static inline bool lane_ready(Lane *lane, int32_t channels)
{
    if (lane->end - lane->words >= 2 * (channels + CODEC_LANES))
        return true;
    if (lane->words > lane->end)
        return lane_fail(lane, CODEC_WORDS);
    if (!lane->in_tail) {
        const size_t left = (size_t)(lane->end - lane->words);
        memcpy(lane->tail, lane->words, left);
        memset(lane->tail + left, 0, sizeof lane->tail - left);
        lane->words = lane->tail;
        lane->end = lane->tail + left;
        lane->in_tail = true;
    }
    return true;
}

/* A lossless exception is written over what its symbol gave: sign and exponent of channel c of row t. */
static void lane_overwrite(Lane *lane, const CodecShape *shape, int32_t t, int32_t c, uint32_t top)
{
    const int32_t which = c >= shape->section[0].channels, pitch = shape->section[which].pitch;
    const int32_t inside = c - (which ? shape->section[0].channels : 0), b = shape->fraction;
    const uint8_t *fractions = lane->stream.residual + (int64_t)t * shape->channels / 8 * b;
    const uint32_t value = top << b | codec_packed(fractions, c, b);
    memcpy(lane->out[which] + ((int64_t)t * pitch + inside) * shape->bytes, &value, (size_t)shape->bytes);
}

/* Put the exceptions of row t in their places: among the symbols, or if lossless among the finished elements. */
static inline bool lane_except(Lane *lane, const CodecShape *shape, int32_t t)
{
    for (; lane->exceptions_done < lane->stream.n_exceptions; lane->exceptions_done++) {
        const uint8_t *exception = lane->stream.exceptions + (size_t)CODEC_EXCEPTION * lane->exceptions_done;
        const uint32_t channel = codec_u16(exception + 2), value = codec_u16(exception + 4);
        if (codec_u16(exception) != (uint32_t)t)
            break;
        if (channel >= (uint32_t)shape->channels)
            return lane_fail(lane, CODEC_EXCEPTIONS);
        if (shape->lossless)
            lane_overwrite(lane, shape, t, (int32_t)channel, value);
        else
            lane->symbol[channel] = (int16_t)value;
    }
    return true;
}

/* Four numbers of b bits, c (a multiple of 4) and its followers, each in 16 bits. Reads up to 8 bytes beyond them. */
static inline __attribute__((always_inline)) uint64_t codec_spread(const uint8_t *packed, int32_t c, const int32_t b)
{
    const uint64_t one = (1u << b) - 1, two = (1ull << 2 * b) - 1;
    uint64_t bits;
    memcpy(&bits, packed + (c * b >> 3), sizeof bits);
    bits >>= c * b & 7;
    bits = (bits & two) | (bits >> 2 * b & two) << 32;
    return (bits & (one << 32 | one)) | (bits >> b & (one << 32 | one)) << 16;
}

#define TARGET
#define NAME(x) x##_generic
#include "codec_decode_isa.h"
#undef TARGET
#undef NAME

#if defined(__x86_64__)
/* How to unpack 32 numbers of 7 or 10 bits, 8 in each 16 bytes of a vector: the four-byte words that 16 bytes are filled
 * with, the two bytes of them that hold a number, and the factor that moves its highest bit to the top. */
typedef struct {
    uint32_t word[16];
    uint8_t byte[64];
    uint16_t factor[32];
} Unpacking;
static Unpacking unpacking[2] __attribute__((aligned(64)));

__attribute__((constructor)) static void unpacking_init(void)
{
    for (unsigned which = 0; which < 2; which++)
        for (unsigned i = 0; i < 32; i++) {
            const unsigned b = which ? 10 : 7, start = i / 8 * b, bit = 8 * (start % 4) + i % 8 * b;
            Unpacking *u = &unpacking[which];
            u->word[i / 2] = start / 4 + i / 2 % 4;
            u->byte[2 * i] = (uint8_t)(bit / 8);
            u->byte[2 * i + 1] = (uint8_t)(bit / 8 + 1);
            u->factor[i] = (uint16_t)(1u << (16 - b - bit % 8));
        }
}

/* Byte i of expand[mask]: how many of the lanes below i are in the mask, which is the word that lane i takes. */
static uint64_t expand[256];

__attribute__((constructor)) static void expand_init(void)
{
    for (unsigned mask = 0; mask < 256; mask++)
        for (unsigned i = 0; i < 8; i++)
            expand[mask] |= (uint64_t)__builtin_popcount(mask & ((1u << i) - 1)) << 8 * i;
}

#define TARGET __attribute__((target("avx2")))
#define NAME(x) x##_avx2
#define LANES_AVX2
#include "codec_decode_isa.h"
#undef TARGET
#undef NAME
#undef LANES_AVX2

#if defined(__clang__) /* does not know the last word, and would drop them all */
#define TARGET __attribute__((target("avx512f,avx512bw")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,prefer-vector-width=512")))
#endif
#define NAME(x) x##_avx512
#define LANES_AVX512
#include "codec_decode_isa.h"
#undef TARGET
#undef NAME
#undef LANES_AVX512
#endif

static bool finite(float f)
{
    return (codec_bits(f) & 0x7f800000u) != 0x7f800000u;
}

/* Parameters of a section's channels, which start at `first` of the row. */
static int lane_section(Lane *lane, const CodecShape *shape, int32_t which, int32_t first)
{
    const CodecSection *section = &shape->section[which];
    const uint8_t *side = lane->stream.side[which];
    const int32_t n = section->channels;

    for (int32_t c = 0; c < n; c++) {
        uint32_t table;
        if (shape->lossless) {
            lane->octave[first + c] = side[c];
            lane->flip[first + c] = side[n + c] & CODEC_FLIP ? (uint16_t)(1 << shape->exponent) : 0;
            table = side[n + c] & ~(uint32_t)CODEC_FLIP;
            if (table >= CODEC_LOSSLESS_TABLES)
                return CODEC_PARAMETERS;
            table += CODEC_LOSSY_TABLES;
        } else {
            const bool by_channel = section->kind == CODEC_BY_CHANNEL;
            lane->mean[first + c] = by_channel ? codec_float(codec_u16(side + 2 * c) << 16) : 0;
            lane->step[first + c] = codec_step(by_channel ? side[2 * n + c] : side[n]);
            table = by_channel ? side[3 * n + c] : side[c];
            if (table >= CODEC_LOSSY_TABLES || !finite(lane->mean[first + c]))
                return CODEC_PARAMETERS;
        }
        lane->table[first + c] = table * CODEC_SLOTS;
    }
    return CODEC_OK;
}

/* Open a stream, check its parameters, and write its raw tokens. */
static bool lane_begin(Lane *lane, const CodecShape *shape, const CodecJob *job)
{
    CodecStream *stream = &lane->stream;
    lane->table = lane->memory;
    lane->symbol = (int32_t *)(lane->memory + shape->channels);
    lane->step = (float *)(lane->memory + 2 * shape->channels);
    lane->mean = lane->step + shape->channels;
    lane->octave = (uint16_t *)(lane->memory + 2 * shape->channels);
    lane->flip = lane->octave + shape->channels;
    lane->error = codec_open(shape, job->data, job->size, stream);
    if (lane->error)
        return false;

    const uint8_t *raw = stream->raw;
    for (int32_t i = 0, first = 0; i < shape->sections; first += shape->section[i++].channels) {
        const size_t row = (size_t)shape->section[i].channels * (size_t)shape->bytes;
        lane->error = lane_section(lane, shape, i, first);
        if (lane->error)
            return false;
        for (int32_t t = 0; t < shape->raw_tokens; t++, raw += row)
            memcpy(job->out[i] + (int64_t)t * shape->section[i].pitch * shape->bytes, raw, row);
    }
    memcpy(lane->state, stream->states, sizeof lane->state);
    for (int i = 0; i < CODEC_LANES; i++)
        if (lane->state[i] < CODEC_LOW || lane->state[i] >> 31)
            return lane_fail(lane, CODEC_STATES);
    lane->words = stream->words;
    lane->end = stream->words + 2 * (size_t)stream->n_words;
    lane->in_tail = false;
    lane->exceptions_done = 0;
    lane->rotation = job->rotation;
    lane->out = job->out;
    return true;
}

/* Whether everything in the stream was used, and nothing more. */
static bool lane_end(Lane *lane)
{
    if (lane->exceptions_done != lane->stream.n_exceptions)
        return lane_fail(lane, CODEC_EXCEPTIONS);
    if (lane->words != lane->end)
        return lane_fail(lane, CODEC_WORDS);
    for (int i = 0; i < CODEC_LANES; i++)
        if (lane->state[i] != CODEC_LOW)
            return lane_fail(lane, CODEC_STATES);
    return true;
}

static bool decode(Lane *lane, int n, const CodecShape *shape)
{
#if defined(__x86_64__)
    if (isa_current == ISA_AVX512)
        return n == 2 ? decode_two_avx512(lane, shape) : decode_one_avx512(lane, shape);
    if (isa_current == ISA_AVX2)
        return n == 2 ? decode_two_avx2(lane, shape) : decode_one_avx2(lane, shape);
#endif
    return n == 2 ? decode_two_generic(lane, shape) : decode_one_generic(lane, shape);
}

int64_t codec_decode(const CodecShape *shape, const CodecJob *jobs, int64_t n, int *error)
{
    Lane lane[2];
    for (int64_t i = 0; i < n;) {
        const int side_by_side = n - i < 2 ? 1 : 2;
        bool good = true;
        for (int s = 0; s < side_by_side; s++) {
            lane[s].error = CODEC_OK;
            good = good && lane_begin(&lane[s], shape, &jobs[i + s]);
        }
        good = good && decode(lane, side_by_side, shape);
        for (int s = 0; s < side_by_side; s++, i++)
            if (lane[s].error || (good && !lane_end(&lane[s]))) {
                *error = lane[s].error;
                return i;
            }
    }
    return n;
}
