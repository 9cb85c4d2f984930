// Sources in memory, and the file that a snapshot of them must become.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "crc32c.hpp"
#include "engine.hpp"
#include "files.hpp"

namespace kenotron::test {

struct Expected {
    Bytes file;
    std::vector<std::vector<std::uint32_t>> sums;
};

class Scene {
public:
    explicit Scene(std::string header_text = "header") : header(std::move(header_text)) {}
    Scene(Scene&&) = default;
    Scene(const Scene&) = delete;  // sources hold addresses

    Scene& add(std::size_t size, bool is_eager = false) {
        memory_.push_back(random_bytes(size, random_));
        return add({memory_.back().data(), {}, size}, is_eager);
    }
    Scene& add_view(bool is_eager = false) {
        memory_.push_back(random_bytes(view_bytes, random_));
        return add(random_view(memory_.back().data(), random_), is_eager);
    }

    // Give all sources other values.
    void change() {
        for (Bytes& bytes : memory_) scramble(bytes, random_);
    }
    void change(std::size_t source) { scramble(memory_[source], random_); }

    // As the sources are now.
    Expected expected() const {
        Expected found{{}, {}};
        for (const char letter : header) found.file.push_back(static_cast<std::byte>(letter));
        for (const Array& array : arrays_) {
            const Bytes bytes = array.row_major();
            found.file.insert(found.file.end(), bytes.begin(), bytes.end());
            auto& sums = found.sums.emplace_back();
            for (std::size_t at = 0; at < bytes.size(); at += sum_bytes) {
                sums.push_back(crc32c(std::span(bytes).subspan(at, std::min(sum_bytes, bytes.size() - at))));
            }
        }
        return found;
    }

    std::string header;
    std::vector<Source> sources;

private:
    Scene& add(Array array, bool is_eager) {
        sources.push_back({array.strided(), is_eager});
        arrays_.push_back(std::move(array));
        return *this;
    }

    Random random_{1};
    std::vector<Bytes> memory_;
    std::vector<Array> arrays_;
};

// Up to some hundred kilobytes of every kind of source.
inline Scene random_scene(Random& random) {
    constexpr std::size_t header_sizes[] = {0, 1, 4096, 5000, 20'000};
    Scene scene(std::string(header_sizes[below(random, std::size(header_sizes))], 'h'));
    for (std::size_t left = below(random, 30); left > 0; --left) {
        const bool is_eager = below(random, 4) == 0;
        switch (below(random, 4)) {
            case 0: scene.add_view(is_eager); break;
            case 1: scene.add(1, is_eager); break;
            case 2: scene.add(1 + below(random, 5000), is_eager); break;
            default: scene.add(1 + below(random, 30'000), is_eager); break;
        }
    }
    return scene;
}

inline EngineSettings small_settings(std::size_t num_slots, std::size_t slot_bytes = direct_alignment) {
    EngineSettings settings;
    settings.slot_bytes = slot_bytes;
    settings.pool_bytes = num_slots * slot_bytes;
    settings.niceness = 0;
    settings.checked_share = 1;
    return settings;
}

inline std::shared_ptr<Engine> make_engine(const EngineSettings& settings) {
    Status failed;
    std::shared_ptr<Engine> engine = Engine::create(settings, failed);
    CHECK_EQUAL(code_of(failed), 0);
    return engine;
}

inline Snapshot submit(Engine& engine, const Scene& scene) {
    Status failed;
    std::optional<Snapshot> snapshot = engine.submit(scene.header, scene.sources, failed);
    CHECK_EQUAL(code_of(failed), 0);
    return std::move(*snapshot);
}

inline void check_finished(Snapshot& snapshot, const std::string& path, const Expected& expected) {
    CHECK_EQUAL(code_of(snapshot.finish()), 0);
    CHECK(!snapshot.has_ended());
    CHECK(read_file(path) == expected.file);
    CHECK(snapshot.sums() == expected.sums);
    CHECK_EQUAL(snapshot.stats().num_bytes, expected.file.size());
}

inline bool are_all_slots_free(const Engine& engine) {
    return comes_true([&] { return engine.pool().num_free() == engine.pool().num_claimed(); });  // it may be claiming
}

}  // namespace kenotron::test
