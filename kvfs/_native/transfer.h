/* What load() and load_coded() share: reading into a buffer of the thread, scattering inside the token, and the outcome. */
#ifndef KVFS_TRANSFER_H
#define KVFS_TRANSFER_H

#include "native.h"

typedef struct {
    char *data;
    int64_t capacity;
} Bounce;

typedef struct {
    enum { LOAD_DONE, LOAD_CANCELLED, LOAD_NO_MEMORY, LOAD_READ_ERROR, LOAD_BAD_SUM, LOAD_BAD_STREAM } outcome;
    int error;           /* errno of LOAD_READ_ERROR */
    int64_t index, head; /* what is bad: an op's or a layer's head */
    const char *why;     /* of LOAD_BAD_STREAM */
    int64_t moved;
} Result;

typedef struct {
    int fd;
    const Plan *plan;
    Token *token;
    Bounce *bounce; /* of the thread; load_reserve() makes it large enough */
    Result result;
} Load;

/* Those that return a bool have set the outcome where it is false. */
bool load_begin(Load *load);
void load_end(Load *load);
bool load_stop(Load *load, int outcome);
bool load_reserve(Load *load, int64_t nbytes);
bool load_read(Load *load, char *buf, int64_t nbytes, int64_t offset);
bool load_scatter(Load *load, const Op *op, Piece piece, const char *src, int64_t head_pitch);
/* NULL, with the exception set; it names the part of several, unless that is negative. */
PyObject *load_failed(const Result *result, Py_ssize_t part);

#endif
