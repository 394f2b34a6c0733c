// Fibers: a stack and a saved stack pointer. The sanitizers' runtimes are told of each switch where
// they are loaded into the process (weak symbols); the emulator itself is never instrumented.
#pragma once

#include "cuda_emulator.h"
#include <vector>

extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void* p, size_t bytes) __attribute__((weak));
void __asan_load16(const void* p) __attribute__((weak));
void __asan_store16(const void* p) __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_acquire(void* p) __attribute__((weak));
void __tsan_release(void* p) __attribute__((weak));
void __tsan_read16(void* p) __attribute__((weak));
void __tsan_write16(void* p) __attribute__((weak));
// Saves the callee-saved registers and the stack pointer, and goes on with another stack.
void emulator_switch_stack(void** save, void* load);
}

namespace emulator {

inline bool address_sanitizer() { return __asan_unpoison_memory_region != nullptr; }
inline bool thread_sanitizer() { return __tsan_create_fiber != nullptr; }
inline void race_acquire(void* p) {
    if (thread_sanitizer()) __tsan_acquire(p);
}
inline void race_release(void* p) {
    if (thread_sanitizer()) __tsan_release(p);
}
// Accesses that the emulator makes for a kernel: the sanitizers must see them.
inline void seen_read16(const void* p) {
    if (address_sanitizer()) __asan_load16(p);
    if (thread_sanitizer()) __tsan_read16(const_cast<void*>(p));
}
inline void seen_write16(void* p) {
    if (address_sanitizer()) __asan_store16(p);
    if (thread_sanitizer()) __tsan_write16(p);
}

// Stacks of one size, each above room that may not be touched.
class Stacks {
public:
    ~Stacks() { release(); }
    size_t bytes() const { return bytes_; }
    // The stack of this number, made at its first use.
    char* at(size_t number);
    void release();
    // Whether the address lies below one of the stacks: it has overflowed.
    bool guards(const void* address) const;

private:
    std::vector<char*> stacks_;
    size_t bytes_ = 0;
};

// One side of a switch: a fiber, or the OS thread's own stack.
struct Side {
    void* stack_pointer = nullptr;
    const void* bottom = nullptr;
    size_t bytes = 0;
    void* fake_stack = nullptr;
    void* race = nullptr;  // thread sanitizer's fiber
};
// Makes `side` start `entry` on the stack when switched to.
void prepare(Side& side, char* stack, size_t bytes, void (*entry)());
void switch_sides(Side& from, Side& to, bool last = false);
// First thing on a new fiber: `from` is the side that switched to it.
void arrived(Side& from);

}  // namespace emulator
