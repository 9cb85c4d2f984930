#include "cuda.hpp"

#include <dlfcn.h>

#include <mutex>

namespace kenotron {

// The few functions that are called, with the types of the driver's stable binary interface.
struct CudaDriver::Api {
    using Result = int;
    using Handle = void*;
    Result (*init)(unsigned) = nullptr;
    Result (*get_error_string)(Result, const char**) = nullptr;
    Result (*device_get)(int*, int) = nullptr;
    Result (*retain_primary)(Handle*, int) = nullptr;
    Result (*push_context)(Handle) = nullptr;
    Result (*pop_context)(Handle*) = nullptr;
    Result (*stream_create)(Handle*, unsigned) = nullptr;
    Result (*stream_destroy)(Handle) = nullptr;
    Result (*stream_wait_event)(Handle, Handle, unsigned) = nullptr;
    Result (*stream_synchronize)(Handle) = nullptr;
    Result (*event_create)(Handle*, unsigned) = nullptr;
    Result (*event_destroy)(Handle) = nullptr;
    Result (*event_record)(Handle, Handle) = nullptr;
    Result (*copy_to_host)(void*, std::uintptr_t, std::size_t, Handle) = nullptr;
    Result (*register_host)(void*, std::size_t, unsigned) = nullptr;
    Result (*unregister_host)(void*) = nullptr;

    void* library = nullptr;
    std::mutex mutex;
    std::map<int, Handle> contexts;  // by device ordinal; retained for as long as the driver is open
};

namespace {

constexpr unsigned stream_non_blocking = 1;
constexpr unsigned event_disable_timing = 2;
constexpr unsigned register_portable = 1;

}  // namespace

class CudaDriver::Current {
public:
    Current(CudaDriver& driver, int device) : driver_(driver) {
        void* context = nullptr;
        status_ = driver.context_of(device, context);
        if (!status_) status_ = driver.error(driver.api_->push_context(context), "cuCtxPushCurrent");
        is_pushed_ = !status_;
    }
    ~Current() {
        void* ignored = nullptr;
        if (is_pushed_) driver_.api_->pop_context(&ignored);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    const Status& status() const { return status_; }

private:
    CudaDriver& driver_;
    Status status_;
    bool is_pushed_ = false;
};

CudaDriver::CudaDriver() : api_(std::make_unique<Api>()) {}

CudaDriver::~CudaDriver() {
    // The library stays open and the primary contexts stay retained: both belong to torch as well, and what tears
    // them down at the end of the process does so in an order of its own.
}

std::shared_ptr<CudaDriver> CudaDriver::open(const std::string& library, std::string& problem) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        problem = dlerror();
        return nullptr;
    }
    std::shared_ptr<CudaDriver> driver(new CudaDriver);
    Api& api = *driver->api_;
    api.library = handle;
    const auto resolve = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
        if (function == nullptr) problem = library + " lacks " + name;
    };
    resolve(api.init, "cuInit");
    resolve(api.get_error_string, "cuGetErrorString");
    resolve(api.device_get, "cuDeviceGet");
    resolve(api.retain_primary, "cuDevicePrimaryCtxRetain");
    resolve(api.push_context, "cuCtxPushCurrent_v2");
    resolve(api.pop_context, "cuCtxPopCurrent_v2");
    resolve(api.stream_create, "cuStreamCreate");
    resolve(api.stream_destroy, "cuStreamDestroy_v2");
    resolve(api.stream_wait_event, "cuStreamWaitEvent");
    resolve(api.stream_synchronize, "cuStreamSynchronize");
    resolve(api.event_create, "cuEventCreate");
    resolve(api.event_destroy, "cuEventDestroy_v2");
    resolve(api.event_record, "cuEventRecord");
    resolve(api.copy_to_host, "cuMemcpyDtoHAsync_v2");
    resolve(api.register_host, "cuMemHostRegister_v2");
    resolve(api.unregister_host, "cuMemHostUnregister");
    if (!problem.empty()) return nullptr;
    if (const Status failed = driver->error(api.init(0), "cuInit")) {
        problem = failed->operation;
        return nullptr;
    }
    return driver;
}

