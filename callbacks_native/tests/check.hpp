// A test harness of one page: TEST registers a case, CHECK and CHECK_EQUAL report what differs and carry on, so that
// one run shows every failure. The last line of a test file is `int main() { return kenotron::test::run_all(); }`.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <iostream>
#include <thread>
#include <vector>

namespace kenotron::test {

struct Case {
    const char* name;
    void (*body)();
};

// Function-local, because the cases of a file register themselves before main, in no order that we could rely on.
inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

inline std::atomic<std::size_t> num_failures = 0;  // threads of a test check as well

struct Register {
    Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

inline void report(const char* file, int line, const char* expression) {
    ++num_failures;
    std::cerr << "  " << file << ':' << line << ": not true: " << expression << '\n';
}

template <typename Left, typename Right>
void check_equal(const Left& left, const Right& right, const char* file, int line, const char* expression) {
    if (left == right) return;
    report(file, line, expression);
    std::cerr << std::hex << std::showbase << "    left  " << left << "\n    right " << right << '\n'
              << std::dec << std::noshowbase;
}

// Whether it does within 20 seconds.
template <typename Condition>
bool comes_true(Condition condition) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!condition() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    return condition();
}

inline int run_all() {
    for (const Case& test : cases()) {
        const std::size_t failures_before = num_failures;
        test.body();
        std::cerr << (num_failures == failures_before ? "ok      " : "FAILED  ") << test.name << '\n';
    }
    return num_failures == 0 ? 0 : 1;
}

}  // namespace kenotron::test

#define TEST(name)                                                          \
    static void name();                                                     \
    static const ::kenotron::test::Register register_##name{#name, &name};  \
    static void name()

#define CHECK(expression)                                                      \
    do {                                                                       \
        if (!(expression)) ::kenotron::test::report(__FILE__, __LINE__, #expression); \
    } while (false)

#define CHECK_EQUAL(left, right) \
    ::kenotron::test::check_equal((left), (right), __FILE__, __LINE__, #left " == " #right)
