// What the engine's threads know of one snapshot. For engine.cpp and snapshot.cpp alone.
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine.hpp"

namespace kenotron {

struct Snapshot::Job {
    // A part of a source that lies in one slot and belongs to one sum.
    struct Part {
        std::size_t source;
        std::size_t begin;  // in the source
        std::size_t size;
        std::size_t at;  // in the slot
        std::uint32_t crc = 0;
        std::uint32_t print = 0;  // when the snapshot was taken: `fingerprint`, or the CRC-32C of all
        bool has_changed = false;  // between that and the copy
    };
    struct Filled {
        std::size_t index;
        std::byte* memory;
    };

    Job(std::string header_text, std::vector<Source> all_sources, std::size_t bytes_of_slot);
    void take_prints(double share, std::uint32_t with_seed);
    bool has_prints_of(const Job& other) const;
    void compare(Part& part, const std::byte* copied) const;
    void compare_sums(std::size_t slot);
    std::size_t num_slots() const noexcept { return parts.size(); }
    std::size_t slot_size(std::size_t index) const noexcept {
        return std::min(slot_bytes, stats.num_bytes - index * slot_bytes);
    }
    std::vector<Part> cut(std::size_t index) const;
    void sum_device_parts(const Filled& slot);
    bool is_settled() const noexcept { return error.has_value() || is_cancelled; }
    // Nobody reads its sources, and nothing is left to write.
    bool is_at_rest() const noexcept { return is_staged && (is_settled() || num_written == num_slots()); }
    Status end() const { return error || !is_cancelled ? error : Error{ECANCELED, "write", {}}; }
    bool is_all_copied() const noexcept { return num_copied == num_slots(); }

    // Set once.
    std::string header;
    std::vector<Source> sources;
    std::vector<std::size_t> begins;  // of the sources in the file
    std::size_t slot_bytes;
    std::vector<std::size_t> order;  // in which slots are copied: those with eager sources come first
    std::size_t num_eager = 0;       // slots
    std::vector<std::unique_ptr<CudaDriver::Event>> events;
    std::chrono::steady_clock::time_point submitted = std::chrono::steady_clock::now();
    std::chrono::steady_clock::time_point copied_from = submitted;  // by copiers; those that wait for it need not mind
    OutputFile file;
    std::size_t lines = 0;  // of each page that fingerprints are made of
    std::uint32_t seed = 0;
    // What seems to hold the same, byte by byte. Then nothing is copied: sums are compared with those of its copy.
    std::shared_ptr<const Job> like;

    // Each written by the thread that copies the slot; sums of device memory by the one that writes it.
    std::vector<std::vector<Part>> parts;

    // Behind the engine's mutex.
    std::size_t num_started = 0;
    std::size_t num_copied = 0;
    std::size_t num_eager_copied = 0;
    std::size_t num_written = 0;
    std::size_t num_reading = 0;  // threads that read sources right now
    std::size_t num_writing = 0;  // threads that create, write or finish the file right now
    std::deque<Filled> filled;
    bool is_attached = false;
    bool is_staged = false;
    bool is_cancelled = false;
    Status error;
    std::optional<std::chrono::steady_clock::time_point> without_room_since;
    SnapshotStats stats;
};

}  // namespace kenotron
