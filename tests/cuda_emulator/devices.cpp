// Settings, devices, contexts.
#include "driver.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace emulator {

std::mutex state;
thread_local Context* current;
static bool initialized;

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the number of
// multiprocessors is that of a usual card.
static const Architecture architectures[] = {
    {70, "Emulated V100", 49152, 98304, 98304, 2048, 32, 80},  // too old, for those who refuse it
    {75, "Emulated T4", 49152, 65536, 65536, 1024, 16, 40},
    {80, "Emulated A100", 49152, 166912, 167936, 2048, 32, 108},
    {86, "Emulated RTX 3090", 49152, 101376, 102400, 1536, 16, 82},
    {89, "Emulated RTX 4090", 49152, 101376, 102400, 1536, 24, 128},
    {90, "Emulated H100", 49152, 232448, 233472, 2048, 32, 132},
    {100, "Emulated B200", 49152, 232448, 233472, 2048, 32, 148},
    {120, "Emulated RTX 5090", 49152, 101376, 102400, 1536, 24, 170},
};

[[noreturn]] static void bad_setting(const std::string& name, const std::string& value, const char* choices) {
    fprintf(stderr, "emulator: %s=%s: use %s\n", name.c_str(), value.c_str(), choices);
    abort();
}

// One setting under the name of its environment variable. False for a name that is none.
static bool set(Settings& s, const std::string& name, const std::string& value) {
    const auto number = [&] { return strtoull(value.c_str(), nullptr, 10); };
    if (name == "EMULATOR_DEVICES") {
        if (number() > 64) bad_setting(name, value, "0 to 64");
        s.devices = (int)number();
    } else if (name == "EMULATOR_ARCH") {
        const Architecture* chosen = nullptr;
        for (const Architecture& a : architectures) {
            if (value == std::to_string(a.capability)) chosen = &a;
        }
        if (chosen == nullptr) bad_setting(name, value, "70, 75, 80, 86, 89, 90, 100 or 120");
        s.architecture = chosen;
    } else if (name == "EMULATOR_MEMORY") {
        s.memory = number();
    } else if (name == "EMULATOR_DRIVER_VERSION") {
        s.driver_version = (int)number();
    } else if (name == "EMULATOR_NCCL_VERSION") {
        int major = 0, minor = 0, patch = 0;
        if (sscanf(value.c_str(), "%d.%d.%d", &major, &minor, &patch) != 3) bad_setting(name, value, "three numbers, like 2.26.2");
        s.nccl_version = major * 10000 + minor * 100 + patch;
    } else if (name == "EMULATOR_NCCL_MULTI_RANK") {
        s.multi_rank = value == "1";
    } else if (name == "EMULATOR_SILENCE") {
        s.silence = atof(value.c_str());
    } else if (name == "EMULATOR_FAIL") {
        plan_failures(value);
    } else if (name == "EMULATOR_STREAMS") {
        if (value != "late" && value != "early") bad_setting(name, value, "late or early");
        s.late_streams = value == "late";
    } else if (name == "EMULATOR_PEERS") {
        s.peers = value == "1";
    } else if (name == "EMULATOR_QUIET") {
        s.quiet = value == "1";
    } else if (name == "EMULATOR_ORDER") {
        if (value == "forward") s.schedule.order = Order::forward;
        else if (value == "reverse") s.schedule.order = Order::reverse;
        else if (value == "random") s.schedule.order = Order::random;
        else bad_setting(name, value, "forward, reverse or random");
    } else if (name == "EMULATOR_SEED") {
        s.schedule.seed = number();
    } else if (name == "EMULATOR_THREADS") {
        s.schedule.os_threads = (unsigned)number();
    } else {
        return false;
    }
    return true;
}

static Settings read_settings() {
    static const char* const defaults[][2] = {
        {"EMULATOR_DEVICES", "1"}, {"EMULATOR_ARCH", "80"}, {"EMULATOR_MEMORY", "8589934592"},
        {"EMULATOR_DRIVER_VERSION", "12080"}, {"EMULATOR_STREAMS", "late"}, {"EMULATOR_PEERS", "1"},
        {"EMULATOR_QUIET", "0"}, {"EMULATOR_ORDER", "forward"}, {"EMULATOR_SEED", "1"},
        {"EMULATOR_THREADS", "1"}, {"EMULATOR_NCCL_VERSION", "2.26.2"}, {"EMULATOR_NCCL_MULTI_RANK", "0"},
        {"EMULATOR_SILENCE", "5"},
    };
    Settings s = {};
    for (const auto& [name, otherwise] : defaults) {
        const char* value = getenv(name);
        set(s, name, value == nullptr || *value == 0 ? otherwise : value);
    }
    return s;
}
Settings& settings() {
    static Settings& settings = *new Settings(read_settings());
    return settings;
}

