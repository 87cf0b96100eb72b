/* The tables as coders use them, all derived from the frozen numbers of codec_tables.h by integer arithmetic. */
#include "codec_cpu.h"
#include "codec_tables.h"

uint32_t codec_lut[CODEC_TABLES * CODEC_SLOTS] __attribute__((aligned(64)));
uint32_t codec_symbols[CODEC_TABLES * 256];
uint8_t codec_reach[CODEC_LOSSY_TABLES];
int16_t codec_costs[CODEC_LOSSLESS_TABLES][2 * CODEC_OCTAVES];
int32_t codec_mean_octave[CODEC_LOSSLESS_TABLES];

int32_t codec_log2(float x)
{
    const uint32_t bits = codec_bits(x);
    return ((int32_t)(bits >> 23) - 127) * 256 + LOG2[bits >> 15 & 255];
}

int32_t codec_table_of(float mean_square)
{
    const int32_t log = codec_log2(mean_square);
    int32_t table = 0;
    while (table < CODEC_LOSSY_TABLES - 1 && log >= THRESHOLDS[table])
        table++;
    return table;
}

/* Give `symbol` of `table` the slots [first, first + frequency); returns the slot after them. */
static uint32_t enter(int32_t table, int32_t symbol, uint32_t frequency, uint32_t first)
{
    codec_symbols[table * 256 + symbol + 128] = frequency << 12 | first;
    for (uint32_t i = 0; i < frequency; i++)
        codec_lut[table * CODEC_SLOTS + (int32_t)(first + i)] = (uint32_t)symbol << 24 | frequency << 12 | i;
    return first + frequency;
}

void codec_tables_init(void)
{
    const uint16_t *half = LOSSY_HALVES;
    for (int32_t table = 0; table < CODEC_LOSSY_TABLES; table++) {
        const int32_t reach = LOSSY_REACH[table];
        uint32_t slot = 0;
        codec_reach[table] = (uint8_t)reach;
        for (int32_t symbol = -reach; symbol <= reach; symbol++)
            slot = enter(table, symbol, half[symbol < 0 ? -symbol : symbol], slot);
        half += reach + 1;
    }
    for (int32_t table = 0; table < CODEC_LOSSLESS_TABLES; table++) {
        const uint16_t *frequencies = &LOSSLESS_FREQUENCIES[table * 2 * CODEC_OCTAVES];
        uint32_t slot = 0, octaves = 0;
        for (int32_t symbol = 0; symbol < 2 * CODEC_OCTAVES; symbol++) {
            slot = enter(CODEC_LOSSY_TABLES + table, symbol, frequencies[symbol], slot);
            codec_costs[table][symbol] = (int16_t)(256 * CODEC_SLOT_BITS - codec_log2(frequencies[symbol]));
            octaves += frequencies[symbol] * (uint32_t)(symbol % CODEC_OCTAVES);
        }
        codec_mean_octave[table] = (int32_t)(octaves * 256 / CODEC_SLOTS);
    }
}
