// What the planner needs to know about a device, as plain values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <sycl/device.hpp>

namespace moe_xe {

struct DeviceFacts {
    std::string name;
    std::string kind;     // "cpu" or "gpu"
    std::string backend;  // "opencl" or "level_zero"
    std::string vendor;
    std::string driver_version;
    std::string architecture;  // SYCL's name, such as "intel_gpu_bmg_g21"; "unknown" where it has none
    std::uint32_t compute_units = 0;
    std::uint32_t xe_cores = 0;  // on a CPU: its compute units
    std::vector<std::size_t> sub_group_sizes;
    std::size_t local_mem_bytes = 0;
    std::size_t global_mem_bytes = 0;
    std::size_t max_work_group_size = 0;
    bool has_fp16 = false;
    bool has_atomic64 = false;
    bool has_matrix_engine = false;
    bool has_system_memory = false;  // kernels reach all memory of the process, not only USM
};

// The message says what to install.
struct DeviceNotFoundError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

DeviceFacts facts_of(const sycl::device& device);

// The devices that moe_xe can use: Intel GPUs first, then CPUs.
std::vector<sycl::device> usable_devices();

// The first device of a kind, "cpu" or "gpu".
// Throws DeviceNotFoundError, or std::invalid_argument for another kind.
sycl::device find_device(const std::string& kind);

// The device at this position of usable_devices(). Throws DeviceNotFoundError.
sycl::device find_device(std::size_t index);

}  // namespace moe_xe
