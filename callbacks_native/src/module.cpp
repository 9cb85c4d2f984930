// The Python face of the engine: argument checks, the GIL, and errors raised as exceptions live here, and only here.
#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "bind.hpp"
#include "crc32c.hpp"

namespace nb = nanobind;

namespace {

// A view of the bytes of any C-contiguous object of the buffer protocol: bytes, memoryview, mmap, a NumPy array.
// While it lives the exporter can neither be resized nor freed, which is what makes it safe to release the GIL.
// Constructed and destroyed with the GIL held.
class BufferView {
public:
    explicit BufferView(nb::handle exporter) {
        // PyBUF_SIMPLE: a plain run of bytes, read-only ones included; anything strided is refused by its exporter.
        if (PyObject_GetBuffer(exporter.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
    }
    ~BufferView() { PyBuffer_Release(&view_); }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;

    std::span<const std::byte> bytes() const {
        return {static_cast<const std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

private:
    Py_buffer view_{};
};

std::uint32_t crc32c(nb::handle buffer, std::uint32_t seed) {
    const BufferView view(buffer);
    const nb::gil_scoped_release others_may_run;  // destroyed before `view`, which needs the GIL to let go
    return kenotron::crc32c(view.bytes(), seed);
}

}  // namespace

NB_MODULE(_engine, module) {
    nb::set_leak_warnings(false);  // an engine may well live until the process ends
    module.doc() = "The native engine of Kénotron.";
    module.def("crc32c", &crc32c, nb::arg("buffer"), nb::arg("seed") = 0u,
               "Return the CRC-32C of a contiguous buffer, continuing from `seed`, the CRC-32C of what precedes it.");
    module.def("version", [] { return KENOTRON_VERSION; }, "Return the version of Kénotron that this was built from.");
    kenotron::bind_engine(module);
    kenotron::bind_reader(module);
}
