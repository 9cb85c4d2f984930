// What a snapshot becomes. How it ends otherwise is in test_engine_ends.cpp.
#include "engine.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "faults.hpp"
#include "files.hpp"
#include "scene.hpp"

using namespace kenotron;
using namespace kenotron::test;
using std::chrono::duration;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

constexpr std::size_t kib = 1024;

// Submits, attaches and finishes it, and looks at what came of it.
void check_round_trip(Engine& engine, Scene& scene, const std::string& path) {
    const Expected expected = scene.expected();
    Snapshot snapshot = submit(engine, scene);
    CHECK_EQUAL(code_of(snapshot.attach(path)), 0);
    engine.fence();
    CHECK(snapshot.is_staged());
    CHECK(snapshot.changed().empty());
    scene.change();
    check_finished(snapshot, path, expected);
    CHECK(are_all_slots_free(engine));
}

// A snapshot in a pool of one slot, stopped after this slot, which holds parts of an eager source and of a lazy one.
struct HalfCopied {
    HalfCopied() { snapshot.wait_eager(); }

    TemporaryFolder folder;
    std::string path = folder.path("file");
    Scene scene = std::move(Scene().add(100, true).add(40 * kib).add_view());
    std::shared_ptr<Engine> engine = make_engine(small_settings(1));
    Expected before = scene.expected();
    Snapshot snapshot = submit(*engine, scene);
};

}  // namespace

TEST(any_snapshots_become_the_files_that_their_sources_make_up) {
    for (unsigned seed = 1; seed <= 40; ++seed) {
        Random random(seed);
        const TemporaryFolder folder;
        EngineSettings settings = small_settings(1 + below(random, 6), direct_alignment * (1 + below(random, 3)));
        settings.num_copiers = 1 + static_cast<int>(below(random, 2));
        settings.num_writers = 1 + static_cast<int>(below(random, 2));
        settings.direct = below(random, 2) == 0;
        const auto engine = make_engine(settings);
        std::vector<Scene> scenes;
        std::vector<Expected> expected;
        std::vector<Snapshot> snapshots;
        for (int i = 0; i < 3; ++i) {
            scenes.push_back(random_scene(random));
            expected.push_back(scenes.back().expected());
            snapshots.push_back(submit(*engine, scenes.back()));
            if (below(random, 2) == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(random, 500)));
        }
        for (std::size_t i = 0; i < 3; ++i) CHECK_EQUAL(code_of(snapshots[i].attach(folder.path(std::to_string(i)))), 0);
        engine->fence();
        for (Scene& scene : scenes) scene.change();
        for (std::size_t i = 0; i < 3; ++i) {
            CHECK(snapshots[i].is_staged());
            CHECK(snapshots[i].changed().empty());
            check_finished(snapshots[i], folder.path(std::to_string(i)), expected[i]);
        }
        CHECK(are_all_slots_free(*engine));
    }
}

TEST(headers_alone_become_files) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    for (const std::size_t size : {1u, 4095u, 4096u, 4097u, 50'000u}) {
        Scene scene{std::string(size, 'h')};
        check_round_trip(*engine, scene, folder.path(std::to_string(size)));
    }
}

TEST(nothing_at_all_becomes_an_empty_file) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(2));
    Scene scene{""};
    check_round_trip(*engine, scene, folder.path("attached"));
    Snapshot snapshot = submit(*engine, scene);
    snapshot.wait_eager();
    snapshot.wait_staged();
    engine->fence();
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("late"))), 0);
    check_finished(snapshot, folder.path("late"), scene.expected());
}

TEST(one_byte_becomes_a_file) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(1));
    Scene bare{""};
    bare.add(1);
    check_round_trip(*engine, bare, folder.path("bare"));
    Scene eager{""};
    eager.add(1, true);
    check_round_trip(*engine, eager, folder.path("eager"));
}

