#include "reader.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "crc32c.hpp"

using kenotron::find_flaw;
using kenotron::Piece;
using kenotron::read_pieces;
using kenotron::ReadErrorKind;
using kenotron::ReadOptions;
using kenotron::ReadResult;
using kenotron::Target;
using Bytes = std::vector<std::byte>;

namespace {

constexpr std::uint64_t chunk_bytes = 1000;  // nothing that a device or a page would like

Bytes random_bytes(std::size_t size, unsigned seed = 1) {
    std::mt19937 random(seed);
    Bytes bytes(size);
    for (std::byte& value : bytes) value = static_cast<std::byte>(random());
    return bytes;
}

// A file that is gone when the test is over.
class TemporaryFile {
public:
    explicit TemporaryFile(const Bytes& content, const std::string& folder = std::filesystem::temp_directory_path()) {
        path_ = folder + "/kenotron-reader-XXXXXX";
        ::close(::mkstemp(path_.data()));
        write(content);
    }
    ~TemporaryFile() { std::filesystem::remove(path_); }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    const std::string& path() const { return path_; }

    void write(const Bytes& content) const {
        std::ofstream file(path_, std::ios::binary | std::ios::trunc);
        file.write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
    }

    void flip_bit(std::uint64_t position) const {
        std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
        file.seekg(static_cast<std::streamoff>(position));
        const int value = file.get();
        file.seekp(static_cast<std::streamoff>(position));
        file.put(static_cast<char>(value ^ 1));
    }

    // tmpfs is all page cache, and knows no other way to read.
    bool is_on_a_disk() const {
        struct statfs status;
        const int descriptor = ::open(path_.c_str(), O_RDONLY | O_DIRECT);
        if (descriptor >= 0) ::close(descriptor);
        return descriptor >= 0 && ::statfs(path_.c_str(), &status) == 0 && status.f_type != TMPFS_MAGIC;
    }

    // False where the system did not do so: it is asked, and may have its reasons.
    bool put_out_of_the_page_cache() const {
        const int descriptor = ::open(path_.c_str(), O_RDONLY);
        ::fsync(descriptor);
        ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
        const std::size_t size = std::filesystem::file_size(path_);
        void* const mapped = size == 0 ? MAP_FAILED : ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
        std::vector<unsigned char> pages(size / 4096 + 1, 0);
        if (mapped != MAP_FAILED) {
            ::mincore(mapped, size, pages.data());
            ::munmap(mapped, size);
        }
        ::close(descriptor);
        return std::ranges::none_of(pages, [](unsigned char page) { return (page & 1) != 0; });
    }

private:
    std::string path_;
};

ReadOptions small_options() {
    ReadOptions options;
    options.chunk_bytes = chunk_bytes;
    options.window_bytes = 4 * chunk_bytes;
    options.gap_bytes = 100;
    options.num_threads = 3;
    return options;
}

// One that lies at `begin` of a file with `content` and is an array of bytes.
Piece make_piece(const Bytes& content, std::uint64_t begin, std::uint64_t num_bytes, std::size_t file = 0) {
    Piece piece;
    piece.file = file;
    piece.begin = begin;
    piece.num_bytes = num_bytes;
    piece.shape = {static_cast<std::int64_t>(num_bytes)};
    for (std::uint64_t at = 0; at < num_bytes; at += chunk_bytes) {
        const std::uint64_t length = std::min(chunk_bytes, num_bytes - at);
        piece.checksums.push_back(kenotron::crc32c(std::span(content).subspan(begin + at, length)));
    }
    return piece;
}

void want_all(Piece& piece, Bytes& destination) {
    destination.assign(piece.num_bytes, std::byte{0});
    piece.targets.push_back({{0}, piece.shape, destination.data(), {1}});
}

bool has(const Bytes& destination, const Bytes& content, std::uint64_t begin) {
    return std::equal(destination.begin(), destination.end(), content.begin() + static_cast<std::ptrdiff_t>(begin));
}

}  // namespace

