// Arrays with any strides, and what they mean by the definition, with nothing in common with the code under test.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "copy.hpp"
#include "files.hpp"

namespace kenotron::test {

struct Array {
    const std::byte* data;
    std::vector<StridedBytes::Dim> dims;
    std::size_t item_bytes;

    StridedBytes strided() const { return StridedBytes(data, dims, item_bytes); }
    Bytes row_major() const {
        Bytes bytes;
        visit(data, 0, bytes);
        return bytes;
    }

private:
    void visit(const std::byte* at, std::size_t dim, Bytes& bytes) const {
        if (dim == dims.size()) {
            bytes.insert(bytes.end(), at, at + item_bytes);
            return;
        }
        for (std::size_t i = 0; i < dims[dim].extent; ++i) {
            visit(at + static_cast<std::ptrdiff_t>(i) * dims[dim].stride, dim + 1, bytes);
        }
    }
};

// So much memory does `random_view` look at, at most.
inline constexpr std::size_t view_bytes = 16 * 6 * 6 * 6 * 6;

// A view of a row-major array as NumPy or torch would make it: sliced with any step, permuted, expanded.
inline Array random_view(const std::byte* memory, Random& random) {
    constexpr std::size_t item_sizes[] = {1, 2, 3, 4, 8, 16};
    Array array{memory, {}, item_sizes[below(random, std::size(item_sizes))]};
    auto stride = static_cast<std::ptrdiff_t>(array.item_bytes);
    for (std::size_t num_dims = below(random, 5); num_dims > 0; --num_dims) {
        const std::size_t whole = 1 + below(random, 6);
        const std::size_t step = 1 + below(random, std::min<std::size_t>(whole, 3));
        const std::size_t first = below(random, whole);
        StridedBytes::Dim dim{(whole - first + step - 1) / step, stride * static_cast<std::ptrdiff_t>(step)};
        array.data += static_cast<std::ptrdiff_t>(first) * stride;
        if (below(random, 3) == 0) {  // backwards
            array.data += static_cast<std::ptrdiff_t>(dim.extent - 1) * dim.stride;
            dim.stride = -dim.stride;
        }
        array.dims.insert(array.dims.begin(), dim);
        stride *= static_cast<std::ptrdiff_t>(whole);
    }
    if (below(random, 2) == 0) std::shuffle(array.dims.begin(), array.dims.end(), random);
    for (std::size_t more = below(random, 3); more > 0; --more) {
        const auto at = static_cast<std::ptrdiff_t>(below(random, array.dims.size() + 1));
        const bool is_expanded = below(random, 2) == 0;
        // The stride of an extent of 1 means nothing, and may be anything.
        array.dims.insert(array.dims.begin() + at,
                          is_expanded ? StridedBytes::Dim{1 + below(random, 4), 0} : StridedBytes::Dim{1, -12345});
    }
    return array;
}

}  // namespace kenotron::test
