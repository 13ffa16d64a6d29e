#include "native_binary.hpp"

#include <sycl/sycl.hpp>

namespace moe_xe {

std::vector<std::byte> extract_binary(const sycl::kernel& kernel, const sycl::device& device) {
    switch (device.get_backend()) {
        case sycl::backend::opencl: return opencl::extract_binary(kernel, device);
        case sycl::backend::ext_oneapi_level_zero: return level_zero::extract_binary(kernel);
        default: throw BinaryError("this SYCL backend has no device binaries");
    }
}

LoadedKernel load_binary(const sycl::queue& queue, std::span<const std::byte> binary,
                         const std::string& function) {
    switch (queue.get_backend()) {
        case sycl::backend::opencl: return opencl::load_binary(queue, binary, function);
        case sycl::backend::ext_oneapi_level_zero:
            return level_zero::load_binary(queue, binary, function);
        default: throw BinaryError("this SYCL backend has no device binaries");
    }
}

}  // namespace moe_xe
