// Device memory, pinned host memory, copies and fills.
#include "driver.h"
#include <cstdlib>

namespace emulator {

static std::map<CUdeviceptr, Allocation> allocations;
static size_t used_bytes[64];
static uint64_t allocation_number;

// With `state` held.
static const Allocation* holder(CUdeviceptr address, size_t bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return nullptr;
    const Allocation& allocation = std::prev(next)->second;
    const size_t offset = address - allocation.base;
    return offset <= allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}
const Allocation* find_allocation(CUdeviceptr address, size_t bytes) {
    std::lock_guard<std::mutex> lock(state);
    return holder(address, bytes);
}

static size_t accounted(size_t bytes) { return (bytes + 511) / 512 * 512; }

static CUresult allocate(CUdeviceptr* address, size_t bytes, bool ready) {
    if (const CUresult error = usable()) return error;
    if (bytes == 0) return invalid_value;
    std::unique_lock<std::mutex> lock(state);
    size_t& used = used_bytes[current->device];
    const bool planned = planned_failure("allocation") || accounted(bytes) > planned_memory_limit() - std::min(used, planned_memory_limit());
    void* room = nullptr;
    if (planned || accounted(bytes) > settings().memory - used || posix_memalign(&room, 256, bytes) != 0) {
        trace("out_of_memory", "\"bytes\":" + std::to_string(bytes));
        return out_of_memory;
    }
    used += accounted(bytes);
    *address = (CUdeviceptr)room;
    allocations[*address] = {*address, bytes, Residence::device, current->device, ready};
    const unsigned char fresh = fresh_byte(settings().schedule, ++allocation_number);
    const size_t live = used;
    lock.unlock();
    memset(room, fresh, bytes);
    count("allocations");
    count("live_bytes", (long long)bytes);
    set_peak("peak_bytes", (long long)live);
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
    size_t bytes;
    {
        std::lock_guard<std::mutex> lock(state);
        const auto found = allocations.find(address);
        if (found == allocations.end() || found->second.residence != Residence::device) return refuse(invalid_value, "cuMemFree: %llx is no allocation", address);
        bytes = found->second.bytes;
        used_bytes[found->second.device] -= accounted(bytes);
        allocations.erase(found);
    }
    free((void*)address);
    count("frees");
    count("live_bytes", -(long long)bytes);
    trace("free", "\"bytes\":" + std::to_string(bytes));
    return success;
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

// ---- copies

enum class Direction { to_device, to_host, on_device };
static const char* const names[] = {"copy_to_device", "copy_to_host", "copy_on_device"};

static CUresult check_range(const char* call, const char* what, CUdeviceptr address, size_t bytes) {
    const Allocation* allocation = find_allocation(address, bytes);
    if (allocation == nullptr) return refuse(invalid_value, "%s: the %s range of %zu bytes is outside of any allocation", call, what, bytes);
    return success;
}
static bool pinned(const void* address, size_t bytes) {
    const Allocation* allocation = find_allocation((CUdeviceptr)address, bytes);
    return allocation != nullptr && allocation->residence == Residence::pinned;
}
static void count_copy(Direction direction, size_t bytes) {
    const std::string name = names[(int)direction];
    count(name);
    count(name + "_bytes", (long long)bytes);
    trace(name.c_str(), "\"bytes\":" + std::to_string(bytes));
}

static CUresult copy_to_device(CUdeviceptr to, const void* from, size_t bytes, void* handle, bool wait) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (bytes == 0) return success;
    if (const CUresult error = check_range("copy to the device", "destination", to, bytes)) return error;
    count_copy(Direction::to_device, bytes);
    if (pinned(from, bytes)) {  // read when the stream gets there: it may not change before
        enqueue(stream, [=] { return memcpy((void*)to, from, bytes), success; });
    } else {
        auto staged = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);
        enqueue(stream, [=] { return memcpy((void*)to, staged->data(), bytes), success; });
    }
    return wait ? finish(stream) : success;
}

