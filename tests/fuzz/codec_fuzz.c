/* Feed damaged streams to the decoders of the codec: codec_fuzz CASES [SEED].
 *
 * Built with the address and undefined-behaviour sanitizers (tests/t1_codec_fuzz.py, `make fuzz-codec`). Every stream lies
 * in a block of exactly its size and is decoded into blocks of exactly the size of the output, so that a read or a write
 * outside is seen at once. Streams of all shapes come from the encoder; a case damages one and decodes it, alone or beside
 * a good one, at every instruction set. Exit status 0: nothing was found, and undamaged streams gave their values back. */
#include "codec_cpu.h"

#include <stdio.h>
#include <stdlib.h>

enum isa isa_current = ISA_GENERIC;

enum { SEEDS = 64, OUTCOMES = CODEC_STATES + 1 };

static uint64_t random_state;

static uint64_t random_bits(void) /* splitmix64 */
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(random_bits() % n);
}

typedef struct {
    CodecShape shape;
    uint8_t *stream;
    uint64_t size;
    float *turns;
    char *expected; /* what the stream decodes to at the first instruction set */
} Seed;

static CodecShape random_shape(void)
{
    static const int32_t dtypes[][3] = {{2, 8, 7}, {2, 5, 10}, {1, 4, 3}, {1, 5, 2}, {4, 8, 23}};
    CodecShape shape = {.lossless = below(2) != 0, .tokens = 1 + (int32_t)below(12), .sections = 1 + (int32_t)below(2)};
    const int32_t *dtype = dtypes[below(shape.lossless ? 5 : 2)];
    shape.bytes = dtype[0];
    shape.exponent = dtype[1];
    shape.fraction = dtype[2];
    shape.raw_tokens = shape.lossless ? 0 : (int32_t)below(5) % (shape.tokens + 1);
    shape.channels = CODEC_LANES * (1 + (int32_t)below(3));
    const int32_t first = shape.sections == 1 ? shape.channels : 8 * (1 + (int32_t)below((uint32_t)shape.channels / 8 - 1));
    for (int32_t i = 0; i < shape.sections; i++) {
        CodecSection *section = &shape.section[i];
        section->kind = (int32_t)below(2);
        section->channels = i ? shape.channels - first : first;
        section->pitch = section->channels;
        section->rope_style = (int32_t)below(2);
    }
    const int32_t pairs = shape.lossless ? 0 : (int32_t)below((uint32_t)first / 2 + 1);
    shape.section[0].rope_pairs = pairs;
    shape.section[0].rope_first = (int32_t)below((uint32_t)(first - 2 * pairs) + 1);
    return shape;
}

static size_t section_bytes(const CodecShape *shape, int32_t i)
{
    return (size_t)(shape->tokens * shape->section[i].channels * shape->bytes);
}

/* Random elements: bits that span a few octaves, with now and then any bits. */
static void fill(char *memory, size_t n, const CodecShape *shape)
{
    const uint32_t sign = 1u << (shape->exponent + shape->fraction), exponents = 1u << shape->exponent;
    for (size_t i = 0; i < n; i += (size_t)shape->bytes) {
        const uint32_t exponent = exponents / 2 - below(exponents > 32 ? 6 : 3);
        uint32_t value = (below(2) ? sign : 0) | exponent << shape->fraction | below(1u << shape->fraction);
        if (shape->lossless && below(50) == 0)
            value = (uint32_t)random_bits();
        memcpy(memory + i, &value, (size_t)shape->bytes);
    }
}

/* Decode `n` streams into blocks of their own; the outcome, and the first one's values to `values` if that is not NULL. */
static int decode(const CodecShape *shape, CodecJob *jobs, int n, char *values)
{
    int error = CODEC_OK;
    for (int j = 0; j < n; j++)
        for (int32_t i = 0; i < shape->sections; i++)
            jobs[j].out[i] = malloc(section_bytes(shape, i));
    codec_decode(shape, jobs, n, &error);
    for (int j = 0; j < n; j++)
        for (int32_t i = 0; i < shape->sections; i++) {
            if (values && j == 0) {
                memcpy(values, jobs[j].out[i], section_bytes(shape, i));
                values += section_bytes(shape, i);
            }
            free(jobs[j].out[i]);
        }
    return error;
}

static int isas(enum isa *found)
{
    int n = 0;
    found[n++] = ISA_GENERIC;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        found[n++] = ISA_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
        found[n++] = ISA_AVX512;
#endif
    return n;
}

