// Snapshots of device memory, with a driver that is none (fake_cuda.hpp).
#include "cuda.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "fake_cuda.hpp"
#include "files.hpp"
#include "scene.hpp"

using namespace kenotron;
using namespace kenotron::test;
using std::chrono::milliseconds;

namespace {

constexpr std::size_t kib = 1024;
constexpr int always = 1 << 30;

FakeCuda& cuda() {
    static FakeCuda* const found = [] {
        void* library = dlopen(FAKE_CUDA, RTLD_NOW);
        return reinterpret_cast<FakeCuda* (*)()>(dlsym(library, "fake_cuda"))();
    }();
    return *found;
}

// Of one test: nothing fails any more when it ends.
struct Faults {
    Faults() { cuda().reset(); }
    ~Faults() { cuda().reset(); }
    Faults(const Faults&) = delete;
    Faults& operator=(const Faults&) = delete;
};

EngineSettings settings_with(const char* library, std::size_t num_slots) {
    EngineSettings settings = small_settings(num_slots);
    settings.cuda_library = library;
    return settings;
}

// Memory on a device, and the stream that the work on it is given to.
class DeviceMemory {
public:
    DeviceMemory(std::size_t size, int device, bool is_default_stream = false)
        : device_(device), stream_(is_default_stream ? 0 : cuda().make_stream(device)), memory_(size) {}
    ~DeviceMemory() {
        cuda().synchronize(device_, stream_);
        if (stream_ != 0) cuda().destroy_stream(stream_);
    }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    // Work on the stream that gives it other values, and takes so long. Returns the values.
    Bytes change(int ms = 2) {
        const Bytes next = random_bytes(memory_.size(), random_);
        cuda().launch(device_, stream_, [this, next, ms] {
            std::this_thread::sleep_for(milliseconds(ms));
            std::copy(next.begin(), next.end(), memory_.begin());
        });
        return next;
    }
    Source source(bool is_eager = false) const {
        const StridedBytes::Dim dim{memory_.size(), 1};
        return {StridedBytes(memory_.data(), {&dim, 1}, 1), is_eager, device_, stream_};
    }

private:
    Random random_{1};
    int device_;
    std::uint64_t stream_;
    Bytes memory_;
};

void append(Bytes& to, const Bytes& more) { to.insert(to.end(), more.begin(), more.end()); }

std::vector<std::uint32_t> sums_of(const Bytes& bytes) { return {crc32c_portable(bytes)}; }

Snapshot submit(Engine& engine, std::vector<Source> sources) {
    Status failed;
    std::optional<Snapshot> snapshot = engine.submit("", std::move(sources), failed);
    CHECK_EQUAL(code_of(failed), 0);
    return std::move(*snapshot);
}

// A snapshot of device memory and one of host memory come out right.
void check_usable(Engine& engine, const TemporaryFolder& folder) {
    static int name = 0;
    DeviceMemory memory(10 * kib, 0);
    const Bytes values = memory.change();
    Snapshot device = submit(engine, std::vector{memory.source()});
    Scene scene;
    scene.add(20 * kib);
    Snapshot host = submit(engine, scene);
    const std::string device_path = folder.path("usable-" + std::to_string(name++));
    const std::string host_path = folder.path("usable-" + std::to_string(name++));
    CHECK_EQUAL(code_of(device.attach(device_path)), 0);
    CHECK_EQUAL(code_of(host.attach(host_path)), 0);
    engine.fence();
    memory.change(0);
    check_finished(device, device_path, {values, {sums_of(values)}});
    check_finished(host, host_path, scene.expected());
    CHECK(are_all_slots_free(engine));
}

}  // namespace

// ---- Order --------------------------------------------------------------------------------------------------------------

