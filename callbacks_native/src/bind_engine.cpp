// The Python face of the writing half. Every call that may wait releases the GIL.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "engine.hpp"

namespace nb = nanobind;

namespace kenotron {
namespace {

// address, (extent, stride in bytes) of each dimension, bytes of an item, is eager, device ordinal or -1, stream, is own
using SourceTuple = std::tuple<std::uintptr_t, std::vector<std::pair<std::size_t, std::ptrdiff_t>>, std::size_t, bool, int,
                               std::uint64_t, bool>;

class PySnapshot {
public:
    PySnapshot(Snapshot snapshot, nb::object keep) : snapshot_(std::move(snapshot)), keep_(std::move(keep)) {}
    PySnapshot(PySnapshot&&) = default;
    ~PySnapshot() {
        if (!keep_.is_valid()) return;  // moved from, or forgotten
        const nb::gil_scoped_release others_may_run;
        snapshot_.cancel();
    }

    void attach(const std::string& path) {
        check(unlocked([&] { return snapshot_.attach(path); }));
    }
    void wait_eager() {
        unlocked([&] { snapshot_.wait_eager(); return Status{}; });
    }
    void wait_staged() {
        unlocked([&] { snapshot_.wait_staged(); return Status{}; });
    }
    void finish() {
        check(unlocked([&] { return snapshot_.finish(); }));
    }
    void cancel() {
        unlocked([&] { snapshot_.cancel(); return Status{}; });
        keep_.reset();  // its sums may still be asked for
    }
    bool has_ended() const { return snapshot_.has_ended(); }
    bool is_staged() const { return snapshot_.is_staged(); }
    std::vector<std::size_t> changed() const { return snapshot_.changed(); }
    bool is_like_other() const { return snapshot_.is_like_other(); }
    const Snapshot& native() const { return snapshot_; }
    std::vector<std::vector<std::uint32_t>> sums() const { return snapshot_.sums(); }

    nb::dict stats() const {
        const SnapshotStats stats = snapshot_.stats();
        nb::dict result;
        result["num_bytes"] = stats.num_bytes;
        result["staged_s"] = stats.staged_s;
        result["written_s"] = stats.written_s;
        result["waited_for_room_s"] = stats.waited_for_room_s;
        result["is_direct"] = stats.is_direct;
        return result;
    }

private:
    template <typename Call>
    static Status unlocked(Call call) {
        const nb::gil_scoped_release others_may_run;
        return call();
    }
    static void check(const Status& failed) {
        if (failed) raise(*failed);
    }

    Snapshot snapshot_;
    nb::object keep_;  // whatever owns the sources
};

std::shared_ptr<Engine> make_engine(std::size_t pool_bytes, std::size_t slot_bytes, int num_copiers, int num_writers, int niceness,
                                    std::vector<int> cpus, double max_bytes_per_second, bool direct, double checked_share,
                                    std::string cuda_library) {
    Status failed;
    auto engine = Engine::create({pool_bytes, slot_bytes, num_copiers, num_writers, niceness, std::move(cpus),
                                  max_bytes_per_second, direct, checked_share, std::move(cuda_library)},
                                 failed);
    if (failed) raise(*failed);
    return engine;
}

PySnapshot submit(Engine& engine, const nb::bytes& header, const std::vector<SourceTuple>& tuples, nb::object keep,
                  double head_start_s, const PySnapshot* other) {
    std::vector<Source> sources;
    sources.reserve(tuples.size());
    for (const auto& [address, dims, item_bytes, is_eager, device, stream, is_own] : tuples) {
        std::vector<StridedBytes::Dim> extents;
        for (const auto& [extent, stride] : dims) extents.push_back({extent, stride});
        sources.push_back({StridedBytes(reinterpret_cast<const std::byte*>(address), extents, item_bytes), is_eager, device, stream,
                           is_own});
    }
    Status failed;
    std::string header_text(header.c_str(), header.size());
    std::optional<Snapshot> snapshot = [&] {
        const nb::gil_scoped_release others_may_run;
        return engine.submit(std::move(header_text), std::move(sources), failed, head_start_s, other == nullptr ? nullptr : &other->native());
    }();
    if (failed) raise(*failed);
    return PySnapshot(std::move(*snapshot), std::move(keep));
}

}  // namespace

void bind_engine(nb::module_& module) {
    nb::class_<PySnapshot>(module, "Snapshot")
        .def("attach", &PySnapshot::attach, nb::arg("path"))
        .def("wait_eager", &PySnapshot::wait_eager)
        .def("wait_staged", &PySnapshot::wait_staged)
        .def("finish", &PySnapshot::finish)
        .def("cancel", &PySnapshot::cancel)
        .def("sums", &PySnapshot::sums)
        .def("changed", &PySnapshot::changed)
        .def("stats", &PySnapshot::stats)
        .def_prop_ro("has_ended", &PySnapshot::has_ended)
        .def_prop_ro("is_staged", &PySnapshot::is_staged)
        .def_prop_ro("is_like_other", &PySnapshot::is_like_other);

    nb::class_<Engine>(module, "Engine")
        .def(nb::new_(&make_engine), nb::kw_only(), nb::arg("pool_bytes"), nb::arg("slot_bytes"), nb::arg("num_copiers"),
             nb::arg("num_writers"), nb::arg("niceness"), nb::arg("cpus"), nb::arg("max_bytes_per_second"), nb::arg("direct"),
             nb::arg("checked_share"), nb::arg("cuda_library") = "libcuda.so.1")
        .def("prepare", &Engine::prepare, nb::arg("num_bytes"), nb::call_guard<nb::gil_scoped_release>())
        .def("submit", &submit, nb::arg("header"), nb::arg("sources"), nb::arg("keep"),
             nb::arg("head_start_s") = 0.0, nb::arg("other") = nb::none())
        .def("fence", &Engine::fence, nb::arg("within_s") = nb::none(), nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("num_slots", [](const Engine& engine) { return engine.pool().num_slots(); })
        .def_prop_ro("num_free_slots", [](const Engine& engine) { return engine.pool().num_free(); })
        .def_prop_ro("num_claimed_slots", [](const Engine& engine) { return engine.pool().num_claimed(); })
        .def_prop_ro("is_locked", [](const Engine& engine) { return engine.pool().is_locked(); });
}

}  // namespace kenotron
