// The writing half of the engine: snapshots of a model's memory are copied into a pool, summed on the way, and written.
//
//   submit ──► copiers ──► pool of slots ──► writers ──► finish
//              (1)         (bounded)         (2)         (fsync, by whoever waits for it)
//
// 1. submit: a snapshot is a header and sources (runs of memory), which make up one file in this order. The file is cut
//    into slots. Nothing is copied yet, but a fingerprint of each page is taken: the caller is to keep the sources unchanged
//    until the snapshot is staged, and might not.
// 2. copiers take one free slot of the pool after the other, oldest snapshot first, fill it and compute its CRC-32C sums.
//    (What comes from a device is summed by its writer: a link carries several times what a core sums, and would stand
//    idle.) Without a free slot they wait for the writers: that is what bounds memory. A thread that waits for a snapshot
//    to be staged (the fence) copies too instead of sleeping.
// 3. staged: all has been copied. What was copied has the fingerprints of what was there at submit, or the snapshot tells
//    which sources somebody has changed: it must not be kept.
// 4. attach: the file is created, which may be long after submit. From here on writers take filled slots.
// 5. finish: when all is written the file gets its exact size and is made durable.
//
// A snapshot of what another one held, told by its fingerprints, is not copied: its sources are summed, and compared with
// the other's sums. What holds the same to the last byte may be a link to the same file.
//
// A failure is kept in its snapshot, which frees its slots and counts as staged once nobody reads its sources any more;
// other snapshots go on. No thread ever throws or ends the process. All state is behind one mutex, which is held for
// bookkeeping alone.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "copy.hpp"
#include "cuda.hpp"
#include "error.hpp"
#include "file.hpp"
#include "pool.hpp"

namespace kenotron {

// One checksum is kept for so many bytes of each source.
inline constexpr std::size_t sum_bytes = std::size_t{4} << 20;

struct EngineSettings {
    std::size_t pool_bytes = std::size_t{256} << 20;
    std::size_t slot_bytes = std::size_t{8} << 20;  // a multiple of `direct_alignment`
    int num_copiers = 1;
    int num_writers = 2;
    int niceness = 5;                // of the threads of the engine
    std::vector<int> cpus;           // that they may run on; empty: all
    double max_bytes_per_second = 0;  // over all writers; 0: no limit
    bool direct = true;              // past the page cache, where the file system can
    double checked_share = 1.0 / 64;  // of the bytes, that fingerprints are made of
    std::string cuda_library = "libcuda.so.1";
};

struct Source {
    StridedBytes bytes;
    bool is_eager = false;     // copied first, since it may change at any time
    int device = -1;           // CUDA ordinal, and then contiguous; -1: host memory
    std::uint64_t stream = 0;  // that the device's work on it was given to
    bool is_own = false;       // nobody can change it: its fingerprint tells every byte of it
};

struct SnapshotStats {
    std::size_t num_bytes = 0;
    double staged_s = 0;         // from submit until all was copied
    double written_s = 0;        // from submit until all was written
    double waited_for_room_s = 0;  // that copying stood still for want of a free slot
    bool is_direct = false;
};

class Engine;

// One file on its way: made by Engine::submit. Destroying it gives up what has not happened yet.
class Snapshot {
public:
    Snapshot(Snapshot&&) = default;
    Snapshot& operator=(Snapshot&&) = delete;
    ~Snapshot();

    // Create the file and let the writers begin. Once.
    Status attach(const std::string& path);

    // Return when the eager sources have been copied: those that may change at any time. The caller helps. With more of
    // them than the pool holds this waits for a file to be attached.
    void wait_eager();

    // Return when all has been copied, or the snapshot has ended.
    void wait_staged();
    bool is_staged() const;

    // Whether it has failed or was cancelled: nothing more will happen.
    bool has_ended() const;

    // Which sources were not copied as they were at submit, because somebody has changed them. Of a staged snapshot.
    std::vector<std::size_t> changed() const;

    // Whether nothing is copied, since the other snapshot that was given to submit seems to hold the same. Once it is staged,
    // `changed` tells in which sources it does not. No file is attached to it.
    bool is_like_other() const;

    // Wait for the writers, give the file its size, make it durable and close it.
    Status finish();

    // Of a finished snapshot: for each source, the sum of each `sum_bytes` of it.
    std::vector<std::vector<std::uint32_t>> sums() const;

    SnapshotStats stats() const;

    // Drop all that is left to do; returns when no thread reads a source or writes the file any more.
    void cancel();

private:
    friend class Engine;
    struct Job;  // what the threads know of it: job.hpp

    Snapshot(std::shared_ptr<Engine> engine, std::shared_ptr<Job> job);

    std::shared_ptr<Engine> engine_;
    std::shared_ptr<Job> job_;
};

class Engine : public std::enable_shared_from_this<Engine> {
public:
    // Fails where there is no address space for the pool.
    static std::shared_ptr<Engine> create(EngineSettings settings, Status& failed);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Claim memory for a snapshot of so many bytes (at most the whole pool) in the background.
    void prepare(std::size_t num_bytes);

    // Take a snapshot of sources of at least one byte each, and return at once. Copiers begin so many seconds later unless
    // some of them are eager; whoever waits for the snapshot helps at once. `other`: a snapshot that may hold the same.
    std::optional<Snapshot> submit(std::string header, std::vector<Source> sources, Status& failed, double head_start_s = 0,
                                   const Snapshot* other = nullptr);

    // Return true when every snapshot is staged: from here on the sources may change. False when the time is up first.
    bool fence(std::optional<double> within_s = {});

    const EngineSettings& settings() const noexcept { return settings_; }
    const SlotPool& pool() const noexcept { return pool_; }

private:
    friend class Snapshot;
    using Clock = std::chrono::steady_clock;
    using Lock = std::unique_lock<std::mutex>;
    using Job = Snapshot::Job;

    explicit Engine(EngineSettings settings);
    void start_threads();
    void run_copier();
    void run_writer();
    void behave() const noexcept;
    Status use_devices(Job& job);

    // Each does one slot's worth of work with the mutex released meanwhile; false where there is none to do now.
    bool copy_one(Lock& lock, CudaCopier* devices);
    void compare_one(Lock& lock, const std::shared_ptr<Job>& job);
    bool write_one(Lock& lock);
    Status fill(Job& job, std::size_t index, std::byte* slot, CudaCopier* devices) const;
    bool wait_for_bandwidth(Lock& lock, const Job& job, std::size_t num_bytes);

    // With the mutex held.
    void begin(const std::shared_ptr<Job>& job);
    void note_copied(Job& job);
    void settle(Job& job);
    bool help_until(Lock& lock, const std::function<bool()>& done, std::optional<Clock::time_point> deadline = {});

    const EngineSettings settings_;
    const int owner_;  // the process: after a fork there are no threads to join
    mutable std::mutex mutex_;
    std::condition_variable changed_;  // anything at all: there are few threads, and some hundred events a second
    std::deque<std::shared_ptr<Job>> copying_;  // not staged yet, the oldest first
    std::deque<std::shared_ptr<Job>> writing_;  // attached and not all written, the oldest first
    Clock::time_point bandwidth_free_at_{};
    bool is_stopping_ = false;
    std::shared_ptr<CudaDriver> cuda_;
    SlotPool pool_;
    std::vector<std::thread> threads_;
};

}  // namespace kenotron
