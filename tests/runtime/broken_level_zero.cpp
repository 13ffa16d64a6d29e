// A Level Zero loader with one GPU that cannot compute: no context can be created, and the function named by BROKEN_FUNCTION fails.
// Found through ZEL_LIBRARY_PATH under the name libze_loader.so.1. Only what the SYCL runtime asks of a GPU before it computes; the
// layouts are the specification's.
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr std::uint32_t kUninitialized = 0x78000001, kUnsupportedFeature = 0x78000003;
constexpr std::uint32_t kGpu = 1, kIntel = 0x8086, kIpVersionExtension = 0x1000f;
constexpr std::uint32_t kIpVersion = 20u << 22 | 1u << 14;  // intel_gpu_bmg_g21
constexpr std::uint32_t kApiVersion = 1u << 16 | 13;

struct Extension {
    std::uint32_t type;
    Extension* next;
    std::uint32_t value;
};

struct ComponentVersion {
    char name[64];
    std::uint32_t api_version;
    int major, minor, patch;
};

struct DriverProperties {
    std::uint32_t type;
    void* next;
    std::uint8_t uuid[16];
    std::uint32_t driver_version;
};

struct DeviceProperties {
    std::uint32_t type;
    Extension* next;
    std::uint32_t device_type, vendor_id, device_id, flags, subdevice_id, core_clock_rate;
    std::uint64_t max_mem_alloc_size;
    std::uint32_t max_hardware_contexts, max_command_queue_priority, num_threads_per_eu, simd_width, eus_per_subslice,
        subslices_per_slice, slices;
    std::uint64_t timer_resolution;
    std::uint32_t timestamp_valid_bits, kernel_timestamp_valid_bits;
    std::uint8_t uuid[16];
    char name[256];
};

struct QueueGroupProperties {
    std::uint32_t type;
    void* next;
    std::uint32_t flags;
    std::size_t max_fill_pattern_size;
    std::uint32_t queues;
};

std::uint64_t the_driver[8], the_device[8];  // handles are their addresses

std::uint32_t result_of(const char* function) {
    const char* const broken = std::getenv("BROKEN_FUNCTION");
    return broken && !std::strcmp(broken, function) ? kUninitialized : 0;
}

void list_one(std::uint32_t* count, void** handles, void* handle) {
    if (handles && *count > 0) *handles = handle;
    *count = 1;
}

}  // namespace