TEST(copies_wait_for_the_work_that_was_given_to_the_stream_before) {
    const TemporaryFolder folder;
    const auto engine = make_engine(settings_with(FAKE_CUDA, 20));
    for (const bool is_default_stream : {false, true}) {
        DeviceMemory memory(50 * kib, 0, is_default_stream);
        for (int i = 0; i < 5; ++i) {
            const std::string path = folder.path(std::to_string(is_default_stream) + std::to_string(i));
            const Bytes values = memory.change(10);
            Snapshot snapshot = submit(*engine, {memory.source()});
            engine->fence();
            memory.change(0);
            CHECK_EQUAL(code_of(snapshot.attach(path)), 0);
            check_finished(snapshot, path, {values, {sums_of(values)}});
        }
    }
    CHECK(are_all_slots_free(*engine));
}

TEST(eager_device_memory_may_change_once_it_was_waited_for) {
    const TemporaryFolder folder;
    const auto engine = make_engine(settings_with(FAKE_CUDA, 2));
    DeviceMemory eager(3 * kib, 0);
    DeviceMemory lazy(50 * kib, 0);
    Bytes expected = lazy.change();
    append(expected, eager.change());
    Snapshot snapshot = submit(*engine, {lazy.source(), eager.source(true)});
    snapshot.wait_eager();
    eager.change(0);
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("file"))), 0);
    engine->fence();
    CHECK_EQUAL(code_of(snapshot.finish()), 0);
    CHECK(read_file(folder.path("file")) == expected);
}

TEST(devices_streams_and_host_memory_mix_in_one_file) {
    const TemporaryFolder folder;
    for (unsigned seed = 1; seed <= 15; ++seed) {
        Random random(seed);
        EngineSettings settings = settings_with(FAKE_CUDA, 1 + below(random, 4));
        settings.num_copiers = 1 + static_cast<int>(below(random, 2));
        const auto engine = make_engine(settings);
        std::vector<std::unique_ptr<DeviceMemory>> memories;
        std::vector<std::unique_ptr<Bytes>> host;
        std::vector<Source> sources;
        Expected expected;
        for (std::size_t i = 0; i < 12; ++i) {
            const std::size_t size = 1 + below(random, 6 * kib);
            Bytes values;
            if (below(random, 3) == 0) {
                host.push_back(std::make_unique<Bytes>(random_bytes(size, random)));
                const StridedBytes::Dim dim{size, 1};
                sources.push_back({StridedBytes(host.back()->data(), {&dim, 1}, 1)});
                values = *host.back();
            } else {
                memories.push_back(std::make_unique<DeviceMemory>(size, static_cast<int>(below(random, 2)), i == 5));
                values = memories.back()->change();
                sources.push_back(memories.back()->source(below(random, 4) == 0));
            }
            append(expected.file, values);
            expected.sums.push_back(sums_of(values));
        }
        Snapshot snapshot = submit(*engine, sources);
        CHECK_EQUAL(code_of(snapshot.attach(folder.path(std::to_string(seed)))), 0);
        engine->fence();
        CHECK(snapshot.changed().empty());
        for (const auto& memory : memories) memory->change(0);
        for (const auto& bytes : host) scramble(*bytes, random);
        check_finished(snapshot, folder.path(std::to_string(seed)), expected);
        CHECK(are_all_slots_free(*engine));
    }
}

TEST(a_thread_at_the_fence_helps_with_the_first_snapshot_of_a_device) {
    const TemporaryFolder folder;
    for (int i = 0; i < 5; ++i) {
        const auto engine = make_engine(settings_with(FAKE_CUDA, 1));
        Scene scene;
        scene.add(10 * kib);
        Snapshot host = submit(*engine, scene);
        std::thread other([&] { engine->fence(); });
        std::this_thread::sleep_for(milliseconds(5));  // it waits for a file by then
        DeviceMemory memory(100 * kib, 1);
        const Bytes values = memory.change();
        Snapshot device = submit(*engine, std::vector{memory.source()});
        CHECK_EQUAL(code_of(host.attach(folder.path("host" + std::to_string(i)))), 0);
        CHECK_EQUAL(code_of(device.attach(folder.path("device" + std::to_string(i)))), 0);
        other.join();
        check_finished(device, folder.path("device" + std::to_string(i)), {values, {sums_of(values)}});
        CHECK_EQUAL(code_of(host.finish()), 0);
    }
}

