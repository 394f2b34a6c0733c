// Runs one kernel launch on the CPU: its blocks one after the other (or spread over OS threads), the
// threads of a block as fibers in a chosen order.
#pragma once

#include "cuda_emulator.h"
#include <string>

namespace emulator {

enum class Order { forward = 0, reverse = 1, random = 2 };

// The static shared memory of a module, as the calling OS thread has it.
struct StaticShared {
    virtual ~StaticShared() = default;
    virtual void fill(unsigned char value) const = 0;
    virtual bool holds(const void* p, size_t bytes) const = 0;
    // Makes the race detector forget who used it.
    virtual void forget() const = 0;
};

struct Launch {
    const Kernel* kernel;
    void** arguments;
    dim3 grid, block;
    size_t dynamic_bytes;
    const StaticShared* static_shared;
};

struct Schedule {
    Order order = Order::forward;
    uint64_t seed = 1;
    unsigned os_threads = 1;
};

// What fresh memory holds: differs between the orders, so that reading it shows as a difference.
unsigned char fresh_byte(const Schedule& schedule, uint64_t salt);

// Returns "" or what the kernel did wrong.
std::string run(const Launch& launch, const Schedule& schedule);

}  // namespace emulator
