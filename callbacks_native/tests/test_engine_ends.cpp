// How a snapshot ends that does not become a file, and how an engine does. What else there is is in test_engine.cpp.
#include "engine.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "faults.hpp"
#include "files.hpp"
#include "forks.hpp"
#include "scene.hpp"

using namespace kenotron;
using namespace kenotron::test;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

namespace {

constexpr std::size_t kib = 1024;

// The engine is as good as new.
void check_usable(Engine& engine, const std::string& path) {
    CHECK(are_all_slots_free(engine));
    Scene scene;
    scene.add(30 * kib);
    const Expected expected = scene.expected();
    Snapshot snapshot = submit(engine, scene);
    CHECK_EQUAL(code_of(snapshot.attach(path)), 0);
    engine.fence();
    scene.change();
    check_finished(snapshot, path, expected);
    CHECK(are_all_slots_free(engine));
}

// One source whose single bytes are gathered from everywhere: copying it takes its time.
struct SlowSource {
    explicit SlowSource(std::size_t size) : memory(size), bytes(memory.data(), dims(size), 1) {}
    static std::vector<StridedBytes::Dim> dims(std::size_t size) { return {{kib, 1}, {size / kib, kib}}; }

    Bytes memory;
    StridedBytes bytes;
};

// Whether somebody has taken a slot.
bool is_copying(const Engine& engine) {
    return comes_true([&] { return engine.pool().num_claimed() > 0 && engine.pool().num_free() == 0; });
}

}  // namespace

// ---- Failures -----------------------------------------------------------------------------------------------------------

TEST(a_missing_folder_ends_the_snapshot_and_nobody_waits_for_it) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(100 * kib).add(50 * kib, true);
    Snapshot snapshot = submit(*engine, scene);
    std::thread other([&] { snapshot.wait_eager(); });
    const Status failed = snapshot.attach(folder.path("missing/file"));
    CHECK_EQUAL(code_of(failed), ENOENT);
    other.join();
    engine->fence();
    snapshot.wait_staged();
    CHECK(snapshot.is_staged());
    CHECK(snapshot.has_ended());
    CHECK_EQUAL(code_of(snapshot.finish()), ENOENT);
    check_usable(*engine, folder.path("next"));
}

TEST(a_full_disk_ends_the_snapshot_when_it_is_attached) {
    const Faults faults;
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(100 * kib);
    faults->fallocate.hook(only_call(0, -ENOSPC));
    Snapshot snapshot = submit(*engine, scene);
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), ENOSPC);
    engine->fence();
    CHECK_EQUAL(code_of(snapshot.finish()), ENOSPC);
    check_usable(*engine, folder.path("next"));
}

TEST(a_failing_write_ends_its_snapshot_and_no_other) {
    const Faults faults;
    for (int which = 0; which < 30; which += 3) {
        const TemporaryFolder folder;
        const auto engine = make_engine(small_settings(4));
        std::vector<Scene> scenes(2);
        std::vector<Expected> expected;
        std::vector<Snapshot> snapshots;
        faults->pwrite.hook(only_call(which, -EIO));
        for (Scene& scene : scenes) {
            scene.add(60 * kib);
            expected.push_back(scene.expected());
            snapshots.push_back(submit(*engine, scene));
        }
        for (std::size_t i = 0; i < 2; ++i) CHECK_EQUAL(code_of(snapshots[i].attach(folder.path(std::to_string(i)))), 0);
        engine->fence();
        for (Scene& scene : scenes) scene.change();
        int num_failed = 0;
        for (std::size_t i = 0; i < 2; ++i) {
            const Status failed = snapshots[i].finish();
            CHECK_EQUAL(snapshots[i].has_ended(), failed.has_value());
            if (failed) {
                ++num_failed;
                CHECK_EQUAL(code_of(failed), EIO);
                CHECK_EQUAL(failed->path, folder.path(std::to_string(i)));
                CHECK_EQUAL(code_of(snapshots[i].finish()), EIO);
            } else {
                CHECK(read_file(folder.path(std::to_string(i))) == expected[i].file);
                CHECK(snapshots[i].sums() == expected[i].sums);
            }
        }
        CHECK_EQUAL(num_failed, 1);
        check_usable(*engine, folder.path("next"));
    }
}

