// A fork in a test, with a parent that does not wait for ever.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

namespace kenotron::test {

// Whether a forked child that does `body` comes to its end within 20 seconds.
template <typename Body>
bool child_ends(Body body) {
    const pid_t child = fork();
    if (child == 0) {
        body();
        _exit(0);  // a sanitizer's look at what threads that are not there have left behind is of no interest
    }
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (std::chrono::steady_clock::now() < until) {
        int status = 0;
        if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    return false;
}

}  // namespace kenotron::test
