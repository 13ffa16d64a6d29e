// Which devices moe_xe uses, and what to do where there is none.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "platform.hpp"

namespace moe_xe {

// The message says what to install, and what failed.
struct DeviceNotFoundError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The devices that moe_xe can use: Intel GPUs first, then CPUs. What fails is left out; platforms() has the errors.
std::vector<FoundDevice> usable_devices();

// The first device of a kind, "cpu" or "gpu".
// Throws DeviceNotFoundError, or std::invalid_argument for another kind.
sycl::device find_device(const std::string& kind);

// The device at this position of usable_devices(). Throws DeviceNotFoundError.
sycl::device find_device(std::size_t index);

}  // namespace moe_xe
