#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "crc32c.hpp"
#include "job.hpp"

namespace kenotron {

Snapshot::Job::Job(std::string header_text, std::vector<Source> all_sources, std::size_t bytes_of_slot)
    : header(std::move(header_text)), sources(std::move(all_sources)), slot_bytes(bytes_of_slot) {
    std::size_t position = header.size();
    for (const Source& source : sources) {
        begins.push_back(position);
        position += source.bytes.num_bytes();
    }
    stats.num_bytes = position;
    parts.resize((position + slot_bytes - 1) / slot_bytes);
    for (std::size_t i = 0; i < parts.size(); ++i) parts[i] = cut(i);
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
            found.push_back({source, within, size, position - begin});
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

// Notes what the lazy sources hold now. What is on a device is compared by whoever owns it.
void Snapshot::Job::take_prints(double share, std::uint32_t with_seed) {
    seed = with_seed;
    if (share <= 0) return;
    lines = std::clamp<std::size_t>(static_cast<std::size_t>(share * double{lines_per_page} + 0.5), 1, lines_per_page);
    for (auto& slot : parts) {
        for (Part& part : slot) {
            const Source& source = sources[part.source];
            if (source.device >= 0 || source.is_eager) continue;
            part.print = source.bytes.is_contiguous()
                             ? fingerprint(source.bytes.data() + part.begin, part.size, source.is_own ? lines_per_page : lines, seed)
                             : source.bytes.sum(part.begin, part.size);
        }
    }
}

// Whether it is laid out as another one that was taken with the same seed, and its sources held the same then.
bool Snapshot::Job::has_prints_of(const Job& other) const {
    const auto is_same = [&](const Source& source) { return source.device < 0 && !source.is_eager; };
    if (lines == 0 || header.size() != other.header.size() || begins != other.begins || parts.size() != other.parts.size()) {
        return false;
    }
    if (!std::all_of(sources.begin(), sources.end(), is_same)) return false;
    if (!std::all_of(other.sources.begin(), other.sources.end(), is_same)) return false;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        for (std::size_t k = 0; k < parts[i].size(); ++k) {
            if (parts[i][k].print != other.parts[i][k].print) return false;
        }
    }
    return true;
}

// Finds out whether a part that was copied is still what it was when the snapshot was taken.
void Snapshot::Job::compare(Part& part, const std::byte* copied) const {
    const Source& source = sources[part.source];
    if (lines == 0 || source.is_eager || source.is_own) return;
    const std::uint32_t print = source.bytes.is_contiguous() ? fingerprint(copied, part.size, lines, seed) : part.crc;
    part.has_changed = print != part.print;
}

// In place of copying: sums the sources, and compares with what the other one has copied.
void Snapshot::Job::compare_sums(std::size_t slot) {
    for (std::size_t i = 0; i < parts[slot].size(); ++i) {
        Part& part = parts[slot][i];
        part.crc = sources[part.source].bytes.sum(part.begin, part.size);
        part.has_changed = part.crc != like->parts[slot][i].crc;
    }
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

bool Snapshot::is_like_other() const { return job_->like != nullptr; }

std::vector<std::size_t> Snapshot::changed() const {
    const Engine::Lock lock(engine_->mutex_);
    std::vector<std::size_t> found;
    for (const auto& slot : job_->parts) {  // in the order of the sources
        for (const Job::Part& part : slot) {
            if (part.has_changed && (found.empty() || found.back() != part.source)) found.push_back(part.source);
        }
    }
    return found;
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
