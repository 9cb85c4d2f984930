#include "fake_cuda.hpp"

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

using kenotron::test::fake_cuda_error;
using kenotron::test::fake_cuda_error_text;
using kenotron::test::FakeCuda;
using kenotron::test::num_fake_devices;

namespace {

constexpr int success = 0;
constexpr int invalid_value = 1;
constexpr int invalid_device = 101;
constexpr int invalid_context = 201;
constexpr int invalid_handle = 400;
constexpr int already_registered = 712;
constexpr int not_registered = 713;

class Stream {
public:
    explicit Stream(int on_device) : device(on_device), thread_([this] { run(); }) {}
    ~Stream() {
        push({});  // the last one
        thread_.join();
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    void push(std::function<void()> work) {
        const std::lock_guard lock(mutex_);
        work_.push_back(std::move(work));
        changed_.notify_all();
    }
    void synchronize() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return work_.empty(); });
    }

    const int device;

private:
    void run() {
        std::minstd_rand random(static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(this)));
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return !work_.empty(); });
            const auto work = work_.front();
            if (!work) return;
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
            work();
            lock.lock();
            work_.pop_front();  // only now is it empty to whoever synchronizes
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> work_;
    std::thread thread_;
};

// A point in the work of a stream.
class Moment {
public:
    void reach() {
        const std::lock_guard lock(mutex_);
        is_reached_ = true;
        changed_.notify_all();
    }
    void wait() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return is_reached_; });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool is_reached_ = false;
};

struct Event {
    int device;
    std::shared_ptr<Moment> last_recorded;
};

struct Device {
    int ordinal;
    std::unique_ptr<Stream> default_stream;
};

class Driver final : public FakeCuda {
public:
    std::uint64_t make_stream(int device) override {
        const std::lock_guard lock(mutex);
        auto stream = std::make_unique<Stream>(device);
        const auto handle = reinterpret_cast<std::uint64_t>(stream.get());
        of_tests[handle] = std::move(stream);
        return handle;
    }
    void destroy_stream(std::uint64_t stream) override {
        const std::lock_guard lock(mutex);
        of_tests.erase(stream);
    }
    void launch(int device, std::uint64_t stream, std::function<void()> kernel) override {
        stream_of(device, reinterpret_cast<void*>(stream)).push(std::move(kernel));
    }
    void synchronize(int device, std::uint64_t stream) override {
        stream_of(device, reinterpret_cast<void*>(stream)).synchronize();
    }
    void fail(const std::string& function, int num_good, int num_bad) override {
        const std::lock_guard lock(mutex);
        faults[function] = {num_good, num_bad};
    }
    void delay(int device, int ms) override {
        const std::lock_guard lock(mutex);
        delays[device] = ms;
    }
    void reset() override {
        const std::lock_guard lock(mutex);
        faults.clear();
        delays.clear();
    }
    Counts counts() override {
        const std::lock_guard lock(mutex);
        return {num_streams, num_events, static_cast<int>(pinned.size())};
    }

    Stream& stream_of(int device, void* handle) {
        const std::lock_guard lock(mutex);
        if (handle != nullptr) return *static_cast<Stream*>(handle);
        auto& stream = devices[static_cast<std::size_t>(device)].default_stream;
        if (!stream) stream = std::make_unique<Stream>(device);
        return *stream;
    }
    bool is_to_fail(const std::string& function) {
        const std::lock_guard lock(mutex);
        const auto found = faults.find(function);
        if (found == faults.end()) return false;
        auto& [num_good, num_bad] = found->second;
        return num_good-- <= 0 && num_bad-- > 0;
    }

    std::mutex mutex;
    std::map<std::string, std::pair<int, int>> faults;
    std::map<int, int> delays;
    std::map<std::uint64_t, std::unique_ptr<Stream>> of_tests;
    std::map<std::byte*, std::size_t> pinned;
    int num_streams = 0;
    int num_events = 0;
    Device devices[num_fake_devices] = {{0, {}}, {1, {}}};
};

Driver driver;
thread_local std::vector<Device*> contexts;

}  // namespace

#define FAIL_IF_TOLD(function) \
    if (driver.is_to_fail(function)) return fake_cuda_error
#define NEED_CONTEXT() \
    if (contexts.empty()) return invalid_context

