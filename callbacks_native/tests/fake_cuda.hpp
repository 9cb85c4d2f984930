// A CUDA driver without a GPU, as a shared library: device memory is host memory, and each stream a thread that dawdles, so
// that whoever forgets to wait reads too early. What the tests steer it by is found through the symbol "fake_cuda".
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace kenotron::test {

class FakeCuda {
public:
    struct Counts {
        int num_streams;
        int num_events;
        int num_pinned;
    };

    virtual ~FakeCuda() = default;

    // A stream to give work to; 0 stands for the default stream of a device.
    virtual std::uint64_t make_stream(int device) = 0;
    virtual void destroy_stream(std::uint64_t stream) = 0;
    virtual void launch(int device, std::uint64_t stream, std::function<void()> kernel) = 0;
    virtual void synchronize(int device, std::uint64_t stream) = 0;

    // Let calls of a function fail, after so many that do not.
    virtual void fail(const std::string& function, int num_good, int num_bad) = 0;
    // Let every copy from a device begin so many milliseconds late.
    virtual void delay(int device, int ms) = 0;
    // Neither of both.
    virtual void reset() = 0;

    // What is there now, save what was made here.
    virtual Counts counts() = 0;
};

inline constexpr int fake_cuda_error = 700;
inline constexpr const char* fake_cuda_error_text = "an illegal memory access was encountered";
inline constexpr int num_fake_devices = 2;

}  // namespace kenotron::test
