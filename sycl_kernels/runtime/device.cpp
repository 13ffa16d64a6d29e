#include "device.hpp"

#include <algorithm>

#include <sycl/sycl.hpp>

#include "fork.hpp"

namespace moe_xe {
namespace {

namespace syclex = sycl::ext::oneapi::experimental;
namespace intel_info = sycl::ext::intel::info::device;

constexpr std::uint32_t kIntelVendorId = 0x8086;

constexpr const char* kNoCpu =
    "No SYCL CPU device was found. Its driver comes from pip: pip install 'moe_xe[cpu]'. "
    "If that is installed: import moe_xe before another library looks for SYCL devices, and "
    "see that ONEAPI_DEVICE_SELECTOR does not hide the device.";

constexpr const char* kNoGpu =
    "No Intel GPU was found by SYCL. It needs the Intel GPU driver (Level Zero: the packages "
    "libze-intel-gpu1 and libze1, or intel-level-zero-gpu) and access to /dev/dri; "
    "ONEAPI_DEVICE_SELECTOR must not hide it. Without a GPU use the CPU device: "
    "pip install 'moe_xe[cpu]'.";

std::string backend_name(sycl::backend backend) {
    switch (backend) {
        case sycl::backend::opencl: return "opencl";
        case sycl::backend::ext_oneapi_level_zero: return "level_zero";
        default: return "other";
    }
}

struct ArchitectureName {
    syclex::architecture value;
    const char* name;
};

// SYCL gives no text for an architecture, but its list can be included.
constexpr ArchitectureName kArchitectures[] = {
#define __SYCL_ARCHITECTURE(NAME, VALUE) {syclex::architecture::NAME, #NAME},
#define __SYCL_ARCHITECTURE_ALIAS(ALIAS, NAME)
#include <sycl/ext/oneapi/experimental/device_architecture.def>
#undef __SYCL_ARCHITECTURE
#undef __SYCL_ARCHITECTURE_ALIAS
};

std::string architecture_name(const sycl::device& device) {
    try {
        const auto value = device.get_info<syclex::info::device::architecture>();
        for (const ArchitectureName& known : kArchitectures)
            if (known.value == value) return known.name;
    } catch (const sycl::exception&) {
        // Not every backend answers this question.
    }
    return "unknown";
}

std::uint32_t xe_core_count(const sycl::device& device, std::uint32_t compute_units) {
    // The CPU device also claims these aspects, with 1 slice.
    if (!device.is_gpu() || !device.has(sycl::aspect::ext_intel_gpu_slices) ||
        !device.has(sycl::aspect::ext_intel_gpu_subslices_per_slice))
        return compute_units;
    return device.get_info<intel_info::gpu_slices>() *
           device.get_info<intel_info::gpu_subslices_per_slice>();
}

bool is_intel_gpu(const sycl::device& device) {
    return device.is_gpu() && device.get_info<sycl::info::device::vendor_id>() == kIntelVendorId;
}

// The same card may also be offered by OpenCL: one entry per card is enough.
void append_gpus(std::vector<sycl::device>& usable, const std::vector<sycl::device>& all) {
    for (const auto backend : {sycl::backend::ext_oneapi_level_zero, sycl::backend::opencl}) {
        for (const sycl::device& device : all)
            if (is_intel_gpu(device) && device.get_backend() == backend) usable.push_back(device);
        if (!usable.empty()) return;
    }
}

}  // namespace

DeviceFacts facts_of(const sycl::device& device) {
    enter_runtime();
    namespace info = sycl::info::device;
    DeviceFacts facts;
    facts.name = device.get_info<info::name>();
    facts.kind = device.is_gpu() ? "gpu" : "cpu";
    facts.backend = backend_name(device.get_backend());
    facts.vendor = device.get_info<info::vendor>();
    facts.driver_version = device.get_info<info::driver_version>();
    facts.architecture = architecture_name(device);
    facts.compute_units = device.get_info<info::max_compute_units>();
    facts.xe_cores = xe_core_count(device, facts.compute_units);
    facts.sub_group_sizes = device.get_info<info::sub_group_sizes>();
    facts.local_mem_bytes = device.get_info<info::local_mem_size>();
    facts.global_mem_bytes = device.get_info<info::global_mem_size>();
    facts.max_work_group_size = device.get_info<info::max_work_group_size>();
    facts.has_fp16 = device.has(sycl::aspect::fp16);
    facts.has_atomic64 = device.has(sycl::aspect::atomic64);
    facts.has_matrix_engine = device.has(sycl::aspect::ext_intel_matrix);
    facts.has_system_memory = device.has(sycl::aspect::usm_system_allocations);
    return facts;
}

std::vector<sycl::device> usable_devices() {
    enter_runtime();
    const std::vector<sycl::device> all = sycl::device::get_devices();
    std::vector<sycl::device> usable;
    append_gpus(usable, all);
    std::copy_if(all.begin(), all.end(), std::back_inserter(usable),
                 [](const sycl::device& device) { return device.is_cpu(); });
    return usable;
}

sycl::device find_device(const std::string& kind) {
    if (kind != "cpu" && kind != "gpu")
        throw std::invalid_argument("a device is \"cpu\", \"gpu\" or an index, not \"" + kind + "\"");
    const bool want_gpu = kind == "gpu";
    for (const sycl::device& device : usable_devices())
        if (device.is_gpu() == want_gpu) return device;
    throw DeviceNotFoundError(want_gpu ? kNoGpu : kNoCpu);
}

sycl::device find_device(std::size_t index) {
    const std::vector<sycl::device> usable = usable_devices();
    if (index < usable.size()) return usable[index];
    if (usable.empty()) throw DeviceNotFoundError(std::string(kNoGpu) + ' ' + kNoCpu);
    throw DeviceNotFoundError("there is no SYCL device " + std::to_string(index) + ": moe_xe sees " +
                              std::to_string(usable.size()));
}

}  // namespace moe_xe
