// Counts of the bytes that kernels ask of device memory: traffic.cpp.
#pragma once

#include "scheduler.h"
#include <cstddef>
#include <string>

namespace emulator {

// Whether kernels are compiled to count: EMULATOR_SANITIZE=traffic.
bool traffic_is_counted();
// An access that the emulator makes for a kernel of this OS thread. Nothing where none is counted.
void note_traffic(const void* address, size_t bytes, bool write);
// Runs a launch on this OS thread alone, then adds to the counters `read_bytes:KERNEL`,
// `written_bytes:KERNEL` (what its threads asked for) and `read_sectors:KERNEL`, `written_sectors:KERNEL`
// (pieces of 32 bytes that they touched, each once per launch).
std::string run_counting_traffic(const Launch& launch, const Schedule& schedule);

}  // namespace emulator