TEST(a_failing_fsync_is_told_by_finish_every_time) {
    const Faults faults;
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(10 * kib);
    Snapshot snapshot = submit(*engine, scene);
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    engine->fence();
    faults->fsync.hook(only_call(0, -EIO));
    CHECK_EQUAL(operation_of(snapshot.finish()), "fsync");
    CHECK_EQUAL(operation_of(snapshot.finish()), "fsync");
    CHECK_EQUAL(faults->fsync.num_calls(), 1);
    check_usable(*engine, folder.path("next"));
}

// Found to be over by the fence, its sources are freed at once.
TEST(a_snapshot_that_has_failed_is_staged_only_when_nobody_reads_its_sources_any_more) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(1, 1024 * kib));
    engine->prepare(1);
    for (int i = 0; i < 12; ++i) {
        auto source = std::make_unique<SlowSource>(1024 * kib);
        Status failed;
        std::optional<Snapshot> snapshot = engine->submit("", {{source->bytes}}, failed);
        CHECK(is_copying(*engine));
        CHECK_EQUAL(code_of(snapshot->attach(folder.path("missing/file"))), ENOENT);
        switch (i % 3) {
            case 0: engine->fence(); break;
            case 1: snapshot->wait_staged(); break;
            default: CHECK_EQUAL(code_of(snapshot->finish()), ENOENT); break;
        }
        source.reset();
        CHECK(snapshot->has_ended());
    }
    check_usable(*engine, folder.path("next"));
}

// ---- Cancelling ---------------------------------------------------------------------------------------------------------

TEST(a_snapshot_is_cancelled_at_any_moment) {
    const TemporaryFolder folder;
    Random random(1);
    EngineSettings settings = small_settings(3, 8 * kib);
    settings.num_copiers = 2;
    const auto engine = make_engine(settings);
    for (int i = 0; i < 300; ++i) {
        const auto pause = [&] { std::this_thread::sleep_for(microseconds(below(random, 300))); };
        Scene scene = random_scene(random);
        Snapshot snapshot = submit(*engine, scene);
        if (below(random, 2) == 0) pause();
        if (below(random, 3) > 0) CHECK_EQUAL(code_of(snapshot.attach(folder.path(std::to_string(i)))), 0);
        if (below(random, 2) == 0) pause();
        if (below(random, 2) == 0) snapshot.cancel();
        if (below(random, 4) == 0) {
            snapshot.cancel();
            CHECK(snapshot.is_staged());
            CHECK(snapshot.has_ended());
            CHECK_EQUAL(code_of(snapshot.finish()), ECANCELED);
        }
    }  // destroyed before its sources are
    check_usable(*engine, folder.path("next"));
}

TEST(whoever_waits_for_a_snapshot_that_is_cancelled_returns) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(100 * kib).add(50 * kib, true);
    Snapshot snapshot = submit(*engine, scene);
    std::vector<std::thread> threads;
    threads.emplace_back([&] { snapshot.wait_eager(); });
    threads.emplace_back([&] { snapshot.wait_staged(); });
    threads.emplace_back([&] { CHECK_EQUAL(code_of(snapshot.finish()), ECANCELED); });
    threads.emplace_back([&] { engine->fence(); });
    std::this_thread::sleep_for(milliseconds(20));
    snapshot.cancel();
    for (std::thread& thread : threads) thread.join();
    check_usable(*engine, folder.path("next"));
}

TEST(a_snapshot_that_was_cancelled_makes_no_file) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(10 * kib);
    Snapshot snapshot = submit(*engine, scene);
    snapshot.cancel();
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), ECANCELED);
    CHECK(!std::filesystem::exists(folder.path("file")));
}

TEST(cancelling_does_not_wait_for_bandwidth) {
    const TemporaryFolder folder;
    EngineSettings settings = small_settings(4, 64 * kib);
    settings.max_bytes_per_second = 1024;  // a minute for each slot
    const auto engine = make_engine(settings);
    Scene scene;
    scene.add(200 * kib);
    const auto start = steady_clock::now();
    {
        Snapshot snapshot = submit(*engine, scene);
        CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
        engine->fence();
    }
    CHECK(steady_clock::now() - start < seconds(20));
    CHECK(are_all_slots_free(*engine));
}

