/* load_coded(): coded part files into paged KV. A few layers at a time are read and verified, and then two heads at a time
 * decoded and scattered: what lies between the file and the blocks never leaves the processor's cache. Several parts in
 * a call, as a thread that comes back for each waits for the interpreter each time. */
#include "codec_cpu.h"
#include "transfer.h"

enum {
    READ_BYTES = 256 << 10, /* layers are read together until they are so many bytes */
    SIDE_BY_SIDE = 2,       /* streams that codec_decode() decodes at the same time */
    LINE = 64,
};

typedef struct {
    Load load;
    Plan plan; /* load.plan */
    CodecStreams streams;
    Py_buffer sums_view;
    int64_t *bounds;  /* where each layer's streams begin, and where the last ones end; a private copy */
    const char *sums; /* u64 for every layer, unaligned */
    int64_t start;    /* of the streams in the file */
    int64_t layers, heads, tensors;
    int64_t slot[CODEC_MAX_SECTIONS + 1]; /* where the rows of each tensor lie in the memory of a stream, and its size */
} CodedLoad;

static int refuse(const char *why)
{
    PyErr_SetString(PyExc_ValueError, why);
    return -1;
}

static const Op *op_of(const CodedLoad *coded, int64_t layer, int64_t tensor)
{
    return coded->load.plan->ops + layer * coded->tensors + tensor;
}

/* The tensor that a section belongs to: K and V have one each, a latent has one of one or two sections. */
static int64_t tensor_of(const CodedLoad *coded, int32_t section)
{
    return section < coded->tensors ? section : coded->tensors - 1;
}

/* Where a section of a stream begins inside its head of its tensor. */
static int64_t inside(const CodedLoad *coded, int64_t stream, int32_t section)
{
    const int64_t offset = coded->streams.rows[stream * coded->streams.columns + CODEC_DECODE_COLUMNS + section];
    const Op *op = op_of(coded, stream / coded->heads, tensor_of(coded, section));
    return offset - op->file_off - stream % coded->heads * op->head_bytes;
}

/* That streams, layers and tensors are those of one part. */
static int check(CodedLoad *coded, Py_ssize_t sums)
{
    const int64_t *bounds = coded->bounds;
    const CodecShape *shape = &coded->streams.shape;
    const Py_ssize_t ops = coded->load.plan->n_ops;

    if (coded->layers < 1 || coded->streams.n < 1 || coded->streams.n % coded->layers || ops % coded->layers
        || sums != 8 * coded->layers)
        return refuse("streams, ops and sums must be those of the layers that bounds delimit");
    coded->heads = coded->streams.n / coded->layers;
    coded->tensors = ops / coded->layers;
    if (coded->tensors < 1 || coded->tensors > shape->sections)
        return refuse("a layer has a tensor for each section, or one for all");
    for (int64_t i = 0; i < coded->layers; i++)
        if (bounds[i] < 0 || bounds[i] > bounds[i + 1] || bounds[i + 1] > INT64_MAX / 2 - coded->start)
            return refuse("bounds must not decrease");
    for (int64_t t = 0; t < coded->tensors; t++) {
        const Op *first = op_of(coded, 0, t);
        coded->slot[t + 1] = coded->slot[t] + (first->head_bytes + LINE - 1) / LINE * LINE;
        for (int64_t i = 0; i < coded->layers; i++) {
            const Op *op = op_of(coded, i, t);
            if (op->heads != coded->heads || op->tokens != shape->tokens || op->head_bytes != first->head_bytes
                || op->itemsize != shape->bytes)
                return refuse("tensors must have the shape of the streams");
        }
    }
    for (int64_t i = 0; i < coded->streams.n; i++) {
        const int64_t *row = coded->streams.rows + i * coded->streams.columns, layer = i / coded->heads;
        if (row[0] < bounds[layer] || row[1] < 0 || row[0] > bounds[layer + 1] - row[1])
            return refuse("a stream lies outside its layer");
        for (int32_t s = 0; s < shape->sections; s++) {
            const int64_t at = inside(coded, i, s);
            if (at < 0 || at > op_of(coded, layer, tensor_of(coded, s))->head_bytes - codec_extent(shape, s))
                return refuse("the rows of a stream lie outside its head");
        }
    }
    return 0;
}

