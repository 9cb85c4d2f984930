// A box of a row-major piece as bytes: which bytes of the piece belong to it, and where each of them goes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kenotron {

// Made once for each box that is wanted of a piece; safe to use from several threads at once, as long as no two of them
// scatter the same bytes. Nothing in it grows with the box, only with its dimensions.
class Box {
public:
    // All of a piece of `num_bytes`, going nowhere.
    explicit Box(std::uint64_t num_bytes);

    // The indices offset[d] <= i[d] < offset[d] + shape[d] of a row-major piece of `piece_shape`, whose bytes go to
    // `destination`, the element 0, with `strides` in bytes, of any sign. All spans are equally long, the box lies
    // inside the piece and the piece's bytes can be counted in an int64.
    Box(std::span<const std::int64_t> piece_shape, std::size_t item_bytes, std::span<const std::int64_t> offset,
        std::span<const std::int64_t> shape, std::byte* destination, std::span<const std::int64_t> strides);

    // The first byte of the box at or after `position`, both counted from where the piece begins; none behind its end.
    std::optional<std::uint64_t> next(std::uint64_t position) const;

    // Copies those of `bytes` that belong to the box, the first of which stands at `position` of the piece.
    void scatter(std::span<const std::byte> bytes, std::uint64_t position) const;

private:
    // The box is `extent` smaller boxes, `span` bytes each from its first byte to its last, at `step` bytes from one
    // another in the piece and `stride` in the destination.
    struct Dim {
        std::uint64_t extent;
        std::uint64_t step;
        std::ptrdiff_t stride;
        std::uint64_t span;
    };

    static std::uint64_t first_ending_after(std::uint64_t position, std::uint64_t start, const Dim& dim);
    void scatter_dim(std::size_t dim, std::uint64_t start, std::byte* to, std::span<const std::byte> bytes,
                     std::uint64_t position) const;

    std::vector<Dim> dims_;  // from the outermost to the runs, of which each is contiguous here and there; never empty
    std::uint64_t begin_ = 0;
    std::byte* destination_ = nullptr;
    bool is_empty_ = false;
};

}  // namespace kenotron
