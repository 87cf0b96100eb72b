/* codec_rotation(), codec_encode() and codec_decode() for Python: arguments checked, then streams with the GIL released. */
#include "codec_cpu.h"

#include <stdlib.h>

enum { SHAPE_HEAD = 4, SHAPE_SECTION = 6, COLUMNS_ENCODE = 1 };

static const struct {
    int32_t bytes, exponent, fraction;
} DTYPES[] = {{2, 8, 7}, {2, 5, 10}, {1, 4, 3}, {1, 5, 2}, {4, 8, 23}}; /* BF16 F16 F8_E4M3 F8_E5M2 F32 */

static int refuse(const char *why)
{
    PyErr_SetString(PyExc_ValueError, why);
    return -1;
}

/* shape: lossless, dtype, tokens, raw_tokens, then for each section: kind, channels, pitch, rope_first, rope_pairs,
 * rope_style. */
static int shape_of(PyObject *array, CodecShape *shape)
{
    Py_buffer view;
    int rc = -1;

    if (int64_view(array, 1, "shape", &view) < 0)
        return -1;
    const int64_t *v = view.buf;
    const Py_ssize_t sections = (view.shape[0] - SHAPE_HEAD) / SHAPE_SECTION;
    bool good = sections >= 1 && sections <= CODEC_MAX_SECTIONS
        && view.shape[0] == SHAPE_HEAD + SHAPE_SECTION * sections;
    for (Py_ssize_t i = 0; good && i < view.shape[0]; i++)
        good = v[i] >= 0 && v[i] <= INT32_MAX;
    if (good && (good = v[1] < (int64_t)(sizeof DTYPES / sizeof *DTYPES))) {
        *shape = (CodecShape){
            .lossless = v[0] != 0, .bytes = DTYPES[v[1]].bytes, .exponent = DTYPES[v[1]].exponent,
            .fraction = DTYPES[v[1]].fraction, .tokens = (int32_t)v[2], .raw_tokens = (int32_t)v[3],
            .sections = (int32_t)sections,
        };
        good = shape->tokens > 0 && shape->tokens <= CODEC_MAX_TOKENS && shape->raw_tokens <= shape->tokens
            && (shape->lossless ? shape->raw_tokens == 0 : shape->bytes == 2);
    }
    for (Py_ssize_t i = 0; good && i < sections; i++) {
        const int64_t *s = v + SHAPE_HEAD + SHAPE_SECTION * i;
        shape->section[i] = (CodecSection){(int32_t)s[0], (int32_t)s[1], (int32_t)s[2],
                                           (int32_t)s[3], (int32_t)s[4], (int32_t)s[5]};
        good = s[0] <= CODEC_BY_TOKEN && s[1] > 0 && s[1] <= CODEC_MAX_CHANNELS && s[1] % 8 == 0 && s[2] >= s[1]
            && s[3] + 2 * s[4] <= s[1] && s[5] <= CODEC_NEIGHBOURS;
        shape->channels += (int32_t)s[1];
    }
    if (good && shape->channels <= CODEC_MAX_CHANNELS && shape->channels % CODEC_LANES == 0)
        rc = 0;
    else
        refuse("not a shape that the codec can code");
    PyBuffer_Release(&view);
    return rc;
}

/* Rows of a section from `offset` on, inside nbytes at `base` and aligned to elements. */
static bool section_fits(const CodecShape *shape, int32_t i, int64_t offset, const void *base, int64_t nbytes)
{
    return offset >= 0 && offset <= nbytes - codec_extent(shape, i)
        && ((uintptr_t)base + (uintptr_t)offset) % (unsigned)shape->bytes == 0;
}

void codec_streams_free(CodecStreams *streams)
{
    free(streams->rows);
    streams->rows = NULL;
    if (streams->rotation.obj)
        PyBuffer_Release(&streams->rotation);
}

static int streams_fill(CodecStreams *streams, PyObject *shape, PyObject *rotation, PyObject *array,
                        Py_ssize_t columns, const void *base, int64_t nbytes)
{
    Py_buffer view;

    if (shape_of(shape, &streams->shape) < 0)
        return -1;
    if (rotation != Py_None) {
        if (PyObject_GetBuffer(rotation, &streams->rotation, PyBUF_SIMPLE) < 0)
            return -1;
        for (int32_t i = 0; i < streams->shape.sections; i++) {
            const int64_t pairs = streams->shape.section[i].rope_pairs;
            if ((uintptr_t)streams->rotation.buf % sizeof(float) != 0
                || (pairs && streams->rotation.len != (int64_t)sizeof(float) * 2 * pairs * streams->shape.tokens))
                return refuse("rotation must hold float32 [tokens, 2, pairs]");
        }
    }
    if (int64_view(array, 2, "streams", &view) < 0)
        return -1;
    streams->n = view.shape[0];
    streams->columns = columns + streams->shape.sections;
    streams->rows = view.shape[1] == streams->columns ? malloc((size_t)view.len + 1) : NULL;
    if (streams->rows)
        memcpy(streams->rows, view.buf, (size_t)view.len);
    else
        refuse("streams does not have the columns of this shape");
    PyBuffer_Release(&view);
    for (Py_ssize_t i = 0; streams->rows && i < streams->n; i++)
        for (int32_t s = 0; s < streams->shape.sections; s++)
            if (!section_fits(&streams->shape, s, streams->rows[i * streams->columns + columns + s], base, nbytes))
                return refuse("a stream's rows lie outside the memory, or not at a multiple of their element size");
    return streams->rows ? 0 : -1;
}

int codec_streams(CodecStreams *streams, PyObject *shape, PyObject *rotation, PyObject *array, Py_ssize_t columns,
                  const void *base, int64_t nbytes)
{
    *streams = (CodecStreams){0};
    const int rc = streams_fill(streams, shape, rotation, array, columns, base, nbytes);
    if (rc < 0)
        codec_streams_free(streams);
    return rc;
}

