// What the loader exports beside the functions of the interface, so that this library can take its place under the name
// libze_loader.so.1. The SYCL runtime's adapters have the loader's static part linked in: it opens that library and takes
// these functions from it by name. No layers (tracing, validation).
#include <level_zero/layers/zel_tracing_api.h>
#include <level_zero/layers/zel_tracing_ddi.h>
#include <level_zero/loader/ze_loader.h>

#include <cstddef>

namespace {

// Newer ones than the adapters know are refused from major version 2 on; they ask for 1.8 and, for their log, 1.21.2.
constexpr zel_version_t kLoaderVersion = {1, 32, 0};

ze_result_t unsupported() { return ZE_RESULT_ERROR_UNSUPPORTED_FEATURE; }

}  // namespace

#define ZESIM_EXPORT __attribute__((visibility("default")))
extern "C" {

ZESIM_EXPORT ze_result_t zeLoaderInit() { return ZE_RESULT_SUCCESS; }

ZESIM_EXPORT ze_result_t zelLoaderGetVersion(zel_component_version_t* version) {
    if (!version) return ZE_RESULT_ERROR_INVALID_NULL_POINTER;
    *version = {.component_name = "loader", .spec_version = ZE_API_VERSION_CURRENT, .component_lib_version = kLoaderVersion};
    return ZE_RESULT_SUCCESS;
}

ZESIM_EXPORT ze_result_t zelLoaderGetVersionsInternal(std::size_t* count, zel_component_version_t* versions) {
    if (!count) return ZE_RESULT_ERROR_INVALID_NULL_POINTER;
    if (versions && *count < 1) return ZE_RESULT_ERROR_INVALID_SIZE;
    *count = 1;
    return versions ? zelLoaderGetVersion(versions) : ZE_RESULT_SUCCESS;
}

// Handles are the driver's own: there is nobody in between.
ZESIM_EXPORT ze_result_t zelLoaderTranslateHandleInternal(zel_handle_type_t, void* handle, void** translated) {
    if (!handle) return ZE_RESULT_ERROR_INVALID_NULL_HANDLE;
    if (!translated) return ZE_RESULT_ERROR_INVALID_NULL_POINTER;
    *translated = handle;
    return ZE_RESULT_SUCCESS;
}

ZESIM_EXPORT void* zeLoaderGetTracingHandle() { return nullptr; }

ZESIM_EXPORT ze_result_t zelGetTracerApiProcAddrTable(ze_api_version_t, zel_tracer_dditable_t* table) {
    if (!table) return ZE_RESULT_ERROR_INVALID_NULL_POINTER;
    *table = {};
    return ZE_RESULT_SUCCESS;
}

ZESIM_EXPORT ze_result_t zelEnableTracingLayer() { return unsupported(); }
ZESIM_EXPORT ze_result_t zelDisableTracingLayer() { return unsupported(); }

ZESIM_EXPORT ze_result_t zelGetTracingLayerState(bool* enabled) {
    if (!enabled) return ZE_RESULT_ERROR_INVALID_NULL_POINTER;
    *enabled = false;
    return ZE_RESULT_SUCCESS;
}

}  // extern "C"
