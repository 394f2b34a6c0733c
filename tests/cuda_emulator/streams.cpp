// Streams and events. An operation runs as late as events and synchronisation allow: when a host call
// needs it, or a later operation that does. So work that nothing waits for is found not done. Where streams
// run early, each call runs all that can run.
//
// Any host thread that asks for a stream's work runs it, with what that waits for in other streams; two
// threads do so at once in different streams. What only another thread can bring is waited for by calls
// that synchronise, and by no other call.
#include "driver.h"

namespace emulator {

static auto& progressed = *new std::condition_variable;
static uint64_t changes;
static auto last_change = std::chrono::steady_clock::now();
static uint64_t last_sequence;
void (*say_who_waits)();

// Handles of streams and events are addresses of these entries; 0 and 1 mean the default stream.
static auto& live_streams = *new std::map<void*, StreamRef>;
static auto& live_events = *new std::map<void*, std::shared_ptr<Event>>;

StreamRef find_stream(void* handle, Context* context) {
    std::lock_guard<std::mutex> lock(state);
    if (context == nullptr) context = current;
    if (handle == nullptr || handle == (void*)1) return context == nullptr ? nullptr : context->default_stream;
    const auto found = live_streams.find(handle);
    return found == live_streams.end() ? nullptr : found->second;
}
static std::shared_ptr<Event> find_event(void* handle) {
    std::lock_guard<std::mutex> lock(state);
    const auto found = live_events.find(handle);
    return found == live_events.end() ? nullptr : found->second;
}

// ---- running

void changed() {
    changes++;
    last_change = std::chrono::steady_clock::now();
    progressed.notify_all();
}

void notice_silence() {
    static uint64_t said_at = ~0ull;
    const std::chrono::duration<double> silence = std::chrono::steady_clock::now() - last_change;
    if (say_who_waits == nullptr || said_at == changes || silence.count() < settings().silence) return;
    said_at = changes;
    say_who_waits();
}

void wait_for_change(std::unique_lock<std::mutex>& lock) {
    const uint64_t before = changes;
    while (changes == before) {
        progressed.wait_for(lock, std::chrono::milliseconds(500));
        notice_silence();
    }
}

static bool reached(const StreamRef& stream, uint64_t sequence) {
    return stream->completed >= sequence || (stream->queue.empty() && !stream->busy);
}

// Runs the operation at the head of a stream. `state` is held before and after.
static void run_head(std::unique_lock<std::mutex>& lock, const StreamRef& stream) {
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    Context& context = *stream->context;
    CUresult result = success;
    if (operation.run && context.error == success) {
        stream->busy = true;
        lock.unlock();
        result = operation.run();
        operation = {operation.sequence, nullptr, nullptr};
        lock.lock();
        stream->busy = false;
    }
    if (result != success && context.error == success) context.error = result;
    stream->completed = operation.sequence;
    changed();
}

// Brings a stream on, and first the streams that its operations wait for, each of these at most once.
// Returns whether anything has changed. `state` is held, but not while operations run.
static bool advance(std::unique_lock<std::mutex>& lock, const StreamRef& stream, uint64_t sequence, std::set<Stream*>& passed) {
    bool progress = false;
    while (stream->completed < sequence && !stream->queue.empty() && !stream->busy) {
        const Operation& head = stream->queue.front();
        if (head.hangs) return progress;
        Attempt attempt;
        if (head.ready && stream->context->error == success && !head.ready(attempt)) {
            progress |= attempt.changed;
            if (attempt.changed) changed();
            if (!passed.insert(stream.get()).second) return progress;
            bool further = false;
            for (const Need& need : attempt.needs) further |= advance(lock, need.stream, need.sequence, passed);
            if (!further) return progress;
            progress = true;
            continue;
        }
        run_head(lock, stream);
        progress = true;
    }
    return progress;
}

static std::vector<StreamRef> all_streams() {
    std::vector<StreamRef> all;
    for (int device = 0; device < most_devices; device++) {
        const Context& context = context_of(device);
        all.insert(all.end(), context.streams.begin(), context.streams.end());
        if (context.default_stream) all.push_back(context.default_stream);
    }
    return all;
}
static bool advance_all(std::unique_lock<std::mutex>& lock) {
    bool progress = false;
    for (const StreamRef& stream : all_streams()) {
        std::set<Stream*> passed;
        progress |= advance(lock, stream, stream->last, passed);
    }
    return progress;
}

// As far as this thread can bring the stream. With `state` held.
static void bring(std::unique_lock<std::mutex>& lock, const StreamRef& stream, uint64_t sequence) {
    for (bool progress = true; progress && !reached(stream, sequence);) {
        std::set<Stream*> passed;
        progress = advance(lock, stream, sequence, passed);
    }
    if (!settings().late_streams) {
        while (advance_all(lock)) {}
    }
}

CUresult run_until(const StreamRef& stream, uint64_t sequence) {
    std::unique_lock<std::mutex> lock(state);
    while (true) {
        const uint64_t before = changes;
        bring(lock, stream, sequence);
        if (reached(stream, sequence)) return stream->context->error;
        if (changes == before) wait_for_change(lock);
    }
}

bool try_until(const StreamRef& stream, uint64_t sequence) {
    std::unique_lock<std::mutex> lock(state);
    bring(lock, stream, sequence);
    if (reached(stream, sequence)) return true;
    notice_silence();
    return false;
}

void run_early() {
    if (settings().late_streams) return;
    std::unique_lock<std::mutex> lock(state);
    while (advance_all(lock)) {}
}

// ---- putting in

static uint64_t push(const StreamRef& stream, Operation operation) {
    stream->last = operation.sequence = ++last_sequence;
    stream->queue.push_back(std::move(operation));
    changed();
    return stream->last;
}

void append_wait(const StreamRef& stream, const StreamRef& other, uint64_t sequence) {
    if (other->completed >= sequence || stream == other) return;
    push(stream, {0, nullptr, [other, sequence](Attempt& attempt) {
        if (reached(other, sequence)) return true;
        attempt.needs.push_back({other, sequence});
        return false;
    }});
}

// The order that the default stream keeps with all streams that do not opt out.
static void keep_default_order(const StreamRef& stream) {
    Context& context = *stream->context;
    if (stream == context.default_stream) {
        for (const StreamRef& other : context.streams) {
            if (other->waits_for_default) append_wait(stream, other, other->last);
        }
    } else if (stream->waits_for_default) {
        append_wait(stream, context.default_stream, context.default_stream->last);
    }
}

uint64_t append(const StreamRef& stream, Operation operation) {
    keep_default_order(stream);
    return push(stream, std::move(operation));
}

static CUresult enqueue(const StreamRef& stream, Operation operation) {
    {
        std::lock_guard<std::mutex> lock(state);
        append(stream, std::move(operation));
    }
    if (settings().late_streams) return success;
    run_early();
    return stream->context->error;
}
CUresult enqueue(const StreamRef& stream, std::function<CUresult()> run) { return enqueue(stream, Operation{0, std::move(run), nullptr}); }
CUresult enqueue_hang(const StreamRef& stream) { return enqueue(stream, Operation{0, nullptr, nullptr, true}); }

// ---- waiting

CUresult finish(const StreamRef& stream) {
    uint64_t last;
    {
        std::lock_guard<std::mutex> lock(state);
        keep_default_order(stream);
        last = stream->last;
    }
    return run_until(stream, last);
}

CUresult finish(Context& context) {
    std::vector<Need> all;
    {
        std::lock_guard<std::mutex> lock(state);
        for (const StreamRef& stream : context.streams) all.push_back({stream, stream->last});
        if (context.default_stream) all.push_back({context.default_stream, context.default_stream->last});
    }
    for (const Need& need : all) run_until(need.stream, need.sequence);
    std::lock_guard<std::mutex> lock(state);
    auto& streams = context.streams;
    for (size_t i = 0; i < streams.size();) {
        if (streams[i]->destroyed && streams[i]->queue.empty() && !streams[i]->busy) streams.erase(streams.begin() + (ptrdiff_t)i);
        else i++;
    }
    return context.error;
}

void free_streams_of(Context& context) {
    std::lock_guard<std::mutex> lock(state);
    for (const StreamRef& stream : context.streams) live_streams.erase(stream.get());
    for (auto next = live_events.begin(); next != live_events.end();) {
        const auto event = next++;
        if (event->second->context == &context) live_events.erase(event);
    }
    context.streams.clear();
    context.default_stream.reset();
}

static void count_synchronisation(const char* call) {
    count_on(current->device, "synchronisations");
    trace("synchronise", "\"call\":" + json_text(call));
}

}  // namespace emulator

