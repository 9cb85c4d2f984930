// Makes one system call fail: preloaded into a process (LD_PRELOAD), it stands before the C library.
//
// Calls that change files below FAULT_FOLDER are counted from 1, over all threads; all others pass. The environment is
// read at each call, so that a process can arm itself, and a fork of an unarmed one as well.
//
//   FAULT_FOLDER  absolute, without links; unset: nothing is counted
//   FAULT_CALLS   which calls count, as " write pwrite "; unset: all of them
//   FAULT_AT      the number of the first call that is struck
//   FAULT_TIMES   how many are struck from there on; unset: one
//   FAULT_ACTION  "kill-before", "kill-after"; "fail" with FAULT_ERRNO; "short" (a write does half of it, no multiple of 512)
//   FAULT_LOG     a file elsewhere, to which a line "number call path" is appended for each call that counts
//
// A close that fails has closed, as on Linux. What comes in several guises goes by one name: pwrite64 is "pwrite", renameat2
// "rename"; "open" are those calls alone that may create a file.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long num_calls;

enum fate { PASS, FAIL, SHORT, KILL_AFTER };

static long number_in(const char* variable, long otherwise) {
    const char* text = getenv(variable);
    return text ? atol(text) : otherwise;
}

// Not by the functions of this file: those count.
static void note(long number, const char* call, const char* path) {
    const char* log = getenv("FAULT_LOG");
    if (!log) return;
    char line[PATH_MAX + 64];
    const int size = snprintf(line, sizeof line, "%ld %s %s\n", number, call, path);
    const int descriptor = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    syscall(SYS_write, descriptor, line, size);
    syscall(SYS_close, descriptor);
}

static enum fate fate_of(const char* call, const char* path) {
    const char* folder = getenv("FAULT_FOLDER");
    if (!folder || strncmp(path, folder, strlen(folder)) != 0) return PASS;
    const char* calls = getenv("FAULT_CALLS");
    char padded[32];
    snprintf(padded, sizeof padded, " %s ", call);
    if (calls && !strstr(calls, padded)) return PASS;
    const long number = ++num_calls;
    note(number, call, path);
    const long first = number_in("FAULT_AT", 0);
    if (first <= 0 || number < first || number >= first + number_in("FAULT_TIMES", 1)) return PASS;
    const char* action = getenv("FAULT_ACTION");
    if (strcmp(action, "kill-before") == 0) kill(getpid(), SIGKILL);
    if (strcmp(action, "kill-after") == 0) return KILL_AFTER;
    if (strcmp(action, "short") == 0) return SHORT;
    errno = (int)number_in("FAULT_ERRNO", EIO);
    return FAIL;
}

static enum fate fate_of_descriptor(const char* call, int descriptor) {
    if (!getenv("FAULT_FOLDER")) return PASS;
    char link[64];
    char path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const int before = errno;
    const ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return PASS;
    path[size] = '\0';
    return fate_of(call, path);
}

