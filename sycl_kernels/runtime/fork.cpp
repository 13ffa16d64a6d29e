#include "fork.hpp"

#include <pthread.h>

#include <atomic>

namespace moe_xe {
namespace {

std::atomic<bool> used{false};   // in this process, or in one that it is a copy of
std::atomic<bool> lost{false};

// Without it a kernel of the child waits for ever for threads that only its parent has.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { lost = used.load(); });

}  // namespace

void enter_runtime() {
    if (lost.load(std::memory_order_relaxed))
        throw ForkError(
            "moe_xe cannot be used in this process: it was forked from one that had used moe_xe's devices, and the SYCL "
            "runtime does not survive that. Start processes by \"spawn\" or \"forkserver\" (multiprocessing.get_context, "
            "DataLoader's multiprocessing_context), or fork before moe_xe is first used.");
    if (!used.load(std::memory_order_relaxed)) used = true;
}

}  // namespace moe_xe
