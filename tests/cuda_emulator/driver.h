// The pretend driver's state. Calls of the driver API are spread over devices.cpp, memory.cpp, copies.cpp,
// streams.cpp and modules.cpp. What is SHARED serves libnccl.so too.
//
// Whatever lives as long as the process is made with `new` and never destroyed: when it exits, other
// threads may still wait in here.
#pragma once

#include "scheduler.h"
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
#define API extern "C" __attribute__((visibility("default")))
#define SHARED __attribute__((visibility("default")))

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
    int nccl_version;  // 22602 is 2.26.2
    bool late_streams;
    bool peers;
    bool multi_rank;  // NCCL takes several ranks on one device
    bool quiet;
    double silence;  // seconds without any progress after which waiting groups are named
    Schedule schedule;
};
SHARED Settings& settings();

// Says a line on stderr, unless EMULATOR_QUIET.
SHARED void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Says what the driver refuses and why, and returns `code`.
CUresult refuse(CUresult code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- counters, trace, planned failures (counters.cpp, plan.cpp)

SHARED void count(const std::string& name, long long by = 1);
// Counts `name` and `name:DEVICE`.
SHARED void count_on(int device, const std::string& name, long long by = 1);
void set_peak(const std::string& name, long long value);
// Whether EMULATOR_FAIL wants this call to fail. `what` is the name of the failure, `kernel` the kernel it
// is about or "", `place` the device or rank. Counts the call.
SHARED bool planned_failure(const std::string& what, int place, const std::string& kernel = "");
// The same for failures that have no number: whether one is planned here.
SHARED bool planned_always(const std::string& what, int place);
// Bytes of out_of_memory_after:BYTES, or the largest number.
size_t planned_memory_limit(int device);
// Reads EMULATOR_FAIL anew; calls are counted from here.
void plan_failures(const std::string& text);
// One line of the file that EMULATOR_TRACE names: `event` and further JSON members.
SHARED void trace(const char* event, const std::string& members = "");
std::string json_text(const std::string& text);

// ---- contexts, streams, events

struct Context;
struct Stream;
using StreamRef = std::shared_ptr<Stream>;

// A stream that has to come to some operation before another one can run.
struct Need {
    StreamRef stream;
    uint64_t sequence;
};
struct Attempt {
    std::vector<Need> needs;
    bool changed = false;  // the attempt itself was progress: others may be able to run now
};
struct Operation {
    uint64_t sequence;
    std::function<CUresult()> run;         // without `state`; none: there is nothing to do
    std::function<bool(Attempt&)> ready;   // with `state`, at the head of the stream; none: it is
    bool hangs = false;                    // never ends, not even when the context has failed
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
    std::atomic<CUresult> error{success};  // once set, every call returns it
    StreamRef default_stream;
    std::vector<StreamRef> streams;
    std::set<int> peers;
};
constexpr int most_devices = 64;

// Guards all state; operations run without it.
SHARED extern std::mutex state;
extern thread_local Context* current;
SHARED Context* current_context();
SHARED Context& context_of(int device);

// What ends with a context, once its work is done.
void unload_modules_of(Context& context);
void free_streams_of(Context& context);
void free_memory_of(Context& context);

// The error of the current context, or of there being none.
CUresult usable();
// A null handle is the default stream of `context`, or of the current one.
SHARED StreamRef find_stream(void* handle, Context* context = nullptr);
// Appends an operation, behind what the default stream's order asks for. With `state` held; without it,
// run_early() comes next.
SHARED uint64_t append(const StreamRef& stream, Operation operation);
// Appends a wait for another stream. With `state` held.
SHARED void append_wait(const StreamRef& stream, const StreamRef& other, uint64_t sequence);
// Where streams run early, runs whatever can run.
SHARED void run_early();
CUresult enqueue(const StreamRef& stream, std::function<CUresult()> run);
CUresult enqueue_hang(const StreamRef& stream);
// Runs the stream's operations up to a sequence number, and what they wait for; blocks until another
// thread has brought what is missing.
SHARED CUresult run_until(const StreamRef& stream, uint64_t sequence);
// The same as far as it goes without blocking. Whether the stream got there.
SHARED bool try_until(const StreamRef& stream, uint64_t sequence);
CUresult finish(const StreamRef& stream);
CUresult finish(Context& context);
// Tells those who wait that something has changed. With `state` held.
SHARED void changed();
// Blocks until something changes.
SHARED void wait_for_change(std::unique_lock<std::mutex>& lock);
// Says once who waits for whom, when nothing has moved for long. With `state` held.
SHARED void notice_silence();
// How it says so.
SHARED extern void (*say_who_waits)();

// ---- memory

enum class Residence { device, pinned };
struct Allocation {
    CUdeviceptr base;
    size_t bytes;
    Residence residence;
    int device;
    bool ready;  // an allocation in stream order is ready when the stream gets there
    size_t red_zone;  // bytes before and behind
};
// The allocation that holds the range. A range of no bytes may lie at an end.
std::optional<Allocation> find_allocation(CUdeviceptr address, size_t bytes);
// All allocations of devices.
std::vector<Allocation> device_allocations();
// Why work of `device` may not touch the range, or "".
SHARED std::string wrong_range(int device, CUdeviceptr address, size_t bytes);
// Looks at the red zones of all that is allocated.
void check_all_red_zones();
// Whether a kernel of the context may touch the address.
CUresult check_kernel_pointer(Context& context, CUdeviceptr address, const char* kernel, unsigned argument);
// Makes the first bytes of an allocation's rest NaNs, as halves and as floats.
void put_nans(CUdeviceptr address);

// Groups of NCCL that are queued and not complete, by device. What else happens on the device meanwhile can
// deadlock on a GPU, and is counted as `WHAT_beside_nccl`.
SHARED extern std::atomic<int> nccl_groups_open[most_devices];
void count_beside_nccl(const char* what, int device);

}  // namespace emulator

// Puts work of a library into a stream. Returns a CUresult.
API int emulator_enqueue(void* stream, const char* label, void (*run)(void* data), void (*drop)(void* data), void* data);
// Whether [address, address + bytes) lies inside one allocation of the current context's device.
API int emulator_holds(const void* address, size_t bytes);
API int emulator_planned_failure(const char* what);
// A library needs code of this kind on the current device, and loads it at the first time.
API void emulator_note_load(uint64_t kind);
