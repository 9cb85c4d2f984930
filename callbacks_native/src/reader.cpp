// How a read goes:
//   1. Of each piece, the chunks in which wanted bytes lie, in the order of the files: only chunks have checksums.
//   2. Neighbouring chunks make a window, what lies between them is read along where it is short: ten thousand tiny
//      tensors are a few reads, and a tensor of any size needs no more memory than one window per thread.
//   3. Threads take windows one by one. A window that is in the page cache is copied from there, any other one is read
//      past it into an aligned buffer: at the speed of the disk, for a tenth of the processor time. One that is shared
//      goes through the page cache, and so much before it is taken the disk is asked for it: of processes that read the
//      same, all in the same order, the first asks, and the disk goes on while all of them copy.
//   4. A chunk has its checksum, or none of its bytes goes any further. Then its boxes are copied out of it.
// An error is a value and stops all threads, unless all errors are asked for; then a window that cannot be read is
// tried again chunk by chunk, so that one bad sector is not the end of its neighbours.
#include "reader.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>

#include "box.hpp"
#include "crc32c.hpp"
#include "file.hpp"

namespace kenotron {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t huge_page_bytes = 2 << 20;
constexpr std::uint64_t probe_bytes = 1 << 20;
constexpr auto time_between_questions = std::chrono::milliseconds(100);

// Where the block that a byte lies in begins, and where the first one at or behind it does.
constexpr std::uint64_t block_of(std::uint64_t position) { return position / direct_alignment * direct_alignment; }
constexpr std::uint64_t round_up(std::uint64_t position, std::uint64_t unit = direct_alignment) {
    return (position + unit - 1) / unit * unit;
}

// ---- Files ----------------------------------------------------------------------------------------------------------

class Descriptor {
public:
    Descriptor(const std::string& path, int flags) {
        do {
            number_ = ::open(path.c_str(), flags | O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO would be waited for
        } while (number_ < 0 && errno == EINTR);
        if (number_ < 0) {
            code_ = errno;
            return;
        }
        struct stat found {};
        if (::fstat(number_, &found) == 0 && S_ISREG(found.st_mode)) return;
        code_ = S_ISDIR(found.st_mode) ? EISDIR : EINVAL;
        ::close(std::exchange(number_, -1));
    }
    ~Descriptor() {
        if (number_ >= 0) ::close(number_);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    bool is_open() const { return number_ >= 0; }
    int number() const { return number_; }
    int code() const { return code_; }

    // Tells the system what is read next: all of it is asked of the disk at once, and not readahead by readahead.
    void expect(std::uint64_t offset, std::uint64_t num_bytes) const {
#ifdef POSIX_FADV_WILLNEED
        ::posix_fadvise(number_, static_cast<off_t>(offset), static_cast<off_t>(num_bytes), POSIX_FADV_WILLNEED);
#else
        static_cast<void>(offset), static_cast<void>(num_bytes);
#endif
    }

    // As pread(2), but never interrupted.
    ssize_t read(std::byte* to, std::uint64_t num_bytes, std::uint64_t offset) const {
        ssize_t count;
        do {
            count = ::pread(number_, to, num_bytes, static_cast<off_t>(offset));
        } while (count < 0 && errno == EINTR);
        return count;
    }

private:
    int number_ = -1;
    int code_ = 0;
};

// Tells what of a file is in the page cache. It is mapped, and none of its pages is ever touched.
//
// preadv2 with RWF_NOWAIT would tell, too, but asking so for what is not there starts reading it into the cache
// (measured: all of 8 MiB, the device's readahead) while we read it past the cache. Even a single byte that was not there
// is, on a busy machine, often there when the answer is given.
class Residency {
public:
    Residency(const std::string& path, int descriptor) {
        struct stat status;
        if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size == 0) return;
        // Of files that are neither ours nor writable mincore(2) says that all is there.
        if (status.st_uid != ::geteuid() && ::faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) != 0) return;
        size_ = static_cast<std::size_t>(status.st_size);
        void* const mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
        if (mapped != MAP_FAILED) mapped_ = static_cast<std::byte*>(mapped);
    }
    ~Residency() {
        if (mapped_ != nullptr) ::munmap(mapped_, size_);
    }
    Residency(const Residency&) = delete;
    Residency& operator=(const Residency&) = delete;

