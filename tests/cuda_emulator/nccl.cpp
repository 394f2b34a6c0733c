// The pretend libnccl.so: communicators whose ranks are threads of this process.
//
// A group is one item of its stream. It is reached when it stands at the head of its stream and all that
// its communicator queued before has ended; an operation ends when the group of its partner has been
// reached too, and never before: nothing is buffered. So a wrong order hangs, as it may on GPUs.
#include "driver.h"
#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

using namespace emulator;

namespace {

typedef int Result;
enum : Result {
    nccl_success = 0,
    system_error = 2,
    invalid_argument = 4,
    invalid_usage = 5,
    remote_error = 6,
    in_progress = 7,
};

// ---- the last error, for ncclGetLastError

char last_error[2048];
std::mutex last_error_mutex;

__attribute__((format(printf, 2, 3))) Result explain(Result code, const char* format, ...) {
    std::lock_guard<std::mutex> lock(last_error_mutex);
    va_list values;
    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    say("NCCL: %s", last_error);
    return code;
}

// ---- communicators and what is queued in them

const size_t type_bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
const char* const type_names[] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16"};

enum class Kind { send, receive, all_reduce };
struct Part {
    Kind kind;
    const void* from;
    void* to;
    size_t count;
    int type, reduction, peer;
    uint64_t number = 0;  // of this kind between these ranks
    bool done = false;

    size_t bytes() const { return count * type_bytes[type]; }
};
std::string text(const Part& part) {
    const std::string amount = std::to_string(part.count) + " " + type_names[part.type];
    if (part.kind == Kind::all_reduce) return "all_reduce " + std::to_string(part.number) + " of " + amount;
    return (part.kind == Kind::send ? "send of " : "receive of ") + amount + (part.kind == Kind::send ? " to rank " : " from rank ") + std::to_string(part.peer);
}

struct Communicator;
struct Group {
    Communicator* communicator;
    std::vector<Part> parts;
    std::vector<StreamRef> streams;  // the first is where it runs, the others wait for it
    uint64_t sequence = 0;
    bool reached = false, done = false;
    bool lost = false;  // never matched, as a planned failure wants it
};
using GroupRef = std::shared_ptr<Group>;

struct World {
    int number, ranks;
    std::vector<Communicator*> members;  // null until a rank has arrived
    Result refused = nccl_success;       // why it never gets ready
    bool deadlock_said = false;
    // What ranks have called for so far: (from, to), by either side, and who has called for a collective.
    std::set<std::pair<int, int>> sending, receiving;
    std::set<int> collecting;

    bool complete() const { return std::find(members.begin(), members.end(), nullptr) == members.end(); }
};

// What a handle points to; never freed, so that a stale handle is recognised.
struct Communicator {
    World* world;
    int rank;
    Context* context;
    bool blocking;
    Result error = nccl_success;    // asynchronous
    bool aborted = false, finalised = false, gone = false;
    std::vector<GroupRef> unlaunched;  // of a group call that is still in progress
    int polls_to_go = 0;               // questions after which that group call is done
    std::deque<GroupRef> queue;        // only the first can be reached
    std::map<int, uint64_t> sends, receives;
    uint64_t collectives = 0;

