// Copying out of a model's memory, with the checksum computed on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kenotron {

// Copy `num_bytes` to memory that this core will not read soon, and return their CRC-32C. It goes tile by tile: the sum
// brings a tile into the cache, and streaming stores take it from there past the cache, so that the training which goes
// on keeps its own data there. The caller calls `publish_stores` before it hands the memory to another thread.
std::uint32_t copy_and_sum(std::byte* to, const std::byte* from, std::size_t num_bytes) noexcept;

// A fingerprint of `num_bytes`: the CRC-32C of `lines` of the 64 lines of each page of 4 KiB, and of all of what is no more
// than a page. Which lines they are follows from the seed.
inline constexpr std::size_t lines_per_page = 64;
std::uint32_t fingerprint(const std::byte* data, std::size_t num_bytes, std::size_t lines, std::uint32_t seed) noexcept;

// Order streaming stores before all that follows: unlike others they are not ordered by a mutex.
void publish_stores() noexcept;

// The row-major bytes of an array that lies in memory with any strides.
class StridedBytes {
public:
    struct Dim {
        std::size_t extent;
        std::ptrdiff_t stride;  // in bytes
    };

    // Dimensions from the outermost; `item_bytes` lie together. Neighbours that are contiguous are merged.
    StridedBytes(const std::byte* data, std::span<const Dim> dims, std::size_t item_bytes);

    std::size_t num_bytes() const noexcept { return num_bytes_; }
    bool is_contiguous() const noexcept { return outer_.empty(); }
    const std::byte* data() const noexcept { return data_; }

    // Copy the bytes from `begin` on, in row-major order, and return their CRC-32C.
    std::uint32_t copy_and_sum(std::byte* to, std::size_t begin, std::size_t num_bytes) const noexcept;

    // The CRC-32C of such a range as it is now, without keeping a copy.
    std::uint32_t sum(std::size_t begin, std::size_t num_bytes) const;

private:
    void gather(std::byte* to, std::size_t begin, std::size_t num_bytes) const noexcept;

    const std::byte* data_;
    std::vector<Dim> outer_;   // all but what is contiguous innermost
    std::size_t run_bytes_;    // what is contiguous innermost
    std::size_t num_bytes_;
};

}  // namespace kenotron
