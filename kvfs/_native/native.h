/* What the C files of kvfs._native._core share. One idea a file:
 *   isa.c       which instruction set the kernels use      xxh3.c      the XXH3-64 hash
 *   buffer.c    typed views of, and pages behind, buffers  checksum.c  xxh3_64() and sums()
 *   kvcopy.c    strided copies and transposes              token.c     CancelToken
 *   plan.c      where rows of tensors lie in paged KV      transfer.c  load(), gather()
 *   module.c    the module table
 * What takes or gives Python objects needs the GIL; everything else runs with it released. */
#ifndef KVFS_NATIVE_H
#define KVFS_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || UINTPTR_MAX != UINT64_MAX
#error "kvfs files are little-endian and addresses are 64 bits: this host is neither supported nor tested"
#endif

/* isa.c */
enum isa { ISA_GENERIC, ISA_NEON, ISA_AVX2, ISA_AVX512 };
extern enum isa isa_current;
int isa_init(PyObject *module); /* adds ISAS, picks the best; -1 with an exception set */
PyObject *py_isa(PyObject *self, PyObject *none);
PyObject *py_use_isa(PyObject *self, PyObject *name);

/* xxh3.c */
uint64_t xxh3_64(const void *data, size_t len);

/* checksum.c */
PyObject *py_xxh3_64(PyObject *self, PyObject *data);
PyObject *py_sums(PyObject *self, PyObject *args, PyObject *kwargs);

/* buffer.c */
int int64_view(PyObject *array, int ndim, const char *name, Py_buffer *view); /* -1 with an exception set */
PyObject *py_populate(PyObject *self, PyObject *data);

/* kvcopy.c: a tile is rows x cols elements; a pitch says how far apart (bytes) its rows and columns lie. */
typedef struct {
    int64_t row, col;
} Pitch;
void kv_copy(char *dst, Pitch to, const char *src, Pitch from, int64_t rows, int64_t cols, int64_t itemsize);
void kv_copy_fence(void); /* due after kv_copy()s: their stores are weakly ordered, and must land before others look */

/* token.c */
typedef struct Token Token;
extern PyTypeObject TokenType;
bool token_cancelled(Token *token);
bool token_enter(Token *token); /* false: cancelled, nothing may be written */
void token_leave(Token *token);
void token_progress(Token *token, int64_t nbytes);

/* plan.c: one Op is one tensor [heads, tokens, dim] of a file, and the paged KV cache it belongs to. */
typedef struct {
    int64_t file_off, heads, tokens, dim, itemsize;
    int64_t row_bytes, head_bytes; /* dim * itemsize; tokens * row_bytes */
    int64_t dst, stride_block, stride_head, stride_token, stride_dim;
    int64_t block_size;
    const int64_t *table;
} Op;

typedef struct {
    Op *ops;
    int64_t *tables; /* private copies: the caller's arrays may change while the GIL is released */
    Py_ssize_t n_ops;
    int64_t first, last, position;
} Plan;

typedef struct {
    int64_t head, heads, first, last; /* heads [head, head + heads), rows [first, last) of a tensor */
} Piece;

int plan_init(Plan *plan, PyObject *ops, PyObject *tables, int64_t first, int64_t last, int64_t position, bool null_ok);
int plan_fits(const Plan *plan, int64_t nbytes); /* every tensor inside nbytes; -1 with ValueError set */
void plan_free(Plan *plan);
/* Rows of a piece between paged KV and memory whose heads lie head_pitch bytes apart; returns bytes moved. */
int64_t plan_scatter(const Plan *plan, const Op *op, Piece piece, const char *src, int64_t head_pitch);
int64_t plan_gather(const Plan *plan, const Op *op, Piece piece, char *dst, int64_t head_pitch);

/* transfer.c */
PyObject *py_load(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *py_gather(PyObject *self, PyObject *args, PyObject *kwargs);

#endif
