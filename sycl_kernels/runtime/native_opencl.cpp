#define CL_TARGET_OPENCL_VERSION 300
#include <CL/cl.h>

#include <algorithm>
#include <memory>

#include <sycl/sycl.hpp>

#include "loaded_library.hpp"
#include "native_binary.hpp"

namespace moe_xe::opencl {
namespace {

struct Api {
    LoadedLibrary library{"libOpenCL.so.1"};
    decltype(clGetKernelInfo)* get_kernel_info = library.get<decltype(clGetKernelInfo)>("clGetKernelInfo");
    decltype(clGetProgramInfo)* get_program_info = library.get<decltype(clGetProgramInfo)>("clGetProgramInfo");
    decltype(clCreateProgramWithBinary)* create_program = library.get<decltype(clCreateProgramWithBinary)>("clCreateProgramWithBinary");
    decltype(clBuildProgram)* build_program = library.get<decltype(clBuildProgram)>("clBuildProgram");
    decltype(clCreateKernel)* create_kernel = library.get<decltype(clCreateKernel)>("clCreateKernel");
    decltype(clReleaseProgram)* release_program = library.get<decltype(clReleaseProgram)>("clReleaseProgram");
    decltype(clReleaseKernel)* release_kernel = library.get<decltype(clReleaseKernel)>("clReleaseKernel");
    decltype(clReleaseContext)* release_context = library.get<decltype(clReleaseContext)>("clReleaseContext");
    decltype(clReleaseDevice)* release_device = library.get<decltype(clReleaseDevice)>("clReleaseDevice");
};

const Api& api() {
    static const Api instance;
    return instance;
}

void check(cl_int status, const char* what) {
    if (status != CL_SUCCESS)
        throw BinaryError(std::string(what) + " failed with OpenCL error " + std::to_string(status));
}

// Handles from sycl::get_native carry a reference that the caller releases.
template <typename Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, cl_int (*)(Handle)>;

Owned<cl_device_id> native(const sycl::device& device) {
    return {sycl::get_native<sycl::backend::opencl>(device), api().release_device};
}
Owned<cl_context> native(const sycl::context& context) {
    return {sycl::get_native<sycl::backend::opencl>(context), api().release_context};
}
Owned<cl_kernel> native(const sycl::kernel& kernel) {
    return {sycl::get_native<sycl::backend::opencl>(kernel), api().release_kernel};
}

// A program-info query that answers one value per device.
template <typename T>
std::vector<T> per_device(cl_program program, cl_program_info what, const char* name) {
    std::size_t bytes = 0;
    check(api().get_program_info(program, what, 0, nullptr, &bytes), name);
    std::vector<T> values(bytes / sizeof(T));
    check(api().get_program_info(program, what, bytes, values.data(), nullptr), name);
    return values;
}

}  // namespace

std::vector<std::byte> extract_binary(const sycl::kernel& kernel, const sycl::device& device) {
    const auto cl_kernel_handle = native(kernel);
    const auto cl_device = native(device);
    cl_program program = nullptr;  // the kernel's own reference
    check(api().get_kernel_info(cl_kernel_handle.get(), CL_KERNEL_PROGRAM, sizeof program, &program,
                                nullptr),
          "clGetKernelInfo");

    const auto devices = per_device<cl_device_id>(program, CL_PROGRAM_DEVICES, "CL_PROGRAM_DEVICES");
    const auto sizes = per_device<std::size_t>(program, CL_PROGRAM_BINARY_SIZES, "CL_PROGRAM_BINARY_SIZES");
    const auto position = static_cast<std::size_t>(
        std::find(devices.begin(), devices.end(), cl_device.get()) - devices.begin());
    if (position >= sizes.size() || sizes[position] == 0)
        throw BinaryError("the OpenCL program has no binary for this device");

    std::vector<std::byte> binary(sizes[position]);
    std::vector<unsigned char*> targets(devices.size(), nullptr);  // null: not wanted
    targets[position] = reinterpret_cast<unsigned char*>(binary.data());
    check(api().get_program_info(program, CL_PROGRAM_BINARIES,
                                 targets.size() * sizeof(unsigned char*), targets.data(), nullptr),
          "CL_PROGRAM_BINARIES");
    return binary;
}

LoadedKernel load_binary(const sycl::queue& queue, std::span<const std::byte> binary,
                         const std::string& function) {
    const auto context = native(queue.get_context());
    const auto device = native(queue.get_device());
    const cl_device_id device_id = device.get();
    const std::size_t size = binary.size();
    const auto* data = reinterpret_cast<const unsigned char*>(binary.data());

    cl_int status = CL_SUCCESS;
    // Intel's CPU driver does not keep a program for the sake of its kernels.
    const std::shared_ptr<std::remove_pointer_t<cl_program>> program(
        api().create_program(context.get(), 1, &device_id, &size, &data, nullptr, &status),
        [](cl_program created) {
            if (created) api().release_program(created);
        });
    check(status, "clCreateProgramWithBinary");
    check(api().build_program(program.get(), 1, &device_id, "", nullptr, nullptr), "clBuildProgram");
    const Owned<cl_kernel> kernel(api().create_kernel(program.get(), function.c_str(), &status),
                                  api().release_kernel);
    check(status, "clCreateKernel");
    return {program, sycl::make_kernel<sycl::backend::opencl>(kernel.get(), queue.get_context())};
}

}  // namespace moe_xe::opencl
