#include "block.h"
#include "traffic.h"
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <thread>

namespace emulator {

__thread Thread* current_thread;
__thread Geometry current_geometry;
__thread Worker* worker;

uint64_t Worker::random() {
    uint64_t& x = random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x * 0x2545F4914F6CDD1Dull >> 16;
}

unsigned char fresh_byte(const Schedule& schedule, uint64_t salt) {
    switch (schedule.order) {
        case Order::forward: return 0xff;  // NaN as half and as float
        case Order::reverse: return 0;
        default: return (unsigned char)((schedule.seed * 0x9E3779B97F4A7C15ull + salt * 0xD1B54A32D192ED03ull) >> 32);
    }
}

// ---- switching between the threads of a block

static void fiber_entry();

static void start(Fiber& fiber) {
    fiber.started = true;
    if (thread_sanitizer()) {
        auto& threads = worker->race_threads[worker->turn];
        while (threads.size() <= fiber.linear) threads.push_back(__tsan_create_fiber(0));  // takes long
        fiber.side.race = threads[fiber.linear];
        fiber.stack = 2 * fiber.linear + worker->turn;
    } else if (worker->free_stacks.empty()) {
        fiber.stack = worker->stacks_made++;
    } else {
        fiber.stack = worker->free_stacks.back();
        worker->free_stacks.pop_back();
    }
    char* stack = worker->stacks.at(fiber.stack);
    prepare(fiber.side, stack, worker->stacks.bytes(), fiber_entry);
}

// The lane of the warp that comes after `lane` in the order, or -1: none can run.
static int next_lane(const Warp& warp, unsigned lane, Order order) {
    if (warp.ready == 0) return -1;
    if (order == Order::reverse) {
        const unsigned below = warp.ready & ((1u << lane) - 1);
        return 31 - __builtin_clz(below != 0 ? below : warp.ready);
    }
    const unsigned above = warp.ready & ~((2u << lane) - 1);
    return __builtin_ctz(above != 0 ? above : warp.ready);
}

// Lets others run, until somebody resumes this thread.
static void yield(bool last = false) {
    Fiber& fiber = this_fiber();
    if (worker->direct && !last) {
        const int lane = next_lane(*fiber.warp, fiber.lane, worker->schedule.order);
        if (lane == (int)fiber.lane) return;
        if (lane >= 0) {
            Fiber& next = *fiber.warp->lanes[lane];
            if (!next.started) start(next);
            current_thread = &next;
            switch_sides(fiber.side, next.side);
            return;
        }
    }
    switch_sides(fiber.side, worker->own, last);
}

static void set_ready(Fiber& fiber) {
    fiber.state = State::ready;
    fiber.warp->ready |= 1u << fiber.lane;
}
static void block(Fiber& fiber, State state) {
    fiber.state = state;
    fiber.warp->ready &= ~(1u << fiber.lane);
}

static void fiber_entry() {
    arrived(worker->own);
    race_acquire(&worker->start);
    worker->launch->kernel->call(worker->launch->arguments);
    Fiber& fiber = this_fiber();
    if (!fiber.copies.empty()) fail("a thread exits with cp.async copies that it never waited for");
    race_release(&worker->end);
    block(fiber, State::done);
    fiber.warp->gone |= 1u << fiber.lane;
    worker->alive--;
    yield(true);
    abort();  // nobody resumes a thread that is done
}

// Runs the thread, and those that it hands over to, until one has nobody to hand over to.
static void resume(Fiber& fiber) {
    if (!fiber.started) start(fiber);
    current_thread = &fiber;
    worker->inside = 1;
    switch_sides(worker->own, fiber.side);
    worker->inside = 0;
    const Fiber& back = this_fiber();
    if (back.state == State::done && !thread_sanitizer()) worker->free_stacks.push_back(back.stack);
}

void fail(const char* format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    const uint3 block = current_geometry.block, thread = current_thread->index;
    char place[128];
    snprintf(place, sizeof place, " [block (%u,%u,%u) thread (%u,%u,%u)]", block.x, block.y, block.z, thread.x, thread.y, thread.z);
    worker->error = std::string(text) + place;
    switch_sides(this_fiber().side, worker->own);
    abort();  // the block has ended: its threads are not resumed
}

void preemption_point() {
    if (worker->schedule.order == Order::random && (worker->random() & 3) == 0) yield();
}

void* dynamic_shared() { return worker->dynamic; }

// ---- barriers and meetings of a warp

void sync_block(Site site) {
    Fiber& fiber = this_fiber();
    fiber.site = site;
    block(fiber, State::at_barrier);
    worker->at_barrier++;
    char* ordered = &worker->barriers[worker->turn][worker->barrier_generation & 1];
    race_release(ordered);
    yield();
    race_acquire(ordered);
}

static void carry_out_shuffle(Warp& warp, unsigned mask) {
    uint64_t words[32];
    memcpy(words, warp.words, sizeof words);
    for (unsigned lane = 0; lane < 32; lane++) {
        const unsigned source = warp.sources[lane] & 31;
        if (!(mask >> lane & 1)) continue;
        if (!(mask >> source & 1)) fail("%s:%d: a shuffle reads lane %u, which its mask %08x does not name", this_fiber().site.file, this_fiber().site.line, source, mask);
        warp.words[lane] = words[source];
    }
}

static void carry_out_ballot(Warp& warp, unsigned mask) {
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) votes |= warp.words[lane] << lane;
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) warp.words[lane] = votes;
    }
}

