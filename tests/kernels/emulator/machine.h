// A CUDA machine on a CPU: the threads of a block are fibers that take turns, in an order drawn anew at every barrier.
//
// It is stricter than a GPU where that finds mistakes: shared memory holds garbage at first, a copy lands no earlier
// than the wait that its thread asked for, and until then its target is garbage; reading beyond the allocation of a
// copy's source is not allowed (tests hand it guarded memory).
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace machine {

const size_t STACK_BYTES = 256 << 10;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Copy {
    uint8_t *to;
    const uint8_t *from;
    int width, bytes;
};

struct Barrier {
    unsigned round = 0, arrived = 0;
};

// What lanes of a warp show each other at a step that they take together: two sets of places, so that nobody writes
// over what another has yet to read.
struct Warp {
    Barrier barrier;
    unsigned size = 0, waiting = 0;  // threads of it that wait for the block
    uint32_t shown[2][32][8];
};

struct Thread {
    ucontext_t context;
    Index index;
    bool done = false;
    std::vector<std::vector<Copy>> groups;  // closed, oldest first
    std::vector<Copy> open;
    unsigned steps = 0;  // of the warp's exchanges
};

struct Block {
    Index index, dimension, grid;
    std::vector<uint8_t> shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barrier;
    unsigned living = 0;
    ucontext_t scheduler;
    std::mt19937 order;
    Thread *running = nullptr;
    std::function<void()> kernel;
};

inline Block *block = nullptr;

inline void pause() { swapcontext(&block->running->context, &block->scheduler); }

inline void meet(Barrier &barrier, unsigned size) {
    const unsigned round = barrier.round;
    if (++barrier.arrived == size) {
        barrier.arrived = 0;
        barrier.round++;
        return;
    }
    while (barrier.round == round) pause();
}

inline unsigned linear(const Index &at, const Index &size) { return (at.z * size.y + at.y) * size.x + at.x; }
inline unsigned thread_number() { return linear(block->running->index, block->dimension); }
inline Warp &warp() { return block->warps[thread_number() / 32]; }
inline unsigned lane() { return thread_number() % 32; }

// All lanes show `count` words; what they showed: [lane][word].
inline const uint32_t (*exchange(const uint32_t *words, int count))[8] {
    Warp &mine = warp();
    auto &places = mine.shown[block->running->steps++ % 2];
    std::memcpy(places[lane()], words, count * sizeof(uint32_t));
    meet(mine.barrier, mine.size);
    return places;
}

inline void copy(void *to, const void *from, int width, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % width || reinterpret_cast<uintptr_t>(from) % width || bytes > width ||
        bytes < 0)
        std::abort();
    std::memset(to, 0xcd, width);
    block->running->open.push_back({static_cast<uint8_t *>(to), static_cast<const uint8_t *>(from), width, bytes});
}

inline void close_group() {
    block->running->groups.push_back(std::move(block->running->open));
    block->running->open.clear();
}

inline void land_all_but(size_t youngest) {
    auto &groups = block->running->groups;
    while (groups.size() > youngest) {
        for (const Copy &one : groups.front()) {
            std::memcpy(one.to, one.from, one.bytes);
            std::memset(one.to + one.bytes, 0, one.width - one.bytes);
        }
        groups.erase(groups.begin());
    }
}

inline void trampoline() {
    block->kernel();
    block->running->done = true;
    block->living--;
    pause();
}

inline uint8_t *stack_of(unsigned thread) {
    static std::vector<std::unique_ptr<uint8_t[]>> stacks;
    while (stacks.size() <= thread) stacks.emplace_back(new uint8_t[STACK_BYTES]);
    return stacks[thread].get();
}

inline void start(Thread &thread, unsigned number) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack_of(number);
    thread.context.uc_stack.ss_size = STACK_BYTES;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, trampoline, 0);
}

inline void meet_block() {
    warp().waiting++;
    meet(block->barrier, block->threads.size());
    warp().waiting--;
}

// A turn for every thread of a warp, again and again: some warps run far ahead of others, as on a GPU.
inline void run_warp(Block &now, unsigned number) {
    unsigned turns[32];
    const unsigned size = now.warps[number].size;
    for (unsigned i = 0; i < size; i++) turns[i] = 32 * number + i;
    const unsigned patience = 1u << now.order() % 12;
    for (unsigned round = 0; round < patience; round++) {
        const bool stuck = now.warps[number].waiting == size;
        std::shuffle(turns, turns + size, now.order);
        for (unsigned i = 0; i < size; i++) {
            if (now.threads[turns[i]].done) continue;
            now.running = &now.threads[turns[i]];
            swapcontext(&now.scheduler, &now.running->context);
        }
        if (stuck || now.threads[turns[0]].done) return;
    }
}

inline void run_block(Block &now) {
    const unsigned size = now.dimension.x * now.dimension.y * now.dimension.z;
    now.threads.resize(size);
    now.warps.assign((size + 31) / 32, Warp());
    now.living = size;
    now.barrier = Barrier();
    for (unsigned i = 0; i < size; i++) {
        Thread &one = now.threads[i];
        one = Thread();
        one.index = {i % now.dimension.x, i / now.dimension.x % now.dimension.y, i / now.dimension.x / now.dimension.y};
        now.warps[i / 32].size++;
        start(one, i);
    }
    block = &now;
    while (now.living) run_warp(now, now.order() % now.warps.size());
    block = nullptr;
}

inline void launch(Index grid, Index dimension, size_t shared_bytes, const std::function<void()> &kernel) {
    Block now;
    now.grid = grid;
    now.dimension = dimension;
    now.kernel = kernel;
    for (now.index.z = 0; now.index.z < grid.z; now.index.z++)
        for (now.index.y = 0; now.index.y < grid.y; now.index.y++)
            for (now.index.x = 0; now.index.x < grid.x; now.index.x++) {
                now.shared.assign(shared_bytes + 16, 0xcd);
                run_block(now);
            }
}

// Kernels by name, their arguments unpacked from pointers as the driver does.
using Call = std::function<void(void **)>;

inline std::map<std::string, Call> &kernels() {
    static std::map<std::string, Call> all;
    return all;
}

struct Registration {
    template <class... A>
    Registration(const char *name, void (*function)(A...)) {
        kernels()[name] = [function](void **arguments) {
            size_t i = 0;
            std::tuple<A...> values{*static_cast<A *>(arguments[i++])...};
            std::apply(function, values);
        };
    }
};

}  // namespace machine
