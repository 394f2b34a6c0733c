// Copies and fills.
#include "driver.h"

namespace emulator {

enum class Direction { to_device, to_host, on_device };
static const char* const names[] = {"copy_to_device", "copy_to_host", "copy_on_device"};

static CUresult check_range(const char* call, const char* what, CUdeviceptr address, size_t bytes) {
    const auto allocation = find_allocation(address, bytes);
    if (!allocation) return refuse(invalid_value, "%s: the %s range of %zu bytes is outside of any allocation", call, what, bytes);
    return success;
}
// Before the work is done: the ranges may have been freed since it was put in.
static CUresult still_there(const char* call, CUdeviceptr address, size_t bytes) {
    return find_allocation(address, bytes) ? success : refuse(illegal_address, "%s: memory was freed before the stream came to it", call);
}
static int device_of(CUdeviceptr address) {
    const auto allocation = find_allocation(address, 0);
    return !allocation || allocation->residence == Residence::pinned ? -1 : allocation->device;
}
static bool pinned(const void* address, size_t bytes) {
    const auto allocation = find_allocation((CUdeviceptr)address, bytes);
    return allocation && allocation->residence == Residence::pinned;
}
static void count_copy(Direction direction, size_t bytes) {
    const std::string name = names[(int)direction];
    count_on(current->device, name);
    count_on(current->device, name + "_bytes", (long long)bytes);
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
        enqueue(stream, [=] {
            const CUresult gone = still_there("copy to the device", to, bytes);
            if (gone == success) memcpy((void*)to, from, bytes);
            return gone;
        });
    } else {
        auto staged = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);
        enqueue(stream, [=] {
            const CUresult gone = still_there("copy to the device", to, bytes);
            if (gone == success) memcpy((void*)to, staged->data(), bytes);
            return gone;
        });
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
    enqueue(stream, [=] {
        const CUresult gone = still_there("copy to the host", from, bytes);
        if (gone == success) memcpy(to, (const void*)from, bytes);
        return gone;
    });
    if (!wait && pinned(to, bytes)) return success;
    count_on(current->device, "synchronisations");
    trace("synchronise", "\"call\":\"copy to pageable memory\"");
    return finish(stream);
}

static CUresult move(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    if (const CUresult gone = still_there("copy on the device", to, bytes)) return gone;
    if (const CUresult gone = still_there("copy on the device", from, bytes)) return gone;
    memcpy((void*)to, (const void*)from, bytes);
    return success;
}

static CUresult copy_between_devices(CUdeviceptr to, CUdeviceptr from, size_t bytes, const StreamRef& stream) {
    const int device = stream->context->device;
    count_on(device, "peer_copies");
    count_on(device, "peer_copy_bytes", (long long)bytes);
    trace("peer_copy", "\"bytes\":" + std::to_string(bytes));
    if (planned_always("peer_copy_error", device)) return refuse(peer_access_unsupported, "copy between devices: fails, as EMULATOR_FAIL says");
    if (planned_always("peer_copy_hang", device)) return enqueue_hang(stream);
    if (planned_always("peer_copy_garbage", device)) return enqueue(stream, [=] { return memset((void*)to, 0x55, bytes), success; });
    return enqueue(stream, [=] { return move(to, from, bytes); });
}

static CUresult copy_on_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* handle) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (bytes == 0) return success;
    if (const CUresult error = check_range("copy on the device", "destination", to, bytes)) return error;
    if (const CUresult error = check_range("copy on the device", "source", from, bytes)) return error;
    if (to < from + bytes && from < to + bytes) return refuse(invalid_value, "copy on the device: source and destination overlap");
    const int there = device_of(to), here = device_of(from);
    if (there >= 0 && here >= 0 && there != here) return copy_between_devices(to, from, bytes, stream);
    count_copy(Direction::on_device, bytes);
    return enqueue(stream, [=] { return move(to, from, bytes); });
}

static CUresult copy_peer(CUdeviceptr to, const Context* to_context, CUdeviceptr from, const Context* from_context, size_t bytes, void* handle) {
    if (to_context == nullptr || from_context == nullptr) return invalid_context;
    for (const auto& [address, context] : {std::pair(to, to_context), std::pair(from, from_context)}) {
        const int device = device_of(address);
        if (device >= 0 && device != context->device) return refuse(invalid_value, "cuMemcpyPeer: memory of device %d is handed over with the context of device %d", device, context->device);
    }
    return copy_on_device(to, from, bytes, handle);
}

// By where the two ranges lie.
static CUresult copy_anywhere(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* handle, bool wait) {
    const bool to_device_memory = device_of(to) >= 0, from_device_memory = device_of(from) >= 0;
    if (to_device_memory && from_device_memory) return copy_on_device(to, from, bytes, handle);
    if (to_device_memory) return copy_to_device(to, (const void*)from, bytes, handle, wait);
    if (from_device_memory) return copy_to_host((void*)to, from, bytes, handle, wait);
    return refuse(not_supported, "cuMemcpy: neither range lies on a device");
}

static CUresult fill_words(CUdeviceptr to, const void* word, size_t word_bytes, size_t words, void* handle) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    if (words == 0) return success;
    if (to % word_bytes != 0) return refuse(invalid_value, "memset: the address is not a multiple of %zu", word_bytes);
    if (const CUresult error = check_range("memset", "destination", to, word_bytes * words)) return error;
    count_on(current->device, "fills");
    trace("fill", "\"bytes\":" + std::to_string(word_bytes * words));
    uint32_t value = 0;
    memcpy(&value, word, word_bytes);
    return enqueue(stream, [=]() -> CUresult {
        if (const CUresult gone = still_there("memset", to, word_bytes * words)) return gone;
        char* p = (char*)to;
        if (word_bytes == 1) memset(p, (int)value, words);
        else for (size_t i = 0; i < words; i++) memcpy(p + i * word_bytes, &value, word_bytes);
        return success;
    });
}

}  // namespace emulator

using namespace emulator;

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream) { return copy_to_device(to, from, bytes, stream, false); }
API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) { return copy_to_device(to, from, bytes, nullptr, true); }
API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream) { return copy_to_host(to, from, bytes, stream, false); }
API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) { return copy_to_host(to, from, bytes, nullptr, true); }
API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) { return copy_on_device(to, from, bytes, stream); }
API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy_on_device(to, from, bytes, nullptr); }
API CUresult cuMemcpyPeerAsync(CUdeviceptr to, Context* to_context, CUdeviceptr from, Context* from_context, size_t bytes, void* stream) { return copy_peer(to, to_context, from, from_context, bytes, stream); }
API CUresult cuMemcpyPeer(CUdeviceptr to, Context* to_context, CUdeviceptr from, Context* from_context, size_t bytes) { return copy_peer(to, to_context, from, from_context, bytes, nullptr); }
API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) { return copy_anywhere(to, from, bytes, stream, false); }
API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return copy_anywhere(to, from, bytes, nullptr, true); }
API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, void* stream) { return fill_words(to, &value, 1, bytes, stream); }
API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) { return fill_words(to, &value, 1, bytes, nullptr); }
API CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t words, void* stream) { return fill_words(to, &value, 2, words, stream); }
API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t words, void* stream) { return fill_words(to, &value, 4, words, stream); }