TEST(thousands_of_tiny_sources_share_slots) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(3));
    Random random(1);
    Scene scene;
    for (int i = 0; i < 5000; ++i) scene.add(1 + below(random, 16), below(random, 1000) == 0);
    check_round_trip(*engine, scene, folder.path("file"));
}

TEST(sources_larger_than_the_pool_pass_through_it) {
    const TemporaryFolder folder;
    // Slots that do not divide what one sum is kept for.
    const auto engine = make_engine(small_settings(3, 100 * kib));
    Scene scene;
    scene.add(1).add(5'000'001).add(sum_bytes).add(17);
    check_round_trip(*engine, scene, folder.path("file"));
}

TEST(a_fence_right_after_submit_is_enough) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(24, 8 * kib));
    Scene scene;
    for (int i = 0; i < 24; ++i) scene.add(7 * kib);
    for (int i = 0; i < 60; ++i) {
        const std::string path = folder.path(std::to_string(i));
        const Expected expected = scene.expected();
        Snapshot snapshot = submit(*engine, scene);
        engine->fence();
        scene.change();
        CHECK(snapshot.changed().empty());
        CHECK_EQUAL(code_of(snapshot.attach(path)), 0);
        check_finished(snapshot, path, expected);
    }
    CHECK(are_all_slots_free(*engine));
}

TEST(copiers_give_the_caller_a_head_start_and_a_fence_does_not) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(8));
    Scene scene;
    scene.add(10 * kib).add_view();
    const Expected expected = scene.expected();
    Status failed;
    std::optional<Snapshot> late = engine->submit(scene.header, scene.sources, failed, 3600);
    std::optional<Snapshot> gone = engine->submit(scene.header, scene.sources, failed, 3600);
    gone.reset();
    std::this_thread::sleep_for(milliseconds(50));
    CHECK(!late->is_staged());
    engine->fence();
    CHECK(late->is_staged());
    scene.change();
    CHECK_EQUAL(code_of(late->attach(folder.path("late"))), 0);
    check_finished(*late, folder.path("late"), expected);
    std::optional<Snapshot> soon = engine->submit(scene.header, scene.sources, failed, 0.02);
    CHECK(comes_true([&] { return soon->is_staged(); }));
    std::optional<Snapshot> eager = engine->submit(scene.header, scene.add(5, true).sources, failed, 3600);
    CHECK(comes_true([&] { return eager->is_staged(); }));
    for (Snapshot* each : {&*soon, &*eager}) each->cancel();
    CHECK(are_all_slots_free(*engine));
}

TEST(snapshots_overtake_each_other_without_harm) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(40));
    Scene scene;
    scene.add(10 * kib).add_view().add(3);
    std::vector<Expected> expected;
    std::vector<Snapshot> snapshots;
    for (int i = 0; i < 3; ++i) {
        expected.push_back(scene.expected());
        snapshots.push_back(submit(*engine, scene));
        engine->fence();
        scene.change();
    }
    for (std::size_t i = 3; i-- > 0;) {  // the last first
        const std::string path = folder.path(std::to_string(i));
        CHECK_EQUAL(code_of(snapshots[i].attach(path)), 0);
        check_finished(snapshots[i], path, expected[i]);
    }
    CHECK(are_all_slots_free(*engine));
}

// Each of these needs one slot: as long as the pool has more, none must wait until another one gets its file.
TEST(snapshots_without_files_yet_use_all_of_the_pool) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(4));
    std::vector<Scene> scenes(4);
    std::vector<Snapshot> snapshots;
    for (Scene& scene : scenes) snapshots.push_back(submit(*engine, scene.add(100)));
    CHECK(comes_true([&] { return snapshots.back().is_staged(); }));
    CHECK_EQUAL(engine->pool().num_claimed(), 4u);
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK_EQUAL(code_of(snapshots[i].attach(folder.path(std::to_string(i)))), 0);
        check_finished(snapshots[i], folder.path(std::to_string(i)), scenes[i].expected());
    }
}