    // Whether the bytes from `begin` to `end` are there, as far as a look at one page of each megabyte tells; false where
    // the system does not say. 1 µs for each look.
    bool has(std::uint64_t begin, std::uint64_t end) const {
        for (std::uint64_t at = begin;; at = std::min(at + probe_bytes, end - 1)) {
            if (!has_page(at)) return false;
            if (at == end - 1) return true;
        }
    }

private:
    bool has_page(std::uint64_t position) const {
#ifdef __linux__
        static const auto page_bytes = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
        if (mapped_ == nullptr || position >= size_) return false;
        unsigned char is_there = 0;
        return ::mincore(mapped_ + position / page_bytes * page_bytes, 1, &is_there) == 0 && (is_there & 1) != 0;
#else
        static_cast<void>(position);
        return false;
#endif
    }

    std::byte* mapped_ = nullptr;
    std::size_t size_ = 0;
};

// What came of reading a range: all of its bytes, or fewer with an errno, or fewer and 0 where the file ends.
struct Outcome {
    std::uint64_t num_bytes = 0;
    int code = 0;
    bool cached = false;
};

// A file opened twice: through the page cache and, where the file system can, past it.
class File {
public:
    File(std::string path, bool direct) : path_(std::move(path)), buffered_(path_, 0) {
#ifdef O_DIRECT
        if (!direct || !buffered_.is_open()) return;
        direct_.emplace(path_, O_DIRECT);
        residency_.emplace(path_, buffered_.number());
#else
        static_cast<void>(direct);
#endif
    }

    const std::string& path() const { return path_; }

    // Has the disk bring the bytes from `begin` to `end` into the page cache, unless they are there.
    void expect(std::uint64_t begin, std::uint64_t end) const {
        if (!buffered_.is_open() || (residency_ && residency_->has(begin, end))) return;
        buffered_.expect(begin, end - begin);
    }

    // Reads the bytes from `begin` to `end`. `buffer` is aligned and has room for all aligned blocks that they touch:
    // its first byte is that of the block in which `begin` lies.
    Outcome read(std::uint64_t begin, std::uint64_t end, bool shared, std::byte* buffer) const {
        if (!buffered_.is_open()) return {0, buffered_.code(), false};
        const std::uint64_t block = block_of(begin);
        std::uint64_t position = begin;
        const bool cached = residency_ && residency_->has(begin, end);
        if (!cached && !shared && direct_ && direct_->is_open()) {
            const auto [num_bytes, code] = read_direct(block, round_up(end) - block, buffer);
            position = std::clamp(block + num_bytes, begin, end);
            if (code != 0) return {position - begin, code, false};
        }
        while (position < end) {  // all of it, or what is left over
            const ssize_t count = buffered_.read(buffer + (position - block), end - position, position);
            if (count < 0) return {position - begin, errno, cached};
            if (count == 0) break;
            position += static_cast<std::uint64_t>(count);
        }
        return {position - begin, 0, cached};
    }

private:
    // Reads whole blocks up to the end of the file. What it leaves over (the file's last bytes, or all, where the file
    // system wants another alignment) is for a buffered read, which also tells the end of the file from a short read.
    std::pair<std::uint64_t, int> read_direct(std::uint64_t block, std::uint64_t length, std::byte* buffer) const {
        std::uint64_t done = 0;
        while (done < length && done % direct_alignment == 0) {
            const ssize_t count = direct_->read(buffer + done, length - done, block + done);
            if (count < 0 && errno != EINVAL) return {done, errno};
            if (count <= 0) break;
            done += static_cast<std::uint64_t>(count);
        }
        return {done, 0};
    }

    std::string path_;
    Descriptor buffered_;
    std::optional<Descriptor> direct_;
    std::optional<Residency> residency_;
};

// ---- Windows --------------------------------------------------------------------------------------------------------

struct Wanted {
    const Piece* piece;
    std::vector<Box> boxes;
};

struct Chunk {
    const Wanted* wanted;
    std::uint64_t begin;  // in the piece
    std::uint64_t end;

    std::uint64_t file_begin() const { return wanted->piece->begin + begin; }
    std::uint64_t file_end() const { return wanted->piece->begin + end; }
};

// Bytes of a file that are shared, and wanted soon.
struct Ahead {
    std::shared_ptr<const File> file;
    std::uint64_t begin;
    std::uint64_t end;
};

struct Window {
    std::shared_ptr<const File> file;
    std::uint64_t begin = 0;  // in the file
    std::uint64_t end = 0;
    std::vector<Chunk> chunks;
    std::vector<Ahead> ahead;  // to be asked for before the window is read; it may be among them

