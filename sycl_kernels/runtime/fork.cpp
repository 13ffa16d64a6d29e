#include "fork.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace moe_xe {
namespace {

std::atomic<bool> used{false};   // in this process, or in one that it is a copy of
std::atomic<bool> lost{false};

// The last thing at exit: the drivers' own clean-up would wait for what ran when the process was copied.
void leave(int status, void*) {
    std::fflush(nullptr);
    _exit(status);
}

// Without it a kernel of the child waits for ever for threads that only its parent has.
void in_child() {
    if (!used) return;
    lost = true;
    on_exit(leave, nullptr);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, in_child);

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
