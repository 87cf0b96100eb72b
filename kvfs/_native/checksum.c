/* xxh3_64() and sums(): checksums of buffers, for Python. */
#include "native.h"

PyObject *py_xxh3_64(PyObject *Py_UNUSED(self), PyObject *data)
{
    Py_buffer view;
    uint64_t sum;

    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    sum = xxh3_64(view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(sum);
}

/* NULL with ValueError set, or n pieces' checksums. Each bound is read once: the caller's array may change. */
static PyObject *sums_of(const Py_buffer *data, const volatile int64_t *bounds, Py_ssize_t n)
{
    PyObject *result = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(uint64_t));
    bool inside = true;

    if (!result)
        return NULL;
    char *out = PyBytes_AS_STRING(result);
    Py_BEGIN_ALLOW_THREADS
    int64_t start = bounds[0];
    inside = start >= 0;
    for (Py_ssize_t i = 0; inside && i < n; i++) {
        int64_t end = bounds[i + 1];
        inside = start <= end && end <= data->len;
        if (inside) {
            uint64_t sum = xxh3_64((const char *)data->buf + start, (size_t)(end - start));
            memcpy(out + sizeof sum * (size_t)i, &sum, sizeof sum);
        }
        start = end;
    }
    Py_END_ALLOW_THREADS
    if (inside)
        return result;
    Py_DECREF(result);
    PyErr_SetString(PyExc_ValueError, "bounds must not decrease nor leave the data");
    return NULL;
}

PyObject *py_sums(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "bounds", NULL};
    PyObject *array, *result = NULL;
    Py_buffer data, bounds;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*O:sums", names, &data, &array))
        return NULL;
    if (int64_view(array, 1, "bounds", &bounds) == 0) {
        if (bounds.shape[0] > 0)
            result = sums_of(&data, bounds.buf, bounds.shape[0] - 1);
        else
            PyErr_SetString(PyExc_ValueError, "bounds must hold at least one offset");
        PyBuffer_Release(&bounds);
    }
    PyBuffer_Release(&data);
    return result;
}
