/* load() and gather(): rows of a part from its file into paged KV, and from there into memory.
 *
 * load() works in pieces: read into a buffer of its own thread (this may block, and only this may), verify, then
 * enter the token and scatter. So a hung volume holds no lock, and a cancelled load writes nothing more. */
#include "transfer.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { PAGE = 4096, BOUNCE_BYTES = 4 << 20 }; /* a piece is at most this, unless one head to verify is larger */

static pthread_key_t bounce_key; /* frees a thread's bounce buffer when the thread ends */
static pthread_once_t bounce_once = PTHREAD_ONCE_INIT;
static int bounce_key_error;

static void bounce_free(void *bounce)
{
    free(((Bounce *)bounce)->data);
    free(bounce);
}

static void bounce_make_key(void)
{
    bounce_key_error = pthread_key_create(&bounce_key, bounce_free);
}

static Bounce *bounce_of_thread(void)
{
    pthread_once(&bounce_once, bounce_make_key);
    if (bounce_key_error)
        return NULL;
    Bounce *bounce = pthread_getspecific(bounce_key);
    if (!bounce && (bounce = calloc(1, sizeof *bounce)) && pthread_setspecific(bounce_key, bounce) != 0) {
        free(bounce);
        bounce = NULL;
    }
    return bounce;
}

bool load_stop(Load *load, int outcome)
{
    load->result.outcome = outcome;
    return false;
}

bool load_begin(Load *load)
{
    load->bounce = bounce_of_thread();
    return load->bounce || load_stop(load, LOAD_NO_MEMORY);
}

void load_end(Load *load)
{
    if (load->bounce && load->bounce->capacity > BOUNCE_BYTES) {
        free(load->bounce->data);
        *load->bounce = (Bounce){0};
    }
}

bool load_reserve(Load *load, int64_t nbytes)
{
    Bounce *bounce = load->bounce;

    if (bounce->capacity >= nbytes)
        return true;
    free(bounce->data);
    bounce->capacity = nbytes < BOUNCE_BYTES ? BOUNCE_BYTES : (nbytes + PAGE - 1) / PAGE * PAGE;
    bounce->data = aligned_alloc(PAGE, (size_t)bounce->capacity); /* takes memory as it is touched */
    if (!bounce->data)
        bounce->capacity = 0;
    return bounce->data || load_stop(load, LOAD_NO_MEMORY);
}

bool load_read(Load *load, char *buf, int64_t nbytes, int64_t offset)
{
    while (nbytes > 0) {
        ssize_t got = pread(load->fd, buf, (size_t)nbytes, offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            load->result.error = got < 0 ? errno : EIO; /* the end of the file: it was cut short */
            return load_stop(load, LOAD_READ_ERROR);
        }
        buf += got;
        offset += got;
        nbytes -= got;
    }
    return true;
}

bool load_scatter(Load *load, const Op *op, Piece piece, const char *src, int64_t head_pitch)
{
    if (!token_enter(load->token))
        return load_stop(load, LOAD_CANCELLED);
    int64_t moved = plan_scatter(load->plan, op, piece, src, head_pitch);
    token_progress(load->token, moved);
    token_leave(load->token);
    load->result.moved += moved;
    return true;
}

PyObject *load_failed(const Result *result, Py_ssize_t part)
{
    PyObject *args = NULL;

    switch (result->outcome) {
    case LOAD_CANCELLED:
        PyErr_SetString(PyExc_InterruptedError, "cancelled");
        return NULL;
    case LOAD_READ_ERROR:
        errno = result->error;
        return PyErr_SetFromErrno(PyExc_OSError);
    case LOAD_BAD_SUM:
        args = Py_BuildValue(part < 0 ? "(sLL)" : "(sLLn)", "checksum", (long long)result->index,
                             (long long)result->head, part);
        break;
    case LOAD_BAD_STREAM:
        args = Py_BuildValue("(sLLns)", "stream", (long long)result->index, (long long)result->head, part, result->why);
        break;
    default:
        return PyErr_NoMemory();
    }
    if (args)
        PyErr_SetObject(PyExc_ValueError, args);
    Py_XDECREF(args);
    return NULL;
}

static PyObject *load_result(const Result *result)
{
    return result->outcome == LOAD_DONE ? PyLong_FromLongLong(result->moved) : load_failed(result, -1);
}

/* Heads of a piece lie head_pitch bytes apart in the buffer, as they do in the file if their rows are all read. */
static bool read_piece(Load *load, const Op *op, Piece piece, int64_t head_pitch)
{
    int64_t offset = op->file_off + piece.head * op->head_bytes + piece.first * op->row_bytes;

    if (!load_reserve(load, piece.heads * head_pitch))
        return false;
    if (head_pitch == op->head_bytes)
        return load_read(load, load->bounce->data, piece.heads * head_pitch, offset);
    for (int64_t h = 0; h < piece.heads; h++)
        if (!load_read(load, load->bounce->data + h * head_pitch, head_pitch, offset + h * op->head_bytes))
            return false;
    return true;
}