    bool ready() const { return world->complete() && world->refused == nccl_success; }
    bool alive() const { return !aborted && context->error == success; }
};
auto& worlds = *new std::vector<World*>;
auto& handles = *new std::set<Communicator*>;

std::string name(const Communicator& c) { return "rank " + std::to_string(c.rank) + " of communicator " + std::to_string(c.world->number); }

void fail_all(World& world, Result code, int at = -1) {
    for (Communicator* c : world.members) {
        if (c != nullptr && c->error == nccl_success) c->error = c->rank == at || at < 0 ? code : remote_error;
    }
}

// ---- matching. All with `state` held.

bool is_partner(const Part& mine, int my_rank, const Part& other, int other_rank) {
    if (other.number != mine.number) return false;
    if (mine.kind == Kind::all_reduce) return other.kind == Kind::all_reduce;
    const Kind wanted = mine.kind == Kind::send ? Kind::receive : Kind::send;
    return other.kind == wanted && mine.peer == other_rank && other.peer == my_rank;
}

Group* reached_group(const World& world, int rank) {
    const Communicator& c = *world.members[(size_t)rank];
    if (!c.alive() || c.queue.empty()) return nullptr;
    Group& first = *c.queue.front();
    return first.reached && !first.lost ? &first : nullptr;
}
Part* reached_partner(const World& world, const Part& mine, int my_rank, int rank) {
    Group* group = reached_group(world, rank);
    if (group == nullptr) return nullptr;
    for (Part& other : group->parts) {
        if (!other.done && is_partner(mine, my_rank, other, rank)) return &other;
    }
    return nullptr;
}
std::vector<int> partners(const World& world, const Part& part, int rank) {
    if (part.kind != Kind::all_reduce) return {part.peer};
    std::vector<int> others;
    for (int r = 0; r < world.ranks; r++) {
        if (r != rank) others.push_back(r);
    }
    return others;
}

template <class T> T reduced(T a, T b, int reduction) {
    switch (reduction) {
        case 0: return (T)(a + b);
        case 1: return (T)(a * b);
        case 2: return std::max(a, b);
        default: return std::min(a, b);
    }
}
template <class T> void reduce(std::vector<Part*>& parts) {
    const size_t count = parts[0]->count;
    std::vector<T> sum((const T*)parts[0]->from, (const T*)parts[0]->from + count);
    for (size_t r = 1; r < parts.size(); r++) {
        for (size_t i = 0; i < count; i++) sum[i] = reduced(sum[i], ((const T*)parts[r]->from)[i], parts[r]->reduction);
    }
    for (Part* part : parts) memcpy(part->to, sum.data(), count * sizeof(T));
}
// Rounds after each rank, as a ring does.
void reduce_halves(std::vector<Part*>& parts) {
    for (size_t i = 0; i < parts[0]->count; i++) {
        float sum = _cvtsh_ss(((const uint16_t*)parts[0]->from)[i]);
        for (size_t r = 1; r < parts.size(); r++) {
            sum = _cvtsh_ss(_cvtss_sh(reduced(sum, _cvtsh_ss(((const uint16_t*)parts[r]->from)[i]), parts[r]->reduction), _MM_FROUND_TO_NEAREST_INT));
        }
        for (Part* part : parts) ((uint16_t*)part->to)[i] = _cvtss_sh(sum, _MM_FROUND_TO_NEAREST_INT);
    }
}

// `parts` are those of all ranks that belong together, in the order of ranks.
void carry_out(World& world, std::vector<Part*>& parts) {
    for (const Part* part : parts) {
        if (part->count == parts[0]->count && part->type == parts[0]->type && part->reduction == parts[0]->reduction) continue;
        explain(invalid_usage, "communicator %d: %s does not fit %s", world.number, text(*parts[0]).c_str(), text(*part).c_str());
        return fail_all(world, invalid_usage);
    }
    for (Part* part : parts) part->done = true;
    if (parts[0]->kind != Kind::all_reduce) {
        const bool first_sends = parts[0]->kind == Kind::send;
        memmove(parts[first_sends]->to, parts[!first_sends]->from, parts[0]->bytes());
        return;
    }
    switch (parts[0]->type) {
        case 0: return reduce<int8_t>(parts);
        case 1: return reduce<uint8_t>(parts);
        case 2: return reduce<int32_t>(parts);
        case 3: return reduce<uint32_t>(parts);
        case 4: return reduce<int64_t>(parts);
        case 5: return reduce<uint64_t>(parts);
        case 6: return reduce_halves(parts);
        case 7: return reduce<float>(parts);
        default: return reduce<double>(parts);
    }
}

void end(Group& group) {
    Communicator& c = *group.communicator;
    group.done = true;
    const auto place = std::find_if(c.queue.begin(), c.queue.end(), [&](const GroupRef& g) { return g.get() == &group; });
    if (place != c.queue.end()) c.queue.erase(place);
    nccl_groups_open[c.context->device]--;
}

// Carries out what the group that was just reached makes possible.
void match(World& world, int rank) {
    Group* group = reached_group(world, rank);
    if (group == nullptr) return;
    for (Part& part : group->parts) {
        if (part.done || world.members[(size_t)rank]->error != nccl_success) continue;
        std::vector<Part*> together;
        if (part.kind == Kind::all_reduce) {
            for (int r = 0; r < world.ranks; r++) together.push_back(r == rank ? &part : reached_partner(world, part, rank, r));
        } else {
            together = {&part, reached_partner(world, part, rank, part.peer)};
        }
        if (std::find(together.begin(), together.end(), nullptr) == together.end()) carry_out(world, together);
    }
    for (Communicator* c : world.members) {
        if (c->queue.empty()) continue;
        const GroupRef first = c->queue.front();
        if (first->reached && std::all_of(first->parts.begin(), first->parts.end(), [](const Part& p) { return p.done; })) end(*first);
    }
}

// Two ranks are connected at their first transfer, each way, and all ranks at the first collective: the call
// is not done before all of them have made theirs.
void call_for(const Group& group) {
    World& world = *group.communicator->world;
    const int rank = group.communicator->rank;
    for (const Part& part : group.parts) {
        if (part.kind == Kind::send) world.sending.insert({rank, part.peer});
        if (part.kind == Kind::receive) world.receiving.insert({part.peer, rank});
        if (part.kind == Kind::all_reduce) world.collecting.insert(rank);
    }
    changed();
}
bool connected(const Group& group, const Part& part) {
    const World& world = *group.communicator->world;
    const int rank = group.communicator->rank;
    if (part.kind == Kind::send) return world.receiving.count({rank, part.peer}) > 0;
    if (part.kind == Kind::receive) return world.sending.count({part.peer, rank}) > 0;
    return world.collecting.size() == (size_t)world.ranks;
}
bool connected(const Group& group) {
    return std::all_of(group.parts.begin(), group.parts.end(), [&](const Part& part) { return connected(group, part); });
}

// The ranks that must end what they are at before `rank` can end what it is at.
std::set<int> waits_for(const World& world, int rank) {
    std::set<int> ranks;
    if (const Group* group = reached_group(world, rank)) {
        for (const Part& part : group->parts) {
            if (part.done) continue;
            for (const int r : partners(world, part, rank)) {
                if (reached_group(world, r) != nullptr && reached_partner(world, part, rank, r) == nullptr) ranks.insert(r);
            }
        }
    }
    return ranks;
}
std::string situation(const Communicator& c) {
    std::string line = name(c) + " (device " + std::to_string(c.context->device) + ") ";
    if (c.aborted) return line + "has aborted";
    if (c.queue.empty() && c.unlaunched.empty()) return line + "has nothing queued";
    const Group& first = c.queue.empty() ? *c.unlaunched.front() : *c.queue.front();
    const bool is_connected = connected(first);
    line += !is_connected ? "waits to be connected for " : c.queue.empty() ? "was not asked whether it has launched " : first.reached ? "waits in " : "has not come to ";
    bool more = false;
    for (const Part& part : first.parts) {
        if (part.done || (!is_connected && connected(first, part))) continue;
        line += (more ? " and " : "") + text(part);
        more = true;
    }
    return line + (first.lost ? " (never ends, as EMULATOR_FAIL says)" : "");
}
std::string situation(const World& world) {
    std::string all;
    for (const Communicator* c : world.members) {
        if (c != nullptr) all += (all.empty() ? "" : "; ") + situation(*c);
    }
    return all;
}

// A circle of ranks none of which can go on before the next.
void notice_deadlock(World& world) {
    if (world.deadlock_said) return;
    for (int start = 0; start < world.ranks; start++) {
        std::set<int> met;
        std::vector<int> left = {start};
        while (!left.empty()) {
            const int rank = left.back();
            left.pop_back();
            for (const int next : waits_for(world, rank)) {
                if (next == start) {
                    world.deadlock_said = true;
                    count("nccl_deadlocks");
                    explain(nccl_success, "deadlock: %s", situation(world).c_str());
                    return;
                }
                if (met.insert(next).second) left.push_back(next);
            }
        }
    }
}

void say_waiting_groups() {
    for (const World* world : worlds) {
        const bool joining = !world->complete() && std::any_of(world->members.begin(), world->members.end(), [](const Communicator* c) { return c != nullptr && !c->gone; });
        if (joining) {
            std::string missing;
            for (int r = 0; r < world->ranks; r++) {
                if (world->members[(size_t)r] == nullptr) missing += " " + std::to_string(r);
            }
            say("NCCL: nothing has moved for %g s: communicator %d still waits for ranks%s", settings().silence, world->number, missing.c_str());
        }
        const bool waits = std::any_of(world->members.begin(), world->members.end(), [](const Communicator* c) { return c != nullptr && (!c->unlaunched.empty() || (!c->queue.empty() && c->queue.front()->reached)); });
        if (waits) say("NCCL: nothing has moved for %g s: %s", settings().silence, situation(*world).c_str());
    }
}

// Whether the group has ended; called when it stands at the head of its stream.
bool has_ended(const GroupRef& group, Attempt& attempt) {
    Communicator& c = *group->communicator;
    World& world = *c.world;
    if (group->done) return true;
    if (c.queue.front() != group) {
        attempt.needs.push_back({c.queue.front()->streams[0], c.queue.front()->sequence});
        return false;
    }
    if (!group->reached) {
        group->reached = attempt.changed = true;
        for (size_t i = 0; i < group->parts.size(); i++) {
            if (planned_failure("nccl_hang", c.rank)) group->lost = true;
            if (!planned_failure("nccl_error", c.rank)) continue;
            group->lost = true;
            explain(nccl_success, "%s: %s fails, as EMULATOR_FAIL says", name(c).c_str(), text(group->parts[i]).c_str());
            fail_all(world, system_error, c.rank);
        }
        match(world, c.rank);
        if (group->done) return true;
        notice_deadlock(world);
    }
    // What the partners have queued, and not yet come to.
    for (const Part& part : group->parts) {
        if (part.done) continue;
        for (const int r : partners(world, part, c.rank)) {
            for (const GroupRef& other : world.members[(size_t)r]->queue) {
                const bool meant = std::any_of(other->parts.begin(), other->parts.end(), [&](const Part& p) { return is_partner(part, c.rank, p, r); });
                if (meant && !other->reached) attempt.needs.push_back({other->streams[0], other->sequence});
            }
        }
    }
    return false;
}

// ---- groups

void launch(const GroupRef& group) {
    Communicator& c = *group->communicator;
    for (Part& part : group->parts) {
        if (part.kind == Kind::send) part.number = c.sends[part.peer]++;
        if (part.kind == Kind::receive) part.number = c.receives[part.peer]++;
        if (part.kind == Kind::all_reduce) part.number = c.collectives++;
        if (part.kind != Kind::receive) count_on(c.context->device, "nccl_bytes", (long long)part.bytes());
    }
    count_on(c.context->device, "nccl_groups");
    trace("nccl_group", "\"rank\":" + std::to_string(c.rank) + ",\"parts\":" + std::to_string(group->parts.size()));
    const StreamRef& stream = group->streams[0];
    for (const StreamRef& other : group->streams) append_wait(stream, other, other->last);
    c.queue.push_back(group);
    nccl_groups_open[c.context->device]++;
    group->sequence = append(stream, {0, nullptr, [group](Attempt& attempt) { return has_ended(group, attempt); }});
    for (const StreamRef& other : group->streams) append_wait(other, stream, group->sequence);
}

struct GroupCall {
    int depth = 0;
    Result error = nccl_success;
    std::vector<GroupRef> groups;             // one per communicator
    std::vector<Communicator*> initialising;  // blocking ones
};
thread_local GroupCall call;

Result wait_until_ready(Communicator& c) {
    std::unique_lock<std::mutex> lock(state);
    while (!c.ready() && c.world->refused == nccl_success && !c.aborted) wait_for_change(lock);
    return c.aborted ? invalid_usage : c.world->refused;
}

Result end_group_call() {
    GroupCall ended;
    std::swap(ended, call);
    Result result = ended.error;
    for (Communicator* c : ended.initialising) {
        if (const Result error = wait_until_ready(*c)) result = error;
    }
    if (result != nccl_success) return result;
    {
        std::unique_lock<std::mutex> lock(state);
        for (const GroupRef& group : ended.groups) call_for(*group);
        for (const GroupRef& group : ended.groups) {
            Communicator& c = *group->communicator;
            if (!c.blocking) {
                result = in_progress;
                c.polls_to_go = 2;
                // As on a GPU, where another thread launches it: what the caller puts into the stream before
                // the call is done may come first.
                if (settings().late_streams || !connected(*group)) {
                    c.unlaunched.push_back(group);
                    continue;
                }
            }
            while (!connected(*group) && !c.aborted) wait_for_change(lock);
            if (!c.aborted) launch(group);
        }
    }
    run_early();
    return result;
}

// With `state` held: an error, or success.
Result check_usable(Communicator* c, const char* function) {
    if (handles.count(c) == 0) return explain(invalid_argument, "%s: there is no such communicator", function);
    if (c->finalised) return explain(invalid_usage, "%s: %s has been finalised", function, name(*c).c_str());
    if (c->gone || c->aborted) return explain(invalid_usage, "%s: %s has been aborted or destroyed", function, name(*c).c_str());
    if (c->world->refused != nccl_success) return c->world->refused;
    if (!c->ready() || c->polls_to_go > 0) return explain(invalid_argument, "%s: %s is still in progress: ask ncclCommGetAsyncError until it is not", function, name(*c).c_str());
    if (c->error != nccl_success) return explain(c->error, "%s: %s has failed before", function, name(*c).c_str());
    return nccl_success;
}

Result check_part(const Communicator& c, const char* function, const Part& part, const StreamRef& stream) {
    if (part.type < 0 || part.type > 9) return explain(invalid_argument, "%s: type %d is none", function, part.type);
    if (part.kind == Kind::all_reduce && (part.type == 9 || part.reduction < 0 || part.reduction > 3)) return explain(invalid_argument, "%s: reduction %d of %s is not there", function, part.reduction, type_names[part.type]);
    if (part.peer < 0 || part.peer >= c.world->ranks) return explain(invalid_argument, "%s: there is no rank %d among %d", function, part.peer, c.world->ranks);
    if (!stream) return explain(invalid_argument, "%s: there is no such stream", function);
    if (stream->context != c.context) return explain(invalid_argument, "%s: %s is of device %d, the stream of device %d", function, name(c).c_str(), c.context->device, stream->context->device);
    for (const void* address : {part.from, (const void*)part.to}) {
        const bool needed = part.kind == Kind::all_reduce || (address == part.from) == (part.kind == Kind::send);
        if (!needed || part.count == 0) continue;
        const std::string wrong = wrong_range(c.context->device, (CUdeviceptr)address, part.bytes());
        if (!wrong.empty()) return explain(invalid_argument, "%s: %s", function, wrong.c_str());
    }
    if (part.kind != Kind::all_reduce && part.peer == c.rank && call.depth == 0) return explain(invalid_usage, "%s: to itself, outside of a group", function);
    return nccl_success;
}

Result add(Communicator* c, const char* function, const Part& part, void* stream_handle) {
    Result error;
    {
        std::lock_guard<std::mutex> lock(state);
        error = check_usable(c, function);
    }
    StreamRef stream;
    if (error == nccl_success) {
        stream = find_stream(stream_handle, c->context);
        error = check_part(*c, function, part, stream);
    }
    if (error != nccl_success) {
        if (call.depth > 0) call.error = error;
        return error;
    }
    auto group = std::find_if(call.groups.begin(), call.groups.end(), [&](const GroupRef& g) { return g->communicator == c; });
    if (group == call.groups.end()) {
        call.groups.push_back(std::make_shared<Group>(Group{c, {}, {}}));
        group = call.groups.end() - 1;
    }
    (*group)->parts.push_back(part);
    auto& streams = (*group)->streams;
    if (std::find(streams.begin(), streams.end(), stream) == streams.end()) streams.push_back(stream);
    return call.depth > 0 ? nccl_success : end_group_call();
}

// ---- making communicators

struct UniqueId {
    char bytes[128];
};
struct Config {  // ncclConfig_t, as far as all versions have it
    size_t bytes;
    unsigned magic, version;
    int blocking;
};

bool multi_rank_allowed() {
    const char* asked = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    return settings().multi_rank || (settings().nccl_version >= 23003 && asked != nullptr && strcmp(asked, "1") == 0);
}

// The last rank has arrived: says whether the communicator can be.
void judge(World& world) {
    std::map<int, int> ranks_by_device;
    for (const Communicator* c : world.members) {
        const auto [other, fresh] = ranks_by_device.insert({c->context->device, c->rank});
        if (fresh || multi_rank_allowed()) continue;
        world.refused = explain(invalid_usage, "Duplicate GPU detected : rank %d and rank %d both on device %d (NCCL %d; from 2.30.3 on NCCL_MULTI_RANK_GPU_ENABLE=1 allows it)", other->second, c->rank, c->context->device, settings().nccl_version);
        return fail_all(world, invalid_usage);
    }
}

Result make(Communicator** result, int ranks, const UniqueId& id, int rank, bool blocking) {
    Context* context = current_context();
    if (context == nullptr) return explain(invalid_usage, "ncclCommInitRank: this thread has no context");
    if (ranks < 1 || rank < 0 || rank >= ranks) return explain(invalid_argument, "ncclCommInitRank: rank %d of %d", rank, ranks);
    int number;
    if (sscanf(id.bytes, "emulator %d", &number) != 1) return explain(invalid_argument, "ncclCommInitRank: this id is not from ncclGetUniqueId of this process");
    auto* c = new Communicator{};
    c->rank = rank;
    c->context = context;
    c->blocking = blocking;
    {
        std::lock_guard<std::mutex> lock(state);
        say_who_waits = say_waiting_groups;
        if (number < 0 || (size_t)number >= worlds.size()) return explain(invalid_argument, "ncclCommInitRank: this id is not from ncclGetUniqueId of this process");
        World& world = *worlds[(size_t)number];
        if (world.members.empty()) {
            world.ranks = ranks;
            world.members.resize((size_t)ranks);
        }
        if (world.ranks != ranks) return explain(invalid_argument, "ncclCommInitRank: %d ranks, another one said %d", ranks, world.ranks);
        if (world.members[(size_t)rank] != nullptr) return explain(invalid_usage, "ncclCommInitRank: rank %d is there already", rank);
        c->world = &world;
        handles.insert(c);
        *result = c;
        if (!planned_always("nccl_init_hang", rank)) world.members[(size_t)rank] = c;
        if (world.complete()) judge(world);
        trace("nccl_init", "\"rank\":" + std::to_string(rank) + ",\"device\":" + std::to_string(context->device));
        changed();
    }
    if (!blocking) return in_progress;
    if (call.depth == 0) return wait_until_ready(*c);
    call.initialising.push_back(c);
    return nccl_success;
}

// What the communicator has queued, and where.
std::vector<Need> open_groups(const Communicator& c) {
    std::lock_guard<std::mutex> lock(state);
    std::vector<Need> open;
    for (const GroupRef& group : c.queue) open.push_back({group->streams[0], group->sequence});
    return open;
}

// With `state` held.
void abort(Communicator& c) {
    c.aborted = true;
    while (!c.queue.empty()) end(*c.queue.front());
    c.unlaunched.clear();
    c.polls_to_go = 0;
    changed();
}

Result known(Communicator* c, const char* function) {
    std::lock_guard<std::mutex> lock(state);
    if (handles.count(c) == 0) return explain(invalid_argument, "%s: there is no such communicator", function);
    return c->gone ? explain(invalid_usage, "%s: %s has been aborted or destroyed", function, name(*c).c_str()) : nccl_success;
}

}  // namespace