static void say_all(const char* format, va_list values) {
    if (settings().quiet) return;
    char text[2048];
    vsnprintf(text, sizeof text, format, values);
    fprintf(stderr, "emulator: %s\n", text);
}
void say(const char* format, ...) {
    va_list values;
    va_start(values, format);
    say_all(format, values);
    va_end(values);
}
CUresult refuse(CUresult code, const char* format, ...) {
    va_list values;
    va_start(values, format);
    say_all(format, values);
    va_end(values);
    return code;
}

Context& context_of(int device) {
    static Context* const contexts = [] {
        auto* all = new Context[most_devices];
        for (int i = 0; i < most_devices; i++) all[i].device = i;
        return all;
    }();
    return contexts[device];
}
Context* current_context() { return current; }

CUresult usable() {
    if (!initialized) return refuse(not_initialized, "a driver call comes before cuInit");
    if (current == nullptr) return refuse(invalid_context, "a driver call on a thread without a context");
    return current->error;
}

static bool exists(int device) { return initialized && device >= 0 && device < settings().devices; }

}  // namespace emulator

using namespace emulator;

API CUresult cuInit(unsigned flags) {
    if (flags != 0) return invalid_value;
    if (settings().devices == 0) return no_device;
    initialized = true;
    return success;
}

API CUresult cuDriverGetVersion(int* version) {
    *version = settings().driver_version;
    return success;
}

API CUresult cuDeviceGetCount(int* number) {
    if (!initialized) return not_initialized;
    *number = settings().devices;
    return success;
}

API CUresult cuDeviceGet(int* device, int ordinal) {
    if (!initialized) return not_initialized;
    if (!exists(ordinal)) return invalid_device;
    *device = ordinal;
    return success;
}

API CUresult cuDeviceGetName(char* name, int bytes, int device) {
    if (!exists(device)) return invalid_device;
    snprintf(name, bytes, "%s", settings().architecture->name);
    return success;
}

API CUresult cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    if (!exists(device)) return invalid_device;
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(i == 15 ? device : 0xe0 + i);
    return success;
}
API CUresult cuDeviceGetUuid(unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

API CUresult cuDeviceTotalMem_v2(size_t* bytes, int device) {
    if (!exists(device)) return invalid_device;
    *bytes = settings().memory;
    return success;
}

API CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (!exists(device)) return invalid_device;
    const Architecture& a = *settings().architecture;
    static const std::map<int, int>& same_for_all = *new std::map<int, int>{
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},           // block limits
        {5, 2147483647}, {6, 65535}, {7, 65535},            // grid limits
        {9, 65536}, {10, 32}, {12, 65536}, {13, 1500000},   // constant memory, warp, registers, clock
        {31, 1}, {36, 6000000}, {37, 256}, {38, 4194304},   // concurrent kernels, memory clock and bus, L2
        {40, 2}, {41, 1}, {82, 65536}, {95, 1}, {115, 1},   // copy engines, unified addresses, memory pools
    };
    switch (attribute) {
        case 8: *value = a.shared_per_block; return success;
        case 16: *value = a.multiprocessors; return success;
        case 33: *value = 1 + device; return success;  // PCI bus
        case 39: *value = a.threads_per_multiprocessor; return success;
        case 75: *value = a.capability / 10; return success;
        case 76: *value = a.capability % 10; return success;
        case 81: *value = a.shared_per_multiprocessor; return success;
        case 97: *value = a.shared_opt_in; return success;
        case 106: *value = a.blocks_per_multiprocessor; return success;
        case 111: *value = a.capability >= 80 ? 1024 : 0; return success;
        default: break;
    }
    const auto found = same_for_all.find(attribute);
    *value = found == same_for_all.end() ? 0 : found->second;
    return success;
}

// Changes a setting of the environment in the running process; 0 for an unknown name. Devices and
// architecture may change while no context is held.
API int emulator_set(const char* name, const char* value) {
    std::lock_guard<std::mutex> lock(state);
    return set(settings(), name, value);
}

