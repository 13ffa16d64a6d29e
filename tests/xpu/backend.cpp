// A backend for torch's device "xpu" where torch was built without one. Memory is SYCL's USM on the first GPU, which the host
// cannot touch; copies go through the current stream's queue; each operator runs on the CPU, between copies. Blocks that are
// freed are given out again in the order of the streams, as torch's allocator does.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include <sycl/sycl.hpp>

namespace {

constexpr c10::DeviceType kType = c10::DeviceType::XPU;
const c10::Device kDevice{kType, 0};
constexpr std::size_t kStreams = 3;
const c10::DispatchKeySet kKeys{c10::DispatchKey::XPU};

thread_local std::size_t current_stream = 0;

// Never destroyed: blocks may be freed after main.
std::vector<sycl::queue>& queues() {
    static auto& all = *[] {
        const sycl::device device{sycl::gpu_selector_v};
        const sycl::context context{device};
        const sycl::property_list properties{sycl::property::queue::in_order{}, sycl::property::queue::enable_profiling{}};
        auto* made = new std::vector<sycl::queue>;
        for (std::size_t i = 0; i < kStreams; ++i) made->emplace_back(context, device, properties);
        return made;
    }();
    return all;
}
sycl::queue& queue() { return queues()[current_stream]; }

void copy_bytes(void* to, const void* from, std::size_t bytes) {
    if (bytes) queue().memcpy(to, from, bytes).wait_and_throw();
}

// ------------------------------------------------------------------ memory
struct Block {
    void* memory;
    std::size_t bytes, stream;
};

class Allocator final : public c10::Allocator {
public:
    c10::DataPtr allocate(std::size_t bytes) override {
        if (!bytes) return {nullptr, nullptr, &release, kDevice};
        const std::lock_guard lock(mutex_);
        auto& free_blocks = free_[{current_stream, bytes}];
        if (free_blocks.empty()) {
            void* memory = sycl::malloc_device(bytes, queue());
            TORCH_CHECK_WITH(OutOfMemoryError, memory, "the xpu of these tests has no ", bytes, " bytes");
            free_blocks.push_back(new Block{memory, bytes, current_stream});
        }
        Block* block = free_blocks.back();
        free_blocks.pop_back();
        peak = std::max(peak, used += bytes);
        return {block->memory, block, &release, kDevice};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { copy_bytes(to, from, bytes); }

    std::size_t used = 0, peak = 0;     // bytes

private:
    static void release(void* context);

    std::mutex mutex_;
    std::map<std::pair<std::size_t, std::size_t>, std::vector<Block*>> free_;
};

Allocator& allocator() {
    static Allocator& one = *new Allocator;
    return one;
}

void Allocator::release(void* context) {
    auto* block = static_cast<Block*>(context);
    if (!block) return;
    Allocator& self = allocator();
    const std::lock_guard lock(self.mutex_);
    self.free_[{block->stream, block->bytes}].push_back(block);
    self.used -= block->bytes;
}

// ------------------------------------------------------------------ copies
std::size_t bytes_spanned(const at::Tensor& tensor) {
    if (!tensor.numel()) return 0;
    std::size_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    return (last + 1) * tensor.element_size();
}

// On the CPU, with the same sizes and strides.
at::Tensor on_host(const at::Tensor& tensor) {
    if (tensor.device().is_cpu()) return tensor;
    at::Tensor host = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
    copy_bytes(host.mutable_data_ptr(), tensor.const_data_ptr(), bytes_spanned(tensor));
    if (tensor.is_conj()) host = host.conj();
    if (tensor.is_neg()) host = host._neg_view();
    return host;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool) {
    if (!self.numel()) return self;
    at::Tensor host = on_host(self);     // what lies between the elements stays
    host.copy_(on_host(from));
    if (!self.device().is_cpu()) copy_bytes(self.mutable_data_ptr(), host.const_data_ptr(), bytes_spanned(self));
    return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    at::Tensor target = to;
    return copy_(target, from, non_blocking);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<c10::MemoryFormat>) {
    const auto wanted = C10_AS_INTARRAYREF_SLOW(sizes);
    auto* impl = self.unsafeGetTensorImpl();
    const std::size_t bytes = (c10::multiply_integers(wanted) + self.storage_offset()) * self.element_size();
    if (bytes > impl->unsafe_storage().nbytes()) {
        c10::DataPtr grown = allocator().allocate(bytes);
        copy_bytes(grown.get(), impl->unsafe_storage().data(), impl->unsafe_storage().nbytes());
        impl->unsafe_storage().set_data_ptr_noswap(std::move(grown));
        impl->unsafe_storage().set_nbytes(bytes);
    }
    impl->set_sizes_contiguous(wanted);
    return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    if (to.sizes() != from.sizes()) resize(to, c10::fromIntArrayRefSlow(from.sizes()), std::nullopt);
    return copy_from(from, to, false);
}

// ------------------------------------------------------------------ operators
at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator(), kKeys,
                                             c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                             offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, XPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY_IMPL(aten, XPU, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", as_strided);
    m.impl("view", view);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("resize_", resize);
    m.impl("copy_", copy_);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
}

// ------------------------------------------------------------------ the device
struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kType; }
    c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
    c10::Device getDevice() const override { return kDevice; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
    c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
    c10::Stream exchangeStream(c10::Stream next) const override {
        const c10::Stream last = stream(current_stream);
        current_stream = static_cast<std::size_t>(next.id());
        return last;
    }
    void synchronizeStream(const c10::Stream& waited) const override { queues()[waited.id()].wait_and_throw(); }
    void synchronizeDevice(c10::DeviceIndex) const override {
        for (sycl::queue& each : queues()) each.wait_and_throw();
    }
    // An event is the number of a stream: who waits for it waits for all that stream has to do.
    void record(void** event, const c10::Stream& recorded, c10::DeviceIndex, c10::EventFlag) const override {
        *event = reinterpret_cast<void*>(recorded.id() + 1);
    }
    void block(void* event, const c10::Stream&) const override { synchronizeEvent(event); }
    void synchronizeEvent(void* event) const override {
        if (event) queues()[reinterpret_cast<std::size_t>(event) - 1].wait_and_throw();
    }
    bool queryEvent(void* event) const override { return synchronizeEvent(event), true; }
    void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}

private:
    static c10::Stream stream(std::size_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, static_cast<c10::StreamId>(id)); }
};
C10_REGISTER_GUARD_IMPL(XPU, Guard);

