// A SYCL queue: our own, or somebody else's (torch, dpctl) shared.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>

#include <sycl/device.hpp>
#include <sycl/queue.hpp>

namespace moe_xe {

// An error that the device reported after the launch had returned.
struct AsyncError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Whether an exception of SYCL's says that the device is lost: a page fault, or a kernel that ran for too long.
bool is_device_lost(const std::exception& error);

class AsyncErrors;

class Queue {
public:
    // A new in-order queue. Throws DeviceNotFoundError where the device cannot be used.
    explicit Queue(const sycl::device& device);

    // Shares an existing queue. sycl::queue is a counted handle, so the copy
    // keeps the queue alive after its owner has gone.
    // Throws std::invalid_argument unless it is an in-order queue: launches
    // rely on the order of submission.
    static Queue shared(const sycl::queue& existing);

    sycl::queue& sycl() { return queue_; }
    const sycl::queue& sycl() const { return queue_; }

    // The address of the sycl::queue held here, for other SYCL libraries;
    // valid as long as this object lives.
    std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(&queue_); }

    // Equal for two queues exactly when a compiled kernel fits both.
    std::size_t context_id() const;
    std::size_t device_id() const;

    // Submits the writing of zeros.
    void zero(void* memory, std::size_t bytes);

    // Waits for everything submitted. Throws AsyncError for errors on a queue
    // made here; those of a shared queue go to its owner's handler.
    void wait();

private:
    Queue(sycl::queue queue, std::shared_ptr<AsyncErrors> errors);

    std::shared_ptr<AsyncErrors> errors_;  // null for a shared queue
    sycl::queue queue_;
};

}  // namespace moe_xe
