// A kernel's machine code, taken out of a driver and given back to it.
//
// SYCL can only reload SPIR-V, which the driver then compiles again (0.4 s on
// the CPU device), so this goes through each backend's own interface. The
// backend libraries are already in the process, loaded by libsycl; they are
// looked up there, so that neither is needed to build or to start.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <sycl/kernel.hpp>
#include <sycl/queue.hpp>

namespace moe_xe {

// The driver did not give or did not take a binary; compiling is the way out.
struct BinaryError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct LoadedKernel {
    std::shared_ptr<void> program;  // must outlive the kernel; null where the kernel itself holds it
    sycl::kernel kernel;
};

std::vector<std::byte> extract_binary(const sycl::kernel& kernel, const sycl::device& device);

// `function` is the kernel's name inside the binary.
LoadedKernel load_binary(const sycl::queue& queue, std::span<const std::byte> binary,
                         const std::string& function);

namespace opencl {
std::vector<std::byte> extract_binary(const sycl::kernel& kernel, const sycl::device& device);
LoadedKernel load_binary(const sycl::queue& queue, std::span<const std::byte> binary,
                         const std::string& function);
}  // namespace opencl

namespace level_zero {
std::vector<std::byte> extract_binary(const sycl::kernel& kernel);
LoadedKernel load_binary(const sycl::queue& queue, std::span<const std::byte> binary,
                         const std::string& function);
}  // namespace level_zero

}  // namespace moe_xe
