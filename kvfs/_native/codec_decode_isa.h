/* The decoder; codec_decode.c includes this once for each instruction set, with
 *   TARGET  the attribute of its functions, NAME(x) their names, and LANES_AVX512 or LANES_AVX2 or neither.
 * Two streams are decoded side by side: a step of rANS is a chain of dependent operations, and two chains overlap. */

#define INLINE TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

#if defined(LANES_AVX512) || defined(LANES_AVX2)
/* Entries of the table at eight indices. Faster than the gather instruction, which is slow or slowed down on many CPUs. */
INLINE __m256i NAME(entries)(__m256i index)
{
    const __m128i low = _mm256_castsi256_si128(index), high = _mm256_extracti128_si256(index, 1);
    const uint64_t i[4] = {(uint64_t)_mm_cvtsi128_si64(low), (uint64_t)_mm_extract_epi64(low, 1),
                           (uint64_t)_mm_cvtsi128_si64(high), (uint64_t)_mm_extract_epi64(high, 1)};
    const int *lut = (const int *)codec_lut;
    const __m128i a = _mm_insert_epi32(_mm_cvtsi32_si128(lut[(uint32_t)i[0]]), lut[i[0] >> 32], 1);
    const __m128i b = _mm_insert_epi32(_mm_cvtsi32_si128(lut[(uint32_t)i[1]]), lut[i[1] >> 32], 1);
    const __m128i c = _mm_insert_epi32(_mm_cvtsi32_si128(lut[(uint32_t)i[2]]), lut[i[2] >> 32], 1);
    const __m128i d = _mm_insert_epi32(_mm_cvtsi32_si128(lut[(uint32_t)i[3]]), lut[i[3] >> 32], 1);
    return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}
#endif

/* A row of symbols of each of n streams, by 32 interleaved rANS decoders. Reads up to 32 words beyond those it takes. */
INLINE void NAME(rows)(Lane *lane, const int n, int32_t channels)
{
#if defined(LANES_AVX512)
    const __m512i slots = _mm512_set1_epi32(CODEC_SLOTS - 1), twelve = _mm512_set1_epi32(0xfff);
    const __m512i low = _mm512_set1_epi32(CODEC_LOW);
    __m512i x[2][2], e[2][2];
    const uint8_t *words[2];
    for (int s = 0; s < n; s++) {
        words[s] = lane[s].words;
        for (int i = 0; i < 2; i++)
            x[s][i] = _mm512_load_si512(lane[s].state + 16 * i);
    }
    for (int32_t c = 0; c < channels; c += CODEC_LANES) {
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int s = 0; s < n; s++) {
                const __m512i table = _mm512_load_si512(lane[s].table + c + 16 * i);
                const __m512i index = _mm512_add_epi32(_mm512_and_si512(x[s][i], slots), table);
                e[s][i] = _mm512_inserti64x4(
                    _mm512_castsi256_si512(NAME(entries)(_mm512_castsi512_si256(index))),
                    NAME(entries)(_mm512_extracti64x4_epi64(index, 1)), 1);
            }
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int s = 0; s < n; s++) {
                const __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(e[s][i], 12), twelve);
                _mm512_store_si512(lane[s].symbol + c + 16 * i, _mm512_srai_epi32(e[s][i], 24));
                const __m512i y = _mm512_add_epi32(
                    _mm512_mullo_epi32(frequency, _mm512_srli_epi32(x[s][i], CODEC_SLOT_BITS)),
                    _mm512_and_si512(e[s][i], twelve));
                const __mmask16 need = _mm512_cmplt_epu32_mask(y, low);
                const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)words[s]));
                words[s] += 2 * __builtin_popcount(need);
                x[s][i] = _mm512_or_si512(_mm512_mask_slli_epi32(y, need, y, 16),
                                          _mm512_maskz_expand_epi32(need, next));
            }
    }
    for (int s = 0; s < n; s++) {
        lane[s].words = words[s];
        for (int i = 0; i < 2; i++)
            _mm512_store_si512(lane[s].state + 16 * i, x[s][i]);
    }
