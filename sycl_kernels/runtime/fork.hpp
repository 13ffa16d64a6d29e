// The SYCL runtime does not survive a fork: its threads are not in the child, and its locks stay as they were.
#pragma once

#include <stdexcept>

namespace moe_xe {

struct ForkError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// To be called before anything is asked of the SYCL runtime. Throws ForkError in a child of a process that had called it.
void enter_runtime();

}  // namespace moe_xe
