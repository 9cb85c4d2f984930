#include "file.hpp"

#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include "check.hpp"
#include "faults.hpp"
#include "files.hpp"

using kenotron::direct_alignment;
using kenotron::OutputFile;
using kenotron::Status;
using namespace kenotron::test;

namespace {

constexpr std::size_t slice_bytes = 3 * direct_alignment;

struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
};

// What a test writes, in memory that is aligned and reaches up to the next block, as a slot's is.
struct Content {
    Content(std::size_t size, Random& random) {
        const std::size_t room = (size / direct_alignment + 1) * direct_alignment;
        memory.reset(static_cast<std::byte*>(std::aligned_alloc(direct_alignment, room)));
        std::fill_n(memory.get(), room, std::byte{0xEE});  // what must not be seen in the file
        bytes = {memory.get(), size};
        scramble(bytes, random);
    }
    bool is_at(const std::string& path) const {
        const Bytes found = read_file(path);
        return found.size() == bytes.size() && std::equal(found.begin(), found.end(), bytes.begin());
    }

    std::unique_ptr<std::byte, Free> memory;
    std::span<std::byte> bytes;
};

// In slices, in a random order. Returns what the first failing write did.
Status write_all(OutputFile& file, const Content& content, Random& random) {
    std::vector<std::size_t> order((content.bytes.size() + slice_bytes - 1) / slice_bytes);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t i : order) {
        const std::size_t size = std::min(slice_bytes, content.bytes.size() - i * slice_bytes);
        if (Status failed = file.write(content.bytes.subspan(i * slice_bytes, size), i * slice_bytes)) return failed;
    }
    return {};
}

