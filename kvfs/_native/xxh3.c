/* XXH3-64 with seed 0 and the default secret, after the public specification (xxHash doc/xxhash_spec.md 0.2.0).
 * The loop over long inputs exists once, as a template; an instruction set adds how it accumulates one 64-byte
 * stripe and how it scrambles the eight accumulators. */
#include "native.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
#define PRIME_MX1 0x165667919E3779F9u
#define PRIME_MX2 0x9FB21C651E98DF25u

enum { STRIPE = 64, STRIPES_PER_BLOCK = 16, BLOCK = STRIPE * STRIPES_PER_BLOCK, SECRET_BYTES = 192 };

static const uint8_t SECRET[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint32_t read32(const uint8_t *p)
{
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static inline uint64_t read64(const uint8_t *p)
{
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static inline uint64_t rotl64(uint64_t x, int by)
{
    return x << by | x >> (64 - by);
}

static inline uint64_t multiply_fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t avalanche(uint64_t x)
{
    x = (x ^ x >> 37) * PRIME_MX1;
    return x ^ x >> 32;
}

static inline uint64_t avalanche_xxh64(uint64_t x)
{
    x = (x ^ x >> 33) * PRIME64_2;
    x = (x ^ x >> 29) * PRIME64_3;
    return x ^ x >> 32;
}

static inline uint64_t mix16(const uint8_t *p, const uint8_t *secret)
{
    return multiply_fold(read64(p) ^ read64(secret), read64(p + 8) ^ read64(secret + 8));
}

static uint64_t hash_0_to_16(const uint8_t *p, size_t len)
{
    if (len > 8) {
        uint64_t low = read64(SECRET + 24) ^ read64(SECRET + 32) ^ read64(p);
        uint64_t high = read64(SECRET + 40) ^ read64(SECRET + 48) ^ read64(p + len - 8);
        return avalanche(len + __builtin_bswap64(low) + high + multiply_fold(low, high));
    }
    if (len >= 4) {
        uint64_t x = read64(SECRET + 8) ^ read64(SECRET + 16) ^ (read32(p + len - 4) | (uint64_t)read32(p) << 32);
        x = (x ^ rotl64(x, 49) ^ rotl64(x, 24)) * PRIME_MX2;
        x = (x ^ ((x >> 35) + len)) * PRIME_MX2;
        return x ^ x >> 28;
    }
    if (len > 0) {
        uint32_t x = p[len - 1] | (uint32_t)len << 8 | (uint32_t)p[0] << 16 | (uint32_t)p[len >> 1] << 24;
        return avalanche_xxh64(read32(SECRET) ^ read32(SECRET + 4) ^ x);
    }
    return avalanche_xxh64(read64(SECRET + 56) ^ read64(SECRET + 64));
}

static uint64_t hash_17_to_128(const uint8_t *p, size_t len)
{
    uint64_t acc = len * PRIME64_1;
    for (size_t i = 0; i <= (len - 1) / 32; i++) {
        acc += mix16(p + 16 * i, SECRET + 32 * i);
        acc += mix16(p + len - 16 * (i + 1), SECRET + 32 * i + 16);
    }
    return avalanche(acc);
}

static uint64_t hash_129_to_240(const uint8_t *p, size_t len)
{
    uint64_t acc = len * PRIME64_1;
    for (size_t i = 0; i < 8; i++)
        acc += mix16(p + 16 * i, SECRET + 16 * i);
    acc = avalanche(acc);
    for (size_t i = 8; i < len / 16; i++)
        acc += mix16(p + 16 * i, SECRET + 16 * (i - 8) + 3);
    return avalanche(acc + mix16(p + len - 16, SECRET + 119));
}

/* Consumes an input of more than 240 bytes. All blocks but the last are scrambled, and the last 64 bytes are a
 * stripe of their own that may overlap the one before. */
#define DEFINE_CONSUME(name, attributes, vec, accumulate, scramble)                                                    \
    attributes static void name(uint64_t state[8], const uint8_t *p, size_t len)                                       \
    {                                                                                                                  \
        vec acc[STRIPE / sizeof(vec)];                                                                                 \
        const uint8_t *last = p + len - STRIPE;                                                                        \
        memcpy(acc, state, sizeof acc);                                                                                \
        for (size_t blocks = (len - 1) / BLOCK; blocks; blocks--, p += BLOCK) {                                        \
            for (int i = 0; i < STRIPES_PER_BLOCK; i++)                                                                \
                accumulate(acc, p + STRIPE * i, SECRET + 8 * i);                                                       \
            scramble(acc, SECRET + SECRET_BYTES - STRIPE);                                                             \
        }                                                                                                              \
        for (int i = 0; i < (int)((len - 1) % BLOCK / STRIPE); i++)                                                    \
            accumulate(acc, p + STRIPE * i, SECRET + 8 * i);                                                           \
        accumulate(acc, last, SECRET + SECRET_BYTES - STRIPE - 7);                                                     \
        memcpy(state, acc, sizeof acc);                                                                                \
    }

static inline void accumulate_generic(uint64_t acc[8], const uint8_t *p, const uint8_t *secret)
{
    for (int i = 0; i < 8; i++) {
        uint64_t lane = read64(p + 8 * i), keyed = lane ^ read64(secret + 8 * i);
        acc[i ^ 1] += lane;
        acc[i] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
    }
}

static inline void scramble_generic(uint64_t acc[8], const uint8_t *secret)
{
    for (int i = 0; i < 8; i++)
        acc[i] = (acc[i] ^ acc[i] >> 47 ^ read64(secret + 8 * i)) * PRIME32_1;
}

DEFINE_CONSUME(consume_generic, , uint64_t, accumulate_generic, scramble_generic)

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))

AVX2 static inline void accumulate_avx2(__m256i acc[2], const uint8_t *p, const uint8_t *secret)
{
    for (int i = 0; i < 2; i++) {
        __m256i lanes = _mm256_loadu_si256((const __m256i *)p + i);
        __m256i keyed = _mm256_xor_si256(lanes, _mm256_loadu_si256((const __m256i *)secret + i));
        __m256i product = _mm256_mul_epu32(keyed, _mm256_shuffle_epi32(keyed, 0x31));
        acc[i] = _mm256_add_epi64(acc[i], _mm256_add_epi64(product, _mm256_shuffle_epi32(lanes, 0x4E)));
    }
}

AVX2 static inline void scramble_avx2(__m256i acc[2], const uint8_t *secret)
{
    const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    for (int i = 0; i < 2; i++) {
        __m256i x = _mm256_xor_si256(acc[i], _mm256_srli_epi64(acc[i], 47));
        x = _mm256_xor_si256(x, _mm256_loadu_si256((const __m256i *)secret + i));
        __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_shuffle_epi32(x, 0x31), prime), 32);
        acc[i] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), high);
    }
}

