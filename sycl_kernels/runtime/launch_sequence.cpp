#include "launch_sequence.hpp"

#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include <sycl/sycl.hpp>

#include "fork.hpp"

namespace moe_xe {
namespace {

bool overlap(const std::byte* x, std::size_t x_bytes, const std::byte* y, std::size_t y_bytes) {
    const std::less<const std::byte*> before;
    return x_bytes && y_bytes && before(x, y + y_bytes) && before(y, x + x_bytes);
}

}  // namespace

void LaunchSequence::add(const Kernel& kernel, std::size_t groups, std::size_t group_size, std::vector<Argument> arguments,
                         std::vector<BufferPointer> pointers) {
    for (const BufferPointer& pointer : pointers)
        if (pointer.buffer >= buffers_.size() || pointer.argument >= arguments.size())
            throw std::invalid_argument("a launch of " + kernel.name() + " has no such buffer or argument");
    launches_.push_back({kernel, groups, group_size, std::move(arguments), std::move(pointers)});
}

bool LaunchSequence::run(Queue& queue, std::span<std::byte* const> addresses, bool on_host) const {
    enter_runtime();
    if (!takes(addresses)) return false;
    zero(queue, addresses, on_host);
    if (!on_host) {
        submit(queue, addresses);
        return true;
    }
    try {
        submit(queue, addresses);
    } catch (...) {
        queue.wait();  // the host frees the memory
        throw;
    }
    queue.wait();
    return true;
}

bool LaunchSequence::takes(std::span<std::byte* const> addresses) const {
    if (addresses.size() != buffers_.size())
        throw std::invalid_argument("launches of " + std::to_string(buffers_.size()) + " buffers were given " +
                                    std::to_string(addresses.size()) + " addresses");
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
        if (buffers_[i].bytes && !addresses[i]) return false;
        if (!buffers_[i].written) continue;
        for (std::size_t j = 0; j < buffers_.size(); ++j)
            if (j != i && overlap(addresses[i], buffers_[i].bytes, addresses[j], buffers_[j].bytes)) return false;
    }
    return true;
}

void LaunchSequence::zero(Queue& queue, std::span<std::byte* const> addresses, bool on_host) const {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
        const std::size_t bytes = buffers_[i].zeroed_bytes;
        if (!bytes) continue;
        if (on_host)
            std::memset(addresses[i], 0, bytes);
        else
            queue.zero(addresses[i], bytes);
    }
}

void LaunchSequence::submit(Queue& queue, std::span<std::byte* const> addresses) const {
    std::vector<Argument> filled;
    for (const Launch& launch : launches_) {
        filled = launch.arguments;
        for (const BufferPointer& pointer : launch.pointers)
            filled[pointer.argument].pointer = addresses[pointer.buffer] + pointer.offset;
        launch.kernel.launch(queue, launch.groups, launch.group_size, filled);
    }
}

}  // namespace moe_xe
