// An access of a kernel to memory that is not there ends the launch with an error, as on a GPU, and not
// the process.
#include "block.h"
#include <csignal>
#include <cstdio>
#include <mutex>
#include <ucontext.h>
#include <unistd.h>

namespace emulator {

static struct sigaction before[2];
static __thread const void* fault_address EMULATOR_TLS;
static __thread bool stack_overflow EMULATOR_TLS;

// Where a thread that faulted goes on, on a fresh part of its stack.
static void report_fault() {
    if (stack_overflow) fail("the stack of a CUDA thread is too small for its local variables");
    fail("illegal address: %p", fault_address);
}

static void on_fault(int signal, siginfo_t* info, void* data) {
    if (worker == nullptr || worker->inside == 0) {  // not a kernel's fault
        sigaction(signal, &before[signal == SIGBUS], nullptr);
        return;  // the access happens again, and goes to the former handler
    }
    fault_address = info->si_addr;
    stack_overflow = worker->stacks.guards(info->si_addr);
    Fiber& fiber = this_fiber();
    char* top = const_cast<char*>(static_cast<const char*>(fiber.side.bottom)) + fiber.side.bytes;
    greg_t* registers = static_cast<ucontext_t*>(data)->uc_mcontext.gregs;
    registers[REG_RIP] = reinterpret_cast<greg_t>(report_fault);
    registers[REG_RSP] = reinterpret_cast<greg_t>(top) - 8;  // as after a call
}

void catch_faults() {
    if (address_sanitizer() || thread_sanitizer()) return;  // they tell more
    static std::once_flag installed;
    std::call_once(installed, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before[0]);
        sigaction(SIGBUS, &action, &before[1]);
    });
    // A thread whose stack has ended needs another one for the handler.
    stack_t present;
    if (sigaltstack(nullptr, &present) == 0 && (present.ss_flags & SS_DISABLE)) {
        static __thread char* room EMULATOR_TLS;
        if (room == nullptr) room = new char[65536];
        stack_t own = {};
        own.ss_sp = room;
        own.ss_size = 65536;
        sigaltstack(&own, nullptr);
    }
}

}  // namespace emulator