AVX512 static inline void accumulate_avx512(__m512i acc[1], const uint8_t *p, const uint8_t *secret)
{
    __m512i lanes = _mm512_loadu_si512(p);
    __m512i keyed = _mm512_xor_si512(lanes, _mm512_loadu_si512(secret));
    __m512i product = _mm512_mul_epu32(keyed, _mm512_shuffle_epi32(keyed, 0x31));
    acc[0] = _mm512_add_epi64(acc[0], _mm512_add_epi64(product, _mm512_shuffle_epi32(lanes, 0x4E)));
}

AVX512 static inline void scramble_avx512(__m512i acc[1], const uint8_t *secret)
{
    const __m512i prime = _mm512_set1_epi32((int)PRIME32_1);
    __m512i x = _mm512_xor_si512(acc[0], _mm512_srli_epi64(acc[0], 47));
    x = _mm512_xor_si512(x, _mm512_loadu_si512(secret));
    __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_shuffle_epi32(x, 0x31), prime), 32);
    acc[0] = _mm512_add_epi64(_mm512_mul_epu32(x, prime), high);
}

DEFINE_CONSUME(consume_avx2, AVX2, __m256i, accumulate_avx2, scramble_avx2)
DEFINE_CONSUME(consume_avx512, AVX512, __m512i, accumulate_avx512, scramble_avx512)

#elif defined(__aarch64__)

static inline void accumulate_neon(uint64x2_t acc[4], const uint8_t *p, const uint8_t *secret)
{
    for (int i = 0; i < 4; i++) {
        uint64x2_t lanes = vreinterpretq_u64_u8(vld1q_u8(p + 16 * i));
        uint64x2_t keyed = veorq_u64(lanes, vreinterpretq_u64_u8(vld1q_u8(secret + 16 * i)));
        uint64x2_t sum = vaddq_u64(acc[i], vextq_u64(lanes, lanes, 1));
        acc[i] = vmlal_u32(sum, vmovn_u64(keyed), vshrn_n_u64(keyed, 32));
    }
}

static inline void scramble_neon(uint64x2_t acc[4], const uint8_t *secret)
{
    const uint32x2_t prime = vdup_n_u32(PRIME32_1);
    for (int i = 0; i < 4; i++) {
        uint64x2_t x = veorq_u64(acc[i], vshrq_n_u64(acc[i], 47));
        x = veorq_u64(x, vreinterpretq_u64_u8(vld1q_u8(secret + 16 * i)));
        uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(x, 32), prime), 32);
        acc[i] = vmlal_u32(high, vmovn_u64(x), prime);
    }
}

DEFINE_CONSUME(consume_neon, , uint64x2_t, accumulate_neon, scramble_neon)

#endif

static void consume(uint64_t acc[8], const uint8_t *p, size_t len)
{
    switch (isa_current) {
#if defined(__x86_64__)
    case ISA_AVX512:
        consume_avx512(acc, p, len);
        return;
    case ISA_AVX2:
        consume_avx2(acc, p, len);
        return;
#elif defined(__aarch64__)
    case ISA_NEON:
        consume_neon(acc, p, len);
        return;
#endif
    default:
        consume_generic(acc, p, len);
    }
}

static uint64_t hash_long(const uint8_t *p, size_t len)
{
    uint64_t acc[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    uint64_t result = len * PRIME64_1;

    consume(acc, p, len);
    for (int i = 0; i < 8; i += 2)
        result += multiply_fold(acc[i] ^ read64(SECRET + 11 + 8 * i), acc[i + 1] ^ read64(SECRET + 19 + 8 * i));
    return avalanche(result);
}

uint64_t xxh3_64(const void *data, size_t len)
{
    if (len <= 16)
        return hash_0_to_16(data, len);
    if (len <= 128)
        return hash_17_to_128(data, len);
    if (len <= 240)
        return hash_129_to_240(data, len);
    return hash_long(data, len);
}
