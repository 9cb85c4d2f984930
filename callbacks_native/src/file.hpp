// A file that is written once, in any order, by several threads, past the page cache where the file system can.
#pragma once

#include <atomic>
#include <cstddef>
#include <span>
#include <string>

#include "error.hpp"

namespace kenotron {

// What a device with large blocks asks of addresses, lengths and positions.
inline constexpr std::size_t direct_alignment = 4096;

class OutputFile {
public:
    OutputFile() = default;
    ~OutputFile();
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    // Create the file, which must not exist, and claim `num_bytes` for it: a full disk is found here.
    Status create(const std::string& path, std::size_t num_bytes, bool direct);

    // Write at a multiple of `direct_alignment`; the length is one too but for the last bytes of the file, and the buffer
    // then reaches up to the next one. Any thread.
    Status write(std::span<const std::byte> bytes, std::size_t position);

    // Give it its exact size, make it durable and close it; after all writes.
    Status finish();

    bool is_open() const noexcept { return descriptor_ >= 0; }
    bool is_direct() const noexcept { return is_direct_; }

private:
    Status reserve();

    int descriptor_ = -1;
    std::string path_;
    std::size_t num_bytes_ = 0;
    std::atomic<bool> is_direct_{false};
};

}  // namespace kenotron