static void carry_out(Meeting meeting, Warp& warp, unsigned mask) {
    switch (meeting) {
        case Meeting::shuffle: carry_out_shuffle(warp, mask); break;
        case Meeting::ballot: carry_out_ballot(warp, mask); break;
        case Meeting::mma_k16:
        case Meeting::mma_k8:
        case Meeting::ldmatrix:
        case Meeting::ldmatrix_transposed: carry_out_tensor_core(meeting, warp); break;
        default: break;
    }
}

// Whoever comes must agree with a lane that it names and that waits already.
static void check_agreement(const Fiber& fiber, const Fiber& other) {
    if (other.mask == fiber.mask && other.meeting == fiber.meeting && other.site.line == fiber.site.line) return;
    fail("divergent warp operation: lane %u is at %s:%d (mask %08x), lane %u at %s:%d (mask %08x)", fiber.lane, fiber.site.file, fiber.site.line, fiber.mask, other.lane, other.site.file, other.site.line, other.mask);
}

void meet(Meeting meeting, unsigned mask, Site site) {
    Fiber& fiber = this_fiber();
    Warp& warp = *fiber.warp;
    if (!(mask >> fiber.lane & 1)) fail("%s:%d: lane %u takes part in a warp operation whose mask %08x does not name it", site.file, site.line, fiber.lane, mask);
    if (const unsigned gone = mask & warp.gone) fail("%s:%d: the mask %08x names lane %d, which has exited or does not exist", site.file, site.line, mask, __builtin_ctz(gone));
    fiber.meeting = meeting;
    fiber.mask = mask;
    fiber.site = site;
    if (meeting == Meeting::sync) race_release(&warp.ordered[worker->turn]);
    if (const unsigned others = mask & warp.waiting) check_agreement(fiber, *warp.lanes[__builtin_ctz(others)]);
    warp.waiting |= 1u << fiber.lane;
    if (mask & ~warp.waiting) {
        block(fiber, State::in_warp);
        yield();
    } else {
        warp.waiting &= ~mask;
        carry_out(meeting, warp, mask);
        for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) warp.lanes[__builtin_ctz(lanes)]->state = State::ready;
        warp.ready |= mask;
        if (worker->schedule.order == Order::random && (worker->random() & 1)) yield();
    }
    if (meeting == Meeting::sync) race_acquire(&warp.ordered[worker->turn]);
}

void sync_warp(unsigned mask, Site site) { meet(Meeting::sync, mask, site); }

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, Site site) {
    Fiber& fiber = this_fiber();
    uint64_t& word = fiber.warp->words[fiber.lane];
    word = value;
    fiber.warp->sources[fiber.lane] = source;
    meet(Meeting::shuffle, mask, site);
    return word;
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
    Fiber& fiber = this_fiber();
    uint64_t& word = fiber.warp->words[fiber.lane];
    word = predicate;
    meet(Meeting::ballot, mask, site);
    return (unsigned)word;
}

