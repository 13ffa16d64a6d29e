#include "cpu_isa.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace moe_xe {
namespace {

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// Which register files the operating system saves at a context switch.
std::uint64_t saved_register_files() {
    std::uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}

constexpr bool has_all(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }

constexpr std::uint64_t kSavesYmm = 0x06;  // XMM, YMM
constexpr std::uint64_t kSavesZmm = 0xe6;  // and the masks and both halves of the ZMM registers
constexpr std::uint64_t kSavesTiles = 0x60000;  // their configuration and their data

// Leaf 1, ECX
constexpr unsigned kOsXsave = 1u << 27, kFma = 1u << 12, kF16c = 1u << 29;
// Leaf 7, EBX
constexpr unsigned kAvx2 = 1u << 5;
constexpr unsigned kAvx512F = 1u << 16, kAvx512Dq = 1u << 17, kAvx512Bw = 1u << 30,
                   kAvx512Vl = 1u << 31;
// Leaf 7, ECX: of bytes, which kernels for bf16 use beside it
constexpr unsigned kAvx512Vbmi = 1u << 1, kAvx512Vnni = 1u << 11;
// Leaf 7, EDX
constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
// Leaf 7.1, EAX
constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxFp16 = 1u << 21;

// Linux gives a process the tiles only if it asks, once for all of its threads.
bool may_use_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, from 5.16 on
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const char* detect() {
    const Registers basic = cpuid(1, 0);
    if (!has_all(basic.ecx, kOsXsave | kFma | kF16c)) return "baseline";
    const std::uint64_t saved = saved_register_files();
    const Registers extended = cpuid(7, 0);
    if (!has_all(saved, kSavesYmm) || !has_all(extended.ebx, kAvx2)) return "baseline";
    if (!has_all(saved, kSavesZmm) ||
        !has_all(extended.ebx, kAvx512F | kAvx512Dq | kAvx512Bw | kAvx512Vl))
        return "avx2";
    const unsigned newer = cpuid(7, 1).eax;
    if (!has_all(newer, kAvx512Bf16) || !has_all(extended.ecx, kAvx512Vbmi | kAvx512Vnni)) return "avx512";
    const bool has_tiles = has_all(saved, kSavesTiles) && has_all(extended.edx, kAmxBf16 | kAmxTile);
    if (!has_tiles || !may_use_tiles()) return "avx512_bf16";
    return has_all(newer, kAmxFp16) ? "amx_fp16" : "amx";
}

}  // namespace

const char* cpu_isa() {
    static const char* const isa = detect();
    return isa;
}

}  // namespace moe_xe
