/* A checked plan of a transfer: which rows of which tensors lie where in paged KV. Nothing is read or written
 * before the whole plan has been checked, and the checks bound every later product and sum. */
#include "native.h"

enum { COLUMNS = 12 };
static const int64_t FIELD_MAX = (int64_t)1 << 56; /* more than any address or file offset on supported hosts */

static int refuse(Py_ssize_t index, const char *why)
{
    PyErr_Format(PyExc_ValueError, "op %zd: %s", index, why);
    return -1;
}

static int op_parse(Op *op, const int64_t row[COLUMNS], Py_ssize_t index, const Plan *plan, int64_t n_tables,
                    int64_t width)
{
    for (int i = 0; i < COLUMNS; i++)
        if (row[i] < 0 || row[i] > FIELD_MAX)
            return refuse(index, "negative or absurd value");
    *op = (Op){
        .file_off = row[0], .heads = row[1], .tokens = row[2], .dim = row[3], .itemsize = row[4],
        .dst = row[5], .stride_block = row[6], .stride_head = row[7], .stride_token = row[8], .stride_dim = row[9],
        .block_size = row[11],
    };
    if (!op->heads || !op->tokens || !op->dim || !op->block_size)
        return refuse(index, "empty tensor or block");
    if (op->itemsize != 1 && op->itemsize != 2 && op->itemsize != 4 && op->itemsize != 8)
        return refuse(index, "itemsize must be 1, 2, 4 or 8");
    int64_t bytes, end;
    if (__builtin_mul_overflow(op->dim, op->itemsize, &op->row_bytes) ||
        __builtin_mul_overflow(op->tokens, op->row_bytes, &op->head_bytes) ||
        __builtin_mul_overflow(op->heads, op->head_bytes, &bytes) ||
        __builtin_add_overflow(op->file_off, bytes, &end) || end > FIELD_MAX)
        return refuse(index, "tensor too large");
    if (!op->dst)
        return refuse(index, "null address");
    if (plan->last > op->tokens)
        return refuse(index, "rows beyond the tensor");
    if (row[10] >= n_tables)
        return refuse(index, "no such table");
    op->table = plan->tables + row[10] * width;
    return 0;
}

/* Block ids that the rows need: inside the table, not negative, and at addresses that exist. */
static int op_check_blocks(const Op *op, Py_ssize_t index, const Plan *plan, int64_t width, bool null_ok)
{
    int64_t first = (plan->position + plan->first) / op->block_size;
    int64_t last = (plan->position + plan->last - 1) / op->block_size;
    if (last >= width) {
        PyErr_Format(PyExc_IndexError, "op %zd: block index %lld outside its table of %lld", index, (long long)last,
                     (long long)width);
        return -1;
    }
    __int128 inside = op->dst + (__int128)(op->heads - 1) * op->stride_head +
                      (__int128)(op->block_size - 1) * op->stride_token + (__int128)(op->dim - 1) * op->stride_dim;
    for (int64_t block = first; block <= last; block++) {
        int64_t id = op->table[block];
        if (id < 0 || id > FIELD_MAX || inside + (__int128)id * op->stride_block > FIELD_MAX)
            return refuse(index, "negative or absurd block id, or an address out of range");
        if (id == 0 && !null_ok)
            return refuse(index, "rows to gather lie in the null block");
    }
    return 0;
}

static int plan_fill(Plan *plan, const Py_buffer *ops, const Py_buffer *tables, bool null_ok)
{
    int64_t n_tables = tables->shape[0], width = tables->shape[1];

    if (ops->shape[1] != COLUMNS) {
        PyErr_Format(PyExc_ValueError, "ops must have %d columns", COLUMNS);
        return -1;
    }
    plan->n_ops = ops->shape[0];
    plan->ops = PyMem_Calloc((size_t)plan->n_ops + 1, sizeof(Op));
    plan->tables = PyMem_Malloc((size_t)tables->len + 1);
    if (!plan->ops || !plan->tables) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(plan->tables, tables->buf, (size_t)tables->len);
    for (Py_ssize_t i = 0; i < plan->n_ops; i++) {
        int64_t row[COLUMNS];
        memcpy(row, (const char *)ops->buf + (size_t)i * sizeof row, sizeof row);
        if (op_parse(&plan->ops[i], row, i, plan, n_tables, width) < 0)
            return -1;
        if (plan->first < plan->last && op_check_blocks(&plan->ops[i], i, plan, width, null_ok) < 0)
            return -1;
    }
    return 0;
}

int plan_init(Plan *plan, PyObject *ops, PyObject *tables, int64_t first, int64_t last, int64_t position, bool null_ok)
{
    Py_buffer ops_view, tables_view;
    int rc = -1;

    *plan = (Plan){.first = first, .last = last, .position = position};
    if (first < 0 || last < first || last > FIELD_MAX || position < 0 || position > FIELD_MAX) {
        PyErr_SetString(PyExc_ValueError, "first, last and position must be 0 <= first <= last and 0 <= position");
        return -1;
    }
    if (int64_view(ops, 2, "ops", &ops_view) < 0)
        return -1;
    if (int64_view(tables, 2, "tables", &tables_view) == 0) {
        rc = plan_fill(plan, &ops_view, &tables_view, null_ok);
        PyBuffer_Release(&tables_view);
    }
    PyBuffer_Release(&ops_view);
    if (rc < 0)
        plan_free(plan);
    return rc;
}

void plan_free(Plan *plan)
{
    PyMem_Free(plan->ops);
    PyMem_Free(plan->tables);
    plan->ops = NULL;
    plan->tables = NULL;
}

int plan_fits(const Plan *plan, int64_t nbytes)
{
    for (Py_ssize_t i = 0; i < plan->n_ops; i++) {
        const Op *op = &plan->ops[i];
        if (op->file_off + op->heads * op->head_bytes > nbytes)
            return refuse(i, "tensor beyond the end of the buffer");
    }
    return 0;
}

/* Both directions walk the same runs: the rows of one head inside one block. */
static int64_t move_rows(const Plan *plan, const Op *op, Piece piece, char *memory, int64_t head_pitch, bool to_kv)
{
    const Pitch flat = {op->row_bytes, op->itemsize}, paged = {op->stride_token, op->stride_dim};
    int64_t moved = 0;

    for (int64_t h = 0; h < piece.heads; h++)
        for (int64_t r = piece.first, rows; r < piece.last; r += rows) {
            int64_t block = (plan->position + r) / op->block_size, offset = (plan->position + r) % op->block_size;
            int64_t left = piece.last - r, room = op->block_size - offset, id = op->table[block];
            rows = left < room ? left : room;
            if (id == 0)
                continue;
            char *mem = memory + h * head_pitch + (r - piece.first) * op->row_bytes;
            char *kv = (char *)(op->dst + id * op->stride_block + (piece.head + h) * op->stride_head +
                                offset * op->stride_token);
            if (to_kv)
                kv_copy(kv, paged, mem, flat, rows, op->dim, op->itemsize);
            else
                kv_copy(mem, flat, kv, paged, rows, op->dim, op->itemsize);
            moved += rows * op->row_bytes;
        }
    kv_copy_fence();
    return moved;
}

int64_t plan_scatter(const Plan *plan, const Op *op, Piece piece, const char *src, int64_t head_pitch)
{
    return move_rows(plan, op, piece, (char *)src, head_pitch, true);
}

int64_t plan_gather(const Plan *plan, const Op *op, Piece piece, char *dst, int64_t head_pitch)
{
    return move_rows(plan, op, piece, dst, head_pitch, false);
}
