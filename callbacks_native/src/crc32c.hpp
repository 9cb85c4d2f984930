// CRC-32C (Castagnoli), the checksum of a checkpoint's chunks: RFC 3720, B.4; also that of iSCSI, of ext4 and of the
// crc32 instruction. Reflected polynomial 0x82F63B78, initial value and final xor 0xFFFFFFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kenotron {

// The checksum of `bytes`. `seed` is the checksum of what came before them (0: nothing did), so that
// crc32c(b, crc32c(a)) is the checksum of a and b together: a chunk made of many tensors is summed piece by piece.
// Uses the processor's CRC instruction where there is one, which is looked up once. Safe to call from any thread.
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t seed = 0) noexcept;

// The checksum of two runs of bytes together, from the checksum of each and the length of the second: runs may be summed
// in any order, by any threads.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second, std::size_t num_second_bytes) noexcept;

// The two ways of computing it, exposed so that the tests can hold them against each other.
std::uint32_t crc32c_portable(std::span<const std::byte> bytes, std::uint32_t seed = 0) noexcept;
std::uint32_t crc32c_hardware(std::span<const std::byte> bytes, std::uint32_t seed = 0) noexcept;

// Whether this processor can run crc32c_hardware, which otherwise must not be called.
bool has_crc32c_hardware() noexcept;

}  // namespace kenotron