    bool is_shared() const {
        return std::ranges::any_of(chunks, [](const Chunk& chunk) { return chunk.wanted->piece->shared; });
    }
};

// In the order of the files.
std::vector<Wanted> sort_by_place(std::span<const Piece> pieces) {
    std::vector<Wanted> sorted;
    sorted.reserve(pieces.size());
    for (const Piece& piece : pieces) {
        Wanted& wanted = sorted.emplace_back(Wanted{&piece, {}});
        if (piece.targets.empty()) wanted.boxes.emplace_back(piece.num_bytes);
        for (const Target& target : piece.targets) {
            wanted.boxes.emplace_back(piece.shape, piece.item_bytes, target.offset, target.shape, target.destination,
                                      target.strides);
        }
    }
    const auto place = [](const Wanted& wanted) { return std::pair(wanted.piece->file, wanted.piece->begin); };
    std::ranges::stable_sort(sorted, {}, place);
    return sorted;
}

// Hands out the windows one by one. They are found as they are asked for, so that no list of them is needed, and a file
// stays open only as long as windows of it are being read: a checkpoint may have more files than a process may open.
class Windows {
public:
    Windows(std::span<const std::string> files, std::span<const Piece> pieces, const ReadOptions& options)
        : files_(files), options_(options), wanted_(sort_by_place(pieces)) {}

    // Puts the next window into `window`; false when there are no more. Called by any thread.
    bool take(Window& window) {
        const std::lock_guard lock(mutex_);
        window.chunks.clear();
        window.ahead.clear();
        while (upcoming_ || (upcoming_ = find_chunk(next_))) {
            if (window.chunks.empty()) {
                window.begin = window.end = upcoming_->file_begin();
            } else if (!continues(window, *upcoming_)) {
                break;
            }
            window.end = std::max(window.end, upcoming_->file_end());
            window.chunks.push_back(*upcoming_);
            taken_bytes_ += upcoming_->end - upcoming_->begin;
            upcoming_.reset();
        }
        if (window.chunks.empty()) return false;
        window.file = open(window.chunks.front().wanted->piece->file, reading_);
        look_ahead(window);
        return true;
    }

private:
    // What lies before it was handed out.
    struct Cursor {
        std::size_t piece = 0;
        std::uint64_t position = 0;  // in the piece
    };

    // A file that is open now.
    struct Open {
        std::shared_ptr<const File> file;
        std::size_t index = 0;
    };

    std::optional<Chunk> find_chunk(Cursor& cursor) const {
        for (; cursor.piece < wanted_.size(); ++cursor.piece, cursor.position = 0) {
            const Wanted& wanted = wanted_[cursor.piece];
            std::optional<std::uint64_t> nearest;
            for (const Box& box : wanted.boxes) {
                const std::optional<std::uint64_t> next = box.next(cursor.position);
                if (next) nearest = std::min(*next, nearest.value_or(*next));
            }
            if (!nearest) continue;
            const std::uint64_t begin = *nearest / options_.chunk_bytes * options_.chunk_bytes;
            cursor.position = begin + std::min(options_.chunk_bytes, wanted.piece->num_bytes - begin);
            return Chunk{&wanted, begin, cursor.position};
        }
        return std::nullopt;
    }

    // Finds what is shared of the next `ahead_bytes` behind what was taken.
    void look_ahead(Window& window) {
        while (expected_bytes_ < taken_bytes_ + options_.ahead_bytes) {
            const std::optional<Chunk> chunk = find_chunk(ahead_);
            if (!chunk) return;
            expected_bytes_ += chunk->end - chunk->begin;
            if (!chunk->wanted->piece->shared) continue;
            const std::shared_ptr<const File> file = open(chunk->wanted->piece->file, expecting_);
            if (!window.ahead.empty() && window.ahead.back().file == file && window.ahead.back().end == chunk->file_begin()) {
                window.ahead.back().end = chunk->file_end();
            } else {
                window.ahead.push_back({file, chunk->file_begin(), chunk->file_end()});
            }
        }
    }

    bool continues(const Window& window, const Chunk& chunk) const {
        return chunk.wanted->piece->file == window.chunks.back().wanted->piece->file &&
               chunk.file_begin() >= window.begin && chunk.file_begin() <= window.end + options_.gap_bytes &&
               chunk.file_end() <= window.begin + options_.window_bytes;
    }

