// The state of one running block. Private to scheduler.cpp and tensor_core.cpp.
#pragma once

#include "fiber.h"
#include "scheduler.h"
#include <vector>

namespace emulator {

enum class State : uint8_t { ready, at_barrier, in_warp, done };
enum class Meeting : uint8_t { none, sync, shuffle, ballot, mma_k16, mma_k8, ldmatrix, ldmatrix_transposed };

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
    unsigned mask;
    Site site;
    size_t stack;
    Warp* warp;
    std::vector<PendingCopy> copies;
    int copy_group;
};

// Masks have a bit per lane.
struct Warp {
    Fiber* lanes[32];
    unsigned ready;    // can run
    unsigned waiting;  // in a meeting
    unsigned gone;     // exited, or never existed
    char ordered[2];   // what __syncwarp orders, for the race detector

    // What the lanes bring to a meeting, and take away from it.
    uint64_t words[32];
    unsigned sources[32];
    alignas(16) float d[32][4];
    alignas(16) unsigned a[32][4];
    unsigned b[32][2];
    alignas(16) uint16_t rows[32][8];
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
    unsigned barrier_generation;
    // For the race detector. Blocks in turn are run by one of two sets of its threads, which nothing
    // orders against each other before the launch ends: so it sees what two blocks do to one place.
    unsigned turn;
    std::vector<void*> race_threads[2];
    char barriers[2][2], start, end;
    volatile unsigned inside;  // whether a CUDA thread is running
    bool direct;               // threads hand over to one another without the scheduler

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
