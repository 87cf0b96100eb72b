/* CancelToken: what stands between a load and blocks that the engine has taken back.
 *
 * Every scatter runs between token_enter() and token_leave(). cancel() closes the door, then waits for those
 * inside: once it has returned, nothing is being written and nothing will be. Several threads may be inside
 * at once, so that one request can be loaded by several of them. */
#include "native.h"

#include <pthread.h>
#include <stdatomic.h>

struct Token {
    PyObject_HEAD
    pthread_mutex_t mutex;
    pthread_cond_t left;
    Py_ssize_t inside;      /* under mutex */
    _Atomic bool cancelled; /* written under mutex */
    _Atomic int64_t progress;
};

bool token_cancelled(Token *token)
{
    return atomic_load(&token->cancelled);
}

bool token_enter(Token *token)
{
    pthread_mutex_lock(&token->mutex);
    bool open = !token->cancelled;
    token->inside += open;
    pthread_mutex_unlock(&token->mutex);
    return open;
}

static bool leave(Token *token)
{
    pthread_mutex_lock(&token->mutex);
    bool was_inside = token->inside > 0;
    token->inside -= was_inside;
    if (token->inside == 0)
        pthread_cond_broadcast(&token->left);
    pthread_mutex_unlock(&token->mutex);
    return was_inside;
}

void token_leave(Token *token)
{
    leave(token);
}

void token_progress(Token *token, int64_t nbytes)
{
    atomic_fetch_add(&token->progress, nbytes);
}

static PyObject *token_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":CancelToken", names))
        return NULL;
    Token *token = (Token *)type->tp_alloc(type, 0); /* zeroed: nobody inside, not cancelled, no progress */
    if (!token)
        return NULL;
    pthread_mutex_init(&token->mutex, NULL);
    pthread_cond_init(&token->left, NULL);
    return (PyObject *)token;
}

static void token_dealloc(Token *token)
{
    pthread_cond_destroy(&token->left);
    pthread_mutex_destroy(&token->mutex);
    Py_TYPE(token)->tp_free(token);
}

static PyObject *token_py_cancel(Token *token, PyObject *Py_UNUSED(none))
{
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&token->mutex);
    token->cancelled = true;
    while (token->inside > 0)
        pthread_cond_wait(&token->left, &token->mutex);
    pthread_mutex_unlock(&token->mutex);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *token_py_acquire(Token *token, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(token_enter(token));
}

static PyObject *token_py_release(Token *token, PyObject *Py_UNUSED(none))
{
    if (leave(token))
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_RuntimeError, "release() of a token that is not acquired");
    return NULL;
}

static PyObject *token_py_add_progress(Token *token, PyObject *nbytes)
{
    long long n = PyLong_AsLongLong(nbytes);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 0) {
        PyErr_SetString(PyExc_ValueError, "progress cannot go back");
        return NULL;
    }
    token_progress(token, n);
    Py_RETURN_NONE;
}

static PyObject *token_get_cancelled(Token *token, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(token_cancelled(token));
}

static PyObject *token_get_progress(Token *token, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(atomic_load(&token->progress));
}

static PyMethodDef token_methods[] = {
    {"cancel", (PyCFunction)token_py_cancel, METH_NOARGS,
     "cancel($self, /)\n--\n\nForbid further scatters and wait until none runs."},
    {"acquire", (PyCFunction)token_py_acquire, METH_NOARGS,
     "acquire($self, /)\n--\n\nEnter a scatter; False if cancelled."},
    {"release", (PyCFunction)token_py_release, METH_NOARGS,
     "release($self, /)\n--\n\nLeave a scatter entered by acquire()."},
    {"add_progress", (PyCFunction)token_py_add_progress, METH_O,
     "add_progress($self, nbytes, /)\n--\n\nAdd bytes that have landed."},
    {0},
};

static PyGetSetDef token_getset[] = {
    {"cancelled", (getter)token_get_cancelled, NULL, "Whether cancel() was called.", NULL},
    {"progress", (getter)token_get_progress, NULL, "Bytes landed so far; may be read at any time.", NULL},
    {0},
};

PyTypeObject TokenType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "kvfs._native.CancelToken",
    .tp_basicsize = sizeof(Token),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "CancelToken()\n--\n\nStands between a load and memory that its owner may take back at any time.",
    .tp_new = token_new,
    .tp_dealloc = (destructor)token_dealloc,
    .tp_methods = token_methods,
    .tp_getset = token_getset,
};
