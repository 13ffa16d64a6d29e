// The platforms as the layer below SYCL lists them, for when SYCL's own list fails.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <sycl/backend_types.hpp>
#include <sycl/platform.hpp>

namespace moe_xe::unified_runtime {

struct Platform {
    std::string name;
    sycl::backend backend;
    std::function<sycl::platform()> make;  // throws sycl::exception
};

// Those of OpenCL and Level Zero. SYCL must have been asked for something before, which loads and initialises the layer.
// Throws std::runtime_error where it is not loaded, or is of an interface that moe_xe does not know.
std::vector<Platform> platforms();

}  // namespace moe_xe::unified_runtime
