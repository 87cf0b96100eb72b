/* Which instruction set the kernels use: the best this CPU has, or the one a test or benchmark asks for. */
#include "native.h"

#include <string.h>

enum isa isa_current = ISA_GENERIC;

static const char *const NAMES[] = {"generic", "neon", "avx2", "avx512"};

static bool supported(enum isa isa)
{
#if defined(__x86_64__)
    if (isa == ISA_AVX2)
        return __builtin_cpu_supports("avx2");
    if (isa == ISA_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#elif defined(__aarch64__)
    if (isa == ISA_NEON)
        return true; /* part of the aarch64 baseline */
#endif
    return isa == ISA_GENERIC;
}

int isa_init(PyObject *module)
{
    PyObject *names = PyList_New(0);
    if (!names)
        return -1;
    for (enum isa isa = ISA_GENERIC; isa <= ISA_AVX512; isa++) {
        if (!supported(isa))
            continue;
        PyObject *name = PyUnicode_FromString(NAMES[isa]);
        if (!name || PyList_Append(names, name) < 0) {
            Py_XDECREF(name);
            Py_DECREF(names);
            return -1;
        }
        Py_DECREF(name);
        isa_current = isa;
    }
    PyObject *tuple = PyList_AsTuple(names);
    Py_DECREF(names);
    int rc = tuple ? PyModule_AddObjectRef(module, "ISAS", tuple) : -1;
    Py_XDECREF(tuple);
    return rc;
}

PyObject *py_isa(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    return PyUnicode_FromString(NAMES[isa_current]);
}

PyObject *py_use_isa(PyObject *Py_UNUSED(self), PyObject *name)
{
    const char *text = PyUnicode_AsUTF8(name);
    if (!text)
        return NULL;
    for (enum isa isa = ISA_GENERIC; isa <= ISA_AVX512; isa++)
        if (!strcmp(text, NAMES[isa]) && supported(isa)) {
            isa_current = isa;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this CPU has no instruction set %R", name);
}
