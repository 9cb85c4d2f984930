#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace kenotron {
namespace {

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

#ifdef O_DIRECT
bool set_direct(int descriptor, bool direct) {
    const int flags = fcntl(descriptor, F_GETFL);
    return flags >= 0 && fcntl(descriptor, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}
#else
bool set_direct(int, bool direct) { return !direct; }
#endif

}  // namespace

OutputFile::~OutputFile() {
    if (descriptor_ >= 0) close(descriptor_);
}

Status OutputFile::create(const std::string& path, std::size_t num_bytes, bool direct) {
    path_ = path;
    num_bytes_ = num_bytes;
    descriptor_ = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ < 0) return last_error("open", path);
    if (Status failed = reserve()) return failed;
    // Afterwards, since some file systems create the file and only then refuse the flag.
    is_direct_ = direct && set_direct(descriptor_, true);
    return {};
}

// Not posix_fallocate: where the file system cannot, glibc writes into every single block instead.
Status OutputFile::reserve() {
#ifdef __linux__
    while (fallocate(descriptor_, 0, 0, static_cast<off_t>(num_bytes_)) != 0) {
        if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) return {};
        if (errno != EINTR) return last_error("fallocate", path_);
    }
#endif
    return {};
}

Status OutputFile::write(std::span<const std::byte> bytes, std::size_t position) {
    std::size_t done = 0;
    while (done < bytes.size()) {
        const bool direct = is_direct_;
        const std::size_t left = bytes.size() - done;
        const std::size_t size = direct ? round_up(left, direct_alignment) : left;
        const ssize_t written = pwrite(descriptor_, bytes.data() + done, size, static_cast<off_t>(position + done));
        if (written > 0) {
            std::size_t step = std::min(static_cast<std::size_t>(written), left);
            if (direct && step < left) {  // a short write: what it began of a block is written again
                step = step / direct_alignment * direct_alignment;
                if (step == 0 && !set_direct(descriptor_, false)) return last_error("fcntl", path_);
                if (step == 0) is_direct_ = false;
            }
            done += step;
            continue;
        }
        if (written == 0) {
            errno = EIO;
            return last_error("pwrite", path_);
        }
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EINVAL && direct && set_direct(descriptor_, false)) {  // it took the flag and cannot honour it
            is_direct_ = false;
            continue;
        }
        return last_error("pwrite", path_);
    }
#ifdef __linux__
    // Buffered: start the write-back now, so that not all of it is left for fsync.
    if (!is_direct_) {
        sync_file_range(descriptor_, static_cast<off_t>(position), static_cast<off_t>(bytes.size()), SYNC_FILE_RANGE_WRITE);
    }
#endif
    return {};
}

Status OutputFile::finish() {
    while (ftruncate(descriptor_, static_cast<off_t>(num_bytes_)) != 0) {
        if (errno != EINTR) return last_error("ftruncate", path_);
    }
    while (fsync(descriptor_) != 0) {
        if (errno == EINTR) continue;
        // The system tells any other failure once and then forgets it: closed, so that nobody can try again.
        const Status failed = last_error("fsync", path_);
        close(std::exchange(descriptor_, -1));
        return failed;
    }
#ifdef POSIX_FADV_DONTNEED
    if (!is_direct_) posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
#endif
    // Closed even where that was interrupted, and durable since fsync.
    if (close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR) return last_error("close", path_);
    return {};
}

}  // namespace kenotron