    std::shared_ptr<const File> open(std::size_t index, Open& open) const {
        if (open.file && open.index == index) return open.file;
        for (const Open& other : {reading_, expecting_}) {
            if (other.file && other.index == index) return (open = other).file;
        }
        open = {std::make_shared<const File>(files_[index], options_.direct), index};
        return open.file;
    }

    const std::span<const std::string> files_;
    const ReadOptions& options_;
    const std::vector<Wanted> wanted_;
    std::mutex mutex_;
    Cursor next_;
    Cursor ahead_;
    std::uint64_t taken_bytes_ = 0;
    std::uint64_t expected_bytes_ = 0;  // that `ahead_` has passed
    std::optional<Chunk> upcoming_;
    Open reading_;
    Open expecting_;
};

// ---- Threads --------------------------------------------------------------------------------------------------------

struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<std::byte, Free>;

// Room for all aligned blocks that the largest window can touch; null where there is no memory for it.
//
// In huge pages: a device is given a buffer page by page, and with small ones a cold read takes half as long again
// (0.8 GB through virtio: 1.1 s, and 0.7 s with huge ones).
Buffer make_buffer(const ReadOptions& options) {
    const std::uint64_t longest = std::max(options.window_bytes, options.chunk_bytes);
    const std::uint64_t room = round_up(longest + direct_alignment, huge_page_bytes);
    Buffer buffer(static_cast<std::byte*>(std::aligned_alloc(huge_page_bytes, room)));
#ifdef MADV_HUGEPAGE
    if (buffer) ::madvise(buffer.get(), room, MADV_HUGEPAGE);
#endif
    return buffer;
}

class Reader {
public:
    Reader(std::span<const std::string> files, std::span<const Piece> pieces, const ReadOptions& options)
        : pieces_(pieces), options_(options), windows_(files, pieces, options) {}

    // Takes windows until there are none, or until one thread has stopped all of them.
    void work(bool calling) noexcept {
        try {
            const Buffer buffer = make_buffer(options_);
            if (!buffer) throw std::bad_alloc();
            Window window;
            Clock::time_point last_question = Clock::now();
            while (!stopped_ && windows_.take(window)) {
                read(window, buffer.get());
                if (calling && options_.interrupted && Clock::now() - last_question >= time_between_questions) {
                    last_question = Clock::now();
                    if (options_.interrupted()) interrupted_ = stopped_ = true;
                }
            }
        } catch (const std::bad_alloc&) {
            out_of_memory_ = stopped_ = true;
        }
    }

    ReadResult finish() {
        if (out_of_memory_) errors_.insert(errors_.begin(), {ReadErrorKind::io, ENOMEM, {}, 0, 0, 0});
        if (options_.stop_at_first_error && errors_.size() > 1) errors_.resize(1);
        std::ranges::stable_sort(errors_, {}, [this](const ReadError& error) {
            return std::pair(error.piece < pieces_.size() ? pieces_[error.piece].file : 0, error.offset);
        });
        return {std::move(errors_), num_bytes_, cached_bytes_, 0, interrupted_};
    }

private:
    void read(const Window& window, std::byte* buffer) {
        for (const Ahead& ahead : window.ahead) ahead.file->expect(ahead.begin, ahead.end);
        const Outcome outcome = window.file->read(window.begin, window.end, window.is_shared(), buffer);
        num_bytes_ += outcome.num_bytes;
        if (outcome.cached) cached_bytes_ += outcome.num_bytes;
        if (outcome.num_bytes < window.end - window.begin) {
            if (!options_.stop_at_first_error && window.chunks.size() > 1) {
                for (const Chunk& chunk : window.chunks) {
                    read({window.file, chunk.file_begin(), chunk.file_end(), {chunk}, {}}, buffer);
                }
                return;
            }
            const ReadErrorKind kind = outcome.code == 0 ? ReadErrorKind::cut : ReadErrorKind::io;
            report(kind, outcome.code, window, window.chunks.front(), window.begin + outcome.num_bytes,
                   window.end - window.begin - outcome.num_bytes);
            return;
        }
        for (const Chunk& chunk : window.chunks) {
            const std::uint64_t length = chunk.end - chunk.begin;
            const std::byte* const first = buffer + (chunk.file_begin() - block_of(window.begin));
            const std::span<const std::byte> bytes(first, length);
            if (crc32c(bytes) != chunk.wanted->piece->checksums[chunk.begin / options_.chunk_bytes]) {
                report(ReadErrorKind::checksum, 0, window, chunk, chunk.file_begin(), length);
                if (options_.stop_at_first_error) return;
                continue;
            }
            for (const Box& box : chunk.wanted->boxes) box.scatter(bytes, chunk.begin);
        }
    }