// ---- one block

static void start_block(Worker& w, dim3 size) {
    const unsigned threads = size.x * size.y * size.z;
    if (w.fibers.size() != threads) {
        w.fibers.clear();
        w.fibers.resize(threads);
        w.warps.assign((threads + 31) / 32, Warp());
        uint3 index = {0, 0, 0};
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = w.fibers[i];
            fiber.index = index;
            fiber.linear = i;
            fiber.lane = i & 31;
            fiber.warp = &w.warps[i / 32];
            fiber.warp->lanes[fiber.lane] = &fiber;
            if (++index.x == size.x) {
                index.x = 0;
                if (++index.y == size.y) index.y = 0, index.z++;
            }
        }
    }
    for (Fiber& fiber : w.fibers) {
        fiber.state = State::ready;
        fiber.started = false;
        fiber.copies.clear();
        fiber.copy_group = 0;
    }
    for (size_t i = 0; i < w.warps.size(); i++) {
        const unsigned lanes = std::min<size_t>(32, threads - 32 * i);
        w.warps[i].waiting = 0;
        w.warps[i].gone = lanes == 32 ? 0 : ~0u << lanes;
        w.warps[i].ready = ~w.warps[i].gone;
    }
    w.alive = threads;
    w.at_barrier = 0;
    w.barrier_generation = 0;
    w.error.clear();
    w.free_stacks.clear();
    w.stacks_made = 0;
    race_release(&w.start);
}

// Lets each thread that can run, run until it waits. Returns whether any could.
static bool run_once(Worker& w, std::vector<unsigned>& warp_order, std::vector<unsigned>& thread_order) {
    bool progress = false;
    const Order order = w.schedule.order;
    auto shuffle_order = [&](std::vector<unsigned>& list) {
        for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[w.random() % i]);
    };
    if (order == Order::random && (w.random() & 1)) {
        shuffle_order(thread_order);
        for (unsigned i : thread_order) {
            if (w.fibers[i].state != State::ready) continue;
            progress = true;
            resume(w.fibers[i]);
            if (!w.error.empty()) return false;
        }
        return progress;
    }
    if (order == Order::random) shuffle_order(warp_order);
    for (unsigned i = 0; i < w.warps.size(); i++) {
        Warp& warp = w.warps[order == Order::reverse ? w.warps.size() - 1 - i : warp_order[i]];
        unsigned lane = order == Order::reverse ? 0 : 31;
        for (int next; (next = next_lane(warp, lane, order)) >= 0;) {
            progress = true;
            resume(*warp.lanes[next]);
            if (!w.error.empty()) return false;
            lane = this_fiber().lane;
        }
    }
    return progress;
}

// All living threads wait at a barrier: they must all be there, and at the same one.
static void open_barrier(Worker& w) {
    const Fiber* first = nullptr;
    char text[600];
    for (const Fiber& fiber : w.fibers) {
        if (fiber.state != State::at_barrier) continue;
        if (first == nullptr) first = &fiber;
        if (fiber.site.line != first->site.line || strcmp(fiber.site.file, first->site.file) != 0) {
            snprintf(text, sizeof text, "divergent __syncthreads: thread %u is at %s:%d, thread %u at %s:%d", first->linear, first->site.file, first->site.line, fiber.linear, fiber.site.file, fiber.site.line);
            w.error = text;
            return;
        }
    }
    if (w.at_barrier < w.fibers.size()) {
        snprintf(text, sizeof text, "%s:%d: __syncthreads reached by %u of %zu threads, the others have exited", first->site.file, first->site.line, w.at_barrier, w.fibers.size());
        w.error = text;
        return;
    }
    for (Fiber& fiber : w.fibers) set_ready(fiber);
    w.at_barrier = 0;
    w.barrier_generation++;
}