#elif defined(LANES_AVX2)
    const __m256i slots = _mm256_set1_epi32(CODEC_SLOTS - 1), twelve = _mm256_set1_epi32(0xfff);
    const __m256i low = _mm256_set1_epi32(CODEC_LOW);
    __m256i x[2][4];
    const uint8_t *words[2];
    for (int s = 0; s < n; s++) {
        words[s] = lane[s].words;
        for (int i = 0; i < 4; i++)
            x[s][i] = _mm256_load_si256((const void *)(lane[s].state + 8 * i));
    }
    for (int32_t c = 0; c < channels; c += CODEC_LANES)
        UNROLL for (int i = 0; i < 4; i++)
            UNROLL for (int s = 0; s < n; s++) {
                const __m256i table = _mm256_load_si256((const void *)(lane[s].table + c + 8 * i));
                const __m256i e = NAME(entries)(_mm256_add_epi32(_mm256_and_si256(x[s][i], slots), table));
                const __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(e, 12), twelve);
                _mm256_store_si256((void *)(lane[s].symbol + c + 8 * i), _mm256_srai_epi32(e, 24));
                const __m256i y = _mm256_add_epi32(
                    _mm256_mullo_epi32(frequency, _mm256_srli_epi32(x[s][i], CODEC_SLOT_BITS)),
                    _mm256_and_si256(e, twelve));
                const __m256i need = _mm256_cmpgt_epi32(low, y);
                const unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(need));
                const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)words[s]));
                const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(expand + mask)));
                const __m256i taken = _mm256_permutevar8x32_epi32(next, place);
                words[s] += 2 * __builtin_popcount(mask);
                x[s][i] = _mm256_blendv_epi8(y, _mm256_or_si256(_mm256_slli_epi32(y, 16), taken), need);
            }
    for (int s = 0; s < n; s++) {
        lane[s].words = words[s];
        for (int i = 0; i < 4; i++)
            _mm256_store_si256((void *)(lane[s].state + 8 * i), x[s][i]);
    }
#else
    for (int s = 0; s < n; s++)
        for (int32_t c = 0; c < channels; c += CODEC_LANES)
            for (int i = 0; i < CODEC_LANES; i++) {
                const uint32_t x = lane[s].state[i], e = codec_lut[lane[s].table[c + i] + (x & (CODEC_SLOTS - 1))];
                const uint32_t y = codec_advance(x, e), need = y < CODEC_LOW, word = codec_u16(lane[s].words);
                lane[s].symbol[c + i] = (int32_t)e >> 24;
                lane[s].state[i] = need ? y << 16 | word : y;
                lane[s].words += 2 * need;
            }
#endif
}

/* A row of a lossy section of n channels, which RoPE turns in halves or not at all, from symbols to bfloat16: one loop. */
INLINE void NAME(finish)(const Lane *lane, int32_t first, const int32_t n, const float *restrict turn, float scale,
                         uint16_t *restrict out)
{
    const int32_t *restrict symbol = lane->symbol + first;
    const float *restrict step = lane->step + first, *restrict mean = lane->mean + first;

    if (turn)
        for (int32_t i = 0; i < n / 2; i++) {
            const float a = (float)symbol[i] * step[i] + mean[i];
            const float b = (float)symbol[n / 2 + i] * step[n / 2 + i] + mean[n / 2 + i];
            out[i] = (uint16_t)codec_to_bf16(a * turn[i] - b * turn[n / 2 + i]);
            out[n / 2 + i] = (uint16_t)codec_to_bf16(b * turn[i] + a * turn[n / 2 + i]);
        }
    else if (scale == 0)
        for (int32_t c = 0; c < n; c++)
            out[c] = (uint16_t)codec_to_bf16((float)symbol[c] * step[c] + mean[c]);
    else
        for (int32_t c = 0; c < n; c++)
            out[c] = (uint16_t)codec_to_bf16((float)symbol[c] * scale);
}

/* The same for any section and either element type. */
TARGET static void NAME(finish_any)(Lane *lane, const CodecSection *section, int32_t first, const float *turn,
                                    float scale, bool half, uint16_t *out)
{
    const int32_t *symbol = lane->symbol + first;
    float value[CODEC_MAX_CHANNELS];

    for (int32_t c = 0; c < section->channels; c++)
        value[c] = scale == 0 ? (float)symbol[c] * lane->step[first + c] + lane->mean[first + c]
                              : (float)symbol[c] * scale;
    if (turn) {
        const int32_t pairs = section->rope_pairs, wide = section->rope_style == CODEC_HALVES;
        float *v = value + section->rope_first;
        for (int32_t i = 0; i < pairs; i++) {
            float *a = v + (wide ? i : 2 * i), *b = a + (wide ? pairs : 1);
            const float x = *a, y = *b;
            *a = x * turn[i] - y * turn[pairs + i];
            *b = y * turn[i] + x * turn[pairs + i];
        }
    }
    for (int32_t c = 0; c < section->channels; c++)
        out[c] = (uint16_t)(half ? codec_to_half(value[c]) : codec_to_bf16(value[c]));
}