TEST(threads_open_the_driver_at_once) {
    const TemporaryFolder folder;
    for (int i = 0; i < 5; ++i) {
        const auto engine = make_engine(settings_with(FAKE_CUDA, 3));
        std::vector<std::thread> threads;
        for (int k = 0; k < 3; ++k) {
            threads.emplace_back([&, k] {
                const std::string path = folder.path(std::to_string(i) + "-" + std::to_string(k));
                DeviceMemory memory(10 * kib, k % 2);
                const Bytes values = memory.change();
                Snapshot snapshot = submit(*engine, {memory.source()});
                CHECK_EQUAL(code_of(snapshot.attach(path)), 0);
                engine->fence();
                memory.change(0);
                check_finished(snapshot, path, {values, {sums_of(values)}});
            });
        }
        for (std::thread& thread : threads) thread.join();
    }
    CHECK_EQUAL(cuda().counts().num_events, 0);
}

// ---- What belongs to the driver -----------------------------------------------------------------------------------------

TEST(slots_are_pinned_and_all_is_given_back) {
    const Faults faults;
    const TemporaryFolder folder;
    for (const bool is_refused : {false, true}) {
        if (is_refused) cuda().fail("cuMemHostRegister", 1, 2);
        {
            const auto engine = make_engine(settings_with(FAKE_CUDA, 4));
            engine->prepare(2 * direct_alignment);  // before the pool knows of devices, and after
            CHECK(comes_true([&] { return engine->pool().num_claimed() == 2; }));
            check_usable(*engine, folder);
            const int num_claimed = static_cast<int>(engine->pool().num_claimed());
            const int num_expected = is_refused ? num_claimed - 2 : num_claimed;
            CHECK(comes_true([&] { return cuda().counts().num_pinned == num_expected; }));
        }
        CHECK_EQUAL(cuda().counts().num_pinned, 0);
        CHECK_EQUAL(cuda().counts().num_events, 0);
        CHECK_EQUAL(cuda().counts().num_streams, 0);
    }
}

TEST(a_snapshot_of_a_device_is_cancelled_at_any_moment) {
    const TemporaryFolder folder;
    Random random(1);
    {
        const auto engine = make_engine(settings_with(FAKE_CUDA, 3));
        for (int i = 0; i < 60; ++i) {
            const auto memory = std::make_unique<DeviceMemory>(40 * kib, i % 2);
            memory->change(0);
            Snapshot snapshot = submit(*engine, {memory->source()});
            if (i % 3 == 0) CHECK_EQUAL(code_of(snapshot.attach(folder.path(std::to_string(i)))), 0);
            std::this_thread::sleep_for(std::chrono::microseconds(below(random, 2000)));
        }
        check_usable(*engine, folder);
    }
    CHECK_EQUAL(cuda().counts().num_events, 0);
    CHECK_EQUAL(cuda().counts().num_streams, 0);
}

// ---- Failures -----------------------------------------------------------------------------------------------------------

TEST(a_missing_library_is_named) {
    const TemporaryFolder folder;
    const auto engine = make_engine(settings_with("libmissing.so.7", 2));
    Bytes memory(100);
    const StridedBytes::Dim dim{memory.size(), 1};
    Status failed;
    CHECK(!engine->submit("", {{StridedBytes(memory.data(), {&dim, 1}, 1), false, 0, 0}}, failed).has_value());
    CHECK_EQUAL(code_of(failed), ENODEV);
    CHECK(operation_of(failed).find("libmissing.so.7") != std::string::npos);
    Scene scene;
    Snapshot snapshot = kenotron::test::submit(*engine, scene.add(9 * kib));
    CHECK_EQUAL(code_of(snapshot.attach(folder.path("host"))), 0);
    check_finished(snapshot, folder.path("host"), scene.expected());
}

TEST(a_missing_function_is_named) {
    const auto engine = make_engine(settings_with(INCOMPLETE_CUDA, 2));
    Bytes memory(100);
    const StridedBytes::Dim dim{memory.size(), 1};
    Status failed;
    CHECK(!engine->submit("", {{StridedBytes(memory.data(), {&dim, 1}, 1), false, 0, 0}}, failed).has_value());
    CHECK_EQUAL(code_of(failed), ENODEV);
    CHECK_EQUAL(operation_of(failed), std::string(INCOMPLETE_CUDA) + " lacks cuMemHostUnregister");
}

