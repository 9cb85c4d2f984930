#include "crc32c.hpp"

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string_view>
#include <vector>

#include "check.hpp"

using kenotron::crc32c;
using kenotron::crc32c_hardware;
using kenotron::crc32c_portable;
using Bytes = std::vector<std::byte>;

namespace {

// The definition, a bit at a time: slow, and with nothing in common with what it checks.
std::uint32_t crc32c_by_definition(std::span<const std::byte> bytes, std::uint32_t seed = 0) {
    std::uint32_t crc = ~seed;
    for (const std::byte value : bytes) {
        crc ^= std::to_integer<std::uint32_t>(value);
        for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ 0x82F63B78u : crc >> 1;
    }
    return ~crc;
}

Bytes random_bytes(std::size_t size) {
    Bytes bytes(size);
    std::uint64_t state = 0x9E3779B97F4A7C15;
    for (std::byte& value : bytes) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        value = static_cast<std::byte>(state >> 56);
    }
    return bytes;
}

// Around every threshold of the implementation: the word, the 3 × 256 and the 3 × 4096 block, and several of these.
constexpr std::size_t interesting_sizes[] = {0,   1,   7,    8,    9,    255,   256,   767,   768,   769,
                                             775, 776, 1536, 4096, 6000, 12287, 12288, 12289, 13063, 40000};

std::uint32_t of_text(std::string_view text) { return crc32c(std::as_bytes(std::span(text))); }

}  // namespace

TEST(known_vectors) {
    CHECK_EQUAL(of_text(""), 0u);
    CHECK_EQUAL(of_text("123456789"), 0xE3069283u);
    // RFC 3720, B.4
    CHECK_EQUAL(crc32c(Bytes(32, std::byte{0x00})), 0x8A9136AAu);
    CHECK_EQUAL(crc32c(Bytes(32, std::byte{0xFF})), 0x62A8AB43u);
    Bytes ascending(32);
    Bytes descending(32);
    for (std::size_t i = 0; i < 32; ++i) {
        ascending[i] = static_cast<std::byte>(i);
        descending[i] = static_cast<std::byte>(31 - i);
    }
    CHECK_EQUAL(crc32c(ascending), 0x46DD794Eu);
    CHECK_EQUAL(crc32c(descending), 0x113FDB5Cu);
}

TEST(every_size_up_to_two_short_blocks_equals_the_definition) {
    const Bytes bytes = random_bytes(1600);
    for (std::size_t size = 0; size <= bytes.size(); ++size) {
        const std::span<const std::byte> head(bytes.data(), size);
        CHECK_EQUAL(crc32c(head), crc32c_by_definition(head));
        CHECK_EQUAL(crc32c_portable(head), crc32c_by_definition(head));
    }
}

TEST(hardware_equals_portable_at_every_alignment) {
    if (!kenotron::has_crc32c_hardware()) return;
    const Bytes bytes = random_bytes(40000 + 64);
    for (std::size_t offset = 0; offset < 64; ++offset) {
        for (const std::size_t size : interesting_sizes) {
            const auto part = std::span(bytes).subspan(offset, size);
            CHECK_EQUAL(crc32c_hardware(part, 0x12345678u), crc32c_portable(part, 0x12345678u));
        }
    }
}

TEST(large_buffers_equal_the_definition) {
    const Bytes bytes = random_bytes(200003);
    CHECK_EQUAL(crc32c(bytes), crc32c_by_definition(bytes));
    CHECK_EQUAL(crc32c_portable(bytes), crc32c_by_definition(bytes));
}

TEST(chained_pieces_equal_the_whole) {
    const Bytes bytes = random_bytes(40000);
    const std::span<const std::byte> whole(bytes);
    for (const std::size_t cut : interesting_sizes) {
        CHECK_EQUAL(crc32c(whole.subspan(cut), crc32c(whole.first(cut))), crc32c(whole));
        CHECK_EQUAL(crc32c_portable(whole.subspan(cut), crc32c_portable(whole.first(cut))), crc32c(whole));
    }
}

TEST(combined_sums_of_any_pieces_equal_one_pass) {
    const Bytes bytes = random_bytes(40000);
    const std::span<const std::byte> whole(bytes);
    std::minstd_rand random(1);
    for (int i = 0; i < 300; ++i) {
        const std::span<const std::byte> part = whole.first(random() % (bytes.size() + 1));
        std::uint32_t sum = 0;
        for (std::size_t done = 0; done < part.size();) {
            const auto piece = part.subspan(done, 1 + random() % (part.size() - done));
            sum = kenotron::crc32c_combine(sum, crc32c(piece), piece.size());
            done += piece.size();
        }
        CHECK_EQUAL(sum, crc32c(part));
    }
}

TEST(combining_with_nothing_changes_nothing) {
    CHECK_EQUAL(kenotron::crc32c_combine(0xDEADBEEFu, 0, 0), 0xDEADBEEFu);
    CHECK_EQUAL(kenotron::crc32c_combine(0, 0xDEADBEEFu, 12345), 0xDEADBEEFu);
}

TEST(an_empty_piece_changes_nothing) { CHECK_EQUAL(crc32c({}, 0xDEADBEEFu), 0xDEADBEEFu); }

TEST(every_flipped_bit_is_seen) {
    Bytes bytes = random_bytes(900);
    const std::uint32_t original = crc32c(bytes);
    for (std::byte& value : bytes) {
        for (int bit = 0; bit < 8; ++bit) {
            value ^= std::byte{1} << bit;
            CHECK(crc32c(bytes) != original);
            value ^= std::byte{1} << bit;
        }
    }
}

int main() { return kenotron::test::run_all(); }