INLINE void NAME(finish_section)(Lane *lane, const CodecShape *shape, int32_t which, int32_t first, int32_t t)
{
    const CodecSection *section = &shape->section[which];
    const int32_t n = section->channels, token = t + shape->raw_tokens;
    const bool by_token = section->kind == CODEC_BY_TOKEN, turned = section->rope_pairs && lane->rotation;
    const float scale = by_token ? lane->step[first] * codec_token_scale(lane->stream.side[which] + n + 4, t) : 0;
    const float *turn = turned ? lane->rotation + (int64_t)token * 2 * section->rope_pairs : NULL;
    uint16_t *out = (uint16_t *)lane->out[which] + (int64_t)token * section->pitch;

    if (shape->exponent == 5 || (turned && (2 * section->rope_pairs != n || section->rope_style != CODEC_HALVES)))
        NAME(finish_any)(lane, section, first, turn, scale, shape->exponent == 5, out);
    else if (n == 64)
        NAME(finish)(lane, first, 64, turn, scale, out);
    else if (n == 128)
        NAME(finish)(lane, first, 128, turn, scale, out);
    else if (n == 256)
        NAME(finish)(lane, first, 256, turn, scale, out);
    else
        NAME(finish)(lane, first, n, turn, scale, out);
}

/* The sign and exponent that a lossless symbol stands for. */
INLINE uint32_t NAME(top)(int32_t symbol, uint32_t octave, uint32_t flip, const int32_t exponent)
{
    const uint32_t sign = ((uint32_t)symbol & CODEC_OCTAVES) << (exponent - 4) ^ flip;
    return sign | ((octave - ((uint32_t)symbol & (CODEC_OCTAVES - 1))) & ((1u << exponent) - 1));
}

/* n elements of two bytes, n a multiple of 8, from symbols and from fractions of b bits (7 or 10). Reads up to 24
 * elements beyond the end of each array, and up to 64 bytes beyond the fractions. */
INLINE void NAME(join)(const int32_t *restrict symbol, const uint16_t *restrict octave, const uint16_t *restrict flip,
                       const uint8_t *restrict fractions, int32_t n, const int32_t b, uint16_t *restrict out)
{
#if defined(LANES_AVX512)
    const Unpacking *u = &unpacking[b == 10];
    const __m512i word = _mm512_load_si512(u->word), byte = _mm512_load_si512(u->byte);
    const __m512i factor = _mm512_load_si512(u->factor), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i negative = _mm512_set1_epi16(CODEC_OCTAVES), octaves = _mm512_set1_epi16(CODEC_OCTAVES - 1);
    const __m512i exponents = _mm512_set1_epi16((1 << (15 - b)) - 1);
    for (int32_t c = 0; c < n; c += 32) {
        const __m512i packed = _mm512_permutexvar_epi32(word, _mm512_loadu_si512(fractions + c / 8 * b));
        const __m512i shifted = _mm512_mullo_epi16(_mm512_shuffle_epi8(packed, byte), factor);
        const __m512i pairs = _mm512_packs_epi32(_mm512_loadu_si512(symbol + c), _mm512_loadu_si512(symbol + c + 16));
        const __m512i s = _mm512_permutexvar_epi64(order, pairs);
        const __m512i sign = _mm512_xor_si512(_mm512_slli_epi16(_mm512_and_si512(s, negative), 11 - b),
                                              _mm512_loadu_si512(flip + c));
        const __m512i exponent = _mm512_and_si512(
            _mm512_sub_epi16(_mm512_loadu_si512(octave + c), _mm512_and_si512(s, octaves)), exponents);
        const __m512i value = _mm512_or_si512(_mm512_slli_epi16(_mm512_or_si512(sign, exponent), b),
                                              _mm512_srli_epi16(shifted, 16 - b));
        if (n - c >= 32)
            _mm512_storeu_si512(out + c, value);
        else
            _mm512_mask_storeu_epi16(out + c, (1u << (n - c)) - 1, value);
    }
#elif defined(LANES_AVX2)
    const Unpacking *u = &unpacking[b == 10];
    const __m256i word = _mm256_load_si256((const void *)u->word), byte = _mm256_load_si256((const void *)u->byte);
    const __m256i factor = _mm256_load_si256((const void *)u->factor);
    const __m256i negative = _mm256_set1_epi16(CODEC_OCTAVES), octaves = _mm256_set1_epi16(CODEC_OCTAVES - 1);
    const __m256i exponents = _mm256_set1_epi16((1 << (15 - b)) - 1);
    for (int32_t c = 0; c < n; c += 16) {
        const __m256i bytes = _mm256_loadu_si256((const void *)(fractions + c / 8 * b));
        const __m256i packed = _mm256_permutevar8x32_epi32(bytes, word);
        const __m256i shifted = _mm256_mullo_epi16(_mm256_shuffle_epi8(packed, byte), factor);
        const __m256i pairs = _mm256_packs_epi32(_mm256_loadu_si256((const void *)(symbol + c)),
                                                 _mm256_loadu_si256((const void *)(symbol + c + 8)));
        const __m256i s = _mm256_permute4x64_epi64(pairs, 0xd8);
        const __m256i sign = _mm256_xor_si256(_mm256_slli_epi16(_mm256_and_si256(s, negative), 11 - b),
                                              _mm256_loadu_si256((const void *)(flip + c)));
        const __m256i exponent = _mm256_and_si256(
            _mm256_sub_epi16(_mm256_loadu_si256((const void *)(octave + c)), _mm256_and_si256(s, octaves)), exponents);
        const __m256i value = _mm256_or_si256(_mm256_slli_epi16(_mm256_or_si256(sign, exponent), b),
                                              _mm256_srli_epi16(shifted, 16 - b));
        if (n - c >= 16)
            _mm256_storeu_si256((void *)(out + c), value);
        else
            _mm_storeu_si128((void *)(out + c), _mm256_castsi256_si128(value));
    }
#else
    uint16_t fraction[CODEC_MAX_CHANNELS];
    for (int32_t c = 0; c < n; c += 4) {
        const uint64_t four = codec_spread(fractions, c, b);
        memcpy(fraction + c, &four, sizeof four);
    }
    for (int32_t c = 0; c < n; c++)
        out[c] = (uint16_t)(NAME(top)(symbol[c], octave[c], flip[c], 15 - b) << b | fraction[c]);
#endif
}

