/* What every decoder of the cachegen bitstream shares, on CPU and GPU; docs/codec-format.md is the specification.
 * NVRTC compiles this header too: plain C, no includes there. Multiplications and additions are never fused, so that
 * every decoder gives the same bits (the extension is built with -ffp-contract=off). */
#ifndef KVFS_CODEC_H
#define KVFS_CODEC_H

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <stdint.h>
#include <string.h>
#endif

#ifdef __CUDACC__
#define CODEC_FN static __device__ __forceinline__
#define CODEC_CONST static __device__ const
#define CODEC_MUL __fmul_rn
#define CODEC_ADD __fadd_rn
#else
#define CODEC_FN static inline __attribute__((always_inline))
#define CODEC_CONST static const
#define CODEC_MUL(a, b) ((a) * (b))
#define CODEC_ADD(a, b) ((a) + (b))
#endif

enum {
    CODEC_LANES = 32,
    CODEC_SLOT_BITS = 11,
    CODEC_SLOTS = 1 << CODEC_SLOT_BITS,
    CODEC_LOW = 1 << 15, /* states lie in [CODEC_LOW, CODEC_LOW << 16); every lane of the encoder starts with it */
    CODEC_LOSSY_TABLES = 24,
    CODEC_LOSSLESS_TABLES = 32,
    CODEC_TABLES = CODEC_LOSSY_TABLES + CODEC_LOSSLESS_TABLES,
    CODEC_OCTAVES = 16,       /* exponents that a lossless table covers */
    CODEC_FLIP = 0x80,        /* in a lossless table byte: the channel is mostly negative */
    CODEC_MAX_CHANNELS = 1024, /* of a row */
    CODEC_MAX_TOKENS = 4096,
    CODEC_MAX_SECTIONS = 2,
    CODEC_STEP_ONE = 128, /* the step code of 1.0 */
    CODEC_EXCEPTION = 6,  /* bytes: u16 token, u16 channel, i16 symbol */
};

enum codec_kind { CODEC_BY_CHANNEL, CODEC_BY_TOKEN }; /* a step and mean per channel (K); a step per token (V) */
enum codec_rope { CODEC_HALVES, CODEC_NEIGHBOURS };   /* the partner of channel i: i + pairs, or i + 1 */
enum codec_error { CODEC_OK, CODEC_TRUNCATED, CODEC_PARAMETERS, CODEC_EXCEPTIONS, CODEC_WORDS, CODEC_STATES };

typedef struct {
    int32_t kind, channels;
    int32_t pitch;                              /* elements between the tokens of this section in memory */
    int32_t rope_first, rope_pairs, rope_style; /* channels that RoPE turns; none if rope_pairs is 0 */
} CodecSection;

/* What is equal for all streams of a part. A stream holds one head of one layer: rows of `channels` symbols, a section
 * after the other, one row for each token. channels is a multiple of CODEC_LANES, that of a section one of 8. */
typedef struct {
    int32_t lossless;
    int32_t bytes, exponent, fraction; /* of an element: bytes, bits, bits */
    int32_t tokens, raw_tokens;        /* the first raw_tokens are stored as they are */
    int32_t sections, channels;
    CodecSection section[CODEC_MAX_SECTIONS];
} CodecShape;

/* Where the pieces of a stream lie. */
typedef struct {
    const uint8_t *raw, *side[CODEC_MAX_SECTIONS], *residual, *states, *exceptions, *words;
    uint32_t n_words, n_exceptions;
    int32_t rows;
} CodecStream;

CODEC_FN uint32_t codec_u16(const uint8_t *p)
{
#ifdef __CUDACC__
    return *(const uint16_t *)p;
#else
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
#endif
}

CODEC_FN uint32_t codec_u32(const uint8_t *p)
{
    return codec_u16(p) | codec_u16(p + 2) << 16;
}

CODEC_FN float codec_float(uint32_t bits)
{
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
#endif
}

