// What the SYCL backends offer, platform by platform: one that fails takes nothing from the others.
#pragma once

#include <string>
#include <vector>

#include <sycl/device.hpp>

#include "device.hpp"

namespace moe_xe {

struct FoundDevice {
    sycl::device device;
    DeviceFacts facts;
};

struct Platform {
    std::string name;
    std::string backend;  // "opencl", "level_zero" or "other"; "unknown" where SYCL failed as a whole
    std::vector<FoundDevice> devices;  // GPUs and CPUs that answer
    std::vector<std::string> errors;   // of the platform, or of devices that are not listed
};

// All platforms that ONEAPI_DEVICE_SELECTOR lets through, with devices or errors. Throws ForkError only.
std::vector<Platform> platforms();

}  // namespace moe_xe