static void report_deadlock(Worker& w) {
    std::map<std::string, unsigned> places;
    for (const Fiber& fiber : w.fibers) {
        if (fiber.state == State::done) continue;
        const char* what = fiber.state == State::at_barrier ? "__syncthreads" : "a warp operation";
        places[std::string(what) + " at " + fiber.site.file + ":" + std::to_string(fiber.site.line)]++;
    }
    w.error = "deadlock:";
    for (auto& [place, threads] : places) w.error += " " + std::to_string(threads) + " threads wait in " + place + ";";
}

static void run_block(Worker& w, dim3 size) {
    start_block(w, size);
    std::vector<unsigned> warp_order(w.warps.size()), thread_order(w.fibers.size());
    for (unsigned i = 0; i < warp_order.size(); i++) warp_order[i] = i;
    for (unsigned i = 0; i < thread_order.size(); i++) thread_order[i] = i;
    while (w.alive > 0 && w.error.empty()) {
        const bool progress = run_once(w, warp_order, thread_order);
        if (!w.error.empty()) break;
        if (w.at_barrier > 0 && w.at_barrier == w.alive) {
            open_barrier(w);
        } else if (!progress) {
            report_deadlock(w);
        }
    }
}

// ---- one launch

static void run_blocks(const Launch& launch, const Schedule& schedule, std::atomic<uint64_t>& next, std::atomic<bool>& stop, std::string& error) {
    static thread_local std::unique_ptr<Worker> kept;
    if (!kept) kept = std::make_unique<Worker>();
    Worker& w = *kept;
    worker = &w;
    catch_faults();
    w.launch = &launch;
    w.schedule = schedule;
    w.direct = schedule.order != Order::random && !address_sanitizer() && !thread_sanitizer();
    if (thread_sanitizer()) w.own.race = __tsan_get_current_fiber();
    current_geometry.block_size = {launch.block.x, launch.block.y, launch.block.z};
    current_geometry.grid_size = {launch.grid.x, launch.grid.y, launch.grid.z};
    const uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    std::vector<void*> kept_shared;
    for (uint64_t i; !stop && (i = next++) < blocks;) {
        const uint64_t b = schedule.order == Order::reverse ? blocks - 1 - i : i;
        current_geometry.block = {(unsigned)(b % launch.grid.x), (unsigned)(b / launch.grid.x % launch.grid.y), (unsigned)(b / launch.grid.x / launch.grid.y)};
        w.random_state = schedule.seed * 0x9E3779B97F4A7C15ull + b * 0xD1B54A32D192ED03ull + 1;
        const unsigned char fresh = fresh_byte(schedule, b);
        w.dynamic = nullptr;
        if (launch.dynamic_bytes > 0) {  // of exactly this size, so that address sanitizer knows its end
            if (posix_memalign(&w.dynamic, 128, launch.dynamic_bytes) != 0) abort();
            memset(w.dynamic, fresh, launch.dynamic_bytes);
        }
        launch.static_shared->forget();
        launch.static_shared->fill(fresh);
        run_block(w, launch.block);
        if (thread_sanitizer()) {
            kept_shared.push_back(w.dynamic);  // two blocks must not get the same place
            w.turn ^= 1;
        } else {
            free(w.dynamic);
        }
        if (!w.error.empty()) {
            error = w.error;
            stop = true;
        }
    }
    race_acquire(&w.end);
    for (void* shared : kept_shared) free(shared);
    worker = nullptr;
}

std::string run(const Launch& launch, const Schedule& schedule) {
    std::atomic<uint64_t> next{0};
    std::atomic<bool> stop{false};
    const uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    const unsigned os_threads = (unsigned)std::min<uint64_t>(thread_sanitizer() || address_sanitizer() || traffic_is_counted() ? 1 : std::max(1u, schedule.os_threads), blocks);
    std::vector<std::string> errors(os_threads);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < os_threads; i++) {
        others.emplace_back([&, i] { run_blocks(launch, schedule, next, stop, errors[i]); });
    }
    run_blocks(launch, schedule, next, stop, errors[0]);
    for (std::thread& other : others) other.join();
    for (const std::string& error : errors) {
        if (!error.empty()) return error;
    }
    return "";
}

}  // namespace emulator