CODEC_FN uint32_t codec_bits(float f)
{
#ifdef __CUDACC__
    return __float_as_uint(f);
#else
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
#endif
}

/* Find the pieces of a stream in size bytes; a CODEC error if they do not fit or anything is left over. */
CODEC_FN int codec_open(const CodecShape *shape, const uint8_t *data, uint64_t size, CodecStream *stream)
{
    const int32_t rows = shape->tokens - shape->raw_tokens;
    uint64_t at = 8;

    if (size < 8)
        return CODEC_TRUNCATED;
    stream->rows = rows;
    stream->n_words = codec_u32(data);
    stream->n_exceptions = codec_u32(data + 4);
    stream->raw = data + at;
    at += (uint64_t)shape->raw_tokens * (uint64_t)(shape->channels * shape->bytes);
    for (int32_t i = 0; i < shape->sections; i++) {
        const CodecSection *section = &shape->section[i];
        stream->side[i] = data + at;
        if (shape->lossless)
            at += 2 * (uint64_t)section->channels;
        else if (section->kind == CODEC_BY_CHANNEL)
            at += 4 * (uint64_t)section->channels;
        else
            at += (uint64_t)section->channels + 4 + 4 * (uint64_t)((rows + 15) / 16);
    }
    stream->residual = data + at;
    if (shape->lossless)
        at += (uint64_t)rows * (uint64_t)(shape->channels / 8 * shape->fraction);
    stream->states = data + at;
    stream->exceptions = stream->states + 4 * CODEC_LANES;
    stream->words = stream->exceptions + (uint64_t)CODEC_EXCEPTION * stream->n_exceptions;
    at += 4 * CODEC_LANES + (uint64_t)CODEC_EXCEPTION * stream->n_exceptions + 2 * (uint64_t)stream->n_words;
    return (at + 3) / 4 * 4 == size ? CODEC_OK : CODEC_TRUNCATED;
}

/* A table entry: symbol (signed) << 24 | frequency << 12 | slot - first slot of the symbol. */
CODEC_FN uint32_t codec_advance(uint32_t state, uint32_t entry)
{
    return ((entry >> 12) & 0xfffu) * (state >> CODEC_SLOT_BITS) + (entry & 0xfffu);
}

CODEC_CONST uint32_t CODEC_EIGHTH[8] = {0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167};

/* 2^((code - CODEC_STEP_ONE) / 8), for codes 0 to 256: steps, and step(256 - code) is the inverse of one. */
CODEC_FN float codec_step(uint32_t code)
{
    return codec_float(((127 - CODEC_STEP_ONE / 8 + (code >> 3)) << 23) | CODEC_EIGHTH[code & 7]);
}

/* 2^-n of token t; n is 0 to 3, two bits a token. */
CODEC_FN float codec_token_scale(const uint8_t *exponents, int32_t t)
{
    return codec_float((127 - ((exponents[t >> 2] >> (t & 3) * 2) & 3u)) << 23);
}

/* float32 to bfloat16 and to IEEE half, to nearest, ties to even. */
CODEC_FN uint32_t codec_to_bf16(float f)
{
    const uint32_t u = codec_bits(f);
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

CODEC_FN uint32_t codec_to_half(float f)
{
    const uint32_t u = codec_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    const uint32_t small = codec_bits(CODEC_ADD(codec_float(a), 0.5f)) - 0x3f000000u;
    const uint32_t finite = a < 0x38800000u ? small : normal;
    return sign | (a >= 0x47800000u ? 0x7c00u : finite);
}

/* Element i of a row of b-bit numbers, b <= 25, packed from the lowest bit of the first byte upwards. Reads 4 bytes. */
CODEC_FN uint32_t codec_packed(const uint8_t *row, int32_t i, int32_t b)
{
    const uint8_t *p = row + (i * b >> 3);
    uint32_t v;
#ifdef __CUDACC__
    v = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
#else
    memcpy(&v, p, sizeof v);
#endif
    return (v >> (i * b & 7)) & ((1u << b) - 1);
}

#endif
