// The pretend driver's state. Calls of the driver API are spread over devices.cpp, memory.cpp,
// streams.cpp and modules.cpp.
#pragma once

#include "scheduler.h"
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
#define API extern "C" __attribute__((visibility("default")))

namespace emulator {

enum : CUresult {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    no_device = 100,
    invalid_device = 101,
    invalid_image = 200,
    invalid_context = 201,
    no_binary_for_gpu = 209,
    peer_access_unsupported = 217,
    invalid_ptx = 218,
    file_not_found = 301,
    invalid_handle = 400,
    not_found = 500,
    not_ready = 600,
    illegal_address = 700,
    launch_out_of_resources = 701,
    peer_access_already_enabled = 704,
    peer_access_not_enabled = 705,
    host_memory_already_registered = 712,
    host_memory_not_registered = 713,
    misaligned_address = 716,
    launch_failed = 719,
    not_supported = 801,
    unknown = 999,
};

// ---- settings, from the environment at the first call

// What one compute capability offers.
struct Architecture {
    int capability;  // 80 is 8.0
    const char* name;
    unsigned shared_per_block, shared_opt_in, shared_per_multiprocessor;
    unsigned threads_per_multiprocessor, blocks_per_multiprocessor, multiprocessors;
};
struct Settings {
    int devices;
    const Architecture* architecture;
    size_t memory;  // bytes per device
    int driver_version;
    bool late_streams;
    bool peers;
    bool quiet;
    Schedule schedule;
};
Settings& settings();

// Says on stderr what the driver refuses and why, and returns `code`.
CUresult refuse(CUresult code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- counters, trace, planned failures (counters.cpp)

void count(const std::string& name, long long by = 1);
void set_peak(const std::string& name, long long value);
// Whether EMULATOR_FAIL wants this call to fail: `launch:KERNEL:N`, `allocation:N`, `product:N` count
// calls from 1.
bool planned_failure(const std::string& what);
// Bytes of EMULATOR_FAIL=out_of_memory_after:BYTES, or the largest number.
size_t planned_memory_limit();
// One line of the file that EMULATOR_TRACE names: `event` and further JSON members.
void trace(const char* event, const std::string& members = "");
std::string json_text(const std::string& text);

// ---- contexts, streams, events

struct Context;
struct Operation {
    uint64_t sequence;
    std::function<CUresult()> run;
};
struct Stream {
    Context* context;
    bool waits_for_default;  // created without CU_STREAM_NON_BLOCKING
    std::deque<Operation> queue;
    uint64_t last = 0;       // sequence number of the last operation put in
    uint64_t completed = 0;  // all up to here have run
    bool busy = false;       // an OS thread is running an operation of this stream
    bool destroyed = false;
};
using StreamRef = std::shared_ptr<Stream>;
struct Event {
    Context* context;
    bool timed;
    StreamRef stream;  // none: never recorded
    uint64_t sequence = 0;
    std::chrono::steady_clock::time_point time;
    unsigned queries = 0;
};
struct Context {
    int device;
    unsigned references = 0;
    CUresult error = success;  // once set, every call returns it
    StreamRef default_stream;
    std::vector<StreamRef> streams;
    std::set<int> peers;
};

// Guards all state; operations run without it.
extern std::mutex state;
extern thread_local Context* current;
Context& context_of(int device);

// What ends with a context, once its work is done.
void unload_modules_of(Context& context);
void free_streams_of(Context& context);
void free_memory_of(Context& context);

// The error of the current context, or of there being none.
CUresult usable();
StreamRef find_stream(void* handle);
// Appends an operation; early streams run it before this returns. `state` is not held.
CUresult enqueue(const StreamRef& stream, std::function<CUresult()> run);
// Runs the stream's operations up to a sequence number, and what they wait for.
CUresult run_until(const StreamRef& stream, uint64_t sequence);
CUresult finish(const StreamRef& stream);
CUresult finish(Context& context);

// ---- memory

enum class Residence { device, pinned };
struct Allocation {
    CUdeviceptr base;
    size_t bytes;
    Residence residence;
    int device;
    bool ready;  // an allocation in stream order is ready when the stream gets there
};
// The allocation that holds the range, or null. A range of no bytes may lie at an end.
const Allocation* find_allocation(CUdeviceptr address, size_t bytes);
// Whether a kernel of the context may touch the address.
CUresult check_kernel_pointer(Context& context, CUdeviceptr address, const char* kernel, unsigned argument);

// ---- products (libcublasLt.so) run in the same streams

}  // namespace emulator

// Puts work of a library into a stream. Returns a CUresult.
API int emulator_enqueue(void* stream, const char* label, void (*run)(void* data), void (*drop)(void* data), void* data);
// Whether [address, address + bytes) lies inside one allocation of the current context's device.
API int emulator_holds(const void* address, size_t bytes);
API int emulator_planned_failure(const char* what);
