// What the planner needs to know about a device, as plain values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <sycl/backend_types.hpp>
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

std::string backend_name(sycl::backend backend);

// Throws sycl::exception where the device does not answer.
DeviceFacts facts_of(const sycl::device& device);

}  // namespace moe_xe
