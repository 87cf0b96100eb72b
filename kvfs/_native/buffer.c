/* What kvfs needs of Python buffers: typed views of int64 arrays, and the pages behind a map. */
#include "native.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; older C libraries do not name it */
#endif

/* A C-contiguous array of 8-byte integers with ndim dimensions. Unsigned ones are read as signed:
 * every caller refuses negative values, and none has a use for values above 2^63. */
int int64_view(PyObject *array, int ndim, const char *name, Py_buffer *view)
{
    if (PyObject_GetBuffer(array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return -1;
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || *format == '<')
        format++;
    bool integers = view->itemsize == 8 && *format && strchr("qlQL", *format) && !format[1];
    if (integers && view->ndim == ndim)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be a C-contiguous int64 array of %d dimension(s)", name, ndim);
    PyBuffer_Release(view);
    return -1;
}

PyObject *py_populate(PyObject *Py_UNUSED(self), PyObject *data)
{
    Py_buffer view;
    int rc = 0;

    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (view.len > 0) {
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)view.buf & ~(page - 1);
        uintptr_t end = (uintptr_t)view.buf + (uintptr_t)view.len;
        Py_BEGIN_ALLOW_THREADS
        rc = madvise((void *)start, end - start, MADV_POPULATE_READ);
        Py_END_ALLOW_THREADS
    }
    if (rc < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    PyBuffer_Release(&view);
    if (rc < 0)
        return NULL;
    Py_RETURN_NONE;
}
