#include "kernel.hpp"

#include <utility>

#include <sycl/sycl.hpp>

#include "fork.hpp"

namespace moe_xe {
namespace {

namespace syclex = sycl::ext::oneapi::experimental;

// An unused argument would be removed from the machine code, and only the SYCL
// bundle knows which; a reloaded binary has no bundle.
constexpr const char* kKeepEveryArgument = "-fno-sycl-dead-args-optimization";

// How the compiler names an extern "C" free-function kernel in the binary.
std::string function_name(const std::string& kernel_name) { return "__sycl_kernel_" + kernel_name; }

void check_signature(const std::string& signature) {
    const auto unknown = signature.find_first_not_of("piqf");
    if (unknown != std::string::npos)
        throw std::invalid_argument("kernel signature \"" + signature + "\": '" + signature[unknown] +
                                    "' is none of p (pointer), i (int32), q (int64), f (float)");
}

}  // namespace

CompileError::CompileError(const std::string& kernel_name, const std::string& log)
    : std::runtime_error("kernel " + kernel_name + " does not compile:\n" + log),
      kernel_name(kernel_name),
      log(log) {}

Kernel::Kernel(LoadedKernel loaded, sycl::device device, std::string name, std::string signature)
    : loaded_(std::move(loaded)),
      device_(std::move(device)),
      name_(std::move(name)),
      signature_(std::move(signature)) {}

Kernel Kernel::compile(const Queue& queue, const std::string& source, const std::string& name,
                       const std::string& signature, const std::vector<std::string>& options) {
    enter_runtime();
    check_signature(signature);
    std::vector<std::string> all_options = options;
    all_options.push_back(kKeepEveryArgument);
    const sycl::device device = queue.sycl().get_device();
    std::string log;
    try {
        auto bundle = syclex::create_kernel_bundle_from_source(
            queue.sycl().get_context(), syclex::source_language::sycl, source);
        auto executable = syclex::build(
            bundle, {device},
            syclex::properties{syclex::save_log{&log}, syclex::build_options{all_options}});
        return Kernel({nullptr, executable.ext_oneapi_get_kernel(name)}, device, name, signature);
    } catch (const sycl::exception& error) {
        // The log is empty for the errors that are in the message.
        throw CompileError(name, log.empty() ? error.what() : log + '\n' + error.what());
    }
}

Kernel Kernel::from_binary(const Queue& queue, std::span<const std::byte> binary,
                           const std::string& name, const std::string& signature) {
    enter_runtime();
    check_signature(signature);
    try {
        return Kernel(load_binary(queue.sycl(), binary, function_name(name)),
                      queue.sycl().get_device(), name, signature);
    } catch (const sycl::exception& error) {
        throw BinaryError(error.what());
    }
}

std::vector<std::byte> Kernel::binary() const {
    enter_runtime();
    try {
        return extract_binary(loaded_.kernel, device_);
    } catch (const sycl::exception& error) {
        throw BinaryError(error.what());
    }
}

void Kernel::launch(Queue& queue, std::size_t groups, std::size_t group_size,
                    std::span<const Argument> arguments) const {
    enter_runtime();
    // Without an event: an in-order queue needs none, and it is faster.
    syclex::submit(queue.sycl(), [&](sycl::handler& handler) {
        for (std::size_t i = 0; i < arguments.size(); ++i) {
            const int index = static_cast<int>(i);
            switch (signature_[i]) {
                case 'p': handler.set_arg(index, arguments[i].pointer); break;
                case 'i': handler.set_arg(index, arguments[i].int32); break;
                case 'q': handler.set_arg(index, arguments[i].int64); break;
                case 'f': handler.set_arg(index, arguments[i].float32); break;
            }
        }
        handler.parallel_for(sycl::nd_range<1>(groups * group_size, group_size), loaded_.kernel);
    });
}

}  // namespace moe_xe
