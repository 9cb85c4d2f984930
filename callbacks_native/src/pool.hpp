// The staging pool: equal slots of page-locked memory through which every checkpoint passes on its way to the disk.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kenotron {

// The address range is reserved at once, which costs nothing; memory is claimed slot by slot, by a thread of the pool,
// when a save first needs it, and kept. Claiming is slow where pages have to come from a hypervisor (0.5 to 3 GB/s
// measured), so that it must neither happen in a save nor be repeated.
//
// Equal slots on a stack, not a ring: no fragmentation, no order of release, any size of tensor, and the slot that is
// taken next is the one whose addresses are still known to the processor.
class SlotPool {
public:
    // `on_claim` is called by the pool's thread when memory for one more slot is there.
    SlotPool(std::size_t num_slots, std::size_t slot_bytes, std::function<void()> on_claim);
    ~SlotPool();
    SlotPool(const SlotPool&) = delete;
    SlotPool& operator=(const SlotPool&) = delete;

    std::size_t num_slots() const noexcept { return num_slots_; }
    std::size_t slot_bytes() const noexcept { return slot_bytes_; }

    // Whether the address range could be had.
    bool is_valid() const noexcept { return base_ != nullptr; }

    // Claim memory for so many slots (at most all of them) in the background.
    void prepare(std::size_t num_slots);

    // From here on every slot is also locked for a device: `pin` is called once for each, by the pool's thread.
    void pin_with(std::function<void(std::byte*, std::size_t)> pin, std::function<void(std::byte*)> unpin);

    // A free slot, or null where none is free now.
    std::byte* try_acquire() noexcept;
    void release(std::byte* slot);

    std::size_t num_claimed() const;
    std::size_t num_free() const;
    bool is_locked() const;  // whether the system let the claimed memory be locked

private:
    void claim_in_background();
    bool claim(std::byte* slot) const noexcept;

    const int owner_;  // process
    const std::size_t num_slots_;
    const std::size_t slot_bytes_;
    const std::function<void()> on_claim_;
    std::byte* mapping_ = nullptr;
    std::size_t mapping_bytes_ = 0;
    std::byte* base_ = nullptr;

    mutable std::mutex mutex_;
    std::condition_variable wanted_changed_;
    std::vector<std::byte*> free_;
    std::size_t num_wanted_ = 0;
    std::size_t num_claimed_ = 0;
    bool is_locked_ = true;
    bool is_stopping_ = false;
    std::function<void(std::byte*, std::size_t)> pin_;
    std::function<void(std::byte*)> unpin_;
    std::size_t num_pinned_ = 0;
    std::thread claimer_;
};

}  // namespace kenotron
