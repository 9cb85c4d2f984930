#include "pool.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

namespace kenotron {
namespace {

constexpr std::size_t huge_page_bytes = std::size_t{2} << 20;

}  // namespace

SlotPool::SlotPool(std::size_t num_slots, std::size_t slot_bytes, std::function<void()> on_claim)
    : owner_(getpid()), num_slots_(num_slots), slot_bytes_(slot_bytes), on_claim_(std::move(on_claim)) {
    mapping_bytes_ = num_slots * slot_bytes + huge_page_bytes;
    void* mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return;
    mapping_ = static_cast<std::byte*>(mapping);
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(mapping_);
    base_ = mapping_ + (huge_page_bytes - address % huge_page_bytes) % huge_page_bytes;
#ifdef MADV_HUGEPAGE
    madvise(base_, num_slots * slot_bytes, MADV_HUGEPAGE);
#endif
#ifdef MADV_DONTFORK
    // A device that writes to a private mapping while a data loader's worker is forked gets the wrong page: open(2).
    madvise(base_, num_slots * slot_bytes, MADV_DONTFORK);
#endif
#ifdef MADV_DONTDUMP
    madvise(base_, num_slots * slot_bytes, MADV_DONTDUMP);
#endif
    free_.reserve(num_slots);
    claimer_ = std::thread([this] { claim_in_background(); });
}

SlotPool::~SlotPool() {
    if (mapping_ == nullptr) return;
    if (owner_ != getpid()) {
        // In a fork's copy the memory is not there, nor is the thread: joining it, or destroying what it waits on, would
        // wait for it. Both are made anew over what they were.
        std::construct_at(&claimer_);
        std::construct_at(&wanted_changed_);
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        is_stopping_ = true;
    }
    wanted_changed_.notify_all();
    claimer_.join();
    if (unpin_) {
        for (std::size_t i = 0; i < num_pinned_; ++i) unpin_(base_ + i * slot_bytes_);
    }
    munmap(mapping_, mapping_bytes_);
}

void SlotPool::prepare(std::size_t num_slots) {
    {
        const std::lock_guard lock(mutex_);
        num_wanted_ = std::max(num_wanted_, std::min(num_slots, num_slots_));
    }
    wanted_changed_.notify_all();
}

void SlotPool::pin_with(std::function<void(std::byte*, std::size_t)> pin, std::function<void(std::byte*)> unpin) {
    {
        const std::lock_guard lock(mutex_);
        if (pin_) return;
        pin_ = std::move(pin);
        unpin_ = std::move(unpin);
    }
    wanted_changed_.notify_all();
}

void SlotPool::claim_in_background() {
    std::unique_lock lock(mutex_);
    for (;;) {
        const auto owes_pin = [this] { return pin_ && num_pinned_ < num_claimed_; };
        wanted_changed_.wait(lock, [&] { return is_stopping_ || owes_pin() || num_claimed_ < num_wanted_; });
        if (is_stopping_) return;
        if (owes_pin()) {
            // Slots are claimed in the order of their addresses, and a pinned slot may well be in use.
            std::byte* slot = base_ + num_pinned_ * slot_bytes_;
            lock.unlock();
            pin_(slot, slot_bytes_);
            lock.lock();
            ++num_pinned_;
            continue;
        }
        std::byte* slot = base_ + num_claimed_ * slot_bytes_;
        lock.unlock();
        const bool locked = claim(slot);
        lock.lock();
        is_locked_ = is_locked_ && locked;
        ++num_claimed_;
        free_.push_back(slot);
        lock.unlock();
        on_claim_();
        lock.lock();
    }
}

bool SlotPool::claim(std::byte* slot) const noexcept {
    bool is_populated = false;
#ifdef MADV_POPULATE_WRITE
    is_populated = madvise(slot, slot_bytes_, MADV_POPULATE_WRITE) == 0;
#endif
    if (!is_populated) {
        const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        for (std::size_t i = 0; i < slot_bytes_; i += page_bytes) *static_cast<volatile std::byte*>(slot + i) = std::byte{0};
    }
    return mlock(slot, slot_bytes_) == 0;  // beyond RLIMIT_MEMLOCK the pages merely could be swapped out
}

std::byte* SlotPool::try_acquire() noexcept {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return nullptr;
    std::byte* slot = free_.back();
    free_.pop_back();
    return slot;
}

void SlotPool::release(std::byte* slot) {
    const std::lock_guard lock(mutex_);
    free_.push_back(slot);
}

std::size_t SlotPool::num_claimed() const {
    const std::lock_guard lock(mutex_);
    return num_claimed_;
}

std::size_t SlotPool::num_free() const {
    const std::lock_guard lock(mutex_);
    return free_.size();
}

bool SlotPool::is_locked() const {
    const std::lock_guard lock(mutex_);
    return is_locked_;
}

}  // namespace kenotron
