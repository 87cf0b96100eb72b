/* One warp decodes one stream, straight into paged KV.
 * On a GPU every lane is a thread; on a host the same text, compiled as C, runs the lanes one after the other, which is how
 * tests check it without a GPU. A variable PER_LANE has a value in each lane; FOR_LANES runs a block in all of them. */
#ifndef KVFS_CODEC_WARP_H
#define KVFS_CODEC_WARP_H

#include "codec.h"

#ifdef __CUDACC__
#define PER_LANE(type, name) type name
#define OF(name) name
#define FOR_LANES for ([[maybe_unused]] int32_t lane = (int32_t)(threadIdx.x % CODEC_LANES), runs = 1; runs > 0; runs--)
#define VOTE(mask, predicate) ((mask) = __ballot_sync(0xffffffffu, (predicate)))
#define SYNC() __syncwarp()
#define COUNT(mask) __popc(mask)
#else
#define PER_LANE(type, name) type name[CODEC_LANES]
#define OF(name) name[lane]
#define FOR_LANES for (int32_t lane = 0; lane < CODEC_LANES; lane++)
#define VOTE(mask, predicate) ((mask) |= (uint32_t)(predicate) << lane)
#define SYNC() ((void)0)
#define COUNT(mask) __builtin_popcount(mask)
#endif

/* Where a stream is and where its rows go: row r of a section lies at
 *   out + table[(position + r) / block_size] * block + (position + r) % block_size * token   (bytes),
 * its channels adjacent. Rows outside [first, last), and rows of block 0, are not written. */
typedef struct {
    uint64_t stream, size, turns; /* addresses; turns is 0 for a stream without RoPE */
    uint64_t out[CODEC_MAX_SECTIONS];
    int64_t block[CODEC_MAX_SECTIONS], token[CODEC_MAX_SECTIONS];
    uint64_t table;
    int32_t block_size, position, first, last;
} CodecTask;

/* The tables of the level, see kvfs/codec/cuda.py. */
typedef struct {
    const uint8_t *symbols;      /* [tables][CODEC_SLOTS], plus 128 */
    const uint32_t *frequencies; /* [tables][256]: frequency << 12 | first slot */
} CodecWarpTables;

/* The address of row r, or 0 if it is not to be written. */
CODEC_FN uint64_t warp_row(const CodecTask *task, int32_t section, int32_t r)
{
    const int64_t at = (int64_t)task->position + r;
    if (r < task->first || r >= task->last)
        return 0;
    const int64_t block = ((const int64_t *)task->table)[at / task->block_size];
    if (block == 0)
        return 0;
    return task->out[section] + (uint64_t)(block * task->block[section] + at % task->block_size * task->token[section]);
}

CODEC_FN void warp_store(uint64_t row, int32_t c, int32_t bytes, uint32_t value)
{
    const uint64_t at = row + (uint64_t)c * (uint64_t)bytes;
    if (bytes == 2)
        *(uint16_t *)at = (uint16_t)value;
    else if (bytes == 1)
        *(uint8_t *)at = (uint8_t)value;
    else
        *(uint32_t *)at = value;
}

/* Channel c of a lossy section before RoPE. */
CODEC_FN float warp_value(const CodecSection *section, const uint8_t *side, const int32_t *row, int32_t c, int32_t t)
{
    const int32_t n = section->channels;
    if (section->kind == CODEC_BY_CHANNEL)
        return CODEC_ADD(CODEC_MUL((float)row[c], codec_step(side[2 * n + c])), codec_float(codec_u16(side + 2 * c) << 16));
    return CODEC_MUL((float)row[c], CODEC_MUL(codec_step(side[n]), codec_token_scale(side + n + 4, t)));
}

/* Channel c of a lossy section as it is stored. `turn`: cosines, then sines, of the token. */
CODEC_FN uint32_t warp_lossy(const CodecShape *shape, const CodecSection *section, const uint8_t *side,
                             const int32_t *row, int32_t c, int32_t t, const float *turn)
{
    const int32_t pairs = section->rope_pairs, i = c - section->rope_first;
    float value = warp_value(section, side, row, c, t);
    if (turn && i >= 0 && i < 2 * pairs) {
        const int32_t halves = section->rope_style == CODEC_HALVES;
        const int32_t pair = halves ? i % pairs : i / 2, second = halves ? i >= pairs : i & 1;
        const int32_t other = c + (second ? -1 : 1) * (halves ? pairs : 1);
        const float partner = warp_value(section, side, row, other, t);
        const float cosine = CODEC_MUL(value, turn[pair]), sine = CODEC_MUL(partner, turn[pairs + pair]);
        value = CODEC_ADD(cosine, second ? sine : -sine);
    }
    return shape->exponent == 5 ? codec_to_half(value) : codec_to_bf16(value);
}

/* Sign and exponent of a lossless channel from its symbol. */
CODEC_FN int32_t warp_top(const CodecShape *shape, const uint8_t *side, int32_t n, int32_t c, int32_t symbol)
{
    const int32_t sign = (symbol >= CODEC_OCTAVES) != ((side[n + c] & CODEC_FLIP) != 0);
    return sign << shape->exponent | ((side[c] - symbol % CODEC_OCTAVES) & ((1 << shape->exponent) - 1));
}