API Result ncclGetVersion(int* version) {
    if (version == nullptr) return invalid_argument;
    *version = settings().nccl_version;
    return nccl_success;
}

API Result ncclGetUniqueId(UniqueId* id) {
    if (id == nullptr) return invalid_argument;
    std::lock_guard<std::mutex> lock(state);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "emulator %zu", worlds.size());
    auto* world = new World{};
    world->number = (int)worlds.size();
    worlds.push_back(world);
    return nccl_success;
}

API Result ncclCommInitRank(Communicator** result, int ranks, UniqueId id, int rank) { return make(result, ranks, id, rank, true); }

API Result ncclCommInitRankConfig(Communicator** result, int ranks, UniqueId id, int rank, const Config* config) {
    if (config != nullptr && (config->magic != 0xcafebeef || config->bytes < sizeof(Config))) return explain(invalid_argument, "ncclCommInitRankConfig: the config was not initialised with its size, magic 0xcafebeef and version");
    const int undefined = -2147483647 - 1;
    if (config != nullptr && config->blocking != 0 && config->blocking != 1 && config->blocking != undefined) return explain(invalid_argument, "ncclCommInitRankConfig: blocking = %d", config->blocking);
    return make(result, ranks, id, rank, config == nullptr || config->blocking != 0);
}

