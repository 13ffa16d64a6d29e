#include <cstdint>

#include <sycl/sycl.hpp>
#include <sycl/ext/oneapi/backend/level_zero.hpp>

#include "loaded_library.hpp"
#include "native_binary.hpp"

namespace moe_xe::level_zero {
namespace {

constexpr auto kBackend = sycl::backend::ext_oneapi_level_zero;

// The five declarations needed here, as in the Level Zero 1.x interface: its
// headers are in no wheel.
using Result = std::int32_t;
constexpr std::int32_t kModuleDescType = 0x1b;
constexpr std::int32_t kKernelDescType = 0x1d;
constexpr std::int32_t kNativeFormat = 1;

struct ModuleDesc {
    std::int32_t type = kModuleDescType;
    const void* next = nullptr;
    std::int32_t format = kNativeFormat;
    std::size_t size = 0;
    const std::uint8_t* data = nullptr;
    const char* build_flags = nullptr;
    const void* constants = nullptr;
};

struct KernelDesc {
    std::int32_t type = kKernelDescType;
    const void* next = nullptr;
    std::uint32_t flags = 0;
    const char* name = nullptr;
};

using GetNativeBinary = Result(ze_module_handle_t, std::size_t*, std::uint8_t*);
using CreateModule = Result(ze_context_handle_t, ze_device_handle_t, const ModuleDesc*,
                            ze_module_handle_t*, void** build_log);
using CreateKernel = Result(ze_module_handle_t, const KernelDesc*, ze_kernel_handle_t*);
using DestroyModule = Result(ze_module_handle_t);

struct Api {
    LoadedLibrary library{"libze_loader.so.1"};
    GetNativeBinary* get_native_binary = library.get<GetNativeBinary>("zeModuleGetNativeBinary");
    CreateModule* create_module = library.get<CreateModule>("zeModuleCreate");
    CreateKernel* create_kernel = library.get<CreateKernel>("zeKernelCreate");
    DestroyModule* destroy_module = library.get<DestroyModule>("zeModuleDestroy");
};

const Api& api() {
    static const Api instance;
    return instance;
}

void check(Result status, const char* what) {
    if (status != 0)
        throw BinaryError(std::string(what) + " failed with Level Zero error " + std::to_string(status));
}

}  // namespace

std::vector<std::byte> extract_binary(const sycl::kernel& kernel) {
    const auto modules = sycl::get_native<kBackend>(kernel.get_kernel_bundle());
    if (modules.size() != 1) throw BinaryError("expected one Level Zero module per kernel");
    std::size_t size = 0;
    check(api().get_native_binary(modules[0], &size, nullptr), "zeModuleGetNativeBinary");
    std::vector<std::byte> binary(size);
    check(api().get_native_binary(modules[0], &size, reinterpret_cast<std::uint8_t*>(binary.data())),
          "zeModuleGetNativeBinary");
    return binary;
}

LoadedKernel load_binary(const sycl::queue& queue, std::span<const std::byte> binary,
                         const std::string& function) {
    const sycl::context context = queue.get_context();
    ModuleDesc module_desc;
    module_desc.size = binary.size();
    module_desc.data = reinterpret_cast<const std::uint8_t*>(binary.data());
    ze_module_handle_t module = nullptr;
    check(api().create_module(sycl::get_native<kBackend>(context),
                              sycl::get_native<kBackend>(queue.get_device()), &module_desc, &module,
                              nullptr),
          "zeModuleCreate");

    KernelDesc kernel_desc;
    kernel_desc.name = function.c_str();
    ze_kernel_handle_t kernel = nullptr;
    if (const Result status = api().create_kernel(module, &kernel_desc, &kernel)) {
        api().destroy_module(module);
        check(status, "zeKernelCreate");
    }

    // From here the SYCL objects own the handles.
    using sycl::ext::oneapi::level_zero::ownership;
    const auto bundle = sycl::make_kernel_bundle<kBackend, sycl::bundle_state::executable>(
        {module, ownership::transfer}, context);
    return {nullptr, sycl::make_kernel<kBackend>({bundle, kernel, ownership::transfer}, context)};
}

}  // namespace moe_xe::level_zero