std::size_t num_open_files() {
    const auto entries = std::filesystem::directory_iterator("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(entries), end(entries)));
}

// What a test of failures begins with: a file of 100,000 bytes.
struct OneFile {
    explicit OneFile(bool direct = true) { created = file.create(path, content.bytes.size(), direct); }
    Status write() { return write_all(file, content, random); }
    bool is_right() const { return content.is_at(path); }

    Random random{1};
    TemporaryFolder folder;
    std::string path = folder.path("file");
    Content content{100'000, random};
    OutputFile file;
    Status created;
};

}  // namespace

TEST(files_have_their_exact_size_and_content) {
    Random random(1);
    const TemporaryFolder folder;
    const TemporaryFolder in_memory("/dev/shm");
    int name = 0;
    for (const TemporaryFolder* in : {&folder, &in_memory}) {
        for (const bool direct : {true, false}) {
            for (const std::size_t size : {1u, 4095u, 4096u, 4097u, 12288u, 12289u, 100'000u, 819'200u}) {
                const std::string path = in->path(std::to_string(name++));
                const Content content(size, random);
                OutputFile file;
                CHECK_EQUAL(code_of(file.create(path, size, direct)), 0);
                CHECK(direct || !file.is_direct());
                CHECK_EQUAL(code_of(write_all(file, content, random)), 0);
                CHECK_EQUAL(code_of(file.finish()), 0);
                CHECK(!file.is_open());
                CHECK(content.is_at(path));
            }
        }
    }
}

TEST(a_file_without_bytes_is_possible) {
    const TemporaryFolder folder;
    OutputFile file;
    CHECK_EQUAL(code_of(file.create(folder.path("empty"), 0, true)), 0);
    CHECK_EQUAL(code_of(file.finish()), 0);
    CHECK(std::filesystem::exists(folder.path("empty")) && std::filesystem::file_size(folder.path("empty")) == 0);
}

TEST(threads_write_to_one_file) {
    Random random(2);
    const TemporaryFolder folder;
    for (const bool direct : {true, false}) {
        const Content content(40 * slice_bytes + 77, random);
        OutputFile file;
        CHECK_EQUAL(code_of(file.create(folder.path(direct ? "direct" : "buffered"), content.bytes.size(), direct)), 0);
        std::vector<std::thread> threads;
        for (std::size_t k = 0; k < 3; ++k) {
            threads.emplace_back([&, k] {
                for (std::size_t at = k * slice_bytes; at < content.bytes.size(); at += 3 * slice_bytes) {
                    const std::size_t size = std::min(slice_bytes, content.bytes.size() - at);
                    CHECK_EQUAL(code_of(file.write(content.bytes.subspan(at, size), at)), 0);
                }
            });
        }
        for (std::thread& thread : threads) thread.join();
        CHECK_EQUAL(code_of(file.finish()), 0);
        CHECK(content.is_at(folder.path(direct ? "direct" : "buffered")));
    }
}

TEST(a_file_that_exists_is_left_alone) {
    OneFile first;
    CHECK_EQUAL(code_of(first.write()), 0);
    CHECK_EQUAL(code_of(first.file.finish()), 0);
    OutputFile second;
    const Status failed = second.create(first.path, 7, true);
    CHECK_EQUAL(code_of(failed), EEXIST);
    CHECK_EQUAL(operation_of(failed), "open");
    CHECK(failed && failed->path == first.path);
    CHECK(!second.is_open());
    CHECK(first.is_right());
}

TEST(a_missing_folder_is_reported) {
    const TemporaryFolder folder;
    OutputFile file;
    CHECK_EQUAL(code_of(file.create(folder.path("missing/file"), 7, true)), ENOENT);
}

TEST(a_full_disk_is_found_when_the_file_is_created) {
    const Faults faults;
    faults->fallocate.hook(always(-ENOSPC));
    OneFile one;
    CHECK_EQUAL(code_of(one.created), ENOSPC);
    CHECK_EQUAL(operation_of(one.created), "fallocate");
}

TEST(a_file_system_that_cannot_reserve_is_written_to_all_the_same) {
    const Faults faults;
    for (const int code : {EOPNOTSUPP, ENOSYS, EINVAL}) {
        faults->fallocate.hook(always(-code));
        OneFile one;
        CHECK_EQUAL(code_of(one.created), 0);
        CHECK_EQUAL(code_of(one.write()), 0);
        CHECK_EQUAL(code_of(one.file.finish()), 0);
        CHECK(one.is_right());
    }
}

TEST(a_limit_on_the_size_of_files_is_reported) {
    signal(SIGXFSZ, SIG_IGN);  // as Python does
    rlimit before{};
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit small{50'000, before.rlim_max};
    const Faults faults;
    for (const bool can_reserve : {true, false}) {
        faults->fallocate.hook(can_reserve ? Syscall::Answer{} : always(-EOPNOTSUPP));
        setrlimit(RLIMIT_FSIZE, &small);
        OneFile one;
        const Status failed = can_reserve ? one.created : one.write();
        setrlimit(RLIMIT_FSIZE, &before);
        CHECK_EQUAL(code_of(failed), EFBIG);
        CHECK_EQUAL(operation_of(failed), can_reserve ? "fallocate" : "pwrite");
    }
}

TEST(a_file_system_that_refuses_direct_writes_gets_others) {
    const Faults faults;
    faults->set_direct.hook(always(-EINVAL));
    OneFile one;
    CHECK_EQUAL(code_of(one.created), 0);
    CHECK(!one.file.is_direct());
    CHECK_EQUAL(code_of(one.write()), 0);
    CHECK_EQUAL(code_of(one.file.finish()), 0);
    CHECK(one.is_right());
}

TEST(a_file_system_that_promises_direct_writes_and_refuses_them_gets_others) {
    const Faults faults;
    for (const int which : {0, 3}) {
        OneFile one;
        if (!one.file.is_direct()) return;
        faults->pwrite.hook(only_call(which, -EINVAL));
        CHECK_EQUAL(code_of(one.write()), 0);
        CHECK(!one.file.is_direct());
        CHECK_EQUAL(code_of(one.file.finish()), 0);
        CHECK(one.is_right());
    }
}

TEST(invalid_buffered_writes_are_reported) {
    const Faults faults;
    OneFile one(false);
    faults->pwrite.hook(always(-EINVAL));
    CHECK_EQUAL(code_of(one.write()), EINVAL);
}

TEST(interrupted_and_short_writes_are_carried_on) {
    const Faults faults;
    for (const bool direct : {true, false}) {
        for (unsigned seed = 1; seed <= 20; ++seed) {
            OneFile one(direct);
            Random random(seed);
            faults->pwrite.hook([&random](int) -> std::optional<long> {
                switch (below(random, 4)) {
                    case 0: return -EINTR;
                    case 1: return static_cast<long>(1 + below(random, slice_bytes));
                    case 2: return static_cast<long>(direct_alignment * (1 + below(random, 2)));
                    default: return {};
                }
            });
            CHECK_EQUAL(code_of(one.write()), 0);
            CHECK_EQUAL(code_of(one.file.finish()), 0);
            CHECK(one.is_right());
        }
    }
}

TEST(a_direct_write_of_less_than_a_block_goes_on_through_the_page_cache) {
    const Faults faults;
    OneFile one;
    if (!one.file.is_direct()) return;
    faults->pwrite.hook(only_call(2, 100));
    CHECK_EQUAL(code_of(one.write()), 0);
    CHECK(!one.file.is_direct());
    CHECK_EQUAL(code_of(one.file.finish()), 0);
    CHECK(one.is_right());
}

TEST(a_write_that_fails_is_reported) {
    const Faults faults;
    for (const int code : {ENOSPC, EIO, EDQUOT}) {
        OneFile one;
        faults->pwrite.hook(only_call(4, -code));
        const Status failed = one.write();
        CHECK_EQUAL(code_of(failed), code);
        CHECK_EQUAL(operation_of(failed), "pwrite");
    }
    OneFile one;
    faults->pwrite.hook(always(0));
    CHECK_EQUAL(code_of(one.write()), EIO);
}

TEST(a_size_that_cannot_be_given_is_reported) {
    const Faults faults;
    OneFile one;
    CHECK_EQUAL(code_of(one.write()), 0);
    faults->ftruncate.hook([](int call) { return call == 0 ? -EINTR : -EIO; });
    CHECK_EQUAL(operation_of(one.file.finish()), "ftruncate");
    CHECK_EQUAL(faults->ftruncate.num_calls(), 2);
    CHECK_EQUAL(faults->fsync.num_calls(), 0);
}

TEST(a_failing_fsync_is_reported_and_never_tried_again) {
    const Faults faults;
    OneFile one;
    CHECK_EQUAL(code_of(one.write()), 0);
    faults->fsync.hook(only_call(0, -EIO));
    const Status failed = one.file.finish();
    CHECK_EQUAL(code_of(failed), EIO);
    CHECK_EQUAL(operation_of(failed), "fsync");
    CHECK(one.file.finish().has_value());  // the system has forgotten it, and would say that all is well
    CHECK_EQUAL(faults->fsync.num_calls(), 1);
}

TEST(an_interrupted_fsync_is_carried_on) {
    const Faults faults;
    OneFile one;
    CHECK_EQUAL(code_of(one.write()), 0);
    faults->fsync.hook(only_call(0, -EINTR));
    CHECK_EQUAL(code_of(one.file.finish()), 0);
    CHECK_EQUAL(faults->fsync.num_calls(), 2);
}

TEST(a_failing_close_is_reported_and_closes) {
    const std::size_t num_before = num_open_files();
    const Faults faults;
    {
        OneFile one;
        CHECK_EQUAL(code_of(one.write()), 0);
        faults->close.hook(only_call(0, -EIO));
        const Status failed = one.file.finish();
        CHECK_EQUAL(operation_of(failed), "close");
        CHECK(!one.file.is_open());
    }
    CHECK_EQUAL(num_open_files(), num_before);
}

TEST(an_interrupted_close_is_no_failure) {
    const std::size_t num_before = num_open_files();
    const Faults faults;
    {
        OneFile one;
        faults->close.hook(only_call(0, -EINTR));
        CHECK_EQUAL(code_of(one.file.finish()), 0);
        CHECK(!one.file.is_open());
    }
    CHECK_EQUAL(num_open_files(), num_before);
}

TEST(files_that_were_not_finished_are_closed) {
    const std::size_t num_before = num_open_files();
    const Faults faults;
    for (int i = 0; i < 3; ++i) {
        OneFile one;
        if (i == 1) faults->fsync.hook(always(-EIO));
        if (i == 2) faults->ftruncate.hook(always(-EIO));
        if (i > 0) CHECK(one.file.finish().has_value());
    }
    CHECK_EQUAL(num_open_files(), num_before);
}

int main() { return kenotron::test::run_all(); }
