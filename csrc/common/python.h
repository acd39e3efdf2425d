// C++ functions as functions of a Python module, by Python's own interface, its stable part where that is asked for.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace efficient_attn {
namespace {

// The module's own errors as Python exceptions, or null; each module defines it.
PyObject* own_exception(const std::exception& error);

struct Wrong {};  // a Python exception is set

// An argument as a call takes it.
template <class X>
X from_python(PyObject* object) {
    if constexpr (std::is_same_v<X, std::string>) {
        char* bytes = nullptr;
        Py_ssize_t size = 0;
        if (PyBytes_AsStringAndSize(object, &bytes, &size) < 0) throw Wrong();
        return std::string(bytes, static_cast<size_t>(size));
    } else if constexpr (std::is_same_v<X, bool>) {
        const int truth = PyObject_IsTrue(object);
        if (truth < 0) throw Wrong();
        return truth != 0;
    } else if constexpr (std::is_unsigned_v<X>) {
        const unsigned long long value = PyLong_AsUnsignedLongLong(object);
        if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw Wrong();
        return static_cast<X>(value);
    } else {
        const long long value = PyLong_AsLongLong(object);
        if (value == -1 && PyErr_Occurred()) throw Wrong();
        if (static_cast<long long>(static_cast<X>(value)) != value) {
            PyErr_SetString(PyExc_OverflowError, "efficient_attn: a number that does not fit");
            throw Wrong();
        }
        return static_cast<X>(value);
    }
}

inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(const char* text) { return PyUnicode_FromString(text); }
inline PyObject* to_python(const std::vector<const char*>& texts) {
    PyObject* list = PyList_New(0);
    for (const char* text : texts) {
        PyObject* item = list ? to_python(text) : nullptr;
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

// Other Python threads run while one lives.
struct WithoutPython {
    WithoutPython() : state(PyEval_SaveThread()) {}
    ~WithoutPython() { PyEval_RestoreThread(state); }
    PyThreadState* state;
};

// What f returns, or null with a Python exception set.
template <class F>
PyObject* guarded(F f) {
    try {
        return f();
    } catch (const Wrong&) {
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyObject* own = own_exception(error);
        const bool wrong_value = dynamic_cast<const std::invalid_argument*>(&error) != nullptr;
        PyErr_SetString(own ? own : wrong_value ? PyExc_ValueError : PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

inline void check_count(Py_ssize_t given, size_t wanted) {
    if (given == static_cast<Py_ssize_t>(wanted)) return;
    PyErr_Format(PyExc_TypeError, "efficient_attn: takes %zu arguments, got %zd", wanted, given);
    throw Wrong();
}

template <auto kFunction>
struct Wrapped;

// A call as Python makes it: positional arguments alone. Other Python threads run while the call does, but not while
// arguments are read.
template <class R, class... A, R (*kFunction)(A...)>
struct Wrapped<kFunction> {
    static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
        return guarded([&] {
            check_count(count, sizeof...(A));
            return apply(arguments, std::index_sequence_for<A...>());
        });
    }

    template <size_t... I>
    static PyObject* apply([[maybe_unused]] PyObject* const* arguments, std::index_sequence<I...>) {
        // Braces: read from the first to the last.
        const std::tuple<std::decay_t<A>...> given{from_python<std::decay_t<A>>(arguments[I])...};
        if constexpr (std::is_void_v<R>) {
            run(given);
            Py_INCREF(Py_None);
            return Py_None;
        } else {
            return to_python(run(given));
        }
    }

    static R run(const std::tuple<std::decay_t<A>...>& given) {
        const WithoutPython unlocked;
        return std::apply(kFunction, given);
    }
};

using FastCall = PyObject* (*)(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

inline PyMethodDef method(const char* name, FastCall function) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

template <auto kFunction>
PyMethodDef method(const char* name) {
    return method(name, &Wrapped<kFunction>::call);
}

}  // namespace
}  // namespace efficient_attn
