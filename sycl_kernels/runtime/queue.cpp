#include "queue.hpp"

#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <sycl/sycl.hpp>

#include "find_device.hpp"
#include "fork.hpp"

namespace moe_xe {

// The handler only collects: it may run on a thread of the SYCL runtime, where
// nobody could catch an exception.
class AsyncErrors {
public:
    void add(const sycl::exception_list& list) {
        const std::lock_guard lock(mutex_);
        for (const std::exception_ptr& error : list) messages_.push_back(text_of(error));
    }

    void throw_if_any() {
        std::vector<std::string> messages;
        {
            const std::lock_guard lock(mutex_);
            messages.swap(messages_);
        }
        if (messages.empty()) return;
        std::string text = "asynchronous SYCL error: " + messages.front();
        for (std::size_t i = 1; i < messages.size(); ++i) text += "; " + messages[i];
        throw AsyncError(text);
    }

private:
    static std::string text_of(const std::exception_ptr& error) {
        try {
            std::rethrow_exception(error);
        } catch (const std::exception& e) {
            return e.what();
        } catch (...) {
            return "an unknown exception";
        }
    }

    std::mutex mutex_;
    std::vector<std::string> messages_;
};

// SYCL has no code for it.
bool is_device_lost(const std::exception& error) {
    return std::string_view(error.what()).find("UR_RESULT_ERROR_DEVICE_LOST") != std::string_view::npos;
}

namespace {

sycl::queue make_queue(const sycl::device& device, std::shared_ptr<AsyncErrors> errors) {
    try {
        return sycl::queue(
            device, [errors = std::move(errors)](sycl::exception_list list) { errors->add(list); },
            sycl::property_list{sycl::property::queue::in_order{}});
    } catch (const sycl::exception& error) {
        throw DeviceNotFoundError(device.get_info<sycl::info::device::name>() + " cannot be used: " + error.what() +
                                  ". moe-xe doctor shows its driver and what else may be wrong.");
    }
}

}  // namespace

Queue::Queue(sycl::queue queue, std::shared_ptr<AsyncErrors> errors)
    : errors_(std::move(errors)), queue_(std::move(queue)) {}

Queue::Queue(const sycl::device& device)
    : errors_(std::make_shared<AsyncErrors>()), queue_(make_queue(device, errors_)) {}

Queue Queue::shared(const sycl::queue& existing) {
    enter_runtime();
    if (!existing.is_in_order())
        throw std::invalid_argument(
            "moe_xe needs an in-order queue (dpctl: SyclQueue(device, property=\"in_order\"))");
    return Queue(existing, nullptr);
}

std::size_t Queue::context_id() const {
    enter_runtime();
    return std::hash<sycl::context>{}(queue_.get_context());
}

std::size_t Queue::device_id() const {
    enter_runtime();
    return std::hash<sycl::device>{}(queue_.get_device());
}

void Queue::zero(void* memory, std::size_t bytes) {
    enter_runtime();
    sycl::ext::oneapi::experimental::memset(queue_, memory, 0, bytes);
}

void Queue::wait() {
    enter_runtime();
    queue_.wait_and_throw();
    if (errors_) errors_->throw_if_any();
}

}  // namespace moe_xe
