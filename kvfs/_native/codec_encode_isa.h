/* The loops of the encoder over KV; codec_encode.c includes this once for each instruction set, with
 *   TARGET  the attribute of its functions, NAME(x) their names, and LANES_AVX512 or LANES_AVX2 or neither.
 * Sums are taken in one order, token after token, so that every instruction set finds the same parameters. */

#define INLINE TARGET static inline __attribute__((always_inline))

/* Row of 16-bit floats to float32. */
TARGET static inline void NAME(widen)(const char *in, float *restrict out, int32_t n, int32_t half)
{
    const uint16_t *restrict row = (const uint16_t *)in;
    if (half)
        for (int32_t c = 0; c < n; c++)
            out[c] = from_half(row[c]);
    else
        for (int32_t c = 0; c < n; c++)
            out[c] = codec_float((uint32_t)row[c] << 16);
}

TARGET static inline void NAME(turn_back)(float *restrict value, const float *restrict turn, const CodecSection *section)
{
    const int32_t pairs = section->rope_pairs;
    float *v = value + section->rope_first;
    if (section->rope_style == CODEC_HALVES)
        for (int32_t i = 0; i < pairs; i++) {
            const float a = v[i], b = v[i + pairs];
            v[i] = a * turn[i] + b * turn[pairs + i];
            v[i + pairs] = b * turn[i] - a * turn[pairs + i];
        }
    else
        for (int32_t i = 0; i < pairs; i++) {
            const float a = v[2 * i], b = v[2 * i + 1];
            v[2 * i] = a * turn[i] + b * turn[pairs + i];
            v[2 * i + 1] = b * turn[i] - a * turn[pairs + i];
        }
}

/* By channel: rows turned back to work->value, with their sums, then less the means, with their squares' sums. */
TARGET static void NAME(centre)(Encoder *work, const CodecShape *shape, int32_t which, const char *in,
                                const float *rotation)
{
    const CodecSection *section = &shape->section[which];
    const int32_t n = section->channels, rows = shape->tokens - shape->raw_tokens;
    float *restrict sum = work->sum, *restrict mean = work->mean;

    memset(sum, 0, sizeof *sum * (size_t)n);
    for (int32_t t = 0; t < rows; t++) {
        float *restrict value = work->value + (int64_t)t * n;
        const int64_t token = t + shape->raw_tokens;
        NAME(widen)(in + token * section->pitch * 2, value, n, shape->exponent == 5);
        if (section->rope_pairs && rotation)
            NAME(turn_back)(value, rotation + token * 2 * section->rope_pairs, section);
        for (int32_t c = 0; c < n; c++)
            sum[c] += value[c];
    }
    for (int32_t c = 0; c < n; c++) {
        const uint32_t bits = codec_to_bf16(sum[c] / (float)rows) << 16;
        mean[c] = codec_float(bits & 0x7f800000u ? bits : 0); /* no subnormal: some programs turn them off */
        sum[c] = 0;
    }
    for (int32_t t = 0; t < rows; t++) {
        float *restrict value = work->value + (int64_t)t * n;
        for (int32_t c = 0; c < n; c++) {
            value[c] -= mean[c];
            sum[c] += value[c] * value[c];
        }
    }
}

/* By token: rows to work->value; the mean square of each to work->sum. */
TARGET static void NAME(energies)(Encoder *work, const CodecShape *shape, int32_t which, const char *in)
{
    const CodecSection *section = &shape->section[which];
    const int32_t n = section->channels, rows = shape->tokens - shape->raw_tokens;

    for (int32_t t = 0; t < rows; t++) {
        float *restrict value = work->value + (int64_t)t * n;
        float lane[8] = {0};
        NAME(widen)(in + (int64_t)(t + shape->raw_tokens) * section->pitch * 2, value, n, shape->exponent == 5);
        for (int32_t c = 0; c < n; c += 8)
            for (int32_t i = 0; i < 8; i++)
                lane[i] += value[c + i] * value[c + i];
        for (int32_t i = 0; i < 4; i++)
            lane[i] += lane[i + 4];
        work->sum[t] = (lane[0] + lane[2] + (lane[1] + lane[3])) / (float)n;
    }
}