    void report(ReadErrorKind kind, int code, const Window& window, const Chunk& chunk, std::uint64_t offset,
                std::uint64_t length) {
        const auto piece = static_cast<std::size_t>(chunk.wanted->piece - pieces_.data());
        const std::lock_guard lock(mutex_);
        errors_.push_back({kind, code, window.file->path(), piece, offset, length});
        if (options_.stop_at_first_error) stopped_ = true;
    }

    const std::span<const Piece> pieces_;
    const ReadOptions& options_;
    Windows windows_;
    std::atomic<bool> stopped_ = false;
    std::atomic<bool> interrupted_ = false;
    std::atomic<bool> out_of_memory_ = false;
    std::atomic<std::uint64_t> num_bytes_ = 0;
    std::atomic<std::uint64_t> cached_bytes_ = 0;
    std::mutex mutex_;
    std::vector<ReadError> errors_;
};

// As many as the options say, but none that would find nothing to do.
unsigned count_threads(std::span<const Piece> pieces, const ReadOptions& options) {
    std::uint64_t num_bytes = 0;
    for (const Piece& piece : pieces) num_bytes += piece.num_bytes;
    const unsigned usual = std::clamp(std::thread::hardware_concurrency(), 2u, 4u);
    const unsigned wanted = options.num_threads != 0 ? options.num_threads : usual;
    return static_cast<unsigned>(std::min<std::uint64_t>(wanted, num_bytes / options.window_bytes + 1));
}

bool is_inside(const Target& target, const std::vector<std::int64_t>& shape) {
    if (target.offset.size() != shape.size() || target.shape.size() != shape.size()) return false;
    for (std::size_t d = 0; d < shape.size(); ++d) {
        if (target.offset[d] < 0 || target.shape[d] < 0 || target.offset[d] > shape[d]) return false;
        if (target.shape[d] > shape[d] - target.offset[d]) return false;
    }
    return true;
}

}  // namespace

std::string_view find_flaw(const Piece& piece, std::size_t num_files, std::uint64_t chunk_bytes) {
    if (piece.file >= num_files) return "there is no such file";
    if (piece.item_bytes == 0) return "an item has no bytes";
    auto num_bytes = static_cast<std::int64_t>(piece.item_bytes);
    for (const std::int64_t extent : piece.shape) {
        if (extent < 0 || __builtin_mul_overflow(num_bytes, extent, &num_bytes)) return "the shape is none";
    }
    if (static_cast<std::uint64_t>(num_bytes) != piece.num_bytes) return "the shape does not have so many bytes";
    std::int64_t end;
    if (__builtin_add_overflow(piece.begin, piece.num_bytes, &end)) return "no file is so long";
    const std::uint64_t num_chunks = piece.num_bytes / chunk_bytes + (piece.num_bytes % chunk_bytes != 0 ? 1 : 0);
    if (piece.checksums.size() != num_chunks) return "there must be one checksum for each chunk";
    for (const Target& target : piece.targets) {
        if (!is_inside(target, piece.shape)) return "a target's box does not lie inside the shape";
        if (target.strides.size() != target.shape.size()) return "a target must have one stride for each dimension";
        if (target.destination == nullptr) return "a target must have a destination";
    }
    return {};
}

ReadResult read_pieces(std::span<const std::string> files, std::span<const Piece> pieces, const ReadOptions& options) {
    assert(options.chunk_bytes > 0 && options.window_bytes > 0);
    assert(std::ranges::all_of(pieces, [&](const Piece& piece) {
        return find_flaw(piece, files.size(), options.chunk_bytes).empty();
    }));
    const Clock::time_point start = Clock::now();
    Reader reader(files, pieces, options);
    {
        std::vector<std::jthread> threads;  // joined at the end of this block, whatever happens
        const unsigned num_others = count_threads(pieces, options) - 1;
        threads.reserve(num_others);
        try {
            while (threads.size() < num_others) threads.emplace_back([&reader] { reader.work(false); });
        } catch (const std::system_error&) {
            // The system allows no more threads: fewer are slower and no less right.
        }
        reader.work(true);
    }
    ReadResult result = reader.finish();
    result.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return result;
}

}  // namespace kenotron
