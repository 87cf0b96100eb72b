/* The kernel over codec_warp(): a warp takes one stream after another. The tables lie in shared memory. */
#include "warp.h"

extern "C" __global__ void __launch_bounds__(256)
kvfs_decode(const CodecShape *shape_, const CodecTask *tasks, int32_t n, const uint4 *symbols, const uint4 *frequencies,
            int32_t n_tables, int32_t *errors)
{
    extern __shared__ uint4 shared[];
    __shared__ CodecShape shape;
    const int32_t symbol_words = n_tables * CODEC_SLOTS / 16, frequency_words = n_tables * 256 / 4;
    const int32_t warps = (int32_t)blockDim.x / CODEC_LANES, warp = (int32_t)threadIdx.x / CODEC_LANES;

    if (threadIdx.x == 0)
        shape = *shape_;
    for (int32_t i = (int32_t)threadIdx.x; i < symbol_words; i += (int32_t)blockDim.x)
        shared[i] = symbols[i];
    for (int32_t i = (int32_t)threadIdx.x; i < frequency_words; i += (int32_t)blockDim.x)
        shared[symbol_words + i] = frequencies[i];
    __syncthreads();
    const CodecWarpTables tables = {(const uint8_t *)shared, (const uint32_t *)(shared + symbol_words)};
    int32_t *row = (int32_t *)(shared + symbol_words + frequency_words) + warp * shape.channels;
    for (int32_t i = (int32_t)blockIdx.x * warps + warp; i < n; i += (int32_t)gridDim.x * warps) {
        const CodecTask task = tasks[i];
        const int error = codec_warp(&shape, &task, &tables, row);
        if (threadIdx.x % CODEC_LANES == 0)
            errors[i] = error;
        __syncwarp();
    }
}