static bool bad(CodedLoad *coded, int outcome, int64_t stream, const char *why)
{
    coded->load.result.index = stream / coded->heads;
    coded->load.result.head = stream % coded->heads;
    coded->load.result.why = why;
    return load_stop(&coded->load, outcome);
}

static bool verify_layer(CodedLoad *coded, int64_t layer, const char *data)
{
    const int64_t *bounds = coded->bounds;
    uint64_t want;

    memcpy(&want, coded->sums + layer * (int64_t)sizeof want, sizeof want);
    return xxh3_64(data, (size_t)(bounds[layer + 1] - bounds[layer])) == want
        || bad(coded, LOAD_BAD_SUM, layer * coded->heads, NULL);
}

/* Decode n streams, the first of which is `stream`, into `memory`, and scatter them. `data` is at `base` in the file. */
static bool move_streams(CodedLoad *coded, int64_t stream, int64_t n, const char *data, int64_t base, char *memory)
{
    const CodecShape *shape = &coded->streams.shape;
    const Plan *plan = coded->load.plan;
    const int64_t size = coded->slot[coded->tensors];
    CodecJob jobs[SIDE_BY_SIDE];
    int error = CODEC_OK;

    for (int64_t j = 0; j < n; j++) {
        const int64_t *row = coded->streams.rows + (stream + j) * coded->streams.columns;
        jobs[j] = (CodecJob){(const uint8_t *)data + (row[0] - base), (uint64_t)row[1],
                             row[2] ? coded->streams.rotation.buf : NULL, {0}};
        for (int32_t s = 0; s < shape->sections; s++)
            jobs[j].out[s] = memory + j * size + coded->slot[tensor_of(coded, s)] + inside(coded, stream + j, s);
    }
    const int64_t good = codec_decode(shape, jobs, n, &error);
    if (good < n)
        return bad(coded, LOAD_BAD_STREAM, stream + good, codec_reason(error));
    for (int64_t j = 0; j < n; j++)
        for (int64_t t = 0; t < coded->tensors; t++) {
            const Op *op = op_of(coded, (stream + j) / coded->heads, t);
            const Piece piece = {(stream + j) % coded->heads, 1, plan->first, plan->last};
            const char *rows = memory + j * size + coded->slot[t] + plan->first * op->row_bytes;
            if (!load_scatter(&coded->load, op, piece, rows, op->head_bytes))
                return false;
        }
    return true;
}

/* Layers [first, last). */
static bool move_layers(CodedLoad *coded, int64_t first, int64_t last)
{
    const int64_t *bounds = coded->bounds, nbytes = bounds[last] - bounds[first];
    const int64_t room = (nbytes + LINE - 1) / LINE * LINE;

    if (token_cancelled(coded->load.token))
        return load_stop(&coded->load, LOAD_CANCELLED);
    if (!load_reserve(&coded->load, room + SIDE_BY_SIDE * coded->slot[coded->tensors]))
        return false;
    char *data = coded->load.bounce->data;
    if (!load_read(&coded->load, data, nbytes, coded->start + bounds[first]))
        return false;
    for (int64_t i = first; i < last; i++)
        if (!verify_layer(coded, i, data + bounds[i] - bounds[first]))
            return false;
    for (int64_t i = first * coded->heads, n; i < last * coded->heads; i += n) {
        n = last * coded->heads - i < SIDE_BY_SIDE ? 1 : SIDE_BY_SIDE;
        if (!move_streams(coded, i, n, data, bounds[first], data + room))
            return false;
    }
    return true;
}

static bool run(CodedLoad *coded)
{
    const int64_t *bounds = coded->bounds;
    bool good = true;

    if (coded->plan.first >= coded->plan.last)
        return true;
    if (!load_begin(&coded->load))
        return false;
    for (int64_t first = 0, last; good && first < coded->layers; first = last) {
        for (last = first + 1; last < coded->layers && bounds[last + 1] - bounds[first] <= READ_BYTES; last++)
            ;
        good = move_layers(coded, first, last);
    }
    load_end(&coded->load);
    return good;
}

