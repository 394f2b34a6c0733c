#include "fiber.h"
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch_stack,.-emulator_switch_stack
)");

namespace emulator {

static const size_t guard_bytes = 64 << 10;

char* Stacks::at(size_t number) {
    if (bytes_ == 0) bytes_ = address_sanitizer() || thread_sanitizer() ? 256 << 10 : 128 << 10;
    if (stacks_.size() <= number) stacks_.resize(number + 1, nullptr);
    char*& stack = stacks_[number];
    if (stack == nullptr) {
        void* room = mmap(nullptr, bytes_ + guard_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED || mprotect(room, guard_bytes, PROT_NONE) != 0) {
            perror("emulator: no room for the stack of a CUDA thread");
            abort();
        }
        stack = static_cast<char*>(room) + guard_bytes;
    }
    return stack;
}

void Stacks::release() {
    for (char* stack : stacks_) {
        if (stack != nullptr) munmap(stack - guard_bytes, bytes_ + guard_bytes);
    }
    stacks_.clear();
}

bool Stacks::guards(const void* address) const {
    for (char* stack : stacks_) {
        if (stack != nullptr && address < stack && address >= stack - guard_bytes) return true;
    }
    return false;
}

void prepare(Side& side, char* stack, size_t bytes, void (*entry)()) {
    // Frames of the fiber that had this stack before.
    if (address_sanitizer()) __asan_unpoison_memory_region(stack, bytes);
    side.bottom = stack;
    side.bytes = bytes;
    side.fake_stack = nullptr;
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // the return address of entry(): the stack is as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    side.stack_pointer = top;
}

void switch_sides(Side& from, Side& to, bool last) {
    if (address_sanitizer()) {
        __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.bytes);
    }
    if (thread_sanitizer()) __tsan_switch_to_fiber(to.race, 1);  // 1: no order follows from the switch
    emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
    if (address_sanitizer()) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void arrived(Side& from) {
    if (address_sanitizer()) __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes);
}

}  // namespace emulator