// ---- contexts

API CUresult cuDevicePrimaryCtxRetain(Context** context, int device) {
    if (!exists(device)) return invalid_device;
    std::lock_guard<std::mutex> lock(state);
    Context& c = context_of(device);
    if (c.references++ == 0) {
        c.error = success;
        c.peers.clear();
        c.default_stream = std::make_shared<Stream>();
        c.default_stream->context = &c;
        c.default_stream->waits_for_default = false;
    }
    *context = &c;
    return success;
}

API CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    if (!exists(device)) return invalid_device;
    Context& c = context_of(device);
    {
        std::lock_guard<std::mutex> lock(state);
        if (c.references == 0) return invalid_context;
        if (--c.references > 0) return success;
    }
    finish(c);
    unload_modules_of(c);
    free_streams_of(c);
    free_memory_of(c);
    return success;
}

API CUresult cuCtxSetCurrent(Context* context) {
    if (!initialized) return not_initialized;
    current = context;
    return success;
}

API CUresult cuCtxGetCurrent(Context** context) {
    if (!initialized) return not_initialized;
    *context = current;
    return success;
}

API CUresult cuCtxGetDevice(int* device) {
    if (current == nullptr) return invalid_context;
    *device = current->device;
    return success;
}

API CUresult cuCtxSetFlags(unsigned) { return usable(); }
API CUresult cuCtxGetApiVersion(Context*, unsigned* version) {
    *version = 3020;
    return success;
}
API CUresult cuCtxGetLimit(size_t* value, int) {
    *value = 1024;
    return usable();
}
API CUresult cuCtxSetLimit(int, size_t) { return usable(); }
API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return usable();
}

API CUresult cuDeviceCanAccessPeer(int* can, int device, int peer) {
    if (!exists(device) || !exists(peer)) return invalid_device;
    *can = device != peer && settings().peers;
    return success;
}

API CUresult cuCtxEnablePeerAccess(Context* peer, unsigned flags) {
    if (const CUresult error = usable()) return error;
    if (flags != 0 || peer == nullptr) return invalid_value;
    std::lock_guard<std::mutex> lock(state);
    if (peer == current) return invalid_device;
    if (!settings().peers) return peer_access_unsupported;
    if (!current->peers.insert(peer->device).second) return peer_access_already_enabled;
    count_on(current->device, "peer_accesses");
    return success;
}

API CUresult cuCtxDisablePeerAccess(Context* peer) {
    if (const CUresult error = usable()) return error;
    std::lock_guard<std::mutex> lock(state);
    return current->peers.erase(peer->device) ? success : peer_access_not_enabled;
}

API CUresult cuProfilerStart() {
    trace("profiler_start");
    return usable();
}
API CUresult cuProfilerStop() {
    trace("profiler_stop");
    return usable();
}

// ---- errors

static const auto& errors = *new std::map<CUresult, std::pair<const char*, const char*>>{
    {success, {"CUDA_SUCCESS", "no error"}},
    {invalid_value, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {out_of_memory, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {not_initialized, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {no_device, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {invalid_device, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {invalid_image, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {invalid_context, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {no_binary_for_gpu, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {peer_access_unsupported, {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices"}},
    {invalid_ptx, {"CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"}},
    {file_not_found, {"CUDA_ERROR_FILE_NOT_FOUND", "file not found"}},
    {invalid_handle, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {not_found, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {not_ready, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {illegal_address, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {launch_out_of_resources, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
    {peer_access_already_enabled, {"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"}},
    {peer_access_not_enabled, {"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled"}},
    {host_memory_already_registered, {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"}},
    {host_memory_not_registered, {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"}},
    {misaligned_address, {"CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"}},
    {launch_failed, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {not_supported, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {unknown, {"CUDA_ERROR_UNKNOWN", "unknown error"}},
};

API CUresult cuGetErrorName(CUresult error, const char** name) {
    const auto found = errors.find(error);
    *name = found == errors.end() ? nullptr : found->second.first;
    return *name == nullptr ? invalid_value : success;
}

API CUresult cuGetErrorString(CUresult error, const char** text) {
    const auto found = errors.find(error);
    *text = found == errors.end() ? nullptr : found->second.second;
    return *text == nullptr ? invalid_value : success;
}