Status CudaDriver::error(int result, const char* operation) const {
    if (result == 0) return {};
    const char* text = nullptr;
    api_->get_error_string(result, &text);
    return Error{EIO, std::string(operation) + ": " + (text == nullptr ? "CUDA error " + std::to_string(result) : text), {}};
}

Status CudaDriver::context_of(int device, void*& context) {
    const std::lock_guard lock(api_->mutex);
    if (const auto found = api_->contexts.find(device); found != api_->contexts.end()) {
        context = found->second;
        return {};
    }
    int handle = 0;
    if (Status failed = error(api_->device_get(&handle, device), "cuDeviceGet")) return failed;
    if (Status failed = error(api_->retain_primary(&context, handle), "cuDevicePrimaryCtxRetain")) return failed;
    api_->contexts[device] = context;
    return {};
}

void CudaDriver::pin(int device, std::byte* memory, std::size_t num_bytes) {
    const Current current(*this, device);
    if (!current.status()) api_->register_host(memory, num_bytes, register_portable);
}

void CudaDriver::unpin(int device, std::byte* memory) {
    const Current current(*this, device);
    if (!current.status()) api_->unregister_host(memory);
}

CudaDriver::Event::~Event() {
    const Current current(*driver_, device_);
    if (event_ != nullptr && !current.status()) driver_->api_->event_destroy(event_);
}

Status CudaDriver::Event::record(std::uint64_t stream) {
    const Current current(*driver_, device_);
    if (current.status()) return current.status();
    Api& api = *driver_->api_;
    if (Status failed = driver_->error(api.event_create(&event_, event_disable_timing), "cuEventCreate")) return failed;
    return driver_->error(api.event_record(event_, reinterpret_cast<void*>(stream)), "cuEventRecord");
}

CudaCopier::~CudaCopier() {
    for (const auto& [device, stream] : streams_) {
        const CudaDriver::Current current(*driver_, device);
        if (!current.status()) driver_->api_->stream_destroy(stream);
    }
}

Status CudaCopier::stream_of(int device, void*& stream) {
    if (const auto found = streams_.find(device); found != streams_.end()) {
        stream = found->second;
        return {};
    }
    if (Status failed = driver_->error(driver_->api_->stream_create(&stream, stream_non_blocking), "cuStreamCreate")) return failed;
    streams_[device] = stream;
    return {};
}

Status CudaCopier::wait_for(const CudaDriver::Event& event) {
    const CudaDriver::Current current(*driver_, event.device_);
    if (current.status()) return current.status();
    void* stream = nullptr;
    if (Status failed = stream_of(event.device_, stream)) return failed;
    return driver_->error(driver_->api_->stream_wait_event(stream, event.event_, 0), "cuStreamWaitEvent");
}

Status CudaCopier::begin_copy(int device, std::byte* to, const std::byte* from, std::size_t num_bytes) {
    const CudaDriver::Current current(*driver_, device);
    if (current.status()) return current.status();
    void* stream = nullptr;
    if (Status failed = stream_of(device, stream)) return failed;
    const auto source = reinterpret_cast<std::uintptr_t>(from);
    return driver_->error(driver_->api_->copy_to_host(to, source, num_bytes, stream), "cuMemcpyDtoHAsync");
}

Status CudaCopier::finish() {
    Status first;  // where one device fails, others still write to the host
    for (const auto& [device, stream] : streams_) {
        const CudaDriver::Current current(*driver_, device);
        Status failed = current.status();
        if (!failed) failed = driver_->error(driver_->api_->stream_synchronize(stream), "cuStreamSynchronize");
        if (failed && !first) first = std::move(failed);
    }
    return first;
}

}  // namespace kenotron
