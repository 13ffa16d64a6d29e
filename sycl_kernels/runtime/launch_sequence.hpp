// Launches that were made before, to be made again on other memory.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kernel.hpp"
#include "queue.hpp"

namespace moe_xe {

// An argument that is the address of a byte of a buffer.
struct BufferPointer {
    std::size_t argument;
    std::size_t buffer;
    std::size_t offset;
};

// Memory that the launches use. An address is given for each when they are made.
struct Buffer {
    std::size_t bytes;          // what they may touch
    bool written;               // by the launches, so it must not share memory with another one
    std::size_t zeroed_bytes;   // at its start, before the first launch
};

class LaunchSequence {
public:
    explicit LaunchSequence(std::vector<Buffer> buffers) : buffers_(std::move(buffers)) {}

    // `arguments` as for Kernel::launch; those of `pointers` are filled in by run. Throws std::invalid_argument for a buffer
    // that is not there.
    void add(const Kernel& kernel, std::size_t groups, std::size_t group_size, std::vector<Argument> arguments,
             std::vector<BufferPointer> pointers);

    // Submits all launches, with an address for each buffer, and returns true; or false, with nothing done, for a null
    // address or one whose memory overlaps with what is written. `on_host`: the memory is the host's, and all launches have
    // ended when it returns.
    bool run(Queue& queue, std::span<std::byte* const> addresses, bool on_host) const;

private:
    struct Launch {
        Kernel kernel;
        std::size_t groups;
        std::size_t group_size;
        std::vector<Argument> arguments;
        std::vector<BufferPointer> pointers;
    };

    bool takes(std::span<std::byte* const> addresses) const;
    void zero(Queue& queue, std::span<std::byte* const> addresses, bool on_host) const;
    void submit(Queue& queue, std::span<std::byte* const> addresses) const;

    std::vector<Buffer> buffers_;
    std::vector<Launch> launches_;
};

}  // namespace moe_xe
