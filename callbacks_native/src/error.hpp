// What went wrong, as a value: it is made on one thread and raised in Python on another.
#pragma once

#include <cerrno>
#include <optional>
#include <string>
#include <utility>

namespace kenotron {

struct Error {
    int code = 0;           // errno
    std::string operation;  // the system call, such as "pwrite"
    std::string path;       // the file that it was called for; empty where there is none
};

using Status = std::optional<Error>;  // nothing: all is well

inline Error last_error(std::string operation, std::string path = {}) {
    return {errno, std::move(operation), std::move(path)};
}

}  // namespace kenotron