TEST(every_place_and_length_is_read_from_the_cache_and_past_it) {
    const Bytes content = random_bytes(50'021);
    const TemporaryFile file(content);
    for (const bool direct : {true, false}) {
        for (const bool cold : {true, false}) {
            for (const std::uint64_t begin : {0, 1, 4095, 4096, 4097, 40'000}) {
                for (const std::uint64_t num_bytes : {1, 999, 1000, 1001, 4096, 10'021}) {
                    Piece piece = make_piece(content, begin, num_bytes);
                    Bytes destination;
                    want_all(piece, destination);
                    if (cold) file.put_out_of_the_page_cache();
                    ReadOptions options = small_options();
                    options.direct = direct;
                    const ReadResult result = read_pieces({{file.path()}}, {{piece}}, options);
                    CHECK(result.errors.empty());
                    CHECK_EQUAL(result.num_bytes, num_bytes);
                    CHECK(has(destination, content, begin));
                }
            }
        }
    }
}

TEST(what_is_in_the_page_cache_is_taken_from_there) {
    const Bytes content = random_bytes(3 << 20);
    const TemporaryFile file(content);
    if (!file.is_on_a_disk()) return;
    const Piece piece = make_piece(content, 0, content.size());
    ReadOptions options = small_options();
    options.window_bytes = 1 << 20;
    ReadResult result = read_pieces({{file.path()}}, {{piece}}, options);
    CHECK_EQUAL(result.cached_bytes, content.size());  // it has just been written
    for (int round = 0; round < 3; ++round) {          // and looking for it there brings it there neither
        if (!file.put_out_of_the_page_cache()) continue;
        result = read_pieces({{file.path()}}, {{piece}}, options);
        CHECK_EQUAL(result.cached_bytes, 0u);
        CHECK_EQUAL(result.num_bytes, content.size());
    }
}

TEST(what_is_shared_stays_in_the_page_cache_for_the_others) {
    const Bytes content = random_bytes(3 << 20);
    const TemporaryFile file(content);
    if (!file.is_on_a_disk()) return;
    Piece piece = make_piece(content, 5, content.size() - 10);
    piece.shared = true;
    Bytes destination;
    want_all(piece, destination);
    ReadOptions options = small_options();
    options.window_bytes = 1 << 20;
    if (!file.put_out_of_the_page_cache()) return;
    CHECK(read_pieces({{file.path()}}, {{piece}}, options).errors.empty());
    CHECK(has(destination, content, 5));
    CHECK_EQUAL(read_pieces({{file.path()}}, {{piece}}, options).cached_bytes, piece.num_bytes);
}

// Pieces that are shared between ones that are not, in two files: each is asked for beforehand, and read once.
TEST(what_is_asked_for_beforehand_is_what_is_shared) {
    const Bytes content = random_bytes(6 << 20);
    const TemporaryFile first(content), second(content);
    if (!first.is_on_a_disk()) return;
    constexpr std::size_t length = 1 << 20;
    for (const std::uint64_t ahead : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{3} << 20, std::uint64_t{1} << 40}) {
        std::vector<Piece> pieces;
        std::vector<Bytes> destinations(12);
        for (std::size_t i = 0; i < 12; ++i) {
            pieces.push_back(make_piece(content, i % 6 * length, length));
            pieces[i].file = i / 6;
            pieces[i].shared = i % 3 != 0;
            want_all(pieces[i], destinations[i]);
        }
        if (!first.put_out_of_the_page_cache() || !second.put_out_of_the_page_cache()) return;
        ReadOptions options = small_options();
        options.window_bytes = length;
        options.ahead_bytes = ahead;
        const ReadResult result = read_pieces({{first.path(), second.path()}}, pieces, options);
        CHECK(result.errors.empty());
        CHECK_EQUAL(result.num_bytes, 2 * content.size());
        for (std::size_t i = 0; i < 12; ++i) CHECK(has(destinations[i], content, i % 6 * length));
        pieces[1].targets.clear();
        for (std::size_t i = 0; i < 12; ++i) {
            const ReadResult again = read_pieces({{first.path(), second.path()}}, {{pieces[i]}}, options);
            CHECK(!pieces[i].shared || again.cached_bytes == length);
        }
    }
}

TEST(files_on_tmpfs_are_read) {
    if (!std::filesystem::is_directory("/dev/shm")) return;
    const Bytes content = random_bytes(50'021);
    const TemporaryFile file(content, "/dev/shm");
    Piece piece = make_piece(content, 77, 49'000);
    Bytes destination;
    want_all(piece, destination);
    CHECK(read_pieces({{file.path()}}, {{piece}}, small_options()).errors.empty());
    CHECK(has(destination, content, 77));
}

TEST(files_that_refuse_direct_reads_are_read_through_the_cache) {
    const std::string path = "/proc/version";  // open(2) answers EINVAL to O_DIRECT
    std::ifstream file(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    if (text.empty()) return;
    Bytes content(text.size());
    std::ranges::transform(text, content.begin(), [](char value) { return static_cast<std::byte>(value); });
    Piece piece = make_piece(content, 0, content.size());
    Bytes destination;
    want_all(piece, destination);
    CHECK(read_pieces({{path}}, {{piece}}, small_options()).errors.empty());
    CHECK(has(destination, content, 0));
}

TEST(neighbours_are_read_at_once_and_what_is_far_from_them_is_not) {
    const Bytes content = random_bytes(100'000);
    const TemporaryFile file(content);
    ReadOptions options = small_options();
    options.direct = false;
    const auto count = [&](const std::vector<Piece>& pieces) {
        const ReadResult result = read_pieces({{file.path()}}, pieces, options);
        CHECK(result.errors.empty());
        return result.num_bytes;
    };
    // 10 bytes each; 100 bytes between two of them are read through, 101 are not.
    CHECK_EQUAL(count({make_piece(content, 0, 10), make_piece(content, 110, 10)}), 120u);
    CHECK_EQUAL(count({make_piece(content, 0, 10), make_piece(content, 111, 10)}), 20u);
    // Of a piece of 10 chunks two bytes, in the first and in the ninth; the order of the pieces does not matter.
    Piece piece = make_piece(content, 3, 10'000);
    std::byte first{}, second{};
    piece.targets = {{{8'500}, {1}, &second, {1}}, {{999}, {1}, &first, {1}}};
    CHECK_EQUAL(count({make_piece(content, 50'000, 10), piece}), 2'010u);
    CHECK(first == content[3 + 999] && second == content[3 + 8'500]);
}

TEST(two_boxes_in_one_chunk_are_one_read) {
    const Bytes content = random_bytes(5'000);
    const TemporaryFile file(content);
    Piece piece = make_piece(content, 0, 5'000);
    piece.shape = {50, 100};
    Bytes left(50 * 10), right(50 * 10);
    piece.targets = {{{0, 0}, {50, 10}, left.data(), {10, 1}}, {{0, 90}, {50, 10}, right.data(), {10, 1}}};
    const ReadResult result = read_pieces({{file.path()}}, {{piece}}, small_options());
    CHECK(result.errors.empty());
    CHECK_EQUAL(result.num_bytes, 5'000u);
    for (std::size_t row = 0; row < 50; ++row) {
        for (std::size_t column = 0; column < 10; ++column) {
            CHECK(left[row * 10 + column] == content[row * 100 + column]);
            CHECK(right[row * 10 + column] == content[row * 100 + 90 + column]);
        }
    }
}

TEST(ten_thousand_tiny_pieces_in_many_files_are_read) {
    constexpr std::size_t num_files = 40, per_file = 250, size = 12;
    std::vector<Bytes> contents;
    std::vector<std::unique_ptr<TemporaryFile>> files;
    std::vector<std::string> paths;
    std::vector<Piece> pieces;
    for (std::size_t f = 0; f < num_files; ++f) {
        contents.push_back(random_bytes(per_file * 16, static_cast<unsigned>(f)));
        files.push_back(std::make_unique<TemporaryFile>(contents.back()));
        paths.push_back(files.back()->path());
        for (std::size_t i = 0; i < per_file; ++i) pieces.push_back(make_piece(contents[f], i * 16, size, f));
    }
    std::vector<Bytes> destinations(pieces.size());
    for (std::size_t i = 0; i < pieces.size(); ++i) want_all(pieces[i], destinations[i]);
    std::ranges::reverse(pieces);
    CHECK(read_pieces(paths, pieces, small_options()).errors.empty());
    for (std::size_t i = 0; i < destinations.size(); ++i) {
        CHECK(has(destinations[i], contents[i / per_file], i % per_file * 16));
    }
}

TEST(no_byte_of_a_damaged_chunk_reaches_its_destination_and_it_is_told_which_it_is) {
    const Bytes content = random_bytes(20'000);
    for (const std::uint64_t position : {5'000, 5'999, 6'000, 12'345}) {
        const TemporaryFile file(content);
        file.flip_bit(position);
        Piece other = make_piece(content, 0, 4'000);
        Piece piece = make_piece(content, 5'000, 10'500);
        Bytes destination, other_destination;
        want_all(other, other_destination);
        want_all(piece, destination);
        const ReadResult result = read_pieces({{file.path()}}, {{other, piece}}, small_options());
        CHECK_EQUAL(result.errors.size(), 1u);
        const auto& error = result.errors.front();
        const std::uint64_t begin = 5'000 + (position - 5'000) / chunk_bytes * chunk_bytes;
        CHECK(error.kind == ReadErrorKind::checksum);
        CHECK_EQUAL(error.piece, 1u);
        CHECK_EQUAL(error.path, file.path());
        CHECK_EQUAL(error.offset, begin);
        CHECK_EQUAL(error.length, chunk_bytes);
        const auto first = destination.begin() + static_cast<std::ptrdiff_t>(begin - 5'000);
        CHECK(std::all_of(first, first + chunk_bytes, [](std::byte value) { return value == std::byte{0}; }));
    }
}

TEST(all_damages_are_told_in_order_where_all_are_asked_for) {
    const Bytes content = random_bytes(100'000);
    const TemporaryFile file(content), untouched(content);
    std::vector<Piece> pieces;
    for (std::uint64_t begin = 0; begin < content.size(); begin += 10'000) {
        pieces.push_back(make_piece(content, begin, 9'500));
    }
    for (const auto position : {93'000, 9'499, 0, 9'600, 50'500}) file.flip_bit(static_cast<std::uint64_t>(position));
    pieces.push_back(make_piece(content, 0, 100'000, 1));
    ReadOptions options = small_options();
    options.stop_at_first_error = false;
    const ReadResult result = read_pieces({{file.path(), untouched.path()}}, pieces, options);
    CHECK_EQUAL(result.errors.size(), 4u);  // one flip was between the pieces
    const std::uint64_t offsets[] = {0, 9'000, 50'000, 93'000};
    const std::size_t damaged[] = {0, 0, 5, 9};
    for (std::size_t i = 0; i < result.errors.size(); ++i) {
        CHECK(result.errors[i].kind == ReadErrorKind::checksum);
        CHECK_EQUAL(result.errors[i].offset, offsets[i]);
        CHECK_EQUAL(result.errors[i].piece, damaged[i]);
    }
    CHECK_EQUAL(result.errors[1].length, 500u);
}

TEST(a_file_that_ends_early_is_told_with_its_end) {
    const Bytes content = random_bytes(20'000);
    for (const bool direct : {true, false}) {
        for (const std::size_t length : {19'999, 16'384, 16'000, 5'001, 0}) {
            const TemporaryFile file(Bytes(content.begin(), content.begin() + static_cast<std::ptrdiff_t>(length)));
            file.put_out_of_the_page_cache();
            ReadOptions options = small_options();
            options.direct = direct;
            options.num_threads = 1;
            const std::vector<Piece> pieces = {make_piece(content, 0, 10'000), make_piece(content, 10'000, 10'000)};
            ReadResult result = read_pieces({{file.path()}}, pieces, options);
            CHECK_EQUAL(result.errors.size(), 1u);
            CHECK(result.errors.front().kind == ReadErrorKind::cut);
            CHECK_EQUAL(result.errors.front().offset, length);
            options.stop_at_first_error = false;
            result = read_pieces({{file.path()}}, pieces, options);
            CHECK_EQUAL(result.errors.size(), (20'000 - length + chunk_bytes - 1) / chunk_bytes);
        }
    }
}

TEST(what_the_system_says_is_told) {
    const Bytes content = random_bytes(5'000);
    const std::string folder = std::filesystem::temp_directory_path();
    for (const auto& [path, code] : {std::pair(folder + "/kenotron-is-not-there", ENOENT), std::pair(folder, EISDIR)}) {
        const ReadResult result = read_pieces({{path}}, {{make_piece(content, 0, 5'000)}}, small_options());
        CHECK_EQUAL(result.errors.size(), 1u);
        CHECK(result.errors.front().kind == ReadErrorKind::io);
        CHECK_EQUAL(result.errors.front().code, code);
        CHECK_EQUAL(result.errors.front().path, path);
    }
}

TEST(nothing_is_read_where_nothing_is_wanted) {
    const Bytes content = random_bytes(5'000);
    Piece piece = make_piece(content, 0, 5'000);
    std::byte nothing{};
    piece.targets = {{{5'000}, {0}, &nothing, {1}}};
    const Piece empty = make_piece(content, 0, 0);
    CHECK_EQUAL(read_pieces({{"nowhere"}}, {{piece, empty}}, small_options()).errors.size(), 0u);
    CHECK_EQUAL(read_pieces({}, {}, small_options()).errors.size(), 0u);
}

TEST(a_question_answered_with_yes_ends_it) {
    const Bytes content = random_bytes(5'000);
    const TemporaryFile file(content);
    const std::vector<Piece> pieces(200'000, make_piece(content, 0, 5'000));
    ReadOptions options = small_options();
    int num_questions = 0;
    options.interrupted = [&] { return ++num_questions == 2; };
    const ReadResult result = read_pieces({{file.path()}}, pieces, options);
    CHECK(result.interrupted || num_questions < 2);  // not on a machine that reads a gigabyte in 0.2 s
    CHECK(num_questions <= 2);
}

TEST(reads_at_the_same_time_do_not_mind_one_another) {
    const Bytes content = random_bytes(300'000);
    const TemporaryFile file(content);
    std::atomic<int> num_wrong = 0;
    {
        std::vector<std::jthread> threads;
        for (int t = 0; t < 4; ++t) {
            threads.emplace_back([&] {
                for (int round = 0; round < 10; ++round) {
                    Piece piece = make_piece(content, 1, 299'000);
                    Bytes destination;
                    want_all(piece, destination);
                    const ReadResult result = read_pieces({{file.path()}}, {{piece}}, small_options());
                    if (!result.errors.empty() || !has(destination, content, 1)) ++num_wrong;
                }
            });
        }
    }
    CHECK_EQUAL(num_wrong.load(), 0);
}

TEST(pieces_that_contradict_themselves_are_told_from_those_that_do_not) {
    const Bytes content = random_bytes(5'000);
    const Piece good = make_piece(content, 0, 5'000);
    std::byte destination{};
    CHECK(find_flaw(good, 1, chunk_bytes).empty());
    const auto flawed = [&](auto change) {
        Piece piece = good;
        change(piece);
        return !find_flaw(piece, 1, chunk_bytes).empty();
    };
    CHECK(flawed([](Piece& piece) { piece.file = 1; }));
    CHECK(flawed([](Piece& piece) { piece.item_bytes = 0; }));
    CHECK(flawed([](Piece& piece) { piece.shape = {4'999}; }));
    CHECK(flawed([](Piece& piece) { piece.shape = {-50, -100}; }));
    CHECK(flawed([](Piece& piece) { piece.shape = {INT64_MAX, INT64_MAX}; }));
    CHECK(flawed([](Piece& piece) { piece.begin = INT64_MAX; }));
    CHECK(flawed([](Piece& piece) { piece.checksums.pop_back(); }));
    CHECK(flawed([](Piece& piece) { piece.checksums.push_back(0); }));
    for (const Target& target : std::vector<Target>{{{1}, {5'000}, &destination, {1}},
                                                    {{-1}, {2}, &destination, {1}},
                                                    {{INT64_MAX}, {2}, &destination, {1}},
                                                    {{0}, {-1}, &destination, {1}},
                                                    {{0, 0}, {1, 1}, &destination, {1, 1}},
                                                    {{0}, {1}, &destination, {}},
                                                    {{0}, {1}, nullptr, {1}}}) {
        CHECK(flawed([&](Piece& piece) { piece.targets.push_back(target); }));
    }
}

int main() { return kenotron::test::run_all(); }
