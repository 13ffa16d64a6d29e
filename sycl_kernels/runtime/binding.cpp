// The Python module moe_xe._runtime, which moe_xe/runtime.py imports for everybody.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <limits>
#include <span>

#include "cpu_isa.hpp"
#include "device.hpp"
#include "find_device.hpp"
#include "fork.hpp"
#include "kernel.hpp"
#include "launch_sequence.hpp"
#include "native_binary.hpp"
#include "platform.hpp"
#include "queue.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace moe_xe {
namespace {

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

// More than any kernel here has; a fixed array keeps the launch free of allocation.
constexpr std::size_t kMaxArguments = 64;

Queue queue_at(std::uintptr_t address) {
    if (address == 0) throw std::invalid_argument("the address of a sycl::queue is not 0");
    return Queue::shared(*reinterpret_cast<const sycl::queue*>(address));
}

// dpctl's capsule owns a copy of the queue and deletes it if nobody renamed the
// capsule, so it is enough to copy the queue and leave the capsule as it is.
Queue queue_in(const nb::capsule& capsule) {
    constexpr const char* kName = "SyclQueueRef";
    const char* name = capsule.name();
    if (!name || std::string(name) != kName)
        throw std::invalid_argument(std::string("expected a capsule named ") + kName);
    return Queue::shared(*static_cast<const sycl::queue*>(capsule.data()));
}

Argument to_argument(char letter, nb::handle value) {
    Argument argument{};
    switch (letter) {
        case 'p':
            argument.pointer = value.is_none() ? nullptr : PyLong_AsVoidPtr(value.ptr());
            break;
        case 'f': argument.float32 = static_cast<float>(PyFloat_AsDouble(value.ptr())); break;
        default: {
            const long long number = PyLong_AsLongLong(value.ptr());
            if (letter == 'q') {
                argument.int64 = number;
            } else if (number < std::numeric_limits<std::int32_t>::min() ||
                       number > std::numeric_limits<std::int32_t>::max()) {
                PyErr_Format(PyExc_OverflowError, "%lld does not fit an int32 kernel argument", number);
            } else {
                argument.int32 = static_cast<std::int32_t>(number);
            }
        }
    }
    if (PyErr_Occurred()) throw nb::python_error();
    return argument;
}

using Arguments = std::array<Argument, kMaxArguments>;

std::span<const Argument> to_arguments(const Kernel& kernel, const nb::tuple& values, Arguments& arguments) {
    const std::string& signature = kernel.signature();
    const std::size_t count = values.size();
    if (count != signature.size() || count > kMaxArguments)
        throw nb::type_error(("kernel " + kernel.name() + " takes " +
                              std::to_string(signature.size()) + " arguments (\"" + signature +
                              "\"), not " + std::to_string(count))
                                 .c_str());
    for (std::size_t i = 0; i < count; ++i) arguments[i] = to_argument(signature[i], values[i]);
    return std::span(arguments.data(), count);
}

void launch(const Kernel& kernel, Queue& queue, std::size_t groups, std::size_t group_size,
            const nb::tuple& values) {
    Arguments storage;
    const std::span<const Argument> arguments = to_arguments(kernel, values, storage);
    const nb::gil_scoped_release no_gil;
    kernel.launch(queue, groups, group_size, arguments);
}

// A pointer of a sequence: argument, buffer and offset in bytes.
using PointerNumbers = std::array<std::size_t, 3>;
using BufferNumbers = std::tuple<std::size_t, bool, std::size_t>;

void new_sequence(LaunchSequence* place, const std::vector<BufferNumbers>& numbers) {
    std::vector<Buffer> buffers;
    for (const auto& [bytes, written, zeroed_bytes] : numbers) buffers.push_back({bytes, written, zeroed_bytes});
    new (place) LaunchSequence(std::move(buffers));
}

void add_launch(LaunchSequence& sequence, const Kernel& kernel, std::size_t groups, std::size_t group_size,
                const nb::tuple& values, const std::vector<PointerNumbers>& numbers) {
    Arguments storage;
    const std::span<const Argument> arguments = to_arguments(kernel, values, storage);
    std::vector<BufferPointer> pointers;
    for (const auto& [argument, buffer, offset] : numbers) pointers.push_back({argument, buffer, offset});
    sequence.add(kernel, groups, group_size, {arguments.begin(), arguments.end()}, std::move(pointers));
}

bool run_sequence(const LaunchSequence& sequence, Queue& queue, const nb::tuple& values, bool on_host) {
    std::array<std::byte*, kMaxArguments> addresses;
    const std::size_t count = values.size();
    if (count > addresses.size()) throw nb::type_error("a sequence of launches has at most 64 buffers");
    for (std::size_t i = 0; i < count; ++i)
        addresses[i] = static_cast<std::byte*>(to_argument('p', values[i]).pointer);
    const nb::gil_scoped_release no_gil;
    return sequence.run(queue, std::span(addresses.data(), count), on_host);
}

nb::bytes binary_of(const Kernel& kernel) {
    std::vector<std::byte> binary;
    {
        const nb::gil_scoped_release no_gil;
        binary = kernel.binary();
    }
    return nb::bytes(binary.data(), binary.size());
}

Kernel from_binary(const Queue& queue, const nb::bytes& binary, const std::string& name,
                   const std::string& signature) {
    const std::span bytes(static_cast<const std::byte*>(binary.data()), binary.size());
    const nb::gil_scoped_release no_gil;
    return Kernel::from_binary(queue, bytes, name, signature);
}

std::vector<DeviceFacts> devices() {
    std::vector<DeviceFacts> all;
    for (const FoundDevice& found : usable_devices()) all.push_back(found.facts);
    return all;
}

std::vector<DeviceFacts> devices_of(const Platform& platform) {
    std::vector<DeviceFacts> all;
    for (const FoundDevice& found : platform.devices) all.push_back(found.facts);
    return all;
}

// nb::exception carries a message only; this one has the log and the name as well.
void register_compile_error(nb::module_& module) {
    PyObject* const type = PyErr_NewExceptionWithDoc(
        "moe_xe._runtime.CompileError",
        "A kernel's source does not compile. Attributes: kernel_name, log (the compiler's output).",
        PyExc_RuntimeError, nullptr);
    module.attr("CompileError") = nb::handle(type);
    nb::register_exception_translator(
        [](const std::exception_ptr& pointer, void* payload) {
            try {
                std::rethrow_exception(pointer);
            } catch (const CompileError& error) {
                const nb::handle type(static_cast<PyObject*>(payload));
                nb::object value = type(error.what());
                value.attr("kernel_name") = error.kernel_name;
                value.attr("log") = error.log;
                PyErr_SetObject(type.ptr(), value.ptr());
            }
        },
        type);
}

// Any call may find the device lost, also one that only waits.
void register_device_lost_error(nb::module_& module) {
    PyObject* const type = PyErr_NewExceptionWithDoc(
        "moe_xe._runtime.DeviceLostError",
        "A kernel accessed memory that is not there, or ran for too long: the driver has taken the device from this process.",
        PyExc_RuntimeError, nullptr);
    module.attr("DeviceLostError") = nb::handle(type);
    nb::register_exception_translator(
        [](const std::exception_ptr& pointer, void* payload) {
            try {
                std::rethrow_exception(pointer);
            } catch (const std::exception& error) {
                if (!is_device_lost(error)) throw;
                const std::string text = std::string("the device is lost (") + error.what() +
                    "): a kernel accessed memory that is not there, or ran for longer than the driver allows. Nothing more runs on "
                    "this device in this process; other devices go on. The system's log (dmesg) has the driver's reason";
                PyErr_SetString(static_cast<PyObject*>(payload), text.c_str());
            }
        },
        type);
}

void bind_device(nb::module_& module) {
    nb::class_<DeviceFacts>(module, "DeviceFacts")
        .def_ro("name", &DeviceFacts::name)
        .def_ro("kind", &DeviceFacts::kind)
        .def_ro("backend", &DeviceFacts::backend)
        .def_ro("vendor", &DeviceFacts::vendor)
        .def_ro("driver_version", &DeviceFacts::driver_version)
        .def_ro("architecture", &DeviceFacts::architecture)
        .def_ro("compute_units", &DeviceFacts::compute_units)
        .def_ro("xe_cores", &DeviceFacts::xe_cores)
        .def_ro("sub_group_sizes", &DeviceFacts::sub_group_sizes)
        .def_ro("local_mem_bytes", &DeviceFacts::local_mem_bytes)
        .def_ro("global_mem_bytes", &DeviceFacts::global_mem_bytes)
        .def_ro("max_work_group_size", &DeviceFacts::max_work_group_size)
        .def_ro("has_fp16", &DeviceFacts::has_fp16)
        .def_ro("has_atomic64", &DeviceFacts::has_atomic64)
        .def_ro("has_matrix_engine", &DeviceFacts::has_matrix_engine)
        .def_ro("has_system_memory", &DeviceFacts::has_system_memory)
        .def("__repr__", [](const DeviceFacts& facts) {
            return "DeviceFacts(" + facts.kind + ", " + facts.name + ", " + facts.architecture + ")";
        });
    nb::class_<Platform>(module, "Platform", "What one driver offers, and what failed.")
        .def_ro("name", &Platform::name)
        .def_ro("backend", &Platform::backend)
        .def_prop_ro("devices", &devices_of)
        .def_ro("errors", &Platform::errors);
    module.def("platforms", &platforms, WithoutGil(),
               "Every SYCL platform with its GPUs and CPUs, and the errors of what failed.");
    module.def("devices", &devices, WithoutGil(),
               "The devices that moe_xe can use: Intel GPUs first, then CPUs. What fails is left out: "
               "platforms() has the errors.");
    module.def("cpu_isa", &cpu_isa, "\"amx_fp16\", \"amx\", \"avx512_bf16\", \"avx512\", \"avx2\" or \"baseline\".");
}

void bind_queue(nb::module_& module) {
    nb::class_<Queue>(module, "Queue", "An in-order SYCL queue.")
        .def_static("create", [](const std::string& kind) { return Queue(find_device(kind)); },
                    "device"_a, WithoutGil(),
                    "A new queue on \"cpu\", \"gpu\" or a position of devices(). "
                    "Raises DeviceNotFoundError.")
        .def_static("create", [](std::size_t index) { return Queue(find_device(index)); },
                    "device"_a, WithoutGil())
        .def_static("from_address", &queue_at, "address"_a,
                    "Shares the sycl::queue at an address, such as torch's "
                    "torch.xpu.current_stream().sycl_queue. Raises ValueError unless in-order.")
        .def_static("from_capsule", &queue_in, "capsule"_a,
                    "Shares the queue of dpctl's SyclQueue._get_capsule().")
        .def_prop_ro("address", &Queue::address)
        .def_prop_ro("context_id", &Queue::context_id)
        .def_prop_ro("device_id", &Queue::device_id)
        .def_prop_ro("device", [](const Queue& queue) { return facts_of(queue.sycl().get_device()); })
        .def("zero", [](Queue& queue, std::uintptr_t address, std::size_t bytes) { queue.zero(reinterpret_cast<void*>(address), bytes); },
             "address"_a, "num_bytes"_a, WithoutGil(), "Submits the writing of zeros to memory that the device reaches.")
        .def("wait", &Queue::wait, WithoutGil(),
             "Waits for everything submitted. Raises AsyncError.");
}

void bind_kernel(nb::module_& module) {
    nb::class_<Kernel>(module, "Kernel", "A kernel compiled at run time.")
        .def_static("compile", &Kernel::compile, "queue"_a, "source"_a, "name"_a, "signature"_a,
                    "options"_a = std::vector<std::string>{}, WithoutGil(),
                    "Compiles the extern \"C\" free-function kernel `name`. The signature has a "
                    "letter per argument: p pointer, i int32, q int64, f float. Raises CompileError.")
        .def_static("from_binary", &from_binary, "queue"_a, "binary"_a, "name"_a, "signature"_a,
                    "Reloads what binary() gave. Raises BinaryError.")
        .def("binary", &binary_of, "The device's machine code. Raises BinaryError.")
        .def("launch", &launch, "queue"_a, "num_groups"_a, "group_size"_a, "args"_a,
             "Submits and returns. A pointer is an int or None. Raises TypeError for a wrong number "
             "of arguments.")
        .def_prop_ro("name", &Kernel::name)
        .def_prop_ro("signature", &Kernel::signature);
}

void bind_launch_sequence(nb::module_& module) {
    nb::class_<LaunchSequence>(module, "LaunchSequence", "Launches that can be made again on other memory.")
        .def("__init__", &new_sequence, "buffers"_a,
             "buffers: for each its bytes, whether the launches write to it, and how many bytes at its start are zeroed first.")
        .def("add", &add_launch, "kernel"_a, "num_groups"_a, "group_size"_a, "args"_a, "pointers"_a,
             "As Kernel.launch, later. pointers: (argument, buffer, offset in bytes), for each argument that points into a buffer.")
        .def("run", &run_sequence, "queue"_a, "addresses"_a, "on_host"_a,
             "Submits all, with an address for each buffer; on_host: and waits. False, with nothing done, where a written "
             "buffer may share memory with another, or an address is null.");
}

}  // namespace
}  // namespace moe_xe

NB_MODULE(_runtime, module) {
    using namespace moe_xe;
    // Queues and kernels that live until the process ends are meant to: SYCL's
    // own state may be gone when static objects are destroyed.
    nb::set_leak_warnings(false);

    nb::exception<DeviceNotFoundError>(module, "DeviceNotFoundError", PyExc_RuntimeError);
    nb::exception<AsyncError>(module, "AsyncError", PyExc_RuntimeError);
    nb::exception<ForkError>(module, "ForkError", PyExc_RuntimeError);
    nb::exception<BinaryError>(module, "BinaryError", PyExc_RuntimeError);
    register_compile_error(module);
    register_device_lost_error(module);
    bind_device(module);
    bind_queue(module);
    bind_kernel(module);
    bind_launch_sequence(module);
}
