#include "engine.hpp"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cstring>

#include "job.hpp"

namespace kenotron {

using std::chrono::duration;

Engine::Engine(EngineSettings settings)
    : settings_(std::move(settings)),
      owner_(getpid()),
      pool_(std::max<std::size_t>(1, settings_.pool_bytes / settings_.slot_bytes), settings_.slot_bytes, [this] {
          const Lock lock(mutex_);
          changed_.notify_all();
      }) {}

std::shared_ptr<Engine> Engine::create(EngineSettings settings, Status& failed) {
    std::shared_ptr<Engine> engine(new Engine(std::move(settings)));
    if (!engine->pool_.is_valid()) {
        failed = Error{ENOMEM, "mmap", {}};
        return nullptr;
    }
    engine->start_threads();
    return engine;
}

void Engine::start_threads() {
    for (int i = 0; i < settings_.num_copiers; ++i) threads_.emplace_back([this] { run_copier(); });
    for (int i = 0; i < settings_.num_writers; ++i) threads_.emplace_back([this] { run_writer(); });
}

Engine::~Engine() {
    if (owner_ != getpid()) {
        // In a fork's copy the threads are not there: joining them, or destroying what they wait on, would wait for them.
        // All of it is made anew over what it was.
        for (std::thread& thread : threads_) std::construct_at(&thread);
        std::construct_at(&changed_);
        return;
    }
    {
        const Lock lock(mutex_);
        is_stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Engine::prepare(std::size_t num_bytes) { pool_.prepare((num_bytes + settings_.slot_bytes - 1) / settings_.slot_bytes); }

std::optional<Snapshot> Engine::submit(std::string header, std::vector<Source> sources, Status& failed, double head_start_s,
                                       const Snapshot* other) {
    auto job = std::make_shared<Job>(std::move(header), std::move(sources), settings_.slot_bytes);
    if (job->num_eager == 0) job->copied_from += std::chrono::duration_cast<Clock::duration>(duration<double>(head_start_s));
    failed = use_devices(*job);
    if (failed) return {};
    const auto ticks = static_cast<std::uint32_t>(job->submitted.time_since_epoch().count());  // other lines each time
    job->take_prints(settings_.checked_share, other == nullptr ? ticks : other->job_->seed);
    if (other != nullptr && job->has_prints_of(*other->job_)) {
        job->like = other->job_->like ? other->job_->like : other->job_;
    } else {
        prepare(job->stats.num_bytes);
    }
    Snapshot snapshot(shared_from_this(), job);
    const Lock lock(mutex_);
    begin(job);
    return snapshot;
}

bool Engine::fence(std::optional<double> within_s) {
    std::optional<Clock::time_point> deadline;
    if (within_s) deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(duration<double>(*within_s));
    Lock lock(mutex_);
    return help_until(lock, [this] { return copying_.empty(); }, deadline);
}

bool Engine::help_until(Lock& lock, const std::function<bool()>& done, std::optional<Clock::time_point> deadline) {
    std::optional<CudaCopier> devices;
    while (!done()) {
        if (deadline && Clock::now() >= *deadline) return false;
        if (cuda_ && !devices) devices.emplace(cuda_);  // perhaps by a snapshot that came while this one waited
        if (copy_one(lock, devices ? &*devices : nullptr)) continue;
        if (deadline) {
            changed_.wait_until(lock, *deadline);
        } else {
            changed_.wait(lock);
        }
    }
    return true;
}

// ---- Copying ----------------------------------------------------------------------------------------------------------

void Engine::run_copier() {
    behave();
    std::optional<CudaCopier> devices;
    Lock lock(mutex_);
    while (!is_stopping_) {
        if (cuda_ && !devices) devices.emplace(cuda_);
        if (!copying_.empty() && Clock::now() < copying_.front()->copied_from) {
            const auto when = copying_.front()->copied_from;  // the snapshot may be gone before the wait is over
            changed_.wait_until(lock, when);
        } else if (!copy_one(lock, devices ? &*devices : nullptr)) {
            changed_.wait(lock);
        }
    }
}

void Engine::begin(const std::shared_ptr<Job>& job) {
    if (job->num_slots() == 0) {
        job->is_staged = true;  // an empty file
    } else {
        copying_.push_back(job);
    }
    changed_.notify_all();
}

bool Engine::copy_one(Lock& lock, CudaCopier* devices) {
    const auto next = std::find_if(copying_.begin(), copying_.end(), [](const auto& job) {
        return job->num_started < job->num_slots() && !job->is_settled() && (!job->like || job->like->is_staged);
    });
    if (next == copying_.end()) return false;
    const std::shared_ptr<Job> job = *next;
    if (job->like) {
        compare_one(lock, job);
        return true;
    }
    std::byte* slot = pool_.try_acquire();
    if (slot == nullptr) {
        pool_.prepare(pool_.num_claimed() + 1);  // as long as there is more, nobody has to wait for a writer
        if (!job->without_room_since) job->without_room_since = Clock::now();
        return false;
    }
    if (job->without_room_since) {
        job->stats.waited_for_room_s += duration<double>(Clock::now() - *job->without_room_since).count();
        job->without_room_since.reset();
    }
    const bool is_eager = job->num_started < job->num_eager;
    const std::size_t index = job->order[job->num_started++];
    ++job->num_reading;
    lock.unlock();
    Status failed = fill(*job, index, slot, devices);
    lock.lock();
    if (failed && !job->is_settled()) job->error = std::move(failed);
    if (job->is_settled()) {
        pool_.release(slot);
    } else {
        job->filled.push_back({index, slot});
        if (is_eager) ++job->num_eager_copied;
        note_copied(*job);
    }
    --job->num_reading;
    if (job->is_settled()) settle(*job);
    changed_.notify_all();
    return true;
}

void Engine::note_copied(Job& job) {
    ++job.num_copied;
    if (!job.is_all_copied()) return;
    job.is_staged = true;
    job.stats.staged_s = duration<double>(Clock::now() - job.submitted).count();
    std::erase_if(copying_, [&](const auto& other) { return other.get() == &job; });
}

// Compares one slot's worth with what the other snapshot has copied, if it has.
void Engine::compare_one(Lock& lock, const std::shared_ptr<Job>& job) {
    if (!job->like->is_all_copied()) {
        job->error = Error{ECANCELED, "compare", {}};
    } else {
        const std::size_t index = job->order[job->num_started++];
        ++job->num_reading;
        lock.unlock();
        job->compare_sums(index);
        lock.lock();
        if (!job->is_settled()) note_copied(*job);
        --job->num_reading;
    }
    if (job->is_settled()) settle(*job);
    changed_.notify_all();
}

Status Engine::fill(Job& job, std::size_t index, std::byte* slot, CudaCopier* devices) const {
    const std::size_t begin = index * settings_.slot_bytes;
    const std::size_t size = job.slot_size(index);
    if (begin < job.header.size()) {
        std::memcpy(slot, job.header.data() + begin, std::min(size, job.header.size() - begin));
    }
    auto& parts = job.parts[index];
    bool is_on_devices = false;
    for (Job::Part& part : parts) {
        const Source& source = job.sources[part.source];
        if (source.device < 0) {
            part.crc = source.bytes.copy_and_sum(slot + part.at, part.begin, part.size);
            job.compare(part, slot + part.at);
            continue;
        }
        if (!is_on_devices) {
            for (const auto& event : job.events) {
                if (Status failed = devices->wait_for(*event)) return failed;
            }
            is_on_devices = true;
        }
        if (Status failed = devices->begin_copy(source.device, slot + part.at, source.bytes.data() + part.begin, part.size)) {
            devices->finish();  // what was begun still writes to the slot
            return failed;
        }
    }
    if (is_on_devices) {
        if (Status failed = devices->finish()) return failed;
    }
    std::memset(slot + size, 0, (direct_alignment - size % direct_alignment) % direct_alignment);
    publish_stores();
    return {};
}

// Opens the driver at the first device source, and marks on each stream where its work stands now.
Status Engine::use_devices(Job& job) {
    std::vector<std::pair<int, std::uint64_t>> streams;
    for (const Source& source : job.sources) {
        if (source.device >= 0) streams.emplace_back(source.device, source.stream);
    }
    if (streams.empty()) return {};
    std::sort(streams.begin(), streams.end());
    streams.erase(std::unique(streams.begin(), streams.end()), streams.end());
    const int first = streams.front().first;
    std::shared_ptr<CudaDriver> driver;
    {
        const Lock lock(mutex_);
        driver = cuda_;
    }
    if (!driver) {
        std::string problem;
        driver = CudaDriver::open(settings_.cuda_library, problem);
        if (!driver) return Error{ENODEV, problem, {}};
        pool_.pin_with([driver, first](std::byte* at, std::size_t size) { driver->pin(first, at, size); },
                       [driver, first](std::byte* at) { driver->unpin(first, at); });
        const Lock lock(mutex_);
        cuda_ = driver;
        changed_.notify_all();
    }
    job.events.clear();
    for (const auto& [device, stream] : streams) {
        job.events.push_back(std::make_unique<CudaDriver::Event>(driver, device));
        if (Status failed = job.events.back()->record(stream)) return failed;
    }
    return {};
}

// ---- Writing ----------------------------------------------------------------------------------------------------------

void Engine::run_writer() {
    behave();
    Lock lock(mutex_);
    while (!is_stopping_) {
        if (!write_one(lock)) changed_.wait(lock);
    }
}

bool Engine::write_one(Lock& lock) {
    const auto next = std::find_if(writing_.begin(), writing_.end(), [](const auto& job) { return !job->filled.empty(); });
    if (next == writing_.end()) return false;
    const std::shared_ptr<Job> job = *next;
    const Job::Filled filled = job->filled.front();
    job->filled.pop_front();
    ++job->num_writing;
    Status failed;
    if (wait_for_bandwidth(lock, *job, job->slot_size(filled.index))) {
        lock.unlock();
        job->sum_device_parts(filled);
        failed = job->file.write({filled.memory, job->slot_size(filled.index)}, filled.index * settings_.slot_bytes);
        lock.lock();
    }
    pool_.release(filled.memory);
    if (failed && !job->is_settled()) {
        job->error = std::move(failed);
        settle(*job);
    } else if (++job->num_written == job->num_slots() && !job->is_settled()) {
        job->stats.written_s = duration<double>(Clock::now() - job->submitted).count();
        std::erase(writing_, job);
    }
    --job->num_writing;
    changed_.notify_all();
    return true;
}

// Returns at the time at which so many bytes may be written; false where the snapshot ends first.
bool Engine::wait_for_bandwidth(Lock& lock, const Job& job, std::size_t num_bytes) {
    if (settings_.max_bytes_per_second <= 0) return true;
    const auto start = std::max(Clock::now(), bandwidth_free_at_);
    const duration<double> length(static_cast<double>(num_bytes) / settings_.max_bytes_per_second);
    bandwidth_free_at_ = start + std::chrono::duration_cast<Clock::duration>(length);
    return !changed_.wait_until(lock, start, [&job] { return job.is_settled(); });
}

// ---- Ends -------------------------------------------------------------------------------------------------------------

void Engine::settle(Job& job) {
    for (const Job::Filled& filled : job.filled) pool_.release(filled.memory);
    job.filled.clear();
    const auto is_this = [&](const auto& other) { return other.get() == &job; };
    std::erase_if(writing_, is_this);
    if (job.num_reading == 0) {  // otherwise the last one that reads sources calls again
        std::erase_if(copying_, is_this);
        job.is_staged = true;
    }
    changed_.notify_all();
}

// Of the calling thread: step aside for training.
void Engine::behave() const noexcept {
#ifdef __linux__
    const auto thread = static_cast<id_t>(syscall(SYS_gettid));
    setpriority(PRIO_PROCESS, thread, settings_.niceness);
    if (!settings_.cpus.empty()) {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (const int cpu : settings_.cpus) CPU_SET(static_cast<std::size_t>(cpu), &set);
        sched_setaffinity(0, sizeof set, &set);
    }
#endif
}

}  // namespace kenotron