/* Row t of a lossless section but for its exceptions. */
INLINE void NAME(join_section)(Lane *lane, const CodecShape *shape, int32_t which, int32_t first, int32_t t)
{
    const CodecSection *section = &shape->section[which];
    const int32_t n = section->channels, b = shape->fraction, *symbol = lane->symbol + first;
    const uint16_t *octave = lane->octave + first, *flip = lane->flip + first;
    const uint8_t *fractions = lane->stream.residual + ((int64_t)t * shape->channels + first) / 8 * b;
    char *out = lane->out[which] + (int64_t)t * section->pitch * shape->bytes;

    if (b == 7)
        NAME(join)(symbol, octave, flip, fractions, n, 7, (uint16_t *)out);
    else if (b == 10)
        NAME(join)(symbol, octave, flip, fractions, n, 10, (uint16_t *)out);
    else
        for (int32_t c = 0; c < n; c++) {
            const uint32_t top = NAME(top)(symbol[c], octave[c], flip[c], shape->exponent);
            const uint32_t value = top << b | codec_packed(fractions, c, b);
            memcpy(out + (int64_t)c * shape->bytes, &value, (size_t)shape->bytes);
        }
}

/* Decode n streams, which lane_begin() has prepared. False if one is damaged: its lane says how. */
INLINE bool NAME(decode)(Lane *lane, const int n, const CodecShape *shape)
{
    for (int32_t t = 0; t < shape->tokens - shape->raw_tokens; t++) {
        for (int s = 0; s < n; s++)
            if (!lane_ready(&lane[s], shape->channels))
                return false;
        NAME(rows)(lane, n, shape->channels);
        for (int s = 0; s < n; s++) {
            if (!shape->lossless && !lane_except(&lane[s], shape, t))
                return false;
            for (int32_t i = 0, first = 0; i < shape->sections; first += shape->section[i++].channels)
                if (shape->lossless)
                    NAME(join_section)(&lane[s], shape, i, first, t);
                else
                    NAME(finish_section)(&lane[s], shape, i, first, t);
            if (shape->lossless && !lane_except(&lane[s], shape, t))
                return false;
        }
    }
    return true;
}

TARGET static bool NAME(decode_one)(Lane *lane, const CodecShape *shape)
{
    return NAME(decode)(lane, 1, shape);
}

TARGET static bool NAME(decode_two)(Lane *lane, const CodecShape *shape)
{
    return NAME(decode)(lane, 2, shape);
}

#undef INLINE
#undef UNROLL