static CUresult copy_to_host(void* to, CUdeviceptr from, size_t bytes, void* handle, bool wait) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (bytes == 0) return success;
    if (const CUresult error = check_range("copy to the host", "source", from, bytes)) return error;
    count_copy(Direction::to_host, bytes);
    enqueue(stream, [=] { return memcpy(to, (const void*)from, bytes), success; });
    if (!wait && pinned(to, bytes)) return success;
    count("synchronisations");
    trace("synchronise", "\"call\":\"copy to pageable memory\"");
    return finish(stream);
}

static CUresult copy_on_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* handle) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (bytes == 0) return success;
    if (const CUresult error = check_range("copy on the device", "destination", to, bytes)) return error;
    if (const CUresult error = check_range("copy on the device", "source", from, bytes)) return error;
    if (to < from + bytes && from < to + bytes) return refuse(invalid_value, "copy on the device: source and destination overlap");
    count_copy(Direction::on_device, bytes);
    return enqueue(stream, [=] { return memcpy((void*)to, (const void*)from, bytes), success; });
}

static CUresult fill_words(CUdeviceptr to, const void* word, size_t word_bytes, size_t words, void* handle) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (words == 0) return success;
    if (to % word_bytes != 0) return refuse(invalid_value, "memset: the address is not a multiple of %zu", word_bytes);
    if (const CUresult error = check_range("memset", "destination", to, word_bytes * words)) return error;
    count("fills");
    trace("fill", "\"bytes\":" + std::to_string(word_bytes * words));
    uint32_t value = 0;
    memcpy(&value, word, word_bytes);
    return enqueue(stream, [=] {
        char* p = (char*)to;
        if (word_bytes == 1) memset(p, (int)value, words);
        else for (size_t i = 0; i < words; i++) memcpy(p + i * word_bytes, &value, word_bytes);
        return success;
    });
}

}  // namespace emulator

using namespace emulator;

API CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) { return allocate(address, bytes, true); }

// Waits for all work of the context, as the driver does.
API CUresult cuMemFree_v2(CUdeviceptr address) {
    if (address == 0) return success;
    if (const CUresult error = usable()) return error;
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
    const size_t limit = std::min(settings().memory, planned_memory_limit());
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
    if (bytes == 0 || posix_memalign(address, 4096, bytes) != 0) return out_of_memory;
    memset(*address, fresh_byte(settings().schedule, bytes), bytes);
    std::lock_guard<std::mutex> lock(state);
    allocations[(CUdeviceptr)*address] = {(CUdeviceptr)*address, bytes, Residence::pinned, -1, true};
    count("pinned_allocations");
    return success;
}
API CUresult cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

API CUresult cuMemFreeHost(void* address) {
    if (const CUresult error = usable()) return error;
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
    allocations[(CUdeviceptr)address] = {(CUdeviceptr)address, bytes, Residence::pinned, -1, true};
    return success;
}

API CUresult cuMemHostUnregister(void* address) {
    if (const CUresult error = usable()) return error;
    finish(*current);
    std::lock_guard<std::mutex> lock(state);
    return allocations.erase((CUdeviceptr)address) ? success : host_memory_not_registered;
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream) { return copy_to_device(to, from, bytes, stream, false); }
API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) { return copy_to_device(to, from, bytes, nullptr, true); }
API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream) { return copy_to_host(to, from, bytes, stream, false); }
API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) { return copy_to_host(to, from, bytes, nullptr, true); }
API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) { return copy_on_device(to, from, bytes, stream); }
API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy_on_device(to, from, bytes, nullptr); }
API CUresult cuMemcpyPeerAsync(CUdeviceptr to, Context*, CUdeviceptr from, Context*, size_t bytes, void* stream) { return copy_on_device(to, from, bytes, stream); }
API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, void* stream) { return fill_words(to, &value, 1, bytes, stream); }
API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) { return fill_words(to, &value, 1, bytes, nullptr); }
API CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t words, void* stream) { return fill_words(to, &value, 2, words, stream); }
API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t words, void* stream) { return fill_words(to, &value, 4, words, stream); }

API int emulator_holds(const void* address, size_t bytes) {
    std::lock_guard<std::mutex> lock(state);
    const Allocation* allocation = holder((CUdeviceptr)address, bytes);
    return allocation != nullptr && (allocation->residence == Residence::pinned || current == nullptr || allocation->device == current->device || current->peers.count(allocation->device));
}
API int emulator_planned_failure(const char* what) { return planned_failure(what); }
