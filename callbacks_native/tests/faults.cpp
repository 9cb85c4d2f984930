#include "faults.hpp"

#include <fcntl.h>
#include <sys/types.h>

#include <cerrno>
#include <cstdarg>
#include <cstddef>

using kenotron::test::syscalls;

namespace kenotron::test {

Syscalls syscalls;

void Syscalls::reset() {
    for (Syscall* call : {&fallocate, &set_direct, &pwrite, &ftruncate, &fsync, &close, &mlock}) call->hook({});
    fsync.hook(always(0));
}

}  // namespace kenotron::test

namespace {

int fail(long answer) {
    errno = static_cast<int>(-answer);
    return -1;
}

}  // namespace

// NOLINTBEGIN: the linker chooses these names
extern "C" {

int __real_fallocate(int, int, off_t, off_t);
int __real_fcntl(int, int, ...);
ssize_t __real_pwrite(int, const void*, size_t, off_t);
int __real_ftruncate(int, off_t);
int __real_fsync(int);
int __real_close(int);
int __real_mlock(const void*, size_t);

int __wrap_fallocate(int descriptor, int mode, off_t offset, off_t size) {
    const auto answer = syscalls.fallocate.next();
    return answer ? fail(*answer) : __real_fallocate(descriptor, mode, offset, size);
}

int __wrap_fcntl(int descriptor, int command, ...) {
    va_list arguments;
    va_start(arguments, command);
    const long argument = va_arg(arguments, long);
    va_end(arguments);
    if (command == F_SETFL && (argument & O_DIRECT) != 0) {
        if (const auto answer = syscalls.set_direct.next()) return fail(*answer);
    }
    return __real_fcntl(descriptor, command, argument);
}

ssize_t __wrap_pwrite(int descriptor, const void* bytes, size_t size, off_t position) {
    const auto answer = syscalls.pwrite.next();
    if (!answer) return __real_pwrite(descriptor, bytes, size, position);
    if (*answer < 0) return fail(*answer);
    if (static_cast<size_t>(*answer) >= size) return __real_pwrite(descriptor, bytes, size, position);
    // Past the page cache only whole blocks reach the file, whatever the count says.
    const bool is_direct = (__real_fcntl(descriptor, F_GETFL, 0L) & O_DIRECT) != 0;
    const size_t reached = is_direct ? static_cast<size_t>(*answer) / 4096 * 4096 : static_cast<size_t>(*answer);
    if (reached > 0 && __real_pwrite(descriptor, bytes, reached, position) != static_cast<ssize_t>(reached)) return -1;
    return *answer;
}

int __wrap_ftruncate(int descriptor, off_t size) {
    const auto answer = syscalls.ftruncate.next();
    return answer ? fail(*answer) : __real_ftruncate(descriptor, size);
}

int __wrap_fsync(int descriptor) {
    const auto answer = syscalls.fsync.next();
    if (!answer) return __real_fsync(descriptor);
    return *answer == 0 ? 0 : fail(*answer);
}

int __wrap_close(int descriptor) {
    const auto answer = syscalls.close.next();
    const int result = __real_close(descriptor);  // it is closed even where it fails
    return answer ? fail(*answer) : result;
}

int __wrap_mlock(const void* memory, size_t size) {
    const auto answer = syscalls.mlock.next();
    return answer ? fail(*answer) : __real_mlock(memory, size);
}
}
// NOLINTEND
