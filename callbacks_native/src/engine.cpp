#include "engine.hpp"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <span>

#include "crc32c.hpp"

namespace kenotron {

using std::chrono::duration;
using std::chrono::steady_clock;

// ---- One snapshot -----------------------------------------------------------------------------------------------------

struct Snapshot::Job {
    // A part of a source that lies in one slot and belongs to one sum.
    struct Part {
        std::size_t source;
        std::size_t begin;  // in the source
        std::size_t size;
        std::size_t at;  // in the slot
        std::uint32_t crc;
    };
    struct Filled {
        std::size_t index;
        std::byte* memory;
    };

    Job(std::string header_text, std::vector<Source> all_sources, std::size_t bytes_of_slot);
    std::size_t num_slots() const noexcept { return parts.size(); }
    std::size_t slot_size(std::size_t index) const noexcept {
        return std::min(slot_bytes, stats.num_bytes - index * slot_bytes);
    }
    std::vector<Part> cut(std::size_t index) const;
    void sum_device_parts(const Filled& filled);
    bool is_settled() const noexcept { return error.has_value() || is_cancelled; }
    // Nobody reads its sources, and nothing is left to write.
    bool is_at_rest() const noexcept { return is_staged && (is_settled() || num_written == num_slots()); }
    Status end() const { return error || !is_cancelled ? error : Error{ECANCELED, "write", {}}; }
    bool are_samples_alike(double share) const;

