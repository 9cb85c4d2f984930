// The CUDA driver, opened at run time: nothing of it is needed to build, nor to run where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "error.hpp"

namespace kenotron {

class CudaDriver {
public:
    // Open `library`, normally "libcuda.so.1". Null, with the reason in `problem`, where that fails.
    static std::shared_ptr<CudaDriver> open(const std::string& library, std::string& problem);
    ~CudaDriver();
    CudaDriver(const CudaDriver&) = delete;
    CudaDriver& operator=(const CudaDriver&) = delete;

    // Lock host memory so that devices reach it directly. Failing costs speed alone, and so is no error.
    void pin(int device, std::byte* memory, std::size_t num_bytes);
    void unpin(int device, std::byte* memory);

    // A point in the work that has been given to a stream so far.
    class Event {
    public:
        Event(std::shared_ptr<CudaDriver> driver, int device) : driver_(std::move(driver)), device_(device) {}
        ~Event();
        Event(const Event&) = delete;
        Event& operator=(const Event&) = delete;
        Status record(std::uint64_t stream);

    private:
        friend class CudaCopier;
        std::shared_ptr<CudaDriver> driver_;
        int device_;
        void* event_ = nullptr;
    };

private:
    friend class CudaCopier;
    struct Api;
    class Current;  // makes a device's context the calling thread's, as long as it lives

    CudaDriver();
    Status error(int result, const char* operation) const;
    Status context_of(int device, void*& context);

    std::unique_ptr<Api> api_;
};

// Copies of one thread from devices to the host, each device on a stream of its own.
class CudaCopier {
public:
    explicit CudaCopier(std::shared_ptr<CudaDriver> driver) : driver_(std::move(driver)) {}
    ~CudaCopier();
    CudaCopier(const CudaCopier&) = delete;
    CudaCopier& operator=(const CudaCopier&) = delete;

    // Copies on `device` that begin from here on wait for `event`, on the device.
    Status wait_for(const CudaDriver::Event& event);
    Status begin_copy(int device, std::byte* to, const std::byte* from, std::size_t num_bytes);
    // Return when all copies that were begun have ended.
    Status finish();

private:
    Status stream_of(int device, void*& stream);

    std::shared_ptr<CudaDriver> driver_;
    std::map<int, void*> streams_;
};

}  // namespace kenotron
