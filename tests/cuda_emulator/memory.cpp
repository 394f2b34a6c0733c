// Device memory and pinned host memory.
#include "driver.h"
#include "fiber.h"
#include <cstdlib>

namespace emulator {

static auto& allocations = *new std::map<CUdeviceptr, Allocation>;
static size_t used_bytes[most_devices];
static uint64_t allocation_number;

// With `state` held.
static const Allocation* holder(CUdeviceptr address, size_t bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return nullptr;
    const Allocation& allocation = std::prev(next)->second;
    const size_t offset = address - allocation.base;
    return offset <= allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}
std::optional<Allocation> find_allocation(CUdeviceptr address, size_t bytes) {
    std::lock_guard<std::mutex> lock(state);
    const Allocation* allocation = holder(address, bytes);
    return allocation == nullptr ? std::nullopt : std::optional(*allocation);
}

std::vector<Allocation> device_allocations() {
    std::lock_guard<std::mutex> lock(state);
    std::vector<Allocation> all;
    for (const auto& [address, allocation] : allocations) {
        if (allocation.residence == Residence::device) all.push_back(allocation);
    }
    return all;
}

// ---- red zones

// NaNs as halves, far off as floats and as integers.
constexpr unsigned char red = 0xfe;
// Address sanitizer has its own, which begin where the allocation ends.
static size_t red_zone_bytes() { return address_sanitizer() ? 0 : 512; }

// Looks at both red zones, says what is damaged and makes them whole.
static void check_red_zones(const Allocation& a) {
    for (const bool behind : {false, true}) {
        auto* zone = (unsigned char*)(behind ? a.base + a.bytes : a.base - a.red_zone);
        size_t damaged = 0, nearest = 0;
        for (size_t i = 0; i < a.red_zone; i++) {
            const size_t distance = behind ? i : a.red_zone - 1 - i;
            if (zone[i] == red) continue;
            nearest = damaged++ == 0 ? distance : std::min(nearest, distance);
        }
        if (damaged == 0) continue;
        memset(zone, red, a.red_zone);
        say("device %d: %zu bytes %s an allocation of %zu bytes were written, the nearest %zu from it", a.device, damaged, behind ? "behind" : "before", a.bytes, nearest + (behind ? 0 : 1));
        count_on(a.device, "damaged_red_zones");
        trace("damaged_red_zone", "\"device\":" + std::to_string(a.device) + ",\"bytes\":" + std::to_string(a.bytes));
    }
}
void check_all_red_zones() {
    std::lock_guard<std::mutex> lock(state);
    for (const auto& [address, allocation] : allocations) check_red_zones(allocation);
}

// ---- allocations

static size_t accounted(size_t bytes) { return (bytes + 511) / 512 * 512; }

static CUresult allocate(CUdeviceptr* address, size_t bytes, bool ready) {
    if (const CUresult error = usable()) return error;
    if (bytes == 0) return invalid_value;
    std::unique_lock<std::mutex> lock(state);
    const int device = current->device;
    count_beside_nccl("allocations", device);
    size_t& used = used_bytes[device];
    const size_t limit = std::min(settings().memory, planned_memory_limit(device)), zone = red_zone_bytes();
    void* room = nullptr;
    if (planned_failure("allocation", device) || accounted(bytes) > limit - std::min(used, limit) || posix_memalign(&room, 256, bytes + 2 * zone) != 0) {
        trace("out_of_memory", "\"bytes\":" + std::to_string(bytes));
        return out_of_memory;
    }
    used += accounted(bytes);
    *address = (CUdeviceptr)room + zone;
    allocations[*address] = {*address, bytes, Residence::device, device, ready, zone};
    const unsigned char fresh = fresh_byte(settings().schedule, ++allocation_number);
    const size_t live = used;
    memset(room, red, zone);
    memset((void*)(*address + bytes), red, zone);
    lock.unlock();
    memset((void*)*address, fresh, bytes);
    count_on(device, "allocations");
    count_on(device, "live_bytes", (long long)bytes);
    set_peak("peak_bytes", (long long)live);
    set_peak("peak_bytes:" + std::to_string(device), (long long)live);
    trace("allocate", "\"bytes\":" + std::to_string(bytes));
    return success;
}

static CUresult release(CUdeviceptr address);
void free_memory_of(Context& context) {
    std::vector<CUdeviceptr> left;
    {
        std::lock_guard<std::mutex> lock(state);
        for (const auto& [address, allocation] : allocations) {
            if (allocation.residence == Residence::device && allocation.device == context.device) left.push_back(address);
        }
    }
    for (const CUdeviceptr address : left) release(address);
}

static CUresult release(CUdeviceptr address) {
    Allocation freed;
    {
        std::lock_guard<std::mutex> lock(state);
        const auto found = allocations.find(address);
        if (found == allocations.end() || found->second.residence != Residence::device) return refuse(invalid_value, "cuMemFree: %llx is no allocation", address);
        freed = found->second;
        check_red_zones(freed);
        used_bytes[freed.device] -= accounted(freed.bytes);
        allocations.erase(found);
    }
    free((void*)(address - freed.red_zone));
    count_on(freed.device, "frees");
    count_on(freed.device, "live_bytes", -(long long)freed.bytes);
    trace("free", "\"bytes\":" + std::to_string(freed.bytes));
    return success;
}

std::string wrong_range(int device, CUdeviceptr address, size_t bytes) {
    const auto allocation = find_allocation(address, bytes);
    if (!allocation) return "a range of " + std::to_string(bytes) + " bytes outside of any allocation";
    if (allocation->residence == Residence::device && allocation->device != device) return "memory of device " + std::to_string(allocation->device) + " on device " + std::to_string(device);
    return "";
}

void put_nans(CUdeviceptr address) {
    std::lock_guard<std::mutex> lock(state);
    const Allocation* allocation = holder(address, 0);
    if (allocation == nullptr) return;
    const size_t halves = std::min<size_t>(16, allocation->base + allocation->bytes - address) / 2;
    for (size_t i = 0; i < halves; i++) ((uint16_t*)address)[i] = 0x7fff;
}

CUresult check_kernel_pointer(Context& context, CUdeviceptr address, const char* kernel, unsigned argument) {
    if (address == 0) return success;
    std::lock_guard<std::mutex> lock(state);
    const Allocation* allocation = holder(address, 0);
    if (allocation == nullptr) return refuse(illegal_address, "%s: argument %u (%llx) points to no allocation of a device", kernel, argument, address);
    if (allocation->residence == Residence::pinned) return success;
    if (!allocation->ready) return refuse(illegal_address, "%s: argument %u points to memory whose allocation in another stream was not waited for", kernel, argument);
    if (allocation->device != context.device && context.peers.count(allocation->device) == 0) {
        return refuse(illegal_address, "%s: argument %u points to memory of device %d, to which device %d has no peer access", kernel, argument, allocation->device, context.device);
    }
    return success;
}

}  // namespace emulator