using namespace emulator;

API CUresult cuStreamCreate(void** handle, unsigned flags) {
    if (const CUresult error = usable()) return error;
    if (flags > 1) return invalid_value;
    auto stream = std::make_shared<Stream>();
    stream->context = current;
    stream->waits_for_default = flags == 0;
    std::lock_guard<std::mutex> lock(state);
    current->streams.push_back(stream);
    live_streams[stream.get()] = stream;
    *handle = stream.get();
    return success;
}
API CUresult cuStreamCreateWithPriority(void** handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }

// What is in the stream is still done, at some time.
API CUresult cuStreamDestroy_v2(void* handle) {
    std::lock_guard<std::mutex> lock(state);
    const auto found = live_streams.find(handle);
    if (found == live_streams.end()) return invalid_handle;
    found->second->destroyed = true;
    live_streams.erase(found);
    return success;
}

API CUresult cuStreamSynchronize(void* handle) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    count_synchronisation("cuStreamSynchronize");
    return finish(stream);
}

// A stream that is only ever asked gets on with its work at every third question.
API CUresult cuStreamQuery(void* handle) {
    static unsigned queries;
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    uint64_t last;
    {
        std::lock_guard<std::mutex> lock(state);
        if (reached(stream, stream->last)) return stream->context->error;
        if (++queries % 3 != 0) return not_ready;
        keep_default_order(stream);
        last = stream->last;
    }
    return try_until(stream, last) ? (CUresult)stream->context->error : not_ready;
}