    // Set once.
    std::string header;
    std::vector<Source> sources;
    std::vector<std::size_t> begins;  // of the sources in the file
    std::size_t slot_bytes;
    std::vector<std::size_t> order;  // in which slots are copied: those with eager sources come first
    std::size_t num_eager = 0;       // slots
    std::vector<std::unique_ptr<CudaDriver::Event>> events;
    steady_clock::time_point submitted = steady_clock::now();
    steady_clock::time_point copied_from = submitted;  // by copiers; those that wait for it need not mind
    OutputFile file;

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
    bool is_torn = false;
    bool is_cancelled = false;
    Status error;
    std::optional<steady_clock::time_point> without_room_since;
    SnapshotStats stats;
};

Snapshot::Job::Job(std::string header_text, std::vector<Source> all_sources, std::size_t bytes_of_slot)
    : header(std::move(header_text)), sources(std::move(all_sources)), slot_bytes(bytes_of_slot) {
    std::size_t position = header.size();
    for (const Source& source : sources) {
        begins.push_back(position);
        position += source.bytes.num_bytes();
    }
    stats.num_bytes = position;
    parts.resize((position + slot_bytes - 1) / slot_bytes);
    order.resize(parts.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::vector<bool> is_eager(parts.size());
    for (std::size_t i = 0; i < sources.size(); ++i) {
        if (!sources[i].is_eager) continue;
        const std::size_t last = begins[i] + sources[i].bytes.num_bytes() - 1;
        for (std::size_t slot = begins[i] / slot_bytes; slot <= last / slot_bytes; ++slot) is_eager[slot] = true;
    }
    std::stable_partition(order.begin(), order.end(), [&](std::size_t slot) { return is_eager[slot]; });
    num_eager = static_cast<std::size_t>(std::count(is_eager.begin(), is_eager.end(), true));
}

std::vector<Snapshot::Job::Part> Snapshot::Job::cut(std::size_t index) const {
    const std::size_t begin = index * slot_bytes;
    const std::size_t end = begin + slot_size(index);
    std::vector<Part> found;
    std::size_t position = std::max(begin, header.size());
    const auto after = std::upper_bound(begins.begin(), begins.end(), position);
    for (auto source = static_cast<std::size_t>(after - begins.begin()) - 1; position < end; ++source) {
        const std::size_t source_end = begins[source] + sources[source].bytes.num_bytes();
        while (position < std::min(source_end, end)) {
            const std::size_t within = position - begins[source];
            const std::size_t size = std::min({source_end - position, end - position, sum_bytes - within % sum_bytes});
            found.push_back({source, within, size, position - begin, 0});
            position += size;
        }
    }
    return found;
}

// Host memory has been summed as it was copied.
void Snapshot::Job::sum_device_parts(const Filled& filled) {
    for (Part& part : parts[filled.index]) {
        if (sources[part.source].device >= 0) part.crc = crc32c({filled.memory + part.at, part.size});
    }
}

// Sums a random share of what was copied again, from the sources.
bool Snapshot::Job::are_samples_alike(double share) const {
    std::vector<const Part*> all;
    for (const auto& slot : parts) {
        for (const Part& part : slot) {
            const Source& source = sources[part.source];
            if (source.device < 0 && !source.is_eager) all.push_back(&part);
        }
    }
    std::minstd_rand random(static_cast<unsigned>(steady_clock::now().time_since_epoch().count()));
    std::shuffle(all.begin(), all.end(), random);
    const double wanted = share * static_cast<double>(stats.num_bytes);
    std::size_t checked = 0;
    for (const Part* part : all) {
        if (share <= 0 || (share < 1 && static_cast<double>(checked) >= wanted)) break;
        if (sources[part->source].bytes.sum(part->begin, part->size) != part->crc) return false;
        checked += part->size;
    }
    return true;
}

Snapshot::Snapshot(std::shared_ptr<Engine> engine, std::shared_ptr<Job> job)
    : engine_(std::move(engine)), job_(std::move(job)) {}

Snapshot::~Snapshot() {
    if (job_) cancel();
}

Status Snapshot::attach(const std::string& path) {
    Engine::Lock lock(engine_->mutex_);
    if (job_->is_settled()) return job_->end();
    ++job_->num_writing;
    lock.unlock();
    // Only this thread knows the file before it is attached.
    Status failed = job_->file.create(path, job_->stats.num_bytes, engine_->settings_.direct);
    lock.lock();
    --job_->num_writing;
    engine_->changed_.notify_all();
    if (failed && !job_->is_settled()) {
        job_->error = std::move(failed);
        engine_->settle(*job_);
    }
    if (job_->is_settled()) return job_->end();
    job_->is_attached = true;
    engine_->writing_.push_back(job_);
    return {};
}

void Snapshot::wait_eager() {
    Engine::Lock lock(engine_->mutex_);
    engine_->help_until(lock, [this] { return job_->is_staged || job_->num_eager_copied == job_->num_eager; });
}

void Snapshot::wait_staged() {
    Engine::Lock lock(engine_->mutex_);
    engine_->changed_.wait(lock, [this] { return job_->is_staged; });
}

bool Snapshot::has_ended() const {
    const Engine::Lock lock(engine_->mutex_);
    return job_->is_settled();
}

bool Snapshot::is_staged() const {
    const Engine::Lock lock(engine_->mutex_);
    return job_->is_staged;
}

bool Snapshot::is_torn() const {
    const Engine::Lock lock(engine_->mutex_);
    return job_->is_torn;
}

void Snapshot::restage() {
    Engine::Lock lock(engine_->mutex_);
    Job& job = *job_;
    // What was filled before is written first: two writers must not race for one place in the file.
    engine_->changed_.wait(lock, [&] { return job.is_at_rest(); });
    if (job.is_settled()) return;
    lock.unlock();
    Status failed = engine_->use_devices(job);  // which have been given more work since
    lock.lock();
    if (failed && !job.is_settled()) {
        job.error = std::move(failed);
        engine_->settle(job);
    }
    if (job.is_settled()) return;
    job.num_started = job.num_copied = job.num_eager_copied = job.num_written = 0;
    job.is_staged = job.is_torn = false;
    ++job.stats.num_restaged;
    engine_->begin(job_);
    engine_->writing_.push_back(job_);
    engine_->help_until(lock, [&] { return job.is_staged; });
}

Status Snapshot::finish() {
    Engine::Lock lock(engine_->mutex_);
    Job& job = *job_;
    engine_->changed_.wait(lock, [&] { return job.is_at_rest(); });
    if (job.is_settled()) return job.end();
    job.stats.is_direct = job.file.is_direct();
    ++job.num_writing;
    lock.unlock();
    Status failed = job.file.finish();
    lock.lock();
    --job.num_writing;
    engine_->changed_.notify_all();
    job.error = failed;
    return failed;
}

std::vector<std::vector<std::uint32_t>> Snapshot::sums() const {
    std::vector<std::vector<std::uint32_t>> sums(job_->sources.size());
    for (const auto& slot : job_->parts) {  // in the order of the file
        for (const Job::Part& part : slot) {
            auto& of_source = sums[part.source];
            if (part.begin % sum_bytes == 0) {
                of_source.push_back(part.crc);
            } else {
                of_source.back() = crc32c_combine(of_source.back(), part.crc, part.size);
            }
        }
    }
    return sums;
}

SnapshotStats Snapshot::stats() const {
    const Engine::Lock lock(engine_->mutex_);
    return job_->stats;
}

void Snapshot::cancel() {
    if (engine_->owner_ != getpid()) return;  // a fork's copy: no thread works on it there
    Engine::Lock lock(engine_->mutex_);
    job_->is_cancelled = true;
    engine_->settle(*job_);
    engine_->changed_.wait(lock, [this] { return job_->num_reading + job_->num_writing == 0; });
}

// ---- The engine -------------------------------------------------------------------------------------------------------

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

std::optional<Snapshot> Engine::submit(std::string header, std::vector<Source> sources, Status& failed, double head_start_s) {
    auto job = std::make_shared<Job>(std::move(header), std::move(sources), settings_.slot_bytes);
    if (job->num_eager == 0) job->copied_from += std::chrono::duration_cast<Clock::duration>(duration<double>(head_start_s));
    failed = use_devices(*job);
    if (failed) return {};
    prepare(job->stats.num_bytes);
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

template <typename Done>
bool Engine::help_until(Lock& lock, Done done, std::optional<Clock::time_point> deadline) {
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
        return job->num_started < job->num_slots() && !job->is_settled();
    });
    if (next == copying_.end()) return false;
    const std::shared_ptr<Job> job = *next;
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
        if (++job->num_copied == job->num_slots()) {
            changed_.notify_all();
            lock.unlock();
            const bool is_alike = job->are_samples_alike(settings_.checked_share);
            lock.lock();
            if (!job->is_settled()) {
                job->is_torn = !is_alike;
                job->is_staged = true;
                job->stats.staged_s = duration<double>(Clock::now() - job->submitted).count();
                std::erase(copying_, job);
            }
        }
    }
    --job->num_reading;
    if (job->is_settled()) settle(*job);
    changed_.notify_all();
    return true;
}

Status Engine::fill(Job& job, std::size_t index, std::byte* slot, CudaCopier* devices) const {
    const std::size_t begin = index * settings_.slot_bytes;
    const std::size_t size = job.slot_size(index);
    if (begin < job.header.size()) {
        std::memcpy(slot, job.header.data() + begin, std::min(size, job.header.size() - begin));
    }
    auto parts = job.cut(index);
    bool is_on_devices = false;
    for (Job::Part& part : parts) {
        const Source& source = job.sources[part.source];
        if (source.device < 0) {
            part.crc = source.bytes.copy_and_sum(slot + part.at, part.begin, part.size);
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
    job.parts[index] = std::move(parts);
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
