#include "platform.hpp"

#include <exception>

#include <sycl/sycl.hpp>

#include "fork.hpp"
#include "unified_runtime.hpp"

namespace moe_xe {
namespace {

void append_devices(Platform& found, const sycl::platform& platform) {
    for (const sycl::device& device : platform.get_devices()) {
        try {
            if (device.is_gpu() || device.is_cpu()) found.devices.push_back({device, facts_of(device)});
        } catch (const std::exception& error) {
            found.errors.push_back(error.what());
        }
    }
}

// `make` gives the platform. What fails becomes an error of `found`.
template <typename Make>
Platform read(Platform found, const Make& make) {
    try {
        const sycl::platform platform = make();
        found.backend = backend_name(platform.get_backend());
        found.name = platform.get_info<sycl::info::platform::name>();
        append_devices(found, platform);
    } catch (const std::exception& error) {
        found.errors.push_back(error.what());
    }
    return found;
}

// SYCL's list is all or nothing: one platform whose devices do not answer, and there is none.
std::vector<Platform> one_by_one(const std::string& failure) {
    std::vector<Platform> all;
    bool explained = false;
    try {
        for (const unified_runtime::Platform& each : unified_runtime::platforms()) {
            all.push_back(read({each.name, backend_name(each.backend), {}, {}}, each.make));
            explained |= !all.back().errors.empty();
        }
    } catch (const std::exception& error) {
        all.push_back({"Unified Runtime", "unknown", {}, {error.what()}});
    }
    if (!explained) all.push_back({"SYCL", "unknown", {}, {failure}});
    return all;
}

}  // namespace

std::vector<Platform> platforms() {
    enter_runtime();
    std::vector<sycl::platform> listed;
    try {
        listed = sycl::platform::get_platforms();
    } catch (const std::exception& error) {
        return one_by_one(error.what());
    }
    std::vector<Platform> all;
    for (const sycl::platform& platform : listed) all.push_back(read({}, [&] { return platform; }));
    return all;
}

}  // namespace moe_xe