static Seed make_seed(const enum isa *isa, int n_isas)
{
    for (;;) {
        Seed seed = {.shape = random_shape()};
        const CodecShape *shape = &seed.shape;
        const size_t turns = (size_t)(2 * shape->section[0].rope_pairs * shape->tokens);
        const size_t total = (size_t)(shape->tokens * shape->channels * shape->bytes);
        const int32_t steps[2] = {-(int32_t)below(1200), -(int32_t)below(1200)};
        const char *in[CODEC_MAX_SECTIONS];
        char *values = malloc(total), *again = malloc(total);
        CodecScratch *scratch = codec_scratch(shape);
        uint8_t *out = malloc(codec_bound(shape));

        fill(values, total, shape);
        for (int32_t i = 0; i < shape->sections; i++)
            in[i] = values + (i ? section_bytes(shape, 0) : 0);
        if (turns) {
            float inv_freq[CODEC_MAX_CHANNELS];
            for (int32_t p = 0; p < shape->section[0].rope_pairs; p++)
                inv_freq[p] = 1.0f / (float)(1 + p);
            seed.turns = malloc(turns * sizeof *seed.turns);
            codec_rotation(inv_freq, shape->section[0].rope_pairs, below(100000), shape->tokens, seed.turns);
        }
        for (int i = 0; i < n_isas; i++) {
            isa_current = isa[i];
            const uint64_t size = codec_encode(shape, steps, in, seed.turns, scratch, out);
            if (i && (size != seed.size || (size && memcmp(out, seed.stream, size))))
                exit((fprintf(stderr, "instruction sets disagree on a stream\n"), 2));
            if (i == 0 && size) {
                seed.size = size;
                seed.stream = malloc(size);
                memcpy(seed.stream, out, size);
            }
        }
        for (int i = 0; i < n_isas && seed.size; i++) {
            CodecJob job = {.data = seed.stream, .size = seed.size, .rotation = seed.turns};
            isa_current = isa[i];
            if (decode(shape, &job, 1, again) || (shape->lossless && memcmp(again, values, total)))
                exit((fprintf(stderr, "a good stream was not decoded\n"), 2));
            if (seed.expected && memcmp(again, seed.expected, total))
                exit((fprintf(stderr, "instruction sets disagree on values\n"), 2));
            if (!seed.expected)
                seed.expected = memcpy(malloc(total), again, total);
        }
        free(values);
        free(again);
        free(out);
        codec_scratch_free(scratch);
        if (seed.size)
            return seed;
        free(seed.turns);
    }
}

/* Damage a copy of a stream; it may become shorter or longer. */
static uint8_t *damage(const Seed *seed, uint64_t *size)
{
    static const uint32_t odd[] = {0, 1, 0x7fff, 0x8000, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffe, 0x55555555};
    *size = seed->size;
    if (below(8) == 0)
        *size = below(2) ? below((uint32_t)seed->size + 1) : seed->size + 4 * below(40);
    uint8_t *bad = malloc(*size + 1); /* malloc(0) may be NULL */
    memset(bad, 0, *size + 1);
    memcpy(bad, seed->stream, *size < seed->size ? *size : seed->size);
    bad = realloc(bad, *size ? *size : 1);
    for (uint32_t n = 1 + below(4); *size && n; n--) {
        const uint32_t at = below(3) ? below((uint32_t)*size) : below((uint32_t)(*size < 160 ? *size : 160));
        switch (below(4)) {
        case 0:
            bad[at] ^= (uint8_t)(1u << below(8));
            break;
        case 1:
            bad[at] = (uint8_t)random_bits();
            break;
        case 2:
            if (at + 4 <= *size)
                memcpy(bad + at, &odd[below(sizeof odd / sizeof *odd)], 4);
            break;
        default:
            memmove(bad + at, bad + at / 2, below((uint32_t)*size - at)); /* the source ends no later than the target */
        }
    }
    return bad;
}

int main(int argc, char **argv)
{
    const unsigned long long cases = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000;
    unsigned long long outcomes[OUTCOMES] = {0};
    enum isa isa[4];
    const int n_isas = isas(isa);
    static Seed seeds[SEEDS];

    random_state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    codec_tables_init();
    for (unsigned long long i = 0; i < cases; i++) {
        if (i % 100000 < SEEDS) { /* new shapes and values now and then */
            Seed *seed = &seeds[i % 100000];
            free(seed->stream);
            free(seed->turns);
            free(seed->expected);
            *seed = make_seed(isa, n_isas);
        }
        const Seed *seed = &seeds[below(i < SEEDS ? (uint32_t)i + 1 : SEEDS)];
        uint64_t size;
        uint8_t *bad = damage(seed, &size);
        CodecJob jobs[2] = {{.data = bad, .size = size, .rotation = seed->turns},
                            {.data = seed->stream, .size = seed->size, .rotation = seed->turns}};
        isa_current = isa[i % (unsigned)n_isas];
        outcomes[decode(&seed->shape, jobs, 1 + (int)below(2), NULL)]++;
        free(bad);
    }
    for (int i = 0; i < SEEDS; i++) {
        free(seeds[i].stream);
        free(seeds[i].turns);
        free(seeds[i].expected);
    }
    printf("%llu cases: good %llu, truncated %llu, parameters %llu, exceptions %llu, words %llu, states %llu\n", cases,
           outcomes[0], outcomes[1], outcomes[2], outcomes[3], outcomes[4], outcomes[5]);
    return 0;
}