/* work->value times work->scale (of channels) times `by_token` (of tokens, or NULL), rounded to work->symbol; squares'
 * sums to work->sum. False if a symbol does not fit. */
TARGET static bool NAME(quantise)(Encoder *work, const CodecShape *shape, int32_t which, int32_t first,
                                  const float *by_token)
{
    const int32_t n = shape->section[which].channels, rows = shape->tokens - shape->raw_tokens;
    const float *restrict scale = work->scale;
    float *restrict sum = work->sum;
    int32_t most = 0;

    memset(sum, 0, sizeof *sum * (size_t)n);
    for (int32_t t = 0; t < rows; t++) {
        const float *restrict value = work->value + (int64_t)t * n;
        int16_t *restrict symbol = work->symbol + (int64_t)t * shape->channels + first;
        const float factor = by_token ? by_token[t] : 1;
        for (int32_t c = 0; c < n; c++) {
            float q = value[c] * (scale[c] * factor);
            q = q < 32768.f ? q : 32768.f;
            q = q > -32768.f ? q : -32768.f;
            const int32_t whole = (int32_t)codec_bits(q + 12582912.f) - 0x4b400000; /* to nearest, ties to even */
            const int32_t size = whole < 0 ? -whole : whole;
            most = size > most ? size : most;
            sum[c] += (float)whole * (float)whole;
            symbol[c] = (int16_t)whole;
        }
    }
    return most < 32768;
}

/* Clip the symbols of row t to what their tables hold; those clipped become exceptions. */
TARGET static void NAME(clip)(Encoder *work, const CodecShape *shape, int32_t t)
{
    const int32_t channels = shape->channels;
    int16_t *restrict symbol = work->symbol + (int64_t)t * channels;
    const int16_t *restrict reach = work->reach;
    uint16_t beyond = 0;

    for (int32_t c = 0; c < channels; c++)
        beyond |= (uint16_t)((symbol[c] > reach[c]) | (symbol[c] < -reach[c]));
    if (!beyond)
        return;
    for (int32_t c = 0; c < channels; c++)
        if (symbol[c] > reach[c] || symbol[c] < -reach[c]) {
            except(work, t, c, symbol[c]);
            symbol[c] = symbol[c] < 0 ? (int16_t)-reach[c] : reach[c];
        }
}

