// Bytes that kernels ask of device memory, for EMULATOR_SANITIZE=traffic: kernels are compiled with the
// thread sanitizer's call before each access, and the functions called are these, which count. With the
// sanitizer's own library loaded before everything, its functions are found first and these are idle.
#include "driver.h"
#include "traffic.h"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace emulator {

namespace {

constexpr uintptr_t sector_bytes = 32;  // what device memory moves at the least
constexpr uintptr_t page_bytes = 4096;

// A bit per sector of a page.
struct Page {
    uint64_t read[2] = {}, written[2] = {};
};

struct Traffic {
    std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // first byte, and the one behind the last
    std::unordered_map<uintptr_t, Page> pages;
    uintptr_t last_number = 0;
    Page* last_page = nullptr;
    long long read = 0, written = 0;

    bool in_device_memory(uintptr_t address) const {
        auto next = std::upper_bound(ranges.begin(), ranges.end(), std::make_pair(address, UINTPTR_MAX));
        return next != ranges.begin() && address < std::prev(next)->second;
    }
    Page& page(uintptr_t number) {
        if (last_page == nullptr || last_number != number) {
            last_page = &pages[number];
            last_number = number;
        }
        return *last_page;
    }
    void access(uintptr_t address, size_t bytes, bool write) {
        if (bytes == 0 || !in_device_memory(address)) return;  // shared memory, or the thread's stack
        (write ? written : read) += (long long)bytes;
        const uintptr_t last = (address + bytes - 1) / sector_bytes;
        for (uintptr_t sector = address / sector_bytes; sector <= last; sector++) {
            const uintptr_t place = sector % (page_bytes / sector_bytes);
            Page& found = page(sector / (page_bytes / sector_bytes));
            (write ? found.written : found.read)[place / 64] |= uint64_t(1) << place % 64;
        }
    }
};

// Of the launch that this OS thread runs.
__thread Traffic* counting EMULATOR_TLS;

}  // namespace

bool traffic_is_counted() {
    static const bool counted = [] {
        const char* sanitizer = getenv("EMULATOR_SANITIZE");
        return sanitizer != nullptr && strcmp(sanitizer, "traffic") == 0;
    }();
    return counted;
}

void note_traffic(const void* address, size_t bytes, bool write) {
    if (counting != nullptr) counting->access((uintptr_t)address, bytes, write);
}

std::string run_counting_traffic(const Launch& launch, const Schedule& schedule) {
    Traffic traffic;
    for (const Allocation& allocation : device_allocations()) traffic.ranges.emplace_back(allocation.base, allocation.base + allocation.bytes);
    std::sort(traffic.ranges.begin(), traffic.ranges.end());
    counting = &traffic;
    std::string error = run(launch, schedule);
    counting = nullptr;
    long long read_sectors = 0, written_sectors = 0;
    for (const auto& [number, page] : traffic.pages) {
        for (const uint64_t bits : page.read) read_sectors += __builtin_popcountll(bits);
        for (const uint64_t bits : page.written) written_sectors += __builtin_popcountll(bits);
    }
    const std::string kernel = launch.kernel->name;
    count("read_bytes:" + kernel, traffic.read);
    count("written_bytes:" + kernel, traffic.written);
    count("read_sectors:" + kernel, read_sectors);
    count("written_sectors:" + kernel, written_sectors);
    return error;
}

}  // namespace emulator

// ---- what the compiler calls

API void __tsan_init() {}
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}
API void __tsan_vptr_update(void**, void*) {}
API void __tsan_read_range(void* p, size_t bytes) { emulator::note_traffic(p, bytes, false); }
API void __tsan_write_range(void* p, size_t bytes) { emulator::note_traffic(p, bytes, true); }
#define ACCESS(bytes)                                                                              \
    API void __tsan_read##bytes(void* p) { emulator::note_traffic(p, bytes, false); }              \
    API void __tsan_write##bytes(void* p) { emulator::note_traffic(p, bytes, true); }              \
    API void __tsan_unaligned_read##bytes(void* p) { emulator::note_traffic(p, bytes, false); }    \
    API void __tsan_unaligned_write##bytes(void* p) { emulator::note_traffic(p, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