static enum fate fate_at(const char* call, int folder, const char* name) {
    if (!getenv("FAULT_FOLDER")) return PASS;
    if (name[0] == '/') return fate_of(call, name);
    char link[64] = "/proc/self/cwd";
    char path[2 * PATH_MAX];
    if (folder != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    const ssize_t size = readlink(link, path, PATH_MAX);
    if (size < 0) return PASS;
    snprintf(path + size, PATH_MAX, "/%s", name);
    return fate_of(call, path);
}

#define REAL(result, name, ...)         \
    static result (*real)(__VA_ARGS__); \
    if (!real) *(void**)&real = dlsym(RTLD_NEXT, #name)

// Calls `real` unless it is to fail, and dies after it if that is its fate.
#define GO_ON(decided, result, call)                    \
    do {                                                \
        const enum fate own = (decided);                \
        if (own == FAIL) return -1;                     \
        const result returned = (call);                 \
        if (own == KILL_AFTER) kill(getpid(), SIGKILL); \
        return returned;                                \
    } while (0)

// ---- Writing ----------------------------------------------------------------------------------------------------------

static size_t less_than(size_t size) {
    const size_t half = size / 2;
    return half % 512 == 0 && half > 1 ? half - 1 : half > 0 ? half : 1;
}

// Past the page cache the kernel refuses such a length; a device that is full or fails half-way does not ask.
static ssize_t write_less(int descriptor, const void* bytes, size_t size, off_t position, bool at_position) {
    const int flags = fcntl(descriptor, F_GETFL);
    fcntl(descriptor, F_SETFL, flags & ~O_DIRECT);
    const ssize_t written = at_position ? syscall(SYS_pwrite64, descriptor, bytes, less_than(size), position)
                                        : syscall(SYS_write, descriptor, bytes, less_than(size));
    fcntl(descriptor, F_SETFL, flags);
    return written;
}

ssize_t write(int descriptor, const void* bytes, size_t size) {
    REAL(ssize_t, write, int, const void*, size_t);
    const enum fate fate = fate_of_descriptor("write", descriptor);
    if (fate == SHORT) return write_less(descriptor, bytes, size, 0, false);
    GO_ON(fate, ssize_t, real(descriptor, bytes, size));
}

ssize_t pwrite(int descriptor, const void* bytes, size_t size, off_t position) {
    REAL(ssize_t, pwrite, int, const void*, size_t, off_t);
    const enum fate fate = fate_of_descriptor("pwrite", descriptor);
    if (fate == SHORT) return write_less(descriptor, bytes, size, position, true);
    GO_ON(fate, ssize_t, real(descriptor, bytes, size, position));
}

ssize_t pwrite64(int descriptor, const void* bytes, size_t size, off64_t position) {
    return pwrite(descriptor, bytes, size, position);
}

int fsync(int descriptor) {
    REAL(int, fsync, int);
    GO_ON(fate_of_descriptor("fsync", descriptor), int, real(descriptor));
}

int ftruncate(int descriptor, off_t size) {
    REAL(int, ftruncate, int, off_t);
    GO_ON(fate_of_descriptor("ftruncate", descriptor), int, real(descriptor, size));
}

int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }

int fallocate(int descriptor, int mode, off_t position, off_t size) {
    REAL(int, fallocate, int, int, off_t, off_t);
    GO_ON(fate_of_descriptor("fallocate", descriptor), int, real(descriptor, mode, position, size));
}

int fallocate64(int descriptor, int mode, off64_t position, off64_t size) { return fallocate(descriptor, mode, position, size); }

// ---- Opening and closing ----------------------------------------------------------------------------------------------

static int open_at(int folder, const char* path, int flags, mode_t mode) {
    REAL(int, openat, int, const char*, int, ...);
    GO_ON(flags & O_CREAT ? fate_at("open", folder, path) : PASS, int, real(folder, path, flags, mode));
}

#define MODE_AFTER(flags)                                               \
    mode_t mode = 0;                                                    \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {      \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode = va_arg(rest, mode_t);                                    \
        va_end(rest);                                                   \
    }

int open(const char* path, int flags, ...) {
    MODE_AFTER(flags);
    return open_at(AT_FDCWD, path, flags, mode);
}

int open64(const char* path, int flags, ...) {
    MODE_AFTER(flags);
    return open_at(AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char* path, int flags, ...) {
    MODE_AFTER(flags);
    return open_at(folder, path, flags, mode);
}

int openat64(int folder, const char* path, int flags, ...) {
    MODE_AFTER(flags);
    return open_at(folder, path, flags, mode);
}

int close(int descriptor) {
    REAL(int, close, int);
    const enum fate fate = fate_of_descriptor("close", descriptor);
    if (fate == FAIL) {
        const int error = errno;
        real(descriptor);
        errno = error;
        return -1;
    }
    GO_ON(fate, int, real(descriptor));
}

// ---- Names ------------------------------------------------------------------------------------------------------------

int mkdir(const char* path, mode_t mode) {
    REAL(int, mkdir, const char*, mode_t);
    GO_ON(fate_at("mkdir", AT_FDCWD, path), int, real(path, mode));
}

int link(const char* from, const char* to) {
    REAL(int, link, const char*, const char*);
    GO_ON(fate_at("link", AT_FDCWD, to), int, real(from, to));
}

int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) {
    REAL(int, linkat, int, const char*, int, const char*, int);
    GO_ON(fate_at("link", to_folder, to), int, real(from_folder, from, to_folder, to, flags));
}

int rename(const char* from, const char* to) {
    REAL(int, rename, const char*, const char*);
    GO_ON(fate_at("rename", AT_FDCWD, from), int, real(from, to));
}

int renameat(int from_folder, const char* from, int to_folder, const char* to) {
    REAL(int, renameat, int, const char*, int, const char*);
    GO_ON(fate_at("rename", from_folder, from), int, real(from_folder, from, to_folder, to));
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
    REAL(int, renameat2, int, const char*, int, const char*, unsigned);
    GO_ON(fate_at("rename", from_folder, from), int, real(from_folder, from, to_folder, to, flags));
}

int unlink(const char* path) {
    REAL(int, unlink, const char*);
    GO_ON(fate_at("unlink", AT_FDCWD, path), int, real(path));
}

int unlinkat(int folder, const char* path, int flags) {
    REAL(int, unlinkat, int, const char*, int);
    GO_ON(fate_at("unlink", folder, path), int, real(folder, path, flags));
}

int rmdir(const char* path) {
    REAL(int, rmdir, const char*);
    GO_ON(fate_at("unlink", AT_FDCWD, path), int, real(path));
}
