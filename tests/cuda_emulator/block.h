// The state of one running block. Private to scheduler.cpp and tensor_core.cpp.
#pragma once

#include "fiber.h"
#include "scheduler.h"
#include <vector>

namespace emulator {

enum class State : uint8_t { ready, at_barrier, in_warp, done };
enum class Meeting : uint8_t { none, sync, shuffle, ballot, mma_k16, mma_k8, ldmatrix };

// A copy that cp.async has started and nothing has waited for.
struct PendingCopy {
    void* shared;
    const void* global;
    bool valid;
    int group;
};

struct Warp;
struct Fiber : Thread {
    Side side;
    State state;
    bool started;
    Meeting meeting;
    unsigned linear;
    size_t stack;
    Warp* warp;
    Site site;
    unsigned mask;
    // What the lane brings to a meeting of its warp, and takes away from it.
    uint64_t word;
    unsigned source;
    float d[4];
    unsigned a[4], b[2];
    uint16_t row[8];
    bool transposed;
    std::vector<PendingCopy> copies;
    int copy_group;
};

struct Warp {
    Fiber* lanes[32];
    unsigned waiting;  // lanes in a meeting
    unsigned gone;     // lanes that have exited or never existed
    char ordered;      // what __syncwarp orders, for the race detector
};

// One OS thread that runs blocks.
struct Worker {
    const Launch* launch;
    Schedule schedule;
    uint64_t random_state;
    void* dynamic;
    std::string error;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned alive, at_barrier;
    Stacks stacks;
    std::vector<size_t> free_stacks;
    size_t stacks_made;
    Side own;  // the OS thread itself
    char barriers[2], start, end;
    unsigned barrier_generation;
    volatile unsigned inside;  // whether a CUDA thread is running

    uint64_t random();
};
extern __thread Worker* worker EMULATOR_TLS;
inline Fiber& this_fiber() { return *static_cast<Fiber*>(current_thread); }

// Meets the other lanes of `mask`; the last to come carries the meeting out for all.
void meet(Meeting meeting, unsigned mask, Site site);
// Makes faults of kernels errors of their launch, for the calling OS thread.
void catch_faults();
// The products and loads of tensor_core.cpp, for a whole warp.
void carry_out_tensor_core(Meeting meeting, Warp& warp);

}  // namespace emulator
