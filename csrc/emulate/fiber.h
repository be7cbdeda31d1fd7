// Switching from one stack to another: the few registers that a call preserves, no system call.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the emulator switches stacks on x86-64 and on aarch64"
#endif

namespace emulate {

extern "C" void emulate_switch(void** saved, void* next);

// What a switch leaves on a stack, in words: the registers that a call preserves, among them where to return to.
#if defined(__x86_64__)
constexpr int RETURN = 6, WORDS = 8;
#else
constexpr int RETURN = 11, WORDS = 20;
#endif

// One stack and where on it to go on. The default one is the caller's own.
struct Fiber {
    void* at = nullptr;
    char* stack = nullptr;
    size_t bytes = 0;
    void* shadow = nullptr;  // the address sanitizer's

    // Begins `entry`, which never returns, at the next switch to this fiber.
    void prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack, bytes);
        shadow = nullptr;
#endif
        auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
        auto* frame = reinterpret_cast<void**>(top) - WORDS;
        for (int i = 0; i < WORDS; ++i) frame[i] = nullptr;
        frame[RETURN] = reinterpret_cast<void*>(entry);
        at = frame;
    }

    // Leaves this fiber for `next`; comes back when someone switches to this one. `last` says that no one will.
    void switch_to(Fiber& next, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(last ? nullptr : &shadow, next.stack, next.bytes);
        emulate_switch(&at, next.at);
        arrived();
#else
        emulate_switch(&at, next.at);
#endif
    }

    // The first thing that a fiber does, and each time that it is switched to.
    void arrived() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(shadow, nullptr, nullptr);
#endif
    }
};

}  // namespace emulate
