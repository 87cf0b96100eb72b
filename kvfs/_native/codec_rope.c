/* Cosines and sines for RoPE from double arithmetic alone, so that every host finds the same bits; a file decodes for
 * ever to what it decoded to when it was written. Kernels: fdlibm's (Sun Microsystems, 1993), on [-pi/4, pi/4]. */
#include "codec_cpu.h"

enum { STRIDE = 16 };

typedef struct {
    double cosine, sine;
} Turn;

static Turn turn_by(double angle)
{
    const double magic = 0x1.8p52, quarters = angle * 0x1.45f306dc9c883p-1 + magic, n = quarters - magic;
    const double r = angle - n * 0x1.921fb544p+0 - n * 0x1.0b4611a626331p-34, z = r * r;
    const double s = r + r * z * (-0x1.5555555555549p-3 + z * (0x1.111111110f8a6p-7 + z * (-0x1.a01a019c161d5p-13 +
                     z * (0x1.71de357b1fe7dp-19 + z * (-0x1.ae5e68a2b9cebp-26 + z * 0x1.5d93a5acfd57cp-33)))));
    const double c = 1 - 0.5 * z + z * z * (0x1.555555555554cp-5 + z * (-0x1.6c16c16c15177p-10 + z * (0x1.a01a019cb159p-16 +
                     z * (-0x1.27e4f809c52adp-22 + z * (0x1.1ee9ebdb4b1c4p-29 + z * -0x1.8fae9be8838d4p-37)))));
    uint64_t bits;
    memcpy(&bits, &quarters, sizeof bits);
    switch (bits & 3) {
    case 0:
        return (Turn){c, s};
    case 1:
        return (Turn){-s, c};
    case 2:
        return (Turn){-c, -s};
    default:
        return (Turn){s, -c};
    }
}

/* Token 16 i + j is turned by the i-th turn and the j-th: few of them need a series. */
void codec_rotation(const float *inv_freq, int64_t pairs, int64_t position, int64_t tokens, float *rotation)
{
    for (int64_t p = 0; p < pairs; p++) {
        const double frequency = inv_freq[p];
        Turn fine[STRIDE];
        for (int64_t j = 0; j < STRIDE; j++)
            fine[j] = turn_by((double)j * frequency);
        for (int64_t t = 0; t < tokens; t += STRIDE) {
            const Turn coarse = turn_by((double)(position + t) * frequency);
            for (int64_t j = 0; j < STRIDE && t + j < tokens; j++) {
                float *row = rotation + (t + j) * 2 * pairs + p;
                row[0] = (float)(coarse.cosine * fine[j].cosine - coarse.sine * fine[j].sine);
                row[pairs] = (float)(coarse.sine * fine[j].cosine + coarse.cosine * fine[j].sine);
            }
        }
    }
}