TEST(memory_is_claimed_for_what_was_prepared_and_no_more) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(6));
    engine->prepare(2 * direct_alignment + 1);
    CHECK(comes_true([&] { return engine->pool().num_claimed() == 3; }));
    for (int i = 0; i < 5; ++i) {
        Scene scene;
        check_round_trip(*engine, scene.add(2 * direct_alignment), folder.path(std::to_string(i)));
    }
    CHECK_EQUAL(engine->pool().num_claimed(), 3u);
}

// ---- What changes too early ---------------------------------------------------------------------------------------------

TEST(eager_sources_may_change_before_the_rest_is_copied) {
    HalfCopied half;
    half.scene.change(0);
    CHECK_EQUAL(code_of(half.snapshot.attach(half.path)), 0);
    half.engine->fence();
    CHECK(half.snapshot.changed().empty());
    check_finished(half.snapshot, half.path, half.before);
}

TEST(a_lazy_source_that_changes_before_the_fence_is_found_out) {
    HalfCopied half;
    half.scene.change(1);
    CHECK_EQUAL(code_of(half.snapshot.attach(half.path)), 0);
    half.engine->fence();
    CHECK(half.snapshot.is_staged());
    CHECK(half.snapshot.changed() == std::vector<std::size_t>{1});
    CHECK_EQUAL(code_of(half.snapshot.finish()), 0);
    CHECK(read_file(half.path) != half.before.file);
    CHECK(are_all_slots_free(*half.engine));
}

TEST(fingerprints_find_a_change_of_whole_pages_and_sums_of_all_any_change) {
    for (const double share : {1.0 / 64, 1.0}) {
        const TemporaryFolder folder;
        EngineSettings settings = small_settings(1, 1024 * kib);
        settings.checked_share = share;
        const auto engine = make_engine(settings);
        Bytes first(300 * kib + 5), second(3000);
        const auto source_of = [](const Bytes& bytes) {
            const StridedBytes::Dim dim{bytes.size(), 1};
            return Source{StridedBytes(bytes.data(), {&dim, 1}, 1)};
        };
        Status failed;
        Scene other;
        Snapshot in_the_way = submit(*engine, other.add(10));  // it has the only slot
        CHECK(comes_true([&] { return in_the_way.is_staged(); }));
        std::optional<Snapshot> snapshot = engine->submit("", {source_of(first), source_of(second)}, failed);
        std::vector<std::size_t> expected{1};
        second[2000] = std::byte{1};
        if (share < 1) {
            std::fill_n(first.begin() + 8 * kib, 4 * kib, std::byte{1});
        } else {
            first[first.size() / 2] = std::byte{1};
        }
        expected.insert(expected.begin(), 0);
        CHECK_EQUAL(code_of(in_the_way.attach(folder.path("other"))), 0);
        engine->fence();
        CHECK(snapshot->changed() == expected);
    }
}

// ---- What holds the same ------------------------------------------------------------------------------------------------

TEST(a_snapshot_of_what_another_one_held_is_compared_and_not_copied) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(200));
    Scene scene;
    scene.add(100 * kib).add_view().add(1);
    Snapshot first = submit(*engine, scene);
    Status failed;
    std::optional<Snapshot> same = engine->submit(scene.header, scene.sources, failed, 0, &first);
    std::optional<Snapshot> third = engine->submit(scene.header, scene.sources, failed, 0, &*same);
    CHECK(same->is_like_other() && third->is_like_other());
    CHECK_EQUAL(code_of(first.attach(folder.path("file"))), 0);
    engine->fence();
    CHECK(same->is_staged() && same->changed().empty());
    CHECK(third->is_staged() && third->changed().empty());
    const std::size_t num_free = engine->pool().num_free();
    check_finished(first, folder.path("file"), scene.expected());
    first.cancel();
    std::optional<Snapshot> late = engine->submit(scene.header, scene.sources, failed, 0, &first);
    CHECK(late->is_like_other());
    scene.change(0);
    std::optional<Snapshot> changed = engine->submit(scene.header, scene.sources, failed, 0, &first);
    CHECK(!changed->is_like_other());
    engine->fence();
    CHECK(late->is_staged());
    CHECK(changed->changed().empty());
    CHECK(num_free <= engine->pool().num_slots());
}

