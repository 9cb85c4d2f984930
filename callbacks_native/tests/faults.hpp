// System calls that fail when a test asks them to. The linker leads all calls of the test's executable here (--wrap, see
// CMakeLists.txt), so that nothing in the code under test knows of it.
#pragma once

#include <atomic>
#include <functional>
#include <optional>

namespace kenotron::test {

// A wrapped system call. What `answer` returns for the n-th call (from 0) since `hook`: nothing, and the real one is
// called; -errno, and it fails; for fsync 0, and it does nothing; for pwrite a count, and only so many bytes are written.
class Syscall {
public:
    using Answer = std::function<std::optional<long>(int)>;

    // While no other thread makes this call.
    void hook(Answer answer) {
        num_calls_ = 0;
        answer_ = std::move(answer);
    }
    int num_calls() const { return num_calls_; }

    std::optional<long> next() {
        const int call = num_calls_++;
        return answer_ ? answer_(call) : std::nullopt;
    }

private:
    std::atomic<int> num_calls_{0};
    Answer answer_;
};

struct Syscalls {
    Syscalls() { reset(); }

    Syscall fallocate;
    Syscall set_direct;  // fcntl that sets O_DIRECT
    Syscall pwrite;
    Syscall ftruncate;
    Syscall fsync;
    Syscall close;
    Syscall mlock;

    // All as the system has them, and counted from here. But fsync does nothing: to whoever reads the file afterwards it
    // makes no difference, and a busy disk takes its time.
    void reset();
};

extern Syscalls syscalls;

inline Syscall::Answer always(long answer) {
    return [answer](int) { return answer; };
}
inline Syscall::Answer only_call(int which, long answer) {
    return [which, answer](int call) { return call == which ? std::optional(answer) : std::nullopt; };
}

// Of one test: everything is as it was when it ends.
class Faults {
public:
    Faults() { syscalls.reset(); }
    ~Faults() { syscalls.reset(); }
    Faults(const Faults&) = delete;
    Faults& operator=(const Faults&) = delete;
    Syscalls* operator->() const { return &syscalls; }
};

}  // namespace kenotron::test
