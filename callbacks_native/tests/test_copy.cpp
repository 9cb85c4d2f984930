#include "copy.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "crc32c.hpp"
#include "files.hpp"

using kenotron::copy_and_sum;
using kenotron::crc32c_portable;
using kenotron::StridedBytes;
using namespace kenotron::test;

namespace {

constexpr std::size_t margin = 64;
constexpr std::byte canary{0xA5};

// Copies to a place `offset` bytes after an aligned one, and checks bytes, sum and that nothing around was touched.
template <typename Copy>
void check_copy(std::span<const std::byte> expected, std::size_t offset, Bytes& room, Copy copy) {
    std::fill(room.begin(), room.end(), canary);
    const auto misaligned = reinterpret_cast<std::uintptr_t>(room.data()) % margin;
    std::byte* to = room.data() + (margin - misaligned) + offset;
    CHECK_EQUAL(copy(to), crc32c_portable(expected));
    CHECK(std::equal(expected.begin(), expected.end(), to));
    CHECK(std::all_of(room.data(), to, [](std::byte value) { return value == canary; }));
    CHECK(std::all_of(to + expected.size(), room.data() + room.size(), [](std::byte value) { return value == canary; }));
}

}  // namespace

TEST(every_length_is_copied_exactly_to_every_alignment) {
    Random random(1);
    const Bytes bytes = random_bytes(300 + margin, random);
    Bytes room(300 + 4 * margin);
    for (std::size_t length = 0; length <= 300; ++length) {
        for (std::size_t offset = 0; offset < margin; ++offset) {
            const auto from = std::span(bytes).subspan(below(random, margin), length);
            check_copy(from, offset, room, [&](std::byte* to) { return copy_and_sum(to, from.data(), from.size()); });
        }
    }
}

TEST(lengths_around_tiles_are_copied_exactly) {
    Random random(2);
    const std::size_t tile = 64 << 10;
    const Bytes bytes = random_bytes(3 * tile, random);
    Bytes room(3 * tile + 4 * margin);
    for (const std::size_t tiles : {tile, 2 * tile}) {
        for (const std::ptrdiff_t more : {-65, -64, -1, 0, 1, 63, 64, 65}) {
            const std::size_t length = tiles + static_cast<std::size_t>(more);
            const auto from = std::span(bytes).subspan(below(random, margin), length);
            for (const std::size_t offset : {std::size_t{0}, std::size_t{1}, std::size_t{63}}) {
                check_copy(from, offset, room, [&](std::byte* to) { return copy_and_sum(to, from.data(), from.size()); });
            }
        }
    }
}

TEST(any_range_of_any_view_is_copied_in_row_major_order) {
    Random random(3);
    const Bytes memory = random_bytes(view_bytes, random);
    for (int i = 0; i < 2000; ++i) {
        const Array array = random_view(memory.data(), random);
        const Bytes expected = array.row_major();
        const StridedBytes strided = array.strided();
        CHECK_EQUAL(strided.num_bytes(), expected.size());
        Bytes room(expected.size() + 4 * margin);
        for (int k = 0; k < 3; ++k) {
            const std::size_t begin = k == 0 ? 0 : below(random, expected.size());
            const std::size_t size = k == 0 ? expected.size() : below(random, expected.size() - begin + 1);
            const auto part = std::span(std::as_const(expected)).subspan(begin, size);
            check_copy(part, below(random, margin), room,
                       [&](std::byte* to) { return strided.copy_and_sum(to, begin, size); });
            CHECK_EQUAL(strided.sum(begin, size), crc32c_portable(part));
        }
    }
}

TEST(views_of_several_tiles_are_copied_in_row_major_order) {
    Random random(4);
    const Bytes memory = random_bytes(600'000, random);
    const Array transposed{memory.data(), {{300, 4}, {500, 4 * 300}}, 4};
    const Array backwards{memory.data() + memory.size() - 2, {{300'000, -2}}, 2};
    const Array expanded{memory.data(), {{100, 3000}, {2, 0}, {700, 1}}, 1};
    for (const Array& array : {transposed, backwards, expanded}) {
        const Bytes expected = array.row_major();
        Bytes room(expected.size() + 4 * margin);
        for (int k = 0; k < 10; ++k) {
            const std::size_t begin = below(random, expected.size());
            const std::size_t size = below(random, expected.size() - begin + 1);
            const auto part = std::span(std::as_const(expected)).subspan(begin, size);
            check_copy(part, below(random, margin), room,
                       [&](std::byte* to) { return array.strided().copy_and_sum(to, begin, size); });
            CHECK_EQUAL(array.strided().sum(begin, size), crc32c_portable(part));
        }
    }
}

TEST(what_lies_together_is_one_run) {
    const Bytes memory(1000);
    using Dims = std::vector<StridedBytes::Dim>;
    const auto is_contiguous = [&](const Dims& dims) { return StridedBytes(memory.data(), dims, 4).is_contiguous(); };
    CHECK(is_contiguous({}));
    CHECK(is_contiguous({{5, 40}, {10, 4}}));
    CHECK(is_contiguous({{1, 7}, {5, 40}, {1, 0}, {10, 4}}));
    CHECK(!is_contiguous({{10, 4}, {5, 40}}));
    CHECK(!is_contiguous({{5, 44}, {10, 4}}));
    CHECK(!is_contiguous({{5, 0}, {10, 4}}));
    CHECK(!is_contiguous({{10, -4}}));
}

int main() { return kenotron::test::run_all(); }