struct XPUHooks final : at::XPUHooksInterface {
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool hasXPU() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex getNumGPUs() const override { return 1; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex current_device() const override { return 0; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    void deviceSynchronize(c10::DeviceIndex) const override { Guard().synchronizeDevice(0); }
};
using at::XPUHooksRegistry;
using at::RegistererXPUHooksRegistry;
REGISTER_XPU_HOOKS(XPUHooks);

const bool has_allocator = (c10::SetAllocator(kType, &allocator()), true);

}  // namespace

// For fake.py.
extern "C" {
std::size_t fake_xpu_streams() { return kStreams; }
void* fake_xpu_queue(std::size_t stream) { return &queues().at(stream); }
std::size_t fake_xpu_current_stream() { return current_stream; }
void fake_xpu_set_stream(std::size_t stream) { current_stream = stream; }
void fake_xpu_synchronize() { Guard().synchronizeDevice(0); }
std::size_t fake_xpu_used_bytes() { return allocator().used; }
std::size_t fake_xpu_peak_bytes() { return allocator().peak; }
void fake_xpu_reset_peak() { allocator().peak = allocator().used; }
void* fake_xpu_record() { return new sycl::event(queue().ext_oneapi_submit_barrier()); }
void fake_xpu_forget(void* event) { delete static_cast<sycl::event*>(event); }
void fake_xpu_wait(void* event) { static_cast<sycl::event*>(event)->wait(); }
std::uint64_t fake_xpu_end_of(void* event) {
    return static_cast<sycl::event*>(event)->get_profiling_info<sycl::info::event_profiling::command_end>();
}
}
