// A kernel compiled at run time, and its launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <sycl/device.hpp>

#include "native_binary.hpp"
#include "queue.hpp"

namespace moe_xe {

struct CompileError : std::runtime_error {
    CompileError(const std::string& kernel_name, const std::string& log);
    std::string kernel_name;
    std::string log;  // the compiler's own words
};

// One kernel argument, of the type that the signature's letter names.
union Argument {
    void* pointer;         // p
    std::int32_t int32;    // i
    std::int64_t int64;    // q
    float float32;         // f
};

class Kernel {
public:
    // Compiles SYCL source in which `name` is an extern "C" free-function
    // kernel (nd_range_kernel<1>) that takes the arguments of `signature`.
    // Throws CompileError; std::invalid_argument for a bad signature.
    static Kernel compile(const Queue& queue, const std::string& source, const std::string& name,
                          const std::string& signature, const std::vector<std::string>& options);

    // From what binary() gave for the same device and driver. Throws BinaryError.
    // The caller vouches for the bytes: drivers do not survive damaged ones.
    static Kernel from_binary(const Queue& queue, std::span<const std::byte> binary,
                              const std::string& name, const std::string& signature);

    // The device's machine code. Throws BinaryError.
    std::vector<std::byte> binary() const;

    // Submits and returns. `arguments` must have one entry per letter of the
    // signature, and the queue must have the context that was compiled for.
    void launch(Queue& queue, std::size_t groups, std::size_t group_size,
                std::span<const Argument> arguments) const;

    const std::string& name() const { return name_; }
    const std::string& signature() const { return signature_; }

private:
    Kernel(LoadedKernel loaded, sycl::device device, std::string name, std::string signature);

    LoadedKernel loaded_;
    sycl::device device_;
    std::string name_;
    std::string signature_;
};

}  // namespace moe_xe
