#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "check.hpp"
#include "faults.hpp"
#include "files.hpp"
#include "forks.hpp"

using kenotron::SlotPool;
using namespace kenotron::test;

namespace {

constexpr std::size_t slot_bytes = 16 << 10;

void do_nothing() {}

bool holds_only(const std::byte* slot, std::byte value) {
    return std::all_of(slot, slot + slot_bytes, [value](std::byte other) { return other == value; });
}

}  // namespace

TEST(slots_that_are_held_never_overlap_and_keep_what_is_in_them) {
    Random random(1);
    SlotPool pool(13, slot_bytes, &do_nothing);
    pool.prepare(13);
    CHECK(comes_true([&] { return pool.num_claimed() == 13; }));
    std::map<std::byte*, std::byte> held;  // and what was written to it
    for (int i = 0; i < 3000; ++i) {
        if (below(random, 100) < 55) {
            std::byte* slot = pool.try_acquire();
            CHECK_EQUAL(slot == nullptr, held.size() == 13);
            if (slot == nullptr) continue;
            const auto after = held.lower_bound(slot);
            CHECK(after == held.end() || slot + slot_bytes <= after->first);
            CHECK(after == held.begin() || std::prev(after)->first + slot_bytes <= slot);
            CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(slot) % 4096, 0u);
            held[slot] = static_cast<std::byte>(i);
            std::fill_n(slot, slot_bytes, held[slot]);
        } else if (!held.empty()) {
            const auto any = std::next(held.begin(), static_cast<std::ptrdiff_t>(below(random, held.size())));
            CHECK(holds_only(any->first, any->second));
            pool.release(any->first);
            held.erase(any);
        }
        CHECK_EQUAL(pool.num_free(), 13 - held.size());
    }
}

TEST(threads_never_hold_the_same_slot) {
    SlotPool pool(3, slot_bytes, &do_nothing);
    pool.prepare(3);
    std::atomic<int> num_left{1000};
    std::vector<std::thread> threads;
    for (int k = 1; k <= 4; ++k) {
        threads.emplace_back([&, mine = static_cast<std::byte>(k)] {
            while (num_left > 0) {
                std::byte* slot = pool.try_acquire();
                if (slot == nullptr) {
                    std::this_thread::yield();
                    continue;
                }
                std::fill_n(slot, slot_bytes, mine);
                CHECK(holds_only(slot, mine));
                pool.release(slot);
                --num_left;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQUAL(pool.num_free(), 3u);
}

TEST(memory_is_claimed_in_the_background_and_no_more_than_was_asked_for) {
    std::atomic<std::size_t> num_told{0};
    SlotPool pool(8, slot_bytes, [&] { ++num_told; });
    CHECK_EQUAL(pool.num_claimed(), 0u);
    CHECK(pool.try_acquire() == nullptr);
    pool.prepare(3);
    pool.prepare(2);
    CHECK(comes_true([&] { return num_told == 3; }));
    CHECK_EQUAL(pool.num_claimed(), 3u);
    CHECK_EQUAL(pool.num_free(), 3u);
    pool.prepare(1000);
    CHECK(comes_true([&] { return num_told == 8; }));
    CHECK_EQUAL(pool.num_claimed(), 8u);
}

TEST(an_address_range_that_is_not_to_be_had_makes_an_invalid_pool) {
    const SlotPool pool(std::size_t{1} << 20, std::size_t{1} << 40, &do_nothing);
    CHECK(!pool.is_valid());
}

TEST(a_pool_that_is_not_allowed_to_lock_memory_says_so_and_works) {
    const Faults faults;
    faults->mlock.hook(always(-ENOMEM));
    SlotPool pool(2, slot_bytes, &do_nothing);
    CHECK(pool.is_locked());
    pool.prepare(2);
    CHECK(comes_true([&] { return pool.num_claimed() == 2; }));
    CHECK(!pool.is_locked());
    CHECK(pool.try_acquire() != nullptr);
}

TEST(a_pool_is_destroyed_at_once) {
    for (std::size_t i = 0; i < 200; ++i) {
        SlotPool pool(4, slot_bytes, &do_nothing);
        if (i % 2 == 0) pool.prepare(i % 8);
    }
}

TEST(every_slot_is_pinned_once_and_unpinned) {
    for (int is_late = 0; is_late < 2; ++is_late) {  // pinned as it is claimed, or afterwards, while it may be in use
        std::mutex mutex;
        std::map<std::byte*, int> pins;
        auto pool = std::make_unique<SlotPool>(6, slot_bytes, &do_nothing);
        const auto claim_all = [&] {
            pool->prepare(6);
            CHECK(comes_true([&] { return pool->num_claimed() == 6; }));
        };
        if (is_late != 0) claim_all();
        pool->pin_with(
            [&](std::byte* slot, std::size_t size) {
                const std::lock_guard lock(mutex);
                CHECK_EQUAL(size, slot_bytes);
                CHECK_EQUAL(++pins[slot], 1);
            },
            [&](std::byte* slot) { CHECK_EQUAL(--pins[slot], 0); });
        if (is_late == 0) claim_all();
        CHECK(comes_true([&] {
            const std::lock_guard lock(mutex);
            return pins.size() == 6;
        }));
        pool.reset();
        CHECK(std::all_of(pins.begin(), pins.end(), [](const auto& pin) { return pin.second == 0; }));
    }
}

TEST(a_forked_childs_copy_is_destroyed_without_waiting_for_threads_that_are_not_there) {
    std::optional<SlotPool> pool;
    for (int i = 0; i < 5; ++i) {
        pool.emplace(4, slot_bytes, &do_nothing);
        pool->prepare(2);
        if (i > 0) CHECK(comes_true([&] { return pool->num_claimed() == 2; }));
        std::this_thread::sleep_for(std::chrono::milliseconds(i));  // the pool's thread sleeps by then
        CHECK(child_ends([&] { pool.reset(); }));
    }
    CHECK(pool->try_acquire() != nullptr);
}

int main() { return kenotron::test::run_all(); }