static bool verify_heads(Load *load, const Op *op, Piece piece, const char *sums)
{
    for (int64_t h = 0; h < piece.heads; h++) {
        uint64_t want;
        memcpy(&want, sums + (piece.head + h) * (int64_t)sizeof want, sizeof want);
        if (xxh3_64(load->bounce->data + h * op->head_bytes, (size_t)op->head_bytes) != want) {
            load->result.index = op - load->plan->ops;
            load->result.head = piece.head + h;
            return load_stop(load, LOAD_BAD_SUM);
        }
    }
    return true;
}

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* With sums, heads are read whole. */
static bool load_verified(Load *load, const Op *op, const char *sums)
{
    int64_t step = clamp(BOUNCE_BYTES / op->head_bytes, 1, op->heads);

    for (int64_t head = 0; head < op->heads; head += step) {
        Piece whole = {head, clamp(op->heads - head, 1, step), 0, op->tokens};
        Piece wanted = {whole.head, whole.heads, load->plan->first, load->plan->last};
        if (token_cancelled(load->token))
            return load_stop(load, LOAD_CANCELLED);
        if (!read_piece(load, op, whole, op->head_bytes) || !verify_heads(load, op, whole, sums))
            return false;
        const char *src = load->bounce->data + wanted.first * op->row_bytes;
        if (!load_scatter(load, op, wanted, src, op->head_bytes))
            return false;
    }
    return true;
}

/* Without, only the rows wanted are read; heads too large for the buffer come in runs of rows. */
static bool load_rows(Load *load, const Op *op)
{
    int64_t first = load->plan->first, last = load->plan->last;
    int64_t rows = clamp(BOUNCE_BYTES / op->row_bytes, 1, last - first), head_pitch = rows * op->row_bytes;
    int64_t step = clamp(BOUNCE_BYTES / head_pitch, 1, rows < last - first ? 1 : op->heads);

    for (int64_t head = 0; head < op->heads; head += step)
        for (int64_t row = first; row < last; row += rows) {
            Piece piece = {head, clamp(op->heads - head, 1, step), row, clamp(row + rows, row, last)};
            head_pitch = (piece.last - piece.first) * op->row_bytes;
            if (token_cancelled(load->token))
                return load_stop(load, LOAD_CANCELLED);
            if (!read_piece(load, op, piece, head_pitch) ||
                !load_scatter(load, op, piece, load->bounce->data, head_pitch))
                return false;
        }
    return true;
}

static void load_run(Load *load, const char *sums)
{
    const Plan *plan = load->plan;

    if (!load_begin(load))
        return;
    for (const Op *op = plan->ops; plan->first < plan->last && op < plan->ops + plan->n_ops; op++) {
        if (!(sums ? load_verified(load, op, sums) : load_rows(load, op)))
            break;
        if (sums)
            sums += op->heads * (int64_t)sizeof(uint64_t);
    }
    load_end(load);
}

static int check_sums(const Plan *plan, Py_ssize_t nbytes)
{
    int64_t heads = 0;
    for (Py_ssize_t i = 0; i < plan->n_ops; i++)
        if (__builtin_add_overflow(heads, plan->ops[i].heads, &heads) || heads > PY_SSIZE_T_MAX / 8)
            break;
    if (nbytes == heads * 8)
        return 0;
    PyErr_SetString(PyExc_ValueError, "sums must hold one u64 for every head of every op");
    return -1;
}

PyObject *py_load(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "ops", "tables", "first", "last", "position", "sums", "token", NULL};
    long long first, last, position;
    PyObject *ops, *tables;
    Py_buffer sums;
    Plan plan;
    Load load = {.plan = &plan};
    PyObject *result = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOLLLz*O!:load", names, &load.fd, &ops, &tables, &first, &last,
                                     &position, &sums, &TokenType, &load.token))
        return NULL;
    if (plan_init(&plan, ops, tables, first, last, position, true) == 0) {
        if (!sums.buf || check_sums(&plan, sums.len) == 0) {
            Py_BEGIN_ALLOW_THREADS
            load_run(&load, sums.buf);
            Py_END_ALLOW_THREADS
            result = load_result(&load.result);
        }
        plan_free(&plan);
    }
    PyBuffer_Release(&sums);
    return result;
}

PyObject *py_gather(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ops", "tables", "first", "last", "position", "out", NULL};
    long long first, last, position;
    PyObject *ops, *tables;
    Py_buffer out;
    Plan plan;
    int64_t moved = 0;
    int rc;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOLLLw*:gather", names, &ops, &tables, &first, &last, &position,
                                     &out))
        return NULL;
    rc = plan_init(&plan, ops, tables, first, last, position, false);
    if (rc == 0) {
        rc = plan_fits(&plan, out.len);
        if (rc == 0) {
            Py_BEGIN_ALLOW_THREADS
            for (const Op *op = plan.ops; first < last && op < plan.ops + plan.n_ops; op++) {
                Piece piece = {0, op->heads, first, last};
                char *rows = (char *)out.buf + op->file_off + first * op->row_bytes;
                moved += plan_gather(&plan, op, piece, rows, op->head_bytes);
            }
            Py_END_ALLOW_THREADS
        }
        plan_free(&plan);
    }
    PyBuffer_Release(&out);
    return rc == 0 ? PyLong_FromLongLong(moved) : NULL;
}
