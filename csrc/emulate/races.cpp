// Races on global memory: between threads of a block, and between blocks.
//
// Only pages that a launch writes are watched, from their first write on: what is only read costs nothing. Within a
// block barriers order accesses, as for shared memory. Blocks are ordered by counters alone: what a block did before it
// counted one up (atomic_count_release, atomic_count_wrapping) is over for a block that has seen the counter since
// (wait_for_count, atomic_count_wrapping).
#include <memory>
#include <unordered_map>

#include "state.h"

namespace emulate {

namespace {

constexpr uintptr_t PAGE = 4096;

// One access to two bytes: the touch within its block, which block that was, and how often it had counted up before.
struct Trail {
    Touch touch;
    uint32_t block = 0, released = 0;
};

struct Watched {
    Trail write;
    Trail read[2];  // the latest of two different warps
    bool atomic = false;
};

struct Page {
    Watched at[PAGE / 2];
};

bool over(const Trail& before, const Warp& warp, int lane) {
    const Block& block = *warp.block;
    if (!before.touch.step) return true;
    if (before.block == block.number) return over(before.touch, warp, lane);
    return before.block < block.seen.size() && block.seen[before.block] > before.released;
}

[[noreturn]] void race(const char* p, const char* did, const Trail& before, const char* was, Here at) {
    const Here there = site(before.touch.site);
    const char* advice = before.block == current->warp->block->number ? "no barrier" : "no counter";
    fault(at, "race: this thread %s byte %lld of %s, which thread %d of block %u %s at %s:%d, with %s between", did,
          offset_in_argument(p), name_of_argument(p), before.touch.warp * LANES + before.touch.lane % LANES,
          before.block, was, place(there.file), there.line, advice);
}

struct Pages {
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> page;
    // By counter: how often each block had counted up when it last counted this one.
    std::unordered_map<const void*, std::vector<uint32_t>> counter;
};

Pages* pages = nullptr;

void join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) {
    if (clock.size() < other.size()) clock.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i) {
        if (clock[i] < other[i]) clock[i] = other[i];
    }
}

}  // namespace

void watch_races(bool on) {
    delete pages;
    pages = on ? new Pages : nullptr;
}

void touch_global(const void* where, size_t bytes, Access access, Here at) {
    const char* p = static_cast<const char*>(where);
    const Warp& warp = *current->warp;
    const int lane = current->number;
    const auto first = reinterpret_cast<uintptr_t>(p);
    const bool reads = access == Access::read || access == Access::uniform_read;
    auto found = pages->page.find(first / PAGE);  // an access is aligned to its size, so it lies in one page
    if (found == pages->page.end()) {
        if (reads) return;
        found = pages->page.emplace(first / PAGE, std::make_unique<Page>()).first;
    }
    const Trail now{touch_of(warp, lane, at), warp.block->number, warp.block->released};
    for (uintptr_t i = first % PAGE / 2; i <= (first % PAGE + bytes - 1) / 2; ++i) {
        Watched& cell = found->second->at[i];
        if (reads) {
            if (!over(cell.write, warp, lane)) race(p, "reads", cell.write, "wrote", at);
            Trail& slot = !cell.read[0].touch.step ||
                                  (cell.read[0].block == now.block && cell.read[0].touch.warp == now.touch.warp)
                              ? cell.read[0]
                              : cell.read[1];
            const bool several = slot.touch.step == now.touch.step && slot.block == now.block &&
                                 slot.touch.warp == now.touch.warp && slot.touch.lane != now.touch.lane;
            slot = now;
            if (several) slot.touch.lane = SEVERAL;
            continue;
        }
        const bool both_atomic = access == Access::atomic && cell.atomic;
        if (!both_atomic && !over(cell.write, warp, lane)) race(p, "writes", cell.write, "wrote", at);
        for (const Trail& read : cell.read) {
            if (!over(read, warp, lane)) race(p, "writes", read, "read", at);
        }
        cell.write = now;
        cell.atomic = access == Access::atomic;
    }
}

void release(const unsigned* counter) {
    Block& block = *current->warp->block;
    ++block.released;
    std::vector<uint32_t> mine = block.seen;
    if (mine.size() <= block.number) mine.resize(block.number + 1);
    mine[block.number] = block.released;
    join(pages->counter[counter], mine);
}

void acquire(const unsigned* counter) {
    const auto found = pages->counter.find(counter);
    if (found != pages->counter.end()) join(current->warp->block->seen, found->second);
}

}  // namespace emulate
