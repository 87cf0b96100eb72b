/* The module table of kvfs._native._core. What each function promises stands in _core.pyi. */
#include "codec_cpu.h"
#include "native.h"

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef methods[] = {
    {"xxh3_64", py_xxh3_64, METH_O, "xxh3_64($module, data, /)\n--\n\nXXH3-64 of a buffer."},
    {"sums", KEYWORDS(py_sums), "sums($module, data, bounds)\n--\n\nXXH3-64 of adjacent pieces."},
    {"populate", py_populate, METH_O, "populate($module, data, /)\n--\n\nFault in the pages of a map."},
    {"load", KEYWORDS(py_load),
     "load($module, fd, ops, tables, first, last, position, sums, token)\n--\n\nA part file's rows into paged KV."},
    {"gather", KEYWORDS(py_gather),
     "gather($module, ops, tables, first, last, position, out)\n--\n\nPaged KV's rows into a buffer."},
    {"codec_rotation", py_codec_rotation, METH_VARARGS,
     "codec_rotation($module, inv_freq, position, tokens, /)\n--\n\nCosines and sines of RoPE."},
    {"codec_encode", py_codec_encode, METH_VARARGS,
     "codec_encode($module, shape, steps, turns, data, places, /)\n--\n\nStreams from KV."},
    {"codec_decode", py_codec_decode, METH_VARARGS,
     "codec_decode($module, shape, turns, coded, data, streams, /)\n--\n\nStreams to KV."},
    {"load_coded", KEYWORDS(py_load_coded),
     "load_coded($module, parts, tables, token)\n--\n\nCoded part files' rows into paged KV."},
    {"isa", py_isa, METH_NOARGS, "isa($module, /)\n--\n\nThe instruction set in use."},
    {"use_isa", py_use_isa, METH_O, "use_isa($module, name, /)\n--\n\nUse another of ISAS."},
    {0},
};

static int exec_module(PyObject *module)
{
    codec_tables_init();
    if (isa_init(module) < 0)
        return -1;
    return PyModule_AddType(module, &TokenType);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvfs._native._core",
    .m_doc = "Checksums, copies and the codec.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
