/* What the C files of the codec share beside the bitstream.
 *   codec_tables.c  the tables as coders use them      codec_rope.c    cosines and sines that every host agrees on
 *   codec_encode.c  one stream from KV                 codec_decode.c  one stream to KV
 *   codec_py.c      the functions for Python       codec_load.c    from a coded part file into paged KV
 * codec_decode_isa.h and codec_encode_isa.h are the kernels, compiled once for each instruction set. */
#ifndef KVFS_CODEC_CPU_H
#define KVFS_CODEC_CPU_H

#include "codec.h"
#include "native.h"

/* codec_tables.c */
extern uint32_t codec_lut[CODEC_TABLES * CODEC_SLOTS];      /* entries by table and slot, see codec_advance */
extern uint32_t codec_symbols[CODEC_TABLES * 256];          /* frequency << 12 | first slot, by table and symbol + 128 */
extern uint8_t codec_reach[CODEC_LOSSY_TABLES];             /* the largest symbol of a lossy table */
extern int16_t codec_costs[CODEC_LOSSLESS_TABLES][2 * CODEC_OCTAVES]; /* 256 times the bits of a symbol */
extern int32_t codec_mean_octave[CODEC_LOSSLESS_TABLES];    /* 256 times the mean octave of a table */
void codec_tables_init(void);
int32_t codec_log2(float x);                                /* 256 log2(x) of a positive float, floor of -32512 for 0 */
int32_t codec_table_of(float mean_square);                  /* the lossy table for symbols of this mean square */

/* codec_rope.c: turns of `tokens` tokens from `position` on, [tokens][cosine, sine][pairs]. */
void codec_rotation(const float *inv_freq, int64_t pairs, int64_t position, int64_t tokens, float *rotation);

/* codec_decode.c */
typedef struct {
    const uint8_t *data;
    uint64_t size;
    const float *rotation; /* NULL: RoPE does not turn this stream */
    char *out[CODEC_MAX_SECTIONS]; /* where token 0 of a section goes */
} CodecJob;
/* Decode n streams in order. Returns n, or the index of a damaged one and its CODEC error. */
int64_t codec_decode(const CodecShape *shape, const CodecJob *jobs, int64_t n, int *error);

/* codec_encode.c */
typedef struct CodecScratch CodecScratch;
CodecScratch *codec_scratch(const CodecShape *shape); /* NULL: no memory */
void codec_scratch_free(CodecScratch *scratch);
uint64_t codec_bound(const CodecShape *shape); /* the most bytes a stream can take */
/* Bytes written to out (codec_bound() at least), or 0: the values cannot be coded with loss. log_step are 256 log2 of
 * the steps relative to the standard deviation, by the kind of section. */
uint64_t codec_encode(const CodecShape *shape, const int32_t *log_step, const char *const *in, const float *rotation,
                      CodecScratch *scratch, uint8_t *out);

/* codec_py.c: which streams there are, as Python says it, checked. */
typedef struct {
    CodecShape shape;
    Py_buffer rotation; /* obj is NULL: none */
    int64_t *rows;      /* [n, columns], a private copy; the last columns are offsets of the sections in memory */
    Py_ssize_t n, columns;
} CodecStreams;
enum { CODEC_DECODE_COLUMNS = 3 }; /* before the offsets: where a stream starts, its size, whether RoPE turns it */
/* The sections of all streams lie inside nbytes at base. -1 with an exception set, and nothing to free. */
int codec_streams(CodecStreams *streams, PyObject *shape, PyObject *rotation, PyObject *array, Py_ssize_t columns,
                  const void *base, int64_t nbytes);
void codec_streams_free(CodecStreams *streams);
const char *codec_reason(int error);

/* Bytes from the first element of a section to its last. */
static inline int64_t codec_extent(const CodecShape *shape, int32_t i)
{
    const CodecSection *section = &shape->section[i];
    return ((int64_t)(shape->tokens - 1) * section->pitch + section->channels) * shape->bytes;
}

PyObject *py_codec_rotation(PyObject *self, PyObject *args);
PyObject *py_codec_encode(PyObject *self, PyObject *args);
PyObject *py_codec_decode(PyObject *self, PyObject *args);

/* codec_load.c */
PyObject *py_load_coded(PyObject *self, PyObject *args, PyObject *kwargs);

#endif