TEST(every_call_that_fails_is_named_and_ends_its_snapshot_alone) {
    const Faults faults;
    const TemporaryFolder folder;
    int name = 0;
    for (const std::string function :
         {"cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuEventCreate", "cuEventRecord",
          "cuStreamCreate", "cuStreamWaitEvent", "cuMemcpyDtoHAsync", "cuStreamSynchronize"}) {
        for (const auto& [num_good, num_bad] : {std::pair{0, always}, {1, 1}, {2, 1}, {5, 1}}) {
            // Later on one could not even wait for the copies that are under way.
            if (function == "cuCtxPushCurrent" && num_good > 0) continue;
            {
                const std::string path = folder.path(std::to_string(name++));
                const auto engine = make_engine(settings_with(FAKE_CUDA, 3));
                DeviceMemory memory(20 * kib, 0);
                DeviceMemory other(20 * kib, 1);
                Bytes values = memory.change();
                append(values, other.change());
                cuda().fail(function, num_good, num_bad);
                Status failed;
                {
                    auto snapshot = engine->submit("", {memory.source(), other.source()}, failed);
                    CHECK_EQUAL(snapshot.has_value(), !failed.has_value());
                    if (snapshot) {
                        snapshot->attach(path);
                        engine->fence();
                        failed = snapshot->finish();
                        CHECK_EQUAL(snapshot->has_ended(), failed.has_value());
                    }
                }
                if (num_good == 0) CHECK(failed.has_value());
                if (failed) {
                    CHECK(code_of(failed) == EIO || (function == "cuInit" && code_of(failed) == ENODEV));
                    CHECK_EQUAL(operation_of(failed), function + ": " + fake_cuda_error_text);
                } else {
                    CHECK(read_file(path) == values);
                }
                cuda().reset();
                check_usable(*engine, folder);
            }
            CHECK_EQUAL(cuda().counts().num_streams, 0);
            CHECK_EQUAL(cuda().counts().num_pinned, 0);
        }
    }
}

TEST(host_memory_is_saved_while_the_device_fails) {
    const Faults faults;
    const TemporaryFolder folder;
    const auto engine = make_engine(settings_with(FAKE_CUDA, 3));
    check_usable(*engine, folder);
    cuda().fail("cuStreamSynchronize", 0, always);
    DeviceMemory memory(20 * kib, 0);
    Snapshot device = submit(*engine, {memory.source()});
    engine->fence();
    CHECK_EQUAL(code_of(device.attach(folder.path("device"))), EIO);
    Scene scene;
    Snapshot host = kenotron::test::submit(*engine, scene.add(30 * kib));
    CHECK_EQUAL(code_of(host.attach(folder.path("host"))), 0);
    check_finished(host, folder.path("host"), scene.expected());
}

// The copy from one device is still under way when that from the other fails: its slot must not be given away before.
TEST(a_slot_is_free_only_when_no_device_writes_to_it) {
    const Faults faults;
    const TemporaryFolder folder;
    const auto engine = make_engine(settings_with(FAKE_CUDA, 1));
    DeviceMemory fails(kib, 0);
    DeviceMemory is_late(kib, 1);
    is_late.change(0);
    cuda().delay(1, 100);
    cuda().fail("cuStreamSynchronize", 0, 1);
    Snapshot device = submit(*engine, {fails.source(), is_late.source()});
    device.wait_staged();
    CHECK_EQUAL(code_of(device.finish()), EIO);
    Scene scene{""};
    Snapshot host = kenotron::test::submit(*engine, scene.add(4 * kib));
    host.wait_staged();
    std::this_thread::sleep_for(milliseconds(150));
    CHECK_EQUAL(code_of(host.attach(folder.path("host"))), 0);
    check_finished(host, folder.path("host"), scene.expected());
}

int main() { return kenotron::test::run_all(); }