// NOLINTBEGIN: names and types are the driver's
extern "C" {

FakeCuda* fake_cuda() { return &driver; }

int cuInit(unsigned) {
    FAIL_IF_TOLD("cuInit");
    return success;
}

int cuGetErrorString(int result, const char** text) {
    *text = result == fake_cuda_error ? fake_cuda_error_text : nullptr;
    return *text == nullptr ? invalid_value : success;
}

int cuDeviceGet(int* handle, int ordinal) {
    FAIL_IF_TOLD("cuDeviceGet");
    if (ordinal < 0 || ordinal >= num_fake_devices) return invalid_device;
    *handle = ordinal + 100;  // a handle is not an ordinal
    return success;
}

int cuDevicePrimaryCtxRetain(void** context, int handle) {
    FAIL_IF_TOLD("cuDevicePrimaryCtxRetain");
    if (handle < 100 || handle >= 100 + num_fake_devices) return invalid_device;
    *context = &driver.devices[handle - 100];
    return success;
}

int cuCtxPushCurrent_v2(void* context) {
    FAIL_IF_TOLD("cuCtxPushCurrent");
    if (context == nullptr) return invalid_context;
    contexts.push_back(static_cast<Device*>(context));
    return success;
}

int cuCtxPopCurrent_v2(void** context) {
    NEED_CONTEXT();
    *context = contexts.back();
    contexts.pop_back();
    return success;
}

int cuStreamCreate(void** stream, unsigned flags) {
    FAIL_IF_TOLD("cuStreamCreate");
    NEED_CONTEXT();
    if (flags != 1) return invalid_value;  // others wait for the default stream
    *stream = new Stream(contexts.back()->ordinal);
    const std::lock_guard lock(driver.mutex);
    ++driver.num_streams;
    return success;
}

int cuStreamDestroy_v2(void* stream) {
    FAIL_IF_TOLD("cuStreamDestroy");
    NEED_CONTEXT();
    delete static_cast<Stream*>(stream);
    const std::lock_guard lock(driver.mutex);
    --driver.num_streams;
    return success;
}

int cuStreamWaitEvent(void* stream, void* event, unsigned) {
    FAIL_IF_TOLD("cuStreamWaitEvent");
    NEED_CONTEXT();
    if (const auto moment = static_cast<Event*>(event)->last_recorded) {
        driver.stream_of(contexts.back()->ordinal, stream).push([moment] { moment->wait(); });
    }
    return success;
}

int cuStreamSynchronize(void* stream) {
    NEED_CONTEXT();
    driver.stream_of(contexts.back()->ordinal, stream).synchronize();
    FAIL_IF_TOLD("cuStreamSynchronize");  // what work before it has done wrong
    return success;
}

int cuEventCreate(void** event, unsigned) {
    FAIL_IF_TOLD("cuEventCreate");
    NEED_CONTEXT();
    *event = new Event{contexts.back()->ordinal, {}};
    const std::lock_guard lock(driver.mutex);
    ++driver.num_events;
    return success;
}

int cuEventDestroy_v2(void* event) {
    FAIL_IF_TOLD("cuEventDestroy");
    NEED_CONTEXT();
    delete static_cast<Event*>(event);
    const std::lock_guard lock(driver.mutex);
    --driver.num_events;
    return success;
}

int cuEventRecord(void* event, void* stream) {
    FAIL_IF_TOLD("cuEventRecord");
    NEED_CONTEXT();
    Event& recorded = *static_cast<Event*>(event);
    Stream& on = driver.stream_of(contexts.back()->ordinal, stream);
    if (on.device != recorded.device) return invalid_handle;
    const auto moment = std::make_shared<Moment>();
    recorded.last_recorded = moment;
    on.push([moment] { moment->reach(); });
    return success;
}

int cuMemcpyDtoHAsync_v2(void* to, std::uintptr_t from, std::size_t size, void* stream) {
    FAIL_IF_TOLD("cuMemcpyDtoHAsync");
    NEED_CONTEXT();
    const int device = contexts.back()->ordinal;
    Stream& on = driver.stream_of(device, stream);
    if (on.device != device) return invalid_handle;
    int ms = 0;
    {
        const std::lock_guard lock(driver.mutex);
        if (const auto found = driver.delays.find(device); found != driver.delays.end()) ms = found->second;
    }
    on.push([=] {
        std::this_thread::sleep_for(std::chrono::milliseconds(ms));
        std::memcpy(to, reinterpret_cast<const void*>(from), size);
    });
    return success;
}

int cuMemHostRegister_v2(void* memory, std::size_t size, unsigned) {
    FAIL_IF_TOLD("cuMemHostRegister");
    NEED_CONTEXT();
    const std::lock_guard lock(driver.mutex);
    auto* const begin = static_cast<std::byte*>(memory);
    for (const auto& [other, other_size] : driver.pinned) {
        if (begin < other + other_size && other < begin + size) return already_registered;
    }
    driver.pinned[begin] = size;
    return success;
}

#ifndef WITHOUT_UNREGISTER
int cuMemHostUnregister(void* memory) {
    FAIL_IF_TOLD("cuMemHostUnregister");
    NEED_CONTEXT();
    const std::lock_guard lock(driver.mutex);
    return driver.pinned.erase(static_cast<std::byte*>(memory)) == 1 ? success : not_registered;
}
#endif
}
// NOLINTEND