/* The 32 rANS encoders, from the last row to the first; words are written downwards from `end`. Returns their start. */
TARGET static uint8_t *NAME(pack)(Encoder *work, const CodecShape *shape, uint8_t *end)
{
    const int16_t *symbols = work->symbol + (int64_t)(shape->tokens - shape->raw_tokens) * shape->channels;
    uint8_t *words = end;
    for (int i = 0; i < CODEC_LANES; i++)
        work->state[i] = CODEC_LOW;
#if defined(LANES_AVX512)
    const __m512i twelve = _mm512_set1_epi32(0xfff), one = _mm512_set1_epi32(1);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i state[2] = {_mm512_loadu_si512(work->state), _mm512_loadu_si512(work->state + 16)};
    for (int32_t c = shape->channels; symbols != work->symbol; c = c ? c : shape->channels) {
        symbols -= CODEC_LANES;
        c -= CODEC_LANES;
        for (int i = 1; i >= 0; i--) {
            const __m512i symbol = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const void *)(symbols + 16 * i)));
            const __m512i table = _mm512_loadu_si512(work->table + c + 16 * i);
            const __m512i e = _mm512_i32gather_epi32(_mm512_add_epi32(symbol, table), codec_symbols, 4);
            const __m512i f = _mm512_srli_epi32(e, 12);
            const __mmask16 full = _mm512_cmpge_epu32_mask(state[i], _mm512_slli_epi32(f, 20));
            const unsigned filled = (unsigned)__builtin_popcount(full);
            /* the words of full lanes, in order, end where the last ones start */
            const __m512i top = _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32((int)filled)),
                                                         _mm512_maskz_compress_epi32(full, state[i]));
            _mm256_storeu_si256((void *)(words - 32), _mm512_cvtepi32_epi16(top));
            words -= 2 * filled;
            const __m512i x = _mm512_mask_srli_epi32(state[i], full, state[i], 16);
            /* x / f in floats is off by one at most */
            __m512i q = _mm512_cvttps_epi32(_mm512_div_ps(_mm512_cvtepi32_ps(x), _mm512_cvtepi32_ps(f)));
            __m512i r = _mm512_sub_epi32(x, _mm512_mullo_epi32(q, f));
            const __mmask16 over = _mm512_cmplt_epi32_mask(r, _mm512_setzero_si512());
            const __mmask16 under = _mm512_cmpge_epi32_mask(r, f);
            q = _mm512_mask_sub_epi32(q, over, q, one);
            r = _mm512_mask_add_epi32(r, over, r, f);
            q = _mm512_mask_add_epi32(q, under, q, one);
            r = _mm512_mask_sub_epi32(r, under, r, f);
            r = _mm512_add_epi32(r, _mm512_and_si512(e, twelve));
            state[i] = _mm512_add_epi32(_mm512_slli_epi32(q, CODEC_SLOT_BITS), r);
        }
    }
    _mm512_storeu_si512(work->state, state[0]);
    _mm512_storeu_si512(work->state + 16, state[1]);
#elif defined(LANES_AVX2)
    const __m256i twelve = _mm256_set1_epi32(0xfff);
    __m256i state[4];
    for (int i = 0; i < 4; i++)
        state[i] = _mm256_loadu_si256((const void *)(work->state + 8 * i));
    for (int32_t c = shape->channels; symbols != work->symbol; c = c ? c : shape->channels) {
        symbols -= CODEC_LANES;
        c -= CODEC_LANES;
        for (int i = 3; i >= 0; i--) {
            const __m256i symbol = _mm256_cvtepi16_epi32(_mm_loadu_si128((const void *)(symbols + 8 * i)));
            const __m256i table = _mm256_loadu_si256((const void *)(work->table + c + 8 * i));
            const __m256i e = _mm256_i32gather_epi32((const int *)codec_symbols, _mm256_add_epi32(symbol, table), 4);
            const __m256i f = _mm256_srli_epi32(e, 12), limit = _mm256_slli_epi32(f, 20);
            const __m256i full = _mm256_cmpeq_epi32(_mm256_max_epu32(state[i], limit), state[i]);
            const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(full));
            const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(gather_top + mask)));
            const __m256i top = _mm256_and_si256(_mm256_permutevar8x32_epi32(state[i], place), _mm256_set1_epi32(0xffff));
            _mm_storeu_si128((void *)(words - 16),
                             _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)));
            words -= 2 * __builtin_popcount((unsigned)mask);
            const __m256i x = _mm256_blendv_epi8(state[i], _mm256_srli_epi32(state[i], 16), full);
            __m256i q = _mm256_cvttps_epi32(_mm256_div_ps(_mm256_cvtepi32_ps(x), _mm256_cvtepi32_ps(f)));
            __m256i r = _mm256_sub_epi32(x, _mm256_mullo_epi32(q, f));
            const __m256i over = _mm256_srai_epi32(r, 31); /* -1 where q is one too large */
            q = _mm256_add_epi32(q, over);
            r = _mm256_add_epi32(r, _mm256_and_si256(over, f));
            const __m256i enough = _mm256_cmpgt_epi32(f, r); /* 0 where q is one too small */
            q = _mm256_add_epi32(q, _mm256_add_epi32(enough, _mm256_set1_epi32(1)));
            r = _mm256_sub_epi32(r, _mm256_andnot_si256(enough, f));
            r = _mm256_add_epi32(r, _mm256_and_si256(e, twelve));
            state[i] = _mm256_add_epi32(_mm256_slli_epi32(q, CODEC_SLOT_BITS), r);
        }
    }
    for (int i = 0; i < 4; i++)
        _mm256_storeu_si256((void *)(work->state + 8 * i), state[i]);