API Result ncclCommGetAsyncError(Communicator* c, Result* error) {
    if (error == nullptr) return invalid_argument;
    if (const Result unknown = known(c, "ncclCommGetAsyncError")) return unknown;
    {
        std::lock_guard<std::mutex> lock(state);
        *error = c->world->refused != nccl_success ? c->world->refused : c->error;
        if (*error != nccl_success) return nccl_success;
        if (!c->ready()) {
            notice_silence();
            *error = c->aborted ? nccl_success : in_progress;
            return nccl_success;
        }
        const auto& unlaunched = c->unlaunched;
        const bool may = std::all_of(unlaunched.begin(), unlaunched.end(), [](const GroupRef& group) { return connected(*group); });
        if (c->polls_to_go > 1 || (c->polls_to_go == 1 && may)) c->polls_to_go--;
        if (c->polls_to_go == 0) {
            for (const GroupRef& group : unlaunched) launch(group);
            c->unlaunched.clear();
        } else {
            notice_silence();
        }
        if (c->polls_to_go > 0) *error = in_progress;
    }
    run_early();
    if (!c->finalised) return nccl_success;
    for (const Need& need : open_groups(*c)) {
        if (!try_until(need.stream, need.sequence)) *error = in_progress;
    }
    return nccl_success;
}

