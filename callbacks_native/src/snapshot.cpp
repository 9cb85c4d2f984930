#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "crc32c.hpp"
#include "job.hpp"

namespace kenotron {

using std::chrono::steady_clock;

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
void Snapshot::Job::sum_device_parts(const Filled& slot) {
    for (Part& part : parts[slot.index]) {
        if (sources[part.source].device >= 0) part.crc = crc32c({slot.memory + part.at, part.size});
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

// ---- What its owner sees ----------------------------------------------------------------------------------------------

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

}  // namespace kenotron
