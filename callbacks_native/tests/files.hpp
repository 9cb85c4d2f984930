// What the tests of files and snapshots share: bytes, a folder to put them in, and a look at what is there afterwards.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "error.hpp"

namespace kenotron::test {

using Bytes = std::vector<std::byte>;
using Random = std::mt19937_64;

// From 0 up to and without `end`.
inline std::size_t below(Random& random, std::size_t end) { return static_cast<std::size_t>(random() % end); }

inline void scramble(std::span<std::byte> bytes, Random& random) {
    for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
        const std::uint64_t word = random();
        std::memcpy(bytes.data() + i, &word, std::min(sizeof word, bytes.size() - i));
    }
}

inline Bytes random_bytes(std::size_t size, Random& random) {
    Bytes bytes(size);
    scramble(bytes, random);
    return bytes;
}

// Removed with all that is in it.
class TemporaryFolder {
public:
    explicit TemporaryFolder(const std::filesystem::path& parent = std::filesystem::temp_directory_path()) {
        std::string pattern = (parent / "kenotron-XXXXXX").string();
        folder_ = mkdtemp(pattern.data());
    }
    ~TemporaryFolder() { std::filesystem::remove_all(folder_); }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;

    std::string path(const std::string& name) const { return (folder_ / name).string(); }

private:
    std::filesystem::path folder_;
};

inline Bytes read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    Bytes bytes(file ? static_cast<std::size_t>(file.tellg()) : 0);
    file.seekg(0);
    file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return bytes;
}

// errno, or 0 where all is well.
inline int code_of(const Status& status) { return status ? status->code : 0; }
inline std::string operation_of(const Status& status) { return status ? status->operation : ""; }

}  // namespace kenotron::test
