// Streams and events. An operation runs as late as events and synchronisation allow: when a host call
// needs it, or a later operation that does. So work that nothing waits for is found not done.
#include "driver.h"

namespace emulator {

static std::condition_variable progressed;
static uint64_t last_sequence;

// Handles of streams and events are addresses of these entries; 0 and 1 mean the default stream.
static std::map<void*, StreamRef> live_streams;
static std::map<void*, std::shared_ptr<Event>> live_events;

StreamRef find_stream(void* handle) {
    std::lock_guard<std::mutex> lock(state);
    if (handle == nullptr || handle == (void*)1) return current == nullptr ? nullptr : current->default_stream;
    const auto found = live_streams.find(handle);
    return found == live_streams.end() ? nullptr : found->second;
}
static std::shared_ptr<Event> find_event(void* handle) {
    std::lock_guard<std::mutex> lock(state);
    const auto found = live_events.find(handle);
    return found == live_events.end() ? nullptr : found->second;
}

CUresult run_until(const StreamRef& stream, uint64_t sequence) {
    std::unique_lock<std::mutex> lock(state);
    while (stream->completed < sequence && !stream->queue.empty()) {
        // Another OS thread at work here runs only operations that were put in before ours, and so
        // waits only for such: these waits cannot form a circle.
        if (stream->busy) {
            progressed.wait(lock);
            continue;
        }
        Operation operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->busy = true;
        CUresult result = stream->context->error;
        if (result == success) {
            lock.unlock();
            result = operation.run();
            operation.run = nullptr;
            lock.lock();
        }
        if (result != success && stream->context->error == success) stream->context->error = result;
        stream->completed = operation.sequence;
        stream->busy = false;
        progressed.notify_all();
    }
    while (stream->completed < sequence && stream->busy) progressed.wait(lock);
    return stream->context->error;
}

// With `state` held.
static uint64_t append(const StreamRef& stream, std::function<CUresult()> run) {
    stream->last = ++last_sequence;
    stream->queue.push_back({stream->last, std::move(run)});
    return stream->last;
}
static void append_wait(const StreamRef& stream, const StreamRef& other, uint64_t sequence) {
    if (other->completed >= sequence || stream == other) return;
    append(stream, [other, sequence] {
        run_until(other, sequence);
        return success;
    });
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

CUresult enqueue(const StreamRef& stream, std::function<CUresult()> run) {
    uint64_t sequence;
    {
        std::lock_guard<std::mutex> lock(state);
        keep_default_order(stream);
        sequence = append(stream, std::move(run));
    }
    return settings().late_streams ? success : run_until(stream, sequence);
}

CUresult finish(const StreamRef& stream) {
    {
        std::lock_guard<std::mutex> lock(state);
        keep_default_order(stream);
    }
    return run_until(stream, stream->last);
}

CUresult finish(Context& context) {
    std::vector<StreamRef> streams;
    {
        std::lock_guard<std::mutex> lock(state);
        streams = context.streams;
        if (context.default_stream) streams.push_back(context.default_stream);
    }
    for (const StreamRef& stream : streams) run_until(stream, stream->last);
    std::lock_guard<std::mutex> lock(state);
    auto& all = context.streams;
    for (size_t i = 0; i < all.size();) {
        if (all[i]->destroyed && all[i]->queue.empty()) all.erase(all.begin() + i);
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
    count("synchronisations");
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
    {
        std::lock_guard<std::mutex> lock(state);
        if (stream->completed < stream->last && ++queries % 3 != 0) return not_ready;
    }
    return finish(stream);
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
    count(label);
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
    uint64_t sequence;
    {
        std::lock_guard<std::mutex> lock(state);
        keep_default_order(stream);
        sequence = append(stream, [event] {
            event->time = std::chrono::steady_clock::now();
            return success;
        });
        event->stream = stream;
        event->sequence = sequence;
        event->queries = 0;
    }
    return settings().late_streams ? success : run_until(stream, sequence);
}
API CUresult cuEventRecordWithFlags(void* handle, void* stream, unsigned) { return cuEventRecord(handle, stream); }

API CUresult cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
    if (const CUresult error = usable()) return error;
    const StreamRef stream = find_stream(stream_handle);
    const std::shared_ptr<Event> event = find_event(handle);
    if (!stream || !event) return invalid_handle;
    std::lock_guard<std::mutex> lock(state);
    if (event->stream) append_wait(stream, event->stream, event->sequence);
    return success;
}

API CUresult cuEventSynchronize(void* handle) {
    if (const CUresult error = usable()) return error;
    const std::shared_ptr<Event> event = find_event(handle);
    if (!event) return invalid_handle;
    count_synchronisation("cuEventSynchronize");
    return event->stream ? run_until(event->stream, event->sequence) : success;
}

API CUresult cuEventQuery(void* handle) {
    if (const CUresult error = usable()) return error;
    const std::shared_ptr<Event> event = find_event(handle);
    if (!event) return invalid_handle;
    {
        std::lock_guard<std::mutex> lock(state);
        if (!event->stream || event->stream->completed >= event->sequence) return success;
        if (++event->queries % 3 != 0) return not_ready;
    }
    return run_until(event->stream, event->sequence);
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