#else
    for (int32_t c = shape->channels; symbols != work->symbol; c = c ? c : shape->channels) {
        symbols -= CODEC_LANES;
        c -= CODEC_LANES;
        for (int i = CODEC_LANES - 1; i >= 0; i--) {
            const uint32_t e = codec_symbols[(int32_t)work->table[c + i] + symbols[i]];
            const uint32_t f = e >> 12;
            uint32_t x = work->state[i];
            const uint32_t full = x >= f << 20;
            const uint16_t word = (uint16_t)x;
            memcpy(words - 2, &word, 2);
            words -= 2 * full;
            x >>= 16 * full;
            work->state[i] = (x / f << CODEC_SLOT_BITS) + x % f + (e & 0xfff);
        }
    }
#endif
    return words;
}

/* Sign and exponent of every element to work->symbol; exponents' sums to work->log. */
INLINE void NAME(read_tops)(
    Encoder *work, const CodecShape *shape, int32_t which, int32_t first, const char *in, const int32_t bytes)
{
    const CodecSection *section = &shape->section[which];
    const int32_t mask = (1 << shape->exponent) - 1, fraction = shape->fraction;
    int32_t *restrict total = work->log + first;

    for (int32_t t = 0; t < shape->tokens; t++) {
        const char *row = in + (int64_t)t * section->pitch * bytes;
        int16_t *restrict top = work->symbol + (int64_t)t * shape->channels + first;
        for (int32_t c = 0; c < section->channels; c++) {
            const int32_t value = (int32_t)(element(row, c, bytes) >> fraction);
            top[c] = (int16_t)value;
            total[c] += value & mask;
        }
    }
}

TARGET static void NAME(tops)(Encoder *work, const CodecShape *shape, int32_t which, int32_t first, const char *in)
{
    if (shape->bytes == 2)
        NAME(read_tops)(work, shape, which, first, in, 2);
    else
        NAME(read_tops)(work, shape, which, first, in, shape->bytes);
}

/* Signs and exponents of row t to symbols; those that the tables do not hold become exceptions and symbol 0. */
TARGET static void NAME(octaves)(Encoder *work, const CodecShape *shape, int32_t t)
{
    const int32_t channels = shape->channels, mask = (1 << shape->exponent) - 1, bits = shape->exponent;
    int16_t *restrict symbol = work->symbol + (int64_t)t * channels;
    const int16_t *restrict octave = work->octave, *restrict flip = work->flip;
    int16_t *restrict row = work->row;
    uint16_t beyond = 0;

    for (int32_t c = 0; c < channels; c++) {
        const int16_t k = (int16_t)(octave[c] - (symbol[c] & mask));
        row[c] = (int16_t)(k + ((symbol[c] >> bits ^ flip[c]) << 4));
        beyond |= (uint16_t)((k < 0) | (k >= CODEC_OCTAVES));
    }
    if (beyond)
        for (int32_t c = 0; c < channels; c++) {
            const int32_t k = octave[c] - (symbol[c] & mask);
            if (k < 0 || k >= CODEC_OCTAVES) {
                except(work, t, c, symbol[c]);
                row[c] = 0;
            }
        }
    memcpy(symbol, row, sizeof *row * (size_t)channels);
}