static int copy_bounds(CodedLoad *coded, PyObject *array)
{
    Py_buffer view;

    if (int64_view(array, 1, "bounds", &view) < 0)
        return -1;
    coded->layers = view.shape[0] - 1;
    coded->bounds = PyMem_Malloc((size_t)view.len + 1);
    if (coded->bounds)
        memcpy(coded->bounds, view.buf, (size_t)view.len);
    else
        PyErr_NoMemory();
    PyBuffer_Release(&view);
    return coded->bounds ? 0 : -1;
}

/* Bytes of the raw form's data: what the offsets of sections lie in. */
static int64_t raw_bytes(const Plan *plan)
{
    int64_t end = 0;
    for (Py_ssize_t i = 0; i < plan->n_ops; i++) {
        const int64_t to = plan->ops[i].file_off + plan->ops[i].heads * plan->ops[i].head_bytes;
        end = to > end ? to : end;
    }
    return end;
}

static void part_free(CodedLoad *coded)
{
    PyMem_Free(coded->bounds);
    codec_streams_free(&coded->streams);
    plan_free(&coded->plan);
    if (coded->sums_view.obj)
        PyBuffer_Release(&coded->sums_view);
}

/* part: fd, start, bounds, sums, shape, turns, streams, ops, first, last, position. To be freed in any case. */
static int part_init(CodedLoad *coded, PyObject *part, PyObject *tables, Token *token)
{
    PyObject *bounds, *shape, *turns, *streams, *ops;
    long long start, first, last, position;

    if (!PyTuple_Check(part))
        return refuse("a part is a tuple");
    if (!PyArg_ParseTuple(part, "iLOy*OOOOLLL:load_coded", &coded->load.fd, &start, &bounds, &coded->sums_view, &shape,
                          &turns, &streams, &ops, &first, &last, &position))
        return -1;
    if (start < 0 || start > INT64_MAX / 2)
        return refuse("start out of range");
    coded->load.plan = &coded->plan;
    coded->load.token = token;
    coded->start = start;
    coded->sums = coded->sums_view.buf;
    if (plan_init(&coded->plan, ops, tables, first, last, position, true) < 0
        || codec_streams(&coded->streams, shape, turns, streams, CODEC_DECODE_COLUMNS, NULL, raw_bytes(&coded->plan)) < 0
        || copy_bounds(coded, bounds) < 0)
        return -1;
    return check(coded, coded->sums_view.len);
}

/* Bytes moved by all, or what became of part `failed`; its number comes after the reason. */
static PyObject *outcome(const CodedLoad *parts, Py_ssize_t n, Py_ssize_t failed)
{
    int64_t moved = 0;

    for (Py_ssize_t i = 0; i < n; i++)
        moved += parts[i].load.result.moved;
    return failed < n ? load_failed(&parts[failed].load.result, failed) : PyLong_FromLongLong(moved);
}

PyObject *py_load_coded(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"parts", "tables", "token", NULL};
    PyObject *list, *tables, *result = NULL;
    Token *token;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO!:load_coded", names, &list, &tables, &TokenType, &token))
        return NULL;
    PyObject *fast = PySequence_Fast(list, "parts must be a sequence");
    if (!fast)
        return NULL;
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
    CodedLoad *parts = PyMem_Calloc((size_t)n + 1, sizeof *parts);
    Py_ssize_t ready = 0, i = 0;
    if (!parts)
        PyErr_NoMemory();
    while (parts && ready < n && part_init(&parts[ready], PySequence_Fast_GET_ITEM(fast, ready), tables, token) == 0)
        ready++;
    if (parts && ready == n) {
        Py_BEGIN_ALLOW_THREADS
        while (i < n && run(&parts[i]))
            i++;
        Py_END_ALLOW_THREADS
        result = outcome(parts, n, i);
    }
    for (i = 0; parts && i <= ready && i < n; i++)
        part_free(&parts[i]);
    PyMem_Free(parts);
    Py_DECREF(fast);
    return result;
}
