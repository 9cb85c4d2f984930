#include "box.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "check.hpp"

using kenotron::Box;
using Indices = std::vector<std::int64_t>;

namespace {

constexpr auto untouched = std::byte{0xEE};

// A box of a piece and its destination, in memory of its own, with what lies between its items.
struct Example {
    Indices piece_shape, offset, shape, strides;
    std::size_t item_bytes;
    std::vector<std::byte> memory;
    std::size_t origin;  // of the first item in `memory`

    std::uint64_t piece_bytes() const {
        std::uint64_t count = item_bytes;
        for (const auto extent : piece_shape) count *= static_cast<std::uint64_t>(extent);
        return count;
    }

    Box box() { return Box(piece_shape, item_bytes, offset, shape, memory.data() + origin, strides); }

    // Calls visit(byte in the piece, byte in memory) for each byte of the box, by the definition and in order.
    template <typename Visit>
    void each_byte(Visit visit) const {
        if (std::ranges::find(shape, 0) != shape.end()) return;
        Indices index(shape.size(), 0);
        for (;;) {
            std::int64_t from = 0;
            auto to = static_cast<std::int64_t>(origin);
            for (std::size_t d = 0; d < shape.size(); ++d) {
                from = from * piece_shape[d] + offset[d] + index[d];
                to += index[d] * strides[d];
            }
            for (std::size_t byte = 0; byte < item_bytes; ++byte) {
                visit(static_cast<std::size_t>(from) * item_bytes + byte, static_cast<std::size_t>(to) + byte);
            }
            std::size_t d = shape.size();
            while (d > 0 && ++index[d - 1] == shape[d - 1]) index[--d] = 0;
            if (d == 0) return;
        }
    }
};

// Dimensions in any order at the destination, with and without gaps, forwards and backwards.
Example make_example(std::mt19937& random) {
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution(low, high)(random); };
    Example example;
    const int sizes[] = {1, 2, 3, 4, 8, 16};
    example.item_bytes = static_cast<std::size_t>(sizes[draw(0, 5)]);
    const auto num_dims = static_cast<std::size_t>(draw(0, 4));
    std::vector<std::size_t> order;
    for (std::size_t d = 0; d < num_dims; ++d) {
        const int extent = draw(1, 6);
        const int offset = draw(0, 2) == 0 ? draw(0, extent) : 0;
        const int taken = draw(0, 2) == 0 ? draw(0, extent - offset) : extent - offset;
        example.piece_shape.push_back(extent);
        example.offset.push_back(offset);
        example.shape.push_back(taken);
        order.push_back(d);
    }
    if (draw(0, 1) == 0) std::ranges::shuffle(order, random);
    example.strides.resize(num_dims);
    auto stride = static_cast<std::int64_t>(example.item_bytes);
    std::int64_t lowest = 0;
    for (std::size_t i = num_dims; i-- > 0;) {
        const std::size_t d = order[i];
        const bool backwards = draw(0, 5) == 0;
        example.strides[d] = backwards ? -stride : stride;
        if (backwards) lowest -= stride * std::max<std::int64_t>(example.shape[d] - 1, 0);
        stride *= std::max<std::int64_t>(example.shape[d], 1) + (draw(0, 3) == 0 ? draw(1, 3) : 0);
    }
    example.origin = static_cast<std::size_t>(-lowest);
    example.memory.assign(static_cast<std::size_t>(stride - lowest), untouched);
    return example;
}

}  // namespace

TEST(random_boxes_are_scattered_from_random_ranges_as_the_definition_says) {
    std::mt19937 random(1);
    for (int round = 0; round < 4000; ++round) {
        Example example = make_example(random);
        std::vector<std::byte> piece(example.piece_bytes());
        for (std::byte& value : piece) value = static_cast<std::byte>(random() & 0x7F);
        std::vector<std::byte> expected = example.memory;
        example.each_byte([&](std::size_t from, std::size_t to) { expected[to] = piece[from]; });

        const Box box = example.box();
        for (std::size_t begin = 0; begin < piece.size();) {
            const std::size_t length = std::min<std::size_t>(piece.size() - begin, 1 + random() % 200);
            // A copy of just these bytes, so that a sanitizer sees a read outside of them.
            const std::vector<std::byte> bytes(piece.begin() + static_cast<std::ptrdiff_t>(begin),
                                               piece.begin() + static_cast<std::ptrdiff_t>(begin + length));
            box.scatter(bytes, begin);
            begin += length;
        }
        CHECK(example.memory == expected);
    }
}

TEST(the_next_byte_of_a_random_box_is_the_one_of_the_definition) {
    std::mt19937 random(2);
    for (int round = 0; round < 1000; ++round) {
        Example example = make_example(random);
        std::vector<bool> wanted(example.piece_bytes(), false);
        example.each_byte([&](std::size_t from, std::size_t) { wanted[from] = true; });
        const Box box = example.box();
        std::optional<std::uint64_t> expected;
        CHECK(!box.next(wanted.size()));
        for (std::size_t position = wanted.size(); position-- > 0;) {
            if (wanted[position]) expected = position;
            CHECK(box.next(position) == expected);
        }
    }
}

TEST(all_of_a_piece_goes_nowhere) {
    const Box box(10);
    CHECK(box.next(0) == 0u);
    CHECK(box.next(9) == 9u);
    CHECK(!box.next(10));
    box.scatter(std::vector<std::byte>(10), 0);
    CHECK(!Box(0).next(0));
}

TEST(an_item_without_dimensions_is_a_box) {
    std::byte destination[4] = {};
    const Box box({}, 4, {}, {}, destination, {});
    CHECK(box.next(0) == 0u);
    CHECK(!box.next(4));
    box.scatter(std::vector<std::byte>(4, std::byte{7}), 0);
    CHECK(destination[0] == std::byte{7} && destination[3] == std::byte{7});
}

int main() { return kenotron::test::run_all(); }
