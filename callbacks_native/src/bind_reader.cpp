// The Python face of the reading half. Destinations are addresses: Python keeps what they belong to alive.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "reader.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kenotron {
namespace {

// A path as Python's own open() takes it: str, bytes or os.PathLike, and names that are no UTF-8.
std::string path_of(nb::handle object) {
    PyObject* encoded = nullptr;
    if (PyUnicode_FSConverter(object.ptr(), &encoded) == 0) throw nb::python_error();
    const auto bytes = nb::steal<nb::bytes>(encoded);
    return {bytes.c_str(), bytes.size()};
}

const char* name_of(ReadErrorKind kind) {
    switch (kind) {
        case ReadErrorKind::io: return "io";
        case ReadErrorKind::cut: return "cut";
        default: return "checksum";
    }
}

// Whether Python's signal handlers have raised something, such as KeyboardInterrupt, in the main thread.
bool has_python_raised() {
    const nb::gil_scoped_acquire python;
    return PyErr_CheckSignals() != 0;
}

ReadResult read(nb::sequence files, const std::vector<Piece>& pieces, std::uint64_t chunk_bytes,
                unsigned num_threads, bool direct, bool stop_at_first_error) {
    if (chunk_bytes == 0) throw nb::value_error("chunk_bytes must be positive");
    std::vector<std::string> paths;
    for (const nb::handle file : files) paths.push_back(path_of(file));
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const std::string_view flaw = find_flaw(pieces[i], paths.size(), chunk_bytes);
        if (!flaw.empty()) throw std::invalid_argument("piece " + std::to_string(i) + ": " + std::string(flaw));
    }
    ReadOptions options;
    options.chunk_bytes = chunk_bytes;
    options.num_threads = num_threads;
    options.direct = direct;
    options.stop_at_first_error = stop_at_first_error;
    options.interrupted = has_python_raised;
    ReadResult result;
    {
        const nb::gil_scoped_release others_may_run;  // `pieces` is a copy that no other thread can change
        result = read_pieces(paths, pieces, options);
    }
    if (result.interrupted) throw nb::python_error();
    return result;
}

}  // namespace

void bind_reader(nb::module_& module) {
    nb::class_<Piece>(module, "PieceToRead", "A row-major array in a file, and the boxes that are wanted of it.")
        .def(
            "__init__",
            [](Piece* self, std::size_t file, std::uint64_t begin, std::uint64_t num_bytes,
               std::vector<std::uint32_t> checksums, std::size_t item_bytes, std::vector<std::int64_t> shape,
               bool shared) {
                new (self) Piece{file, begin, num_bytes, std::move(checksums), item_bytes, std::move(shape), {}, shared};
            },
            nb::kw_only(), "file"_a, "begin"_a, "num_bytes"_a, "checksums"_a, "item_bytes"_a, "shape"_a,
            "shared"_a = false)
        .def(
            "add_target",
            [](Piece& self, std::vector<std::int64_t> offset, std::vector<std::int64_t> shape, std::uintptr_t address,
               std::vector<std::int64_t> strides) {
                auto* const destination = reinterpret_cast<std::byte*>(address);
                self.targets.push_back({std::move(offset), std::move(shape), destination, std::move(strides)});
            },
            nb::kw_only(), "offset"_a, "shape"_a, "address"_a, "strides"_a,
            "Ask for a box: it goes to `address`, with `strides` in bytes, which must stay valid until it is read.");

    nb::class_<ReadError>(module, "ReadError", "What was wrong, and where.")
        .def_prop_ro("kind", [](const ReadError& self) { return name_of(self.kind); })
        .def_ro("code", &ReadError::code)
        .def_prop_ro("path", [](const ReadError& self) {
            return nb::steal<nb::str>(PyUnicode_DecodeFSDefault(self.path.c_str()));
        })
        .def_ro("piece", &ReadError::piece)
        .def_ro("offset", &ReadError::offset)
        .def_ro("length", &ReadError::length);

    nb::class_<ReadResult>(module, "ReadResult", "What reading came to.")
        .def_ro("errors", &ReadResult::errors)
        .def_ro("num_bytes", &ReadResult::num_bytes)
        .def_ro("cached_bytes", &ReadResult::cached_bytes)
        .def_ro("seconds", &ReadResult::seconds);

    module.def("read_pieces", &read, "files"_a, "pieces"_a, nb::kw_only(), "chunk_bytes"_a, "num_threads"_a = 0u,
               "direct"_a = true, "stop_at_first_error"_a = true,
               "Fill the destinations of all pieces, checking every chunk before a byte of it is used.");
}

}  // namespace kenotron
