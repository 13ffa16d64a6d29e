// An OpenCL driver whose devices cannot be listed. Found through OCL_ICD_FILENAMES.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kOutOfHostMemory = -6;
constexpr std::uint32_t kName = 0x0902, kIcdSuffix = 0x0920;

struct Platform {
    void* const* functions;  // what the OpenCL loader asks, in the order of the specification
};

int fail() { return kOutOfHostMemory; }

int get_platform_info(Platform*, std::uint32_t what, std::size_t size, char* value, std::size_t* needed) {
    const char* const text = what == kName ? "Broken OpenCL" : what == kIcdSuffix ? "BROKEN" : "OpenCL 3.0";
    if (needed) *needed = std::strlen(text) + 1;
    if (value) std::strncpy(value, text, size);
    return 0;
}

Platform& the_platform() {
    static void* functions[256];
    static Platform platform = [] {
        for (void*& function : functions) function = reinterpret_cast<void*>(fail);
        functions[1] = reinterpret_cast<void*>(get_platform_info);
        return Platform{functions};
    }();
    return platform;
}

}  // namespace

extern "C" {

int clIcdGetPlatformIDsKHR(std::uint32_t entries, Platform** platforms, std::uint32_t* count) {
    if (platforms && entries) *platforms = &the_platform();
    if (count) *count = 1;
    return 0;
}

int clGetPlatformInfo(Platform* platform, std::uint32_t what, std::size_t size, char* value, std::size_t* needed) {
    return get_platform_info(platform, what, size, value, needed);
}

void* clGetExtensionFunctionAddress(const char* name) {
    return !std::strcmp(name, "clIcdGetPlatformIDsKHR") ? reinterpret_cast<void*>(clIcdGetPlatformIDsKHR) : nullptr;
}

}  // extern "C"
