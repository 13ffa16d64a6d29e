#include "find_device.hpp"

#include <cstdint>

#include <sycl/sycl.hpp>

namespace moe_xe {
namespace {

constexpr std::uint32_t kIntelVendorId = 0x8086;

constexpr const char* kNoCpu =
    "No SYCL CPU device was found. Its driver comes from pip: pip install 'moe_xe[cpu]'. "
    "If that is installed: import moe_xe before another library looks for SYCL devices, and "
    "see that ONEAPI_DEVICE_SELECTOR does not hide the device.";

constexpr const char* kNoGpu =
    "No Intel GPU was found by SYCL. It needs the Intel GPU driver (Level Zero: the package "
    "libze-intel-gpu1, or intel-level-zero-gpu), a recent Level Zero loader (libze1: 1.21.2 or newer; "
    "with 1.8 of Debian 12 SYCL fails) and access to /dev/dri; ONEAPI_DEVICE_SELECTOR must not hide it. "
    "UR_LOG_LEVEL_ZERO=\"level:error;output:stderr\" in the environment makes SYCL say why it skips a card, "
    "and moe-xe doctor shows all of this. Without a GPU use the CPU device: pip install 'moe_xe[cpu]'.";

using Platforms = std::vector<Platform>;

bool is_intel_gpu(const FoundDevice& found) {
    return found.device.is_gpu() && found.device.get_info<sycl::info::device::vendor_id>() == kIntelVendorId;
}

// The same card may also be offered by OpenCL: one entry per card is enough.
void append_gpus(std::vector<FoundDevice>& usable, const Platforms& all) {
    for (const char* backend : {"level_zero", "opencl"}) {
        for (const Platform& platform : all)
            for (const FoundDevice& found : platform.devices)
                if (found.facts.backend == backend && is_intel_gpu(found)) usable.push_back(found);
        if (!usable.empty()) return;
    }
}

std::vector<FoundDevice> usable_of(const Platforms& all) {
    std::vector<FoundDevice> usable;
    append_gpus(usable, all);
    for (const Platform& platform : all)
        for (const FoundDevice& found : platform.devices)
            if (found.device.is_cpu()) usable.push_back(found);
    return usable;
}

std::string with_failures(std::string message, const Platforms& all) {
    for (const Platform& platform : all)
        for (const std::string& error : platform.errors) message += " " + platform.name + " failed: " + error + ".";
    return message;
}

}  // namespace

std::vector<FoundDevice> usable_devices() { return usable_of(platforms()); }

sycl::device find_device(const std::string& kind) {
    if (kind != "cpu" && kind != "gpu")
        throw std::invalid_argument("a device is \"cpu\", \"gpu\" or an index, not \"" + kind + "\"");
    const Platforms all = platforms();
    for (const FoundDevice& found : usable_of(all))
        if (found.facts.kind == kind) return found.device;
    throw DeviceNotFoundError(with_failures(kind == "gpu" ? kNoGpu : kNoCpu, all));
}

sycl::device find_device(std::size_t index) {
    const Platforms all = platforms();
    const std::vector<FoundDevice> usable = usable_of(all);
    if (index < usable.size()) return usable[index].device;
    if (usable.empty()) throw DeviceNotFoundError(with_failures(std::string(kNoGpu) + ' ' + kNoCpu, all));
    throw DeviceNotFoundError(with_failures("there is no SYCL device " + std::to_string(index) + ": moe_xe sees " +
                                                std::to_string(usable.size()) + ".",
                                            all));
}

}  // namespace moe_xe
