// The parts of the Python module, each in a file of its own, and what they share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>

#include "error.hpp"

namespace kenotron {

void bind_engine(nanobind::module_& module);
void bind_reader(nanobind::module_& module);

// Raise an `OSError` with the error's number, text and file. With the GIL held.
[[noreturn]] inline void raise(const Error& error) {
    const std::string text = error.operation + ": " + std::strerror(error.code);
    const nanobind::object path = error.path.empty() ? nanobind::none() : nanobind::cast(error.path.c_str());
    const nanobind::tuple arguments = nanobind::make_tuple(error.code, text.c_str(), path);
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
    throw nanobind::python_error();
}

}  // namespace kenotron