/* Count the signs and exponents of each channel, by their distance below work->octave. */
TARGET static void NAME(count)(Encoder *work, const CodecShape *shape)
{
    const int32_t channels = shape->channels;
    const int16_t mask = (int16_t)((1 << shape->exponent) - 1);
    uint8_t bin[CODEC_MAX_CHANNELS];

    memset(work->counts, 0, sizeof *work->counts * (size_t)channels);
    for (int32_t t = 0; t < shape->tokens; t++) {
        const int16_t *restrict top = work->symbol + (int64_t)t * channels, *restrict octave = work->octave;
        for (int32_t c = 0; c < channels; c++) {
            int16_t below = (int16_t)(octave[c] - (top[c] & mask));
            below = below > 0 ? below : 0;
            below = below < BINS - 1 ? below : BINS - 1;
            bin[c] = (uint8_t)(below + (top[c] > mask ? BINS : 0));
        }
        for (int32_t c = 0; c < channels; c++)
            work->counts[c][bin[c]]++;
    }
}

/* The lossless table, and the exponent of its octave 0, that code a channel's counted exponents shortest. `mean` is 256
 * times the mean of the exponents. */
TARGET static void NAME(choose)(const int16_t *counts, int32_t rows, int32_t mean, uint8_t *octave, uint8_t *table)
{
    int16_t window[HEADROOM + 1][2 * CODEC_OCTAVES]; /* counts of the symbols, by the bin of octave 0 */
    int32_t outside[HEADROOM + 1], best = INT32_MAX, negative = 0;

    for (int32_t bin = 0; bin < BINS; bin++)
        negative += counts[BINS + bin];
    const int32_t flip = 2 * negative > rows;
    for (int32_t base = 0; base <= HEADROOM; base++) {
        memcpy(window[base], counts + BINS * flip + base, sizeof *window / 2);
        memcpy(window[base] + CODEC_OCTAVES, counts + BINS * !flip + base, sizeof *window / 2);
        outside[base] = rows;
        for (int32_t k = 0; k < 2 * CODEC_OCTAVES; k++)
            outside[base] -= window[base][k];
    }
    for (int32_t i = 0; i < CODEC_LOSSLESS_TABLES; i++) {
        const int32_t top = (mean + codec_mean_octave[i] + 128) >> 8, base = (mean >> 8) + HEADROOM - top;
        int32_t cost = outside[base] * EXCEPTION_COST;
        for (int32_t k = 0; k < 2 * CODEC_OCTAVES; k++)
            cost += window[base][k] * codec_costs[i][k];
        if (cost < best) {
            best = cost;
            *octave = (uint8_t)clamp(top, 0, 255);
            *table = (uint8_t)(i | (flip ? CODEC_FLIP : 0));
        }
    }
}

/* The lowest b bits of n elements, n a multiple of 8, packed. Writes up to 8 bytes beyond them. */
INLINE uint8_t *NAME(squeeze)(const char *row, int32_t n, const int32_t bytes, const int32_t b, uint8_t *out)
{
    const uint64_t one = (1ull << b) - 1, two = (1ull << 2 * b) - 1;
    const int32_t step = bytes == 2 ? 4 : 2; /* elements that fit 64 bits beside the 7 bits that may be left over */
    uint64_t bits = 0, taken;
    int32_t held = 0;

    for (int32_t c = 0; c < n; c += step) {
        if (bytes == 2) {
            memcpy(&taken, row + (int64_t)c * 2, sizeof taken);
            taken = (taken & (one << 32 | one)) | (taken >> 16 & (one << 32 | one)) << b;
            taken = (taken & two) | (taken >> 32) << 2 * b;
        } else
            taken = (element(row, c, bytes) & one) | (element(row, c + 1, bytes) & one) << b;
        bits |= taken << held;
        held += step * b;
        memcpy(out, &bits, sizeof bits);
        out += held >> 3;
        bits >>= held & 0x38;
        held &= 7;
    }
    return out;
}

TARGET static uint8_t *NAME(fractions)(const CodecShape *shape, int32_t which, const char *row, uint8_t *out)
{
    const int32_t n = shape->section[which].channels;
    if (shape->fraction == 7)
        return NAME(squeeze)(row, n, 2, 7, out);
    if (shape->fraction == 10)
        return NAME(squeeze)(row, n, 2, 10, out);
    return NAME(squeeze)(row, n, shape->bytes, shape->fraction, out);
}

#undef INLINE