extern "C" {

int zeLoaderInit() { return result_of("zeLoaderInit"); }
void* zeLoaderGetTracingHandle() { return nullptr; }

int zelLoaderGetVersionsInternal(std::size_t* count, ComponentVersion* versions) {
    *count = 1;
    if (versions) *versions = {"loader", kApiVersion, 1, 32, 0};
    return 0;
}

int zelLoaderTranslateHandleInternal(int, void* handle, void** translated) {
    *translated = handle;
    return 0;
}

int zeInit(std::uint32_t) { return result_of("zeInit"); }

int zeInitDrivers(std::uint32_t* count, void** drivers, void*) {
    list_one(count, drivers, the_driver);
    return result_of("zeInitDrivers");
}

int zeDriverGet(std::uint32_t* count, void** drivers) {
    list_one(count, drivers, the_driver);
    return result_of("zeDriverGet");
}

int zeDriverGetApiVersion(void*, std::uint32_t* version) {
    *version = kApiVersion;
    return result_of("zeDriverGetApiVersion");
}

int zeDriverGetProperties(void*, DriverProperties* properties) {
    std::memset(properties->uuid, 1, sizeof properties->uuid);
    properties->driver_version = 1u << 24;
    return result_of("zeDriverGetProperties");
}

int zeDriverGetExtensionProperties(void*, std::uint32_t* count, void*) {
    *count = 0;
    return result_of("zeDriverGetExtensionProperties");
}

int zeDriverGetExtensionFunctionAddress(void*, const char*, void**) { return kUnsupportedFeature; }

int zeDeviceGet(void*, std::uint32_t* count, void** devices) {
    list_one(count, devices, the_device);
    return result_of("zeDeviceGet");
}

int zeDeviceGetProperties(void*, DeviceProperties* properties) {
    for (Extension* each = properties->next; each; each = each->next)
        if (each->type == kIpVersionExtension) each->value = kIpVersion;
    properties->device_type = kGpu;
    properties->vendor_id = kIntel;
    properties->device_id = 0xE20B;
    properties->flags = 0;
    properties->num_threads_per_eu = properties->eus_per_subslice = 8;
    properties->subslices_per_slice = properties->slices = 4;
    std::memset(properties->uuid, 1, sizeof properties->uuid);
    std::strcpy(properties->name, "Broken GPU");
    return result_of("zeDeviceGetProperties");
}

int zeDeviceGetCommandQueueGroupProperties(void*, std::uint32_t* count, QueueGroupProperties* groups) {
    if (groups) groups->flags = 1, groups->max_fill_pattern_size = 16, groups->queues = 1;
    *count = 1;
    return result_of("zeDeviceGetCommandQueueGroupProperties");
}

int zeDeviceGetSubDevices(void*, std::uint32_t* count, void**) {
    *count = 0;
    return result_of("zeDeviceGetSubDevices");
}

int zeDeviceGetRootDevice(void*, void** root) {
    *root = nullptr;
    return result_of("zeDeviceGetRootDevice");
}

int zeDeviceGetMemoryProperties(void*, std::uint32_t* count, void*) {
    *count = 0;
    return result_of("zeDeviceGetMemoryProperties");
}

int zeDeviceGetCacheProperties(void*, std::uint32_t* count, void*) {
    *count = 0;
    return result_of("zeDeviceGetCacheProperties");
}

// Whatever the caller has put there is as good as any.
#define FACTS(NAME) int NAME(void*, void*) { return result_of(#NAME); }
FACTS(zeDeviceGetComputeProperties) FACTS(zeDeviceGetModuleProperties) FACTS(zeDeviceGetImageProperties)
FACTS(zeDeviceGetMemoryAccessProperties)

int zeContextCreate(void*, const void*, void**) { return kUninitialized; }

// Tables that must be there; the functions are then looked up by their names.
#define TABLE(NAME) int NAME##ProcAddrTable(std::uint32_t, void*) { return result_of(#NAME "ProcAddrTable"); }
TABLE(zeGetGlobal) TABLE(zeGetDriver) TABLE(zeGetDevice) TABLE(zeGetContext) TABLE(zeGetCommandQueue) TABLE(zeGetCommandList)
TABLE(zeGetEvent) TABLE(zeGetEventPool) TABLE(zeGetFence) TABLE(zeGetImage) TABLE(zeGetKernel) TABLE(zeGetMem)
TABLE(zeGetModule) TABLE(zeGetModuleBuildLog) TABLE(zeGetPhysicalMem) TABLE(zeGetSampler) TABLE(zeGetVirtualMem)
TABLE(zetGetCommandList) TABLE(zetGetContext) TABLE(zetGetDebug) TABLE(zetGetDevice) TABLE(zetGetKernel) TABLE(zetGetMetric)
TABLE(zetGetMetricGroup) TABLE(zetGetMetricQuery) TABLE(zetGetMetricQueryPool) TABLE(zetGetMetricStreamer) TABLE(zetGetModule)
TABLE(zetGetTracerExp) TABLE(zesGetDevice) TABLE(zesGetDiagnostics) TABLE(zesGetDriver) TABLE(zesGetEngine)
TABLE(zesGetFabricPort) TABLE(zesGetFan) TABLE(zesGetFirmware) TABLE(zesGetFrequency) TABLE(zesGetLed) TABLE(zesGetMemory)
TABLE(zesGetPerformanceFactor) TABLE(zesGetPower) TABLE(zesGetPsu) TABLE(zesGetRas) TABLE(zesGetScheduler)
TABLE(zesGetStandby) TABLE(zesGetTemperature) TABLE(zelGetTracerApi)

}  // extern "C"
