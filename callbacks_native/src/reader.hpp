// Reads boxes out of pieces of files at the speed of the disk, with every byte checked before it is used.
// What a piece and its checksums are is specified in docs/checkpoint-format.md; this knows no more of a checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kenotron {

// A box that is wanted of a piece, and where it goes.
struct Target {
    std::vector<std::int64_t> offset;  // in the piece, in items
    std::vector<std::int64_t> shape;
    std::byte* destination = nullptr;   // of the box's first item
    std::vector<std::int64_t> strides;  // at the destination, in bytes, of any sign
};

// A row-major array in a file, and what is wanted of it. Without targets all of it is read and checked, going nowhere.
struct Piece {
    std::size_t file = 0;     // index among the files
    std::uint64_t begin = 0;  // its first byte in the file
    std::uint64_t num_bytes = 0;
    std::vector<std::uint32_t> checksums;  // the CRC-32C of each chunk, counted from `begin`; the last may be shorter
    std::size_t item_bytes = 1;
    std::vector<std::int64_t> shape;
    std::vector<Target> targets;  // no two of them, nor of two pieces, may share bytes at their destinations
    bool shared = false;  // other processes want it now, too: through the page cache, so that the disk reads it once
};

struct ReadOptions {
    std::uint64_t chunk_bytes = 4 << 20;
    std::uint64_t window_bytes = 8 << 20;  // what is read at once, unless a single chunk is longer
    std::uint64_t gap_bytes = 128 << 10;   // unwanted bytes that are read through rather than skipped
    unsigned num_threads = 0;              // 0: as many as there are processors, but 2 to 4
    bool direct = true;                    // past the page cache, where the file system can and it holds nothing
    std::uint64_t ahead_bytes = 32 << 20;  // how much of what is shared the disk is asked for beforehand
    bool stop_at_first_error = true;
    std::function<bool()> interrupted;  // asked by the calling thread every now and then; true: read no further
};

enum class ReadErrorKind {
    io,        // the system refused; `code` is its errno
    cut,       // the file ends before the piece does
    checksum,  // a chunk does not have its checksum
};

struct ReadError {
    ReadErrorKind kind;
    int code;
    std::string path;
    std::size_t piece;     // index; the first of those that were being read
    std::uint64_t offset;  // in the file: of what was being read, or of its end where it was cut
    std::uint64_t length;
};

struct ReadResult {
    std::vector<ReadError> errors;   // at most one where the first was to stop it; otherwise by file and offset
    std::uint64_t num_bytes = 0;     // that were read, gaps included
    std::uint64_t cached_bytes = 0;  // of these, found in the page cache
    double seconds = 0;
    bool interrupted = false;
};

// What makes a piece one that read_pieces must not be given, empty if nothing does. Destinations cannot be checked.
std::string_view find_flaw(const Piece& piece, std::size_t num_files, std::uint64_t chunk_bytes);

// Fills all destinations, or says what is wrong. After an error or an interruption some are filled and others are not,
// but no byte of a damaged chunk has reached any. Returns when all its threads have ended. `pieces` are ones in which
// find_flaw finds none; `interrupted` must not throw. Throws std::bad_alloc where there is no memory to begin with.
ReadResult read_pieces(std::span<const std::string> files, std::span<const Piece> pieces, const ReadOptions& options);

}  // namespace kenotron