using namespace emulator;

API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) { return allocate(address, bytes, true); }

// Waits for all work of the context, as the driver does.
API CUresult cuMemFree_v2(CUdeviceptr address) {
    if (address == 0) return success;
    if (const CUresult error = usable()) return error;
    count_beside_nccl("allocations", current->device);
    const CUresult error = finish(*current);
    const CUresult released = release(address);
    return error ? error : released;
}

API CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, void* handle) {
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (const CUresult error = allocate(address, bytes, false)) return error;
    const CUdeviceptr base = *address;
    return enqueue(stream, [base] {
        std::lock_guard<std::mutex> lock(state);
        const auto found = allocations.find(base);
        if (found != allocations.end()) found->second.ready = true;
        return success;
    });
}

API CUresult cuMemFreeAsync(CUdeviceptr address, void* handle) {
    if (address == 0) return success;
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    return enqueue(stream, [address] { return release(address); });
}

API CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    if (const CUresult error = usable()) return error;
    std::lock_guard<std::mutex> lock(state);
    const size_t limit = std::min(settings().memory, planned_memory_limit(current->device));
    *total = settings().memory;
    *free_bytes = limit - std::min(limit, used_bytes[current->device]);
    return success;
}

API CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
    std::lock_guard<std::mutex> lock(state);
    const Allocation* allocation = holder(address, 0);
    if (allocation == nullptr) return not_found;
    if (base != nullptr) *base = allocation->base;
    if (bytes != nullptr) *bytes = allocation->bytes;
    return success;
}

API CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    if (const CUresult error = usable()) return error;
    count_beside_nccl("allocations", current->device);
    if (bytes == 0 || posix_memalign(address, 4096, bytes) != 0) return out_of_memory;
    memset(*address, fresh_byte(settings().schedule, bytes), bytes);
    std::lock_guard<std::mutex> lock(state);
    allocations[(CUdeviceptr)*address] = {(CUdeviceptr)*address, bytes, Residence::pinned, -1, true, 0};
    count("pinned_allocations");
    return success;
}
API CUresult cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

API CUresult cuMemFreeHost(void* address) {
    if (const CUresult error = usable()) return error;
    count_beside_nccl("allocations", current->device);
    const CUresult error = finish(*current);
    {
        std::lock_guard<std::mutex> lock(state);
        const auto found = allocations.find((CUdeviceptr)address);
        if (found == allocations.end() || found->second.residence != Residence::pinned) return invalid_value;
        allocations.erase(found);
    }
    free(address);
    return error;
}

API CUresult cuMemHostRegister_v2(void* address, size_t bytes, unsigned) {
    if (const CUresult error = usable()) return error;
    std::lock_guard<std::mutex> lock(state);
    if (holder((CUdeviceptr)address, 0) != nullptr) return host_memory_already_registered;
    allocations[(CUdeviceptr)address] = {(CUdeviceptr)address, bytes, Residence::pinned, -1, true, 0};
    return success;
}

API CUresult cuMemHostUnregister(void* address) {
    if (const CUresult error = usable()) return error;
    finish(*current);
    std::lock_guard<std::mutex> lock(state);
    return allocations.erase((CUdeviceptr)address) ? success : host_memory_not_registered;
}

API int emulator_holds(const void* address, size_t bytes) {
    std::lock_guard<std::mutex> lock(state);
    const Allocation* allocation = holder((CUdeviceptr)address, bytes);
    return allocation != nullptr && (allocation->residence == Residence::pinned || current == nullptr || allocation->device == current->device || current->peers.count(allocation->device));
}
API int emulator_planned_failure(const char* what) { return planned_failure(what, current == nullptr ? -1 : current->device); }