API Result ncclCommAbort(Communicator* c) {
    if (const Result unknown = known(c, "ncclCommAbort")) return unknown;
    {
        std::lock_guard<std::mutex> lock(state);
        abort(*c);
        c->gone = true;
        trace("nccl_abort", "\"rank\":" + std::to_string(c->rank));
    }
    run_early();
    return nccl_success;
}

// Done when all that was queued has ended; another rank need not have come so far.
API Result ncclCommFinalize(Communicator* c) {
    {
        std::lock_guard<std::mutex> lock(state);
        if (const Result error = check_usable(c, "ncclCommFinalize")) return error;
        c->finalised = true;
        if (!c->blocking) return in_progress;
    }
    for (const Need& need : open_groups(*c)) run_until(need.stream, need.sequence);
    return nccl_success;
}

// Waits for what is queued, unless the communicator has failed.
API Result ncclCommDestroy(Communicator* c) {
    if (const Result unknown = known(c, "ncclCommDestroy")) return unknown;
    bool failed;
    {
        std::lock_guard<std::mutex> lock(state);
        failed = c->error != nccl_success || !c->ready();
        if (failed) abort(*c);
    }
    if (!failed) {
        for (const Need& need : open_groups(*c)) run_until(need.stream, need.sequence);
    }
    std::lock_guard<std::mutex> lock(state);
    c->gone = true;
    return nccl_success;
}