API CUresult cuStreamGetCtx(void* handle, Context** context) {
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    *context = stream->context;
    return success;
}

API CUresult cuStreamIsCapturing(void*, int* status) {
    *status = 0;
    return success;
}

API CUresult cuCtxSynchronize() {
    if (const CUresult error = usable()) return error;
    count_synchronisation("cuCtxSynchronize");
    return finish(*current);
}

API CUresult cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    return enqueue(stream, [=] {
        function(data);
        return success;
    });
}

API int emulator_enqueue(void* handle, const char* label, void (*run)(void*), void (*drop)(void*), void* data) {
    std::shared_ptr<void> owned(data, drop);
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    count_on(current->device, label);
    trace(label);
    return enqueue(stream, [=] {
        run(owned.get());
        return success;
    });
}

// ---- events

API CUresult cuEventCreate(void** handle, unsigned flags) {
    if (const CUresult error = usable()) return error;
    if (flags > 7) return invalid_value;
    auto event = std::make_shared<Event>();
    event->context = current;
    event->timed = !(flags & 2);
    std::lock_guard<std::mutex> lock(state);
    live_events[event.get()] = event;
    *handle = event.get();
    return success;
}

API CUresult cuEventDestroy_v2(void* handle) {
    std::lock_guard<std::mutex> lock(state);
    return live_events.erase(handle) ? success : invalid_handle;
}

API CUresult cuEventRecord(void* handle, void* stream_handle) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(stream_handle);
    const std::shared_ptr<Event> event = find_event(handle);
    if (!stream || !event) return invalid_handle;
    if (stream->context != event->context) return refuse(invalid_handle, "cuEventRecord: event and stream belong to different contexts");
    {
        std::lock_guard<std::mutex> lock(state);
        event->sequence = append(stream, {0, [event] {
            event->time = std::chrono::steady_clock::now();
            return success;
        }, nullptr});
        event->stream = stream;
        event->queries = 0;
    }
    run_early();
    return settings().late_streams ? success : (CUresult)stream->context->error;
}
API CUresult cuEventRecordWithFlags(void* handle, void* stream, unsigned) { return cuEventRecord(handle, stream); }

API CUresult cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(stream_handle);
    const std::shared_ptr<Event> event = find_event(handle);
    if (!stream || !event) return invalid_handle;
    {
        std::lock_guard<std::mutex> lock(state);
        if (event->stream) append_wait(stream, event->stream, event->sequence);
    }
    run_early();
    return success;
}

// What an event says belongs to the record that was its last when it was asked.
static Need last_record(const Event& event) {
    std::lock_guard<std::mutex> lock(state);
    return {event.stream, event.sequence};
}

API CUresult cuEventSynchronize(void* handle) {
    if (const CUresult error = usable()) return error;
    const std::shared_ptr<Event> event = find_event(handle);
    if (!event) return invalid_handle;
    count_synchronisation("cuEventSynchronize");
    const Need record = last_record(*event);
    return record.stream ? run_until(record.stream, record.sequence) : success;
}

API CUresult cuEventQuery(void* handle) {
    if (const CUresult error = usable()) return error;
    const std::shared_ptr<Event> event = find_event(handle);
    if (!event) return invalid_handle;
    const Need record = last_record(*event);
    if (!record.stream) return success;
    {
        std::lock_guard<std::mutex> lock(state);
        if (reached(record.stream, record.sequence)) return record.stream->context->error;
        if (++event->queries % 3 != 0) return not_ready;
    }
    return try_until(record.stream, record.sequence) ? (CUresult)record.stream->context->error : not_ready;
}

API CUresult cuEventElapsedTime(float* milliseconds, void* start_handle, void* end_handle) {
    if (const CUresult error = usable()) return error;
    const std::shared_ptr<Event> start = find_event(start_handle), end = find_event(end_handle);
    if (!start || !end || !start->timed || !end->timed) return invalid_handle;
    std::lock_guard<std::mutex> lock(state);
    for (const auto& event : {start, end}) {
        if (!event->stream) return invalid_handle;
        if (event->stream->completed < event->sequence) return not_ready;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return success;
}