/* Decode a stream; `row` is room for shape->channels numbers that the warp shares. Returns a CODEC error. */
CODEC_FN int codec_warp(const CodecShape *shape, const CodecTask *task, const CodecWarpTables *tables, int32_t *row)
{
    CodecStream stream;
    PER_LANE(uint32_t, x);
    uint32_t at = 0, exceptions = 0, bad = 0;
    int32_t first;

    const int error = codec_open(shape, (const uint8_t *)task->stream, task->size, &stream);
    if (error)
        return error;
    FOR_LANES
    {
        OF(x) = codec_u32(stream.states + 4 * lane);
        VOTE(bad, OF(x) < CODEC_LOW || OF(x) >> 31);
    }
    if (bad)
        return CODEC_STATES;
    first = 0;
    for (int32_t s = 0; s < shape->sections; s++) {
        const int32_t n = shape->section[s].channels, lossless = shape->lossless;
        const int32_t by_channel = shape->section[s].kind == CODEC_BY_CHANNEL;
        const uint8_t *side = stream.side[s];
        for (int32_t c0 = 0; c0 < n; c0 += CODEC_LANES) {
            FOR_LANES
            {
                const int32_t c = c0 + lane < n ? c0 + lane : 0;
                const int32_t table = lossless ? side[n + c] & ~CODEC_FLIP : by_channel ? side[3 * n + c] : side[c];
                const uint32_t mean = by_channel && !lossless ? codec_u16(side + 2 * c) : 0;
                VOTE(bad, table >= (lossless ? CODEC_LOSSLESS_TABLES : CODEC_LOSSY_TABLES) || (mean & 0x7f80) == 0x7f80);
            }
            if (bad)
                return CODEC_PARAMETERS;
        }
        for (int32_t t = 0; t < shape->raw_tokens; t++) {
            const uint64_t out = warp_row(task, s, t);
            const uint8_t *raw = stream.raw + (int64_t)(shape->raw_tokens * first + t * n) * shape->bytes;
            if (out)
                FOR_LANES
                for (int32_t c = lane; c < n; c += CODEC_LANES)
                    warp_store(out, c, shape->bytes, codec_u16(raw + 2 * c));
        }
        first += n;
    }

    for (int32_t t = 0; t < stream.rows; t++) {
        int32_t c0 = 0;
        for (int32_t s = 0, begin = 0; s < shape->sections; begin += shape->section[s++].channels)
            for (; c0 < shape->channels && c0 < begin + shape->section[s].channels; c0 += CODEC_LANES) {
                uint32_t need = 0;
                FOR_LANES
                {
                    /* a group of lanes may reach into the next section */
                    const int32_t next = c0 + lane >= begin + shape->section[s].channels;
                    const int32_t which = s + next, c = c0 + lane - (next ? begin + shape->section[s].channels : begin);
                    const int32_t n = shape->section[which].channels;
                    const uint8_t *side = stream.side[which];
                    const int32_t by_channel = shape->section[which].kind == CODEC_BY_CHANNEL;
                    const uint32_t table = shape->lossless ? side[n + c] & ~(uint32_t)CODEC_FLIP
                                                           : by_channel ? side[3 * n + c] : side[c];
                    const uint32_t slot = OF(x) & (CODEC_SLOTS - 1);
                    const uint32_t symbol = tables->symbols[table * CODEC_SLOTS + slot];
                    const uint32_t f = tables->frequencies[table * 256 + symbol];
                    OF(x) = (f >> 12) * (OF(x) >> CODEC_SLOT_BITS) + slot - (f & 0xfff);
                    row[c0 + lane] = shape->lossless ? warp_top(shape, side, n, c, (int32_t)symbol - 128)
                                                     : (int32_t)symbol - 128;
                    VOTE(need, OF(x) < CODEC_LOW);
                }
                FOR_LANES
                if (need >> lane & 1) {
                    const uint32_t word = at + (uint32_t)COUNT(need & ((1u << lane) - 1));
                    OF(x) = OF(x) << 16 | (word < stream.n_words ? codec_u16(stream.words + 2 * (uint64_t)word) : 0);
                }
                at += (uint32_t)COUNT(need);
            }
        SYNC();
        for (; exceptions < stream.n_exceptions; exceptions++) {
            const uint8_t *exception = stream.exceptions + (uint64_t)CODEC_EXCEPTION * exceptions;
            if (codec_u16(exception) != (uint32_t)t)
                break;
            if (codec_u16(exception + 2) >= (uint32_t)shape->channels)
                return CODEC_EXCEPTIONS;
            FOR_LANES
            if (lane == 0)
                row[codec_u16(exception + 2)] = (int16_t)codec_u16(exception + 4);
            SYNC();
        }
        for (int32_t s = 0, begin = 0; s < shape->sections; begin += shape->section[s++].channels) {
            const CodecSection *section = &shape->section[s];
            const int32_t token = t + shape->raw_tokens, n = section->channels;
            const uint64_t out = warp_row(task, s, token);
            const float *turn = section->rope_pairs && task->turns
                ? (const float *)task->turns + (int64_t)token * 2 * section->rope_pairs : 0;
            const uint8_t *fractions = stream.residual + ((int64_t)t * shape->channels + begin) / 8 * shape->fraction;
            if (out)
                FOR_LANES
                for (int32_t c = lane; c < n; c += CODEC_LANES)
                    warp_store(out, c, shape->bytes,
                               shape->lossless
                                   ? (uint32_t)row[begin + c] << shape->fraction | codec_packed(fractions, c, shape->fraction)
                                   : warp_lossy(shape, section, stream.side[s], row + begin, c, t, turn));
        }
        SYNC();
    }
    if (exceptions != stream.n_exceptions)
        return CODEC_EXCEPTIONS;
    if (at != stream.n_words)
        return CODEC_WORDS;
    bad = 0;
    FOR_LANES
    VOTE(bad, OF(x) != CODEC_LOW);
    return bad ? CODEC_STATES : CODEC_OK;
}

#endif