static Result ask(Communicator* c, const char* function, int* value, int (*get)(const Communicator&)) {
    std::lock_guard<std::mutex> lock(state);
    if (const Result error = check_usable(c, function)) return error;
    *value = get(*c);
    return nccl_success;
}
API Result ncclCommCount(Communicator* c, int* count) {
    return ask(c, "ncclCommCount", count, [](const Communicator& c) { return c.world->ranks; });
}
API Result ncclCommUserRank(Communicator* c, int* rank) {
    return ask(c, "ncclCommUserRank", rank, [](const Communicator& c) { return c.rank; });
}
API Result ncclCommCuDevice(Communicator* c, int* device) {
    return ask(c, "ncclCommCuDevice", device, [](const Communicator& c) { return c.context->device; });
}

API Result ncclGroupStart() {
    call.depth++;
    return nccl_success;
}
API Result ncclGroupEnd() {
    if (call.depth == 0) return explain(invalid_usage, "ncclGroupEnd without ncclGroupStart");
    if (call.depth > 1) {
        call.depth--;
        return nccl_success;
    }
    return end_group_call();
}

API Result ncclSend(const void* from, size_t count, int type, int peer, Communicator* c, void* stream) {
    return add(c, "ncclSend", {Kind::send, from, nullptr, count, type, 0, peer}, stream);
}
API Result ncclRecv(void* to, size_t count, int type, int peer, Communicator* c, void* stream) {
    return add(c, "ncclRecv", {Kind::receive, nullptr, to, count, type, 0, peer}, stream);
}
API Result ncclAllReduce(const void* from, void* to, size_t count, int type, int reduction, Communicator* c, void* stream) {
    return add(c, "ncclAllReduce", {Kind::all_reduce, from, to, count, type, reduction, 0}, stream);
}

API const char* ncclGetErrorString(Result result) {
    switch (result) {
        case nccl_success: return "no error";
        case 1: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
        case system_error: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case 3: return "internal error - please report this issue to the NCCL developers";
        case invalid_argument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case invalid_usage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case remote_error: return "remote process exited or there was a network error";
        case in_progress: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}
API const char* ncclGetLastError(Communicator*) { return last_error; }