PyObject *py_codec_rotation(PyObject *Py_UNUSED(self), PyObject *args)
{
    Py_buffer frequencies;
    long long position, tokens;
    PyObject *rotation = NULL;

    if (!PyArg_ParseTuple(args, "y*LL:codec_rotation", &frequencies, &position, &tokens))
        return NULL;
    const int64_t pairs = frequencies.len / (Py_ssize_t)sizeof(float);
    if (position < 0 || position > UINT32_MAX || tokens <= 0 || tokens > CODEC_MAX_TOKENS || pairs > CODEC_MAX_CHANNELS
        || frequencies.len % (Py_ssize_t)sizeof(float) || (uintptr_t)frequencies.buf % sizeof(float))
        refuse("inv_freq must be float32, position and tokens in range");
    else
        rotation = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(tokens * 2 * pairs * (int64_t)sizeof(float)));
    if (rotation) {
        float *out = (float *)PyByteArray_AS_STRING(rotation);
        Py_BEGIN_ALLOW_THREADS
        codec_rotation(frequencies.buf, pairs, position, tokens, out);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&frequencies);
    return rotation;
}

/* A list of streams; None if one cannot be coded with loss; NULL with an exception set. */
static PyObject *encode_streams(CodecStreams *streams, const int32_t *log_step, const Py_buffer *src)
{
    CodecScratch *scratch = codec_scratch(&streams->shape);
    uint8_t *out = malloc(codec_bound(&streams->shape));
    PyObject *list = scratch && out ? PyList_New(0) : PyErr_NoMemory();

    for (Py_ssize_t i = 0; list && i < streams->n; i++) {
        const int64_t *row = streams->rows + i * streams->columns;
        const float *rotation = row[0] ? streams->rotation.buf : NULL;
        const char *in[CODEC_MAX_SECTIONS];
        uint64_t size;
        for (int32_t s = 0; s < streams->shape.sections; s++)
            in[s] = (const char *)src->buf + row[COLUMNS_ENCODE + s];
        Py_BEGIN_ALLOW_THREADS
        size = codec_encode(&streams->shape, log_step, in, rotation, scratch, out);
        Py_END_ALLOW_THREADS
        if (!size) {
            Py_SETREF(list, Py_NewRef(Py_None));
            break;
        }
        PyObject *stream = PyBytes_FromStringAndSize((char *)out, (Py_ssize_t)size);
        if (!stream || PyList_Append(list, stream) < 0)
            Py_CLEAR(list);
        Py_XDECREF(stream);
    }
    free(out);
    if (scratch)
        codec_scratch_free(scratch);
    return list;
}

PyObject *py_codec_encode(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *shape, *rotation, *places, *result = NULL;
    int steps[CODEC_MAX_SECTIONS];
    CodecStreams streams;
    Py_buffer src;

    if (!PyArg_ParseTuple(args, "O(ii)Oy*O:codec_encode", &shape, &steps[0], &steps[1], &rotation, &src, &places))
        return NULL;
    if (abs(steps[0]) > 8192 || abs(steps[1]) > 8192)
        refuse("a step of more than 2^32 or less than 2^-32");
    else if (codec_streams(&streams, shape, rotation, places, COLUMNS_ENCODE, src.buf, src.len) == 0) {
        result = encode_streams(&streams, steps, &src);
        codec_streams_free(&streams);
    }
    PyBuffer_Release(&src);
    return result;
}

const char *codec_reason(int error)
{
    static const char *const REASONS[] = {NULL, "truncated", "parameters", "exceptions", "words", "states"};
    return REASONS[error];
}

static PyObject *decode_streams(const CodecStreams *streams, const Py_buffer *coded, const Py_buffer *dst)
{
    CodecJob *jobs = malloc(sizeof *jobs * (size_t)streams->n + 1);
    int64_t bad;
    int error = CODEC_OK;

    if (!jobs)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < streams->n; i++) {
        const int64_t *row = streams->rows + i * streams->columns;
        if (row[0] < 0 || row[1] < 0 || row[0] > coded->len || row[1] > coded->len - row[0]) {
            refuse("a stream lies outside the coded data");
            free(jobs);
            return NULL;
        }
        jobs[i] = (CodecJob){(const uint8_t *)coded->buf + row[0], (uint64_t)row[1],
                             row[2] ? streams->rotation.buf : NULL, {0}};
        for (int32_t s = 0; s < streams->shape.sections; s++)
            jobs[i].out[s] = (char *)dst->buf + row[CODEC_DECODE_COLUMNS + s];
    }
    Py_BEGIN_ALLOW_THREADS
    bad = codec_decode(&streams->shape, jobs, streams->n, &error);
    Py_END_ALLOW_THREADS
    free(jobs);
    return bad < streams->n ? Py_BuildValue("Ls", (long long)bad, codec_reason(error)) : Py_NewRef(Py_None);
}

PyObject *py_codec_decode(PyObject *Py_UNUSED(self), PyObject *args)
{
    PyObject *shape, *rotation, *array, *result = NULL;
    Py_buffer coded, dst;
    CodecStreams streams;

    if (!PyArg_ParseTuple(args, "OOy*w*O:codec_decode", &shape, &rotation, &coded, &dst, &array))
        return NULL;
    if (codec_streams(&streams, shape, rotation, array, CODEC_DECODE_COLUMNS, dst.buf, dst.len) == 0) {
        result = decode_streams(&streams, &coded, &dst);
        codec_streams_free(&streams);
    }
    PyBuffer_Release(&coded);
    PyBuffer_Release(&dst);
    return result;
}
