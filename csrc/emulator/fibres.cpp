// The emulator's scheduler; what it promises stands in emulator.h.
//
// A fibre's first entry is ucontext's; afterwards _setjmp and _longjmp switch, which spare two system calls a switch.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include "emulator.h"

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10, kMaxShared = 232448, kAlignment = 128;  // 227 KiB a block on sm_90

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fibre {
  jmp_buf context;
  bool started = false;
  State state;
  uint3 index;
  uint32_t mask;
  void* record;
  void (*combine)(void* const*);
};

struct Shared {
  size_t size = 0;
  unsigned char* start = nullptr;
};

Fibre fibres[kMaxThreads];
char* stacks;
jmp_buf scheduler;
const std::function<void()>* body;
unsigned threads, running;
uint64_t serial;
bool failed;
char message[512];

unsigned seed;  // the schedule
std::mt19937 shuffler;
std::vector<unsigned> order;         // ranks, the preferred one first
std::vector<unsigned> position;      // rank -> place in order
uint64_t ready[kMaxThreads / 64];    // by place in order
unsigned turn;                       // plain schedule: the place to look from

std::map<const void*, Shared> arrays;  // static shared memory by its site
size_t arrays_used;
alignas(kAlignment) unsigned char static_memory[kMaxShared];
alignas(kAlignment) unsigned char dynamic_memory[kMaxShared];

void set_state(unsigned rank, State state) {
  fibres[rank].state = state;
  const unsigned place = position[rank];
  if (state == State::kReady)
    ready[place / 64] |= uint64_t(1) << (place % 64);
  else
    ready[place / 64] &= ~(uint64_t(1) << (place % 64));
}

int first_ready(unsigned from) {
  for (unsigned word = from / 64; word * 64 < threads; ++word) {
    uint64_t bits = ready[word];
    if (word == from / 64) bits &= ~uint64_t(0) << (from % 64);
    if (bits) return static_cast<int>(word * 64 + __builtin_ctzll(bits));
  }
  return -1;
}

void __attribute__((noinline)) to_scheduler() {
  if (!_setjmp(fibres[running].context)) _longjmp(scheduler, 1);
}

void fibre_main() {
  for (;;) {
    (*body)();
    set_state(running, State::kDone);
    to_scheduler();
  }
}

void start(unsigned rank) {
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  fibres[rank].started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + kStack * rank;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fibre_main, 0);
  setcontext(&context);
}

void __attribute__((noinline)) resume(unsigned rank) {
  running = rank;
  thread_index = fibres[rank].index;
  if (_setjmp(scheduler)) return;
  if (fibres[rank].started)
    _longjmp(fibres[rank].context, 1);
  else
    start(rank);
}

// Draws the order in which fibres are preferred and sets every waiting one of `released` ready.
void reorder() {
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  std::vector<unsigned> warp_order(warps), lanes(kWarp);
  std::iota(warp_order.begin(), warp_order.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  if (seed == 1) {
    std::reverse(warp_order.begin(), warp_order.end());
    std::reverse(lanes.begin(), lanes.end());
  } else if (seed > 1) {
    std::shuffle(warp_order.begin(), warp_order.end(), shuffler);
  }
  order.clear();
  for (const unsigned warp : warp_order) {
    if (seed > 1) std::shuffle(lanes.begin(), lanes.end(), shuffler);
    for (const unsigned lane : lanes)
      if (warp * kWarp + lane < threads) order.push_back(warp * kWarp + lane);
  }
  position.resize(threads);
  for (unsigned place = 0; place < threads; ++place) position[order[place]] = place;
}

// All of the block that still run wait at the barrier: true, and they go on.
bool release_barrier() {
  unsigned waiting = 0, in_warp = 0;
  for (unsigned rank = 0; rank < threads; ++rank) {
    waiting += fibres[rank].state == State::kAtBarrier;
    in_warp += fibres[rank].state == State::kInWarp;
  }
  if (in_warp) {
    std::snprintf(message, sizeof message,
                  "block (%u, %u, %u) is stuck: %u threads at a barrier, %u in a warp's collective", block_index.x,
                  block_index.y, block_index.z, waiting, in_warp);
    failed = true;
    return false;
  }
  if (!waiting) return false;
  reorder();
  for (unsigned rank = 0; rank < threads; ++rank)
    set_state(rank, fibres[rank].state == State::kAtBarrier ? State::kReady : State::kDone);
  return true;
}

void run_block() {
  ++serial;
  turn = 0;
  arrays.clear();
  arrays_used = 0;
  std::fill(std::begin(ready), std::end(ready), 0);
  reorder();
  for (unsigned rank = 0; rank < threads; ++rank) {
    fibres[rank].index = {rank % block_size.x, rank / block_size.x % block_size.y, rank / block_size.x / block_size.y};
    set_state(rank, State::kReady);
  }
  for (;;) {
    int place = first_ready(seed ? 0 : turn);
    if (place < 0 && !seed) place = first_ready(0);
    if (place < 0) {
      if (release_barrier()) continue;
      break;
    }
    turn = (place + 1) % threads;
    resume(order[place]);
    if (failed) break;
  }
  if (failed)
    for (Fibre& fibre : fibres) fibre.started = false;  // stopped midway: they begin again on clean stacks
}

}  // namespace