TEST(a_snapshot_that_is_like_one_that_was_never_copied_ends_with_it) {
    const auto engine = make_engine(small_settings(1));
    Scene scene;
    scene.add(100 * kib);
    Snapshot first = submit(*engine, scene);
    Status failed;
    std::optional<Snapshot> same = engine->submit(scene.header, scene.sources, failed, 0, &first);
    CHECK(same->is_like_other());
    first.cancel();
    engine->fence();
    CHECK(same->has_ended());
}

// ---- Pace ---------------------------------------------------------------------------------------------------------------

TEST(writers_keep_to_the_limit_of_bandwidth) {
    const TemporaryFolder folder;
    EngineSettings settings = small_settings(4, 16 * kib);
    settings.max_bytes_per_second = 1 << 20;
    const auto engine = make_engine(settings);
    Scene scene{""};
    scene.add(256 * kib);
    const auto start = steady_clock::now();
    check_round_trip(*engine, scene, folder.path("file"));
    // The last of sixteen slots may begin when the others have had their time: 15/64 s.
    CHECK(steady_clock::now() - start >= milliseconds(234));
}

TEST(stats_tell_what_happened) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(1));
    Scene scene;
    scene.add(20 * kib);
    const auto start = steady_clock::now();
    Snapshot snapshot = submit(*engine, scene);
    CHECK(comes_true([&] { return engine->pool().num_claimed() == 1 && engine->pool().num_free() == 0; }));
    std::this_thread::sleep_for(milliseconds(30));
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    check_finished(snapshot, folder.path("file"), scene.expected());
    const double elapsed = duration<double>(steady_clock::now() - start).count();
    const SnapshotStats stats = snapshot.stats();
    CHECK(stats.staged_s >= 0.03 && stats.staged_s <= elapsed);
    CHECK(stats.written_s >= 0.03 && stats.written_s <= elapsed);
    CHECK(stats.waited_for_room_s > 0 && stats.waited_for_room_s <= elapsed);
    CHECK(engine->fence());
}

TEST(a_fence_waits_for_room_that_a_file_makes_later) {
    const TemporaryFolder folder;
    const auto engine = make_engine(small_settings(1));
    Scene scene;
    Snapshot snapshot = submit(*engine, scene.add(20 * kib));
    std::thread other([&] {
        std::this_thread::sleep_for(milliseconds(30));
        CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    });
    CHECK(engine->fence());
    CHECK(snapshot.is_staged());
    other.join();
    CHECK_EQUAL(code_of(snapshot.finish()), 0);
}

TEST(many_threads_use_one_engine) {
    const TemporaryFolder folder;
    EngineSettings settings = small_settings(5, 8 * kib);
    settings.num_copiers = 2;
    const auto engine = make_engine(settings);
    std::atomic<int> num_left{3};
    std::vector<std::thread> threads;
    for (int k = 0; k < 3; ++k) {
        threads.emplace_back([&, k] {
            Random random(static_cast<unsigned>(k));
            for (int i = 0; i < 10; ++i) {
                const std::string path = folder.path(std::to_string(k) + "-" + std::to_string(i));
                Scene scene = random_scene(random);
                const Expected expected = scene.expected();
                Snapshot snapshot = submit(*engine, scene);
                CHECK_EQUAL(code_of(snapshot.attach(path)), 0);
                snapshot.wait_eager();
                engine->fence();
                scene.change();
                CHECK(snapshot.is_staged());
                CHECK(snapshot.changed().empty());
                check_finished(snapshot, path, expected);
            }
            --num_left;
        });
    }
    threads.emplace_back([&] {
        while (num_left > 0) {
            engine->fence();
            std::this_thread::yield();
        }
    });
    for (std::thread& thread : threads) thread.join();
    CHECK(are_all_slots_free(*engine));
}

int main() { return kenotron::test::run_all(); }
