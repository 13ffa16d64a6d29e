#include "unified_runtime.hpp"

#include <cstdint>
#include <optional>

#include <sycl/sycl.hpp>
#include <unified-runtime/ur_api.h>

#include "loaded_library.hpp"

namespace moe_xe::unified_runtime {
namespace {

// Its functions change from version to version.
constexpr const char* kVersion = "LIBUR_LOADER_0.12";

struct Api {
    LoadedLibrary library{"libur_loader.so.0"};
#define MOE_XE_UR(NAME) decltype(::NAME)* NAME = library.get<decltype(::NAME)>(#NAME, kVersion)
    MOE_XE_UR(urAdapterGet);
    MOE_XE_UR(urAdapterGetInfo);
    MOE_XE_UR(urAdapterRelease);
    MOE_XE_UR(urPlatformGet);
    MOE_XE_UR(urPlatformGetInfo);
    MOE_XE_UR(urPlatformGetNativeHandle);
#undef MOE_XE_UR
};

std::optional<sycl::backend> backend_of(const Api& api, ur_adapter_handle_t adapter) {
    ur_backend_t backend = UR_BACKEND_UNKNOWN;
    api.urAdapterGetInfo(adapter, UR_ADAPTER_INFO_BACKEND, sizeof backend, &backend, nullptr);
    switch (backend) {
        case UR_BACKEND_OPENCL: return sycl::backend::opencl;
        case UR_BACKEND_LEVEL_ZERO: return sycl::backend::ext_oneapi_level_zero;
        default: return std::nullopt;
    }
}

std::string name_of(const Api& api, ur_platform_handle_t platform) {
    std::size_t size = 0;
    if (api.urPlatformGetInfo(platform, UR_PLATFORM_INFO_NAME, 0, nullptr, &size) || !size) return "unknown";
    std::string name(size, '\0');
    api.urPlatformGetInfo(platform, UR_PLATFORM_INFO_NAME, size, name.data(), nullptr);
    return name.c_str();  // without the zero at the end
}

// The same two calls for every list: how many, and which. What cannot be listed is empty.
template <typename Handle, typename List>
std::vector<Handle> listed(const List& list) {
    std::uint32_t count = 0;
    if (list(0, nullptr, &count) != UR_RESULT_SUCCESS) return {};
    std::vector<Handle> handles(count);
    if (count && list(count, handles.data(), nullptr) != UR_RESULT_SUCCESS) return {};
    return handles;
}

void append_platforms(std::vector<Platform>& all, const Api& api, ur_adapter_handle_t adapter, sycl::backend backend) {
    const auto list = [&](auto... arguments) { return api.urPlatformGet(adapter, arguments...); };
    for (ur_platform_handle_t platform : listed<ur_platform_handle_t>(list)) {
        ur_native_handle_t native = 0;
        if (api.urPlatformGetNativeHandle(platform, &native) != UR_RESULT_SUCCESS) continue;
        all.push_back({name_of(api, platform), backend, [=] { return sycl::detail::make_platform(native, backend); }});
    }
}

}  // namespace

std::vector<Platform> platforms() {
    const Api api;
    std::vector<Platform> all;
    for (ur_adapter_handle_t adapter : listed<ur_adapter_handle_t>(api.urAdapterGet)) {
        if (const auto backend = backend_of(api, adapter)) append_platforms(all, api, adapter, *backend);
        api.urAdapterRelease(adapter);
    }
    return all;
}

}  // namespace moe_xe::unified_runtime
