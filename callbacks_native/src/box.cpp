// A box is dimensions around contiguous runs. The constructor merges what lies without gaps both in the piece and at
// the destination, so that whole tensors and shards of rows are a single run, and a shard of columns is one to a row.
// Both walks below go down the dimensions and find by division, not by search, where in each of them to go on.
#include "box.hpp"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace kenotron {
namespace {

// One item, or a short run, at a time: with its size known to the compiler each memcpy is a mov.
template <std::size_t RunBytes>
void copy_short_runs(std::byte* to, std::ptrdiff_t stride, const std::byte* from, std::uint64_t step,
                     std::uint64_t count) {
    for (; count > 0; --count, to += stride, from += step) std::memcpy(to, from, RunBytes);
}

void copy_runs(std::byte* to, std::ptrdiff_t stride, const std::byte* from, std::uint64_t step, std::uint64_t run_bytes,
               std::uint64_t count) {
    switch (run_bytes) {
        case 1: return copy_short_runs<1>(to, stride, from, step, count);
        case 2: return copy_short_runs<2>(to, stride, from, step, count);
        case 4: return copy_short_runs<4>(to, stride, from, step, count);
        case 8: return copy_short_runs<8>(to, stride, from, step, count);
        default:
            for (; count > 0; --count, to += stride, from += step) std::memcpy(to, from, run_bytes);
    }
}

}  // namespace

Box::Box(std::uint64_t num_bytes) : dims_{{1, num_bytes, 0, num_bytes}}, is_empty_(num_bytes == 0) {}

Box::Box(std::span<const std::int64_t> piece_shape, std::size_t item_bytes, std::span<const std::int64_t> offset,
         std::span<const std::int64_t> shape, std::byte* destination, std::span<const std::int64_t> strides)
    : destination_(destination) {
    assert(offset.size() == piece_shape.size() && shape.size() == offset.size() && strides.size() == offset.size());
    is_empty_ = std::ranges::find(shape, 0) != shape.end();
    if (is_empty_) return;
    std::uint64_t run_bytes = item_bytes;
    std::uint64_t step = item_bytes;  // of the dimension that we are at
    for (std::size_t d = shape.size(); d-- > 0; step *= static_cast<std::uint64_t>(piece_shape[d])) {
        const auto extent = static_cast<std::uint64_t>(shape[d]);
        const auto stride = static_cast<std::ptrdiff_t>(strides[d]);
        begin_ += static_cast<std::uint64_t>(offset[d]) * step;
        if (extent == 1) continue;
        if (dims_.empty() && step == run_bytes && stride == static_cast<std::ptrdiff_t>(run_bytes)) {
            run_bytes *= extent;
        } else if (!dims_.empty() && step == dims_.back().step * dims_.back().extent &&
                   stride == dims_.back().stride * static_cast<std::ptrdiff_t>(dims_.back().extent)) {
            dims_.back().extent *= extent;
        } else {
            dims_.push_back({extent, step, stride, 0});
        }
    }
    if (dims_.empty()) dims_.push_back({1, run_bytes, 0, 0});
    std::uint64_t span = run_bytes;
    for (Dim& dim : dims_) {  // still from the innermost
        dim.span = span;
        span += (dim.extent - 1) * dim.step;
    }
    std::ranges::reverse(dims_);
}

// The first of the smaller boxes, the first of which begins at `start`, that has a byte after `position` or at it.
std::uint64_t Box::first_ending_after(std::uint64_t position, std::uint64_t start, const Dim& dim) {
    return position < start + dim.span ? 0 : (position - start - dim.span) / dim.step + 1;
}

std::optional<std::uint64_t> Box::next(std::uint64_t position) const {
    if (is_empty_) return std::nullopt;
    std::uint64_t start = begin_;
    for (const Dim& dim : dims_) {
        const std::uint64_t index = first_ending_after(position, start, dim);
        if (index >= dim.extent) return std::nullopt;  // in the outermost only: further in, one was found to end later
        start += index * dim.step;
    }
    return std::max(start, position);
}

void Box::scatter(std::span<const std::byte> bytes, std::uint64_t position) const {
    if (is_empty_ || destination_ == nullptr) return;
    scatter_dim(0, begin_, destination_, bytes, position);
}

void Box::scatter_dim(std::size_t d, std::uint64_t start, std::byte* to, std::span<const std::byte> bytes,
                      std::uint64_t position) const {
    const Dim& dim = dims_[d];
    const std::uint64_t end = position + bytes.size();
    if (start >= end) return;
    std::uint64_t index = first_ending_after(position, start, dim);
    const std::uint64_t stop = std::min(dim.extent, (end - start - 1) / dim.step + 1);
    const auto place = [&] { return to + static_cast<std::ptrdiff_t>(index) * dim.stride; };
    if (d + 1 < dims_.size()) {
        for (; index < stop; ++index) scatter_dim(d + 1, start + index * dim.step, place(), bytes, position);
        return;
    }
    while (index < stop) {
        const std::uint64_t from = start + index * dim.step;
        if (from >= position && from + dim.span <= end) {
            const std::uint64_t count = std::min(stop - index, (end - from - dim.span) / dim.step + 1);
            copy_runs(place(), dim.stride, bytes.data() + (from - position), dim.step, dim.span, count);
            index += count;
        } else {  // the bytes begin or end inside of this run
            const std::uint64_t first = std::max(from, position);
            const std::uint64_t last = std::min(from + dim.span, end);
            std::memcpy(place() + (first - from), bytes.data() + (first - position), last - first);
            ++index;
        }
    }
}

}  // namespace kenotron
