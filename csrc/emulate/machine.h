// The emulated GPU as kernels see it: what the host bodies of csrc/common call. The machine itself is compiled once,
// into a shared object of its own, so that this header stays light: a kernel compiles in under a second.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// A line of a kernel. Outside the namespace, so that an argument of this type draws in no name of it.
struct Here {
    const char* file;
    int line;

    // As a default argument, whoever calls the function with it.
    static constexpr Here now(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

namespace emulate {

struct Index {
    unsigned x, y, z;
};

// The thread that runs: what threadIdx, blockIdx, blockDim and gridDim stand for.
struct Thread {
    Index thread, block, block_dim, grid_dim;
};

extern Thread* self;

enum class Access : int { read, write, atomic, uniform_read };
enum class Operand : int { fp16, bf16, tf32 };

// Checks and counts an access of this thread to global memory.
void global(const void* p, size_t bytes, Access access, Here at);

// Checks an access of this thread to shared memory: bounds of its array, alignment, races.
void shared(const void* p, size_t bytes, const char* begin, const char* end, Access access, Here at);
char* shared_base();
void shared_taken(int bytes, Here at);

void copy_async(void* target, const char* begin, const char* end, const void* source, bool exists, Here at);
void commit_copies();
void wait_copies(int newest, Here at);

// Collectives of a warp.
void sync_warp(Here at);
void shuffle(void* out, const void* value, size_t bytes, int source, Here at);
unsigned ballot(bool vote, Here at);
void ldmatrix(unsigned* out, int count, bool transposed, const void* row, const char* begin, const char* end, Here at);
void mma(float* d, const unsigned* a, const unsigned* b, Operand operand, Here at);

// Barrier `id` of the block for `threads` threads, 0 for all; a warp that does not wait is only counted.
void barrier(int id, int threads, bool wait, Here at);
void wait_for_count(const unsigned* counter, unsigned goal, Here at);
// What this block did so far is over for all who acquire the counter later.
void release(const unsigned* counter);
void acquire(const unsigned* counter);
// Lets another warp run.
void give_way();

uint16_t fp16_from_float(float x);
float fp16_to_float(uint16_t bits);
float exp2(float x);
float log2(float x);

// ---- launching ----------------------------------------------------------------------------------------------------

// One argument as Python hands it over. A pointer has the bytes that it may reach: extent from its first one, of which,
// where owned is given, only those whose entry is not zero.
struct Argument {
    enum Kind : int { pointer, integer32, integer64, real32, integers64 } kind;
    int count;         // of integers64, a structure of so many
    const void* data;  // the pointer, or where the value stands
    uint64_t extent;
    const uint8_t* owned;
    const char* name;
    uint64_t read, written, updated;  // bytes, counted by the launch
};

struct Launch {
    const char* kernel;
    Index grid, block;
    uint64_t shared_bytes;
    uint64_t seed;
    int cooperative;
    int arguments;
    Argument* argument;
    char* report;  // what went wrong, as a sentence
    uint64_t report_bytes;
};

using Body = void (*)(const Launch&);

// Runs the grid; 0 when nothing went wrong.
int run(Launch& launch, Body body);

void mistyped(const Launch& launch, int argument, const char* wanted);

}  // namespace emulate