TEST(a_fence_gives_up_when_its_time_is_up_and_can_be_called_again) {
    const TemporaryFolder folder;
    EngineSettings settings = small_settings(2, 64 * kib);
    settings.max_bytes_per_second = 1e6;
    const auto engine = make_engine(settings);
    Scene scene;
    scene.add(1024 * kib);  // a second
    CHECK(engine->fence(0.0));
    Snapshot snapshot = submit(*engine, scene);
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    CHECK(!engine->fence(0.001));
    CHECK(!snapshot.is_staged());
    CHECK(engine->fence(60.0));
    CHECK(snapshot.is_staged());
    CHECK_EQUAL(code_of(snapshot.finish()), 0);
}

TEST(cancelling_returns_when_the_file_is_left_alone) {
    const Faults faults;
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(10 * kib);
    Snapshot snapshot = submit(*engine, scene);
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    std::atomic<bool> is_syncing{false};
    faults->fsync.hook([&](int) {
        is_syncing = true;
        std::this_thread::sleep_for(milliseconds(50));
        is_syncing = false;
        return 0;
    });
    std::thread other([&] { snapshot.finish(); });
    CHECK(comes_true([&] { return is_syncing.load(); }));
    snapshot.cancel();
    CHECK(!is_syncing);
    other.join();
}

// ---- The engine ---------------------------------------------------------------------------------------------------------

TEST(an_engine_without_address_space_for_its_pool_is_refused) {
    EngineSettings settings;
    settings.pool_bytes = std::size_t{1} << 60;
    Status failed;
    CHECK(Engine::create(settings, failed) == nullptr);
    CHECK_EQUAL(code_of(failed), ENOMEM);
}

TEST(snapshots_keep_their_engine) {
    const TemporaryFolder folder;
    auto engine = make_engine(small_settings(2));
    Scene scene;
    scene.add(50 * kib);
    Snapshot snapshot = submit(*engine, scene);
    engine.reset();
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    check_finished(snapshot, folder.path("file"), scene.expected());
}

TEST(an_engine_is_destroyed_with_snapshots_in_flight) {
    const TemporaryFolder folder;
    Random random(1);
    for (int i = 0; i < 50; ++i) {
        std::vector<Scene> scenes;
        {
            std::vector<Snapshot> snapshots;
            const auto engine = make_engine(small_settings(3));
            for (int k = 0; k < 3; ++k) {
                scenes.push_back(random_scene(random));
                snapshots.push_back(submit(*engine, scenes.back()));
                if (below(random, 2) == 0) snapshots.back().attach(folder.path(std::to_string(3 * i + k)));
            }
            std::this_thread::sleep_for(microseconds(below(random, 500)));
        }
    }
}

TEST(a_thousand_engines_come_and_go) {
    for (std::size_t i = 0; i < 1000; ++i) {
        const auto engine = make_engine(small_settings(2));
        if (i % 2 == 0) engine->prepare(i);
    }
}

TEST(a_forked_childs_copy_is_destroyed_without_waiting_for_threads_that_are_not_there) {
    const TemporaryFolder folder;
    for (int i = 0; i < 4; ++i) {
        auto engine = make_engine(small_settings(2));
        if (i > 0) std::this_thread::sleep_for(milliseconds(5));  // its threads sleep by then
        CHECK(child_ends([&] { engine.reset(); }));
        check_usable(*engine, folder.path(std::to_string(i)));
    }
}

TEST(a_fork_does_not_disturb_what_is_in_flight) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(3));
    Scene scene;
    scene.add(300 * kib).add_view();
    for (int i = 0; i < 10; ++i) {
        const std::string path = folder.path(std::to_string(i));
        const Expected expected = scene.expected();
        std::optional<Snapshot> snapshot(submit(*engine, scene));
        CHECK_EQUAL(code_of(snapshot->attach(path)), 0);
        CHECK(child_ends([&] { snapshot.reset(); }));
        engine->fence();
        scene.change();
        check_finished(*snapshot, path, expected);
    }
    CHECK(are_all_slots_free(*engine));
}

int main() { return kenotron::test::run_all(); }