int run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread_body) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  threads = block.x * block.y * block.z;
  if (!blocks || !threads || threads > kMaxThreads || shared_bytes > kMaxShared || grid.y > 65535 || grid.z > 65535) {
    std::snprintf(message, sizeof message, "grid (%u, %u, %u) of blocks (%u, %u, %u) with %zu bytes of shared memory",
                  grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    return kInvalidConfiguration;
  }
  grid_size = grid;
  block_size = block;
  body = &thread_body;
  failed = false;
  shuffler.seed(seed);
  std::vector<uint64_t> indices(blocks);
  std::iota(indices.begin(), indices.end(), uint64_t(0));
  if (seed == 1) std::reverse(indices.begin(), indices.end());
  if (seed > 1) std::shuffle(indices.begin(), indices.end(), shuffler);
  for (const uint64_t index : indices) {
    block_index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
    std::memset(dynamic_memory, 0xff, shared_bytes);
    run_block();
    if (failed) return kLaunchFailure;
  }
  return 0;
}

void* shared_array(const void* site, size_t bytes) {
  Shared& array = arrays[site];
  if (!array.start) {
    array = {bytes, static_memory + arrays_used};
    arrays_used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (arrays_used > 48 << 10) fail("more than 48 KiB of static shared memory");
    std::memset(array.start, 0xff, bytes);
  }
  return array.start;
}

unsigned char* dynamic_shared() { return dynamic_memory; }

void block_barrier() {
  set_state(running, State::kAtBarrier);
  to_scheduler();
}

void warp_collective(uint32_t mask, void* record, void (*combine)(void* const*)) {
  Fibre& mine = fibres[running];
  const unsigned first = running / kWarp * kWarp;
  if (!(mask >> (running % kWarp) & 1)) fail("lane %u is not in its own mask %08x", running % kWarp, mask);
  mine.mask = mask;
  mine.record = record;
  mine.combine = combine;
  set_state(running, State::kInWarp);
  void* records[kWarp] = {};
  bool complete = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= threads || fibres[first + lane].state == State::kDone)
      fail("mask %08x names lane %u, which has ended", mask, lane);
    const Fibre& other = fibres[first + lane];
    if (other.state != State::kInWarp) {
      complete = false;
    } else if (other.mask != mask || other.combine != combine) {
      fail("lanes %u and %u of warp %u are in different collectives", running % kWarp, lane, running / kWarp);
    }
    records[lane] = other.record;
  }
  if (complete) {
    combine(records);
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (records[lane]) set_state(first + lane, State::kReady);
  }
  to_scheduler();
}

void fail(const char* format, ...) {
  const int written = std::snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u): ", block_index.x,
                                    block_index.y, block_index.z, thread_index.x, thread_index.y, thread_index.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + written, sizeof message - written, format, arguments);
  va_end(arguments);
  failed = true;
  for (;;) to_scheduler();
}

unsigned thread_rank() { return running; }
uint64_t block_serial() { return serial; }

}  // namespace emulator

// For the tests, through ctypes.
extern "C" {
void mlite_emulator_schedule(unsigned schedule) { emulator::seed = schedule; }
const char* mlite_emulator_error() { return emulator::message; }
}
