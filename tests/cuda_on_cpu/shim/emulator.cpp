// The scheduler: a Worker per OS thread runs one block at a time, each of its threads as a fiber on a stack of its own.
//
// A fiber runs until it waits; then the one most recently made ready goes on. So a warp whose lanes have met runs ahead
// before any other starts, which shows a missing barrier on either side of a write. See emulator.h.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "context.h"
#include "cuda_runtime.h"

namespace conv1x1::cuda::emulator {
namespace {

constexpr size_t kStackSize = CONV1X1_EMULATOR_ASAN ? 256 << 10 : 64 << 10;
constexpr size_t kSharedAlignment = 128;
constexpr size_t kCanary = CONV1X1_EMULATOR_ASAN ? 0 : 256;  // AddressSanitizer has its own
constexpr unsigned char kPoison = 0xff;                      // a NaN in every floating-point type

struct SpareStacks {
  std::mutex mutex;
  std::vector<unsigned char*> stacks;
};

SpareStacks& spare_stacks() {
  static SpareStacks instance;
  return instance;
}

// Stacks are mapped once and used again: a page that no access may touch, then the stack.
unsigned char* take_stack() {
  {
    const std::lock_guard<std::mutex> lock(spare_stacks().mutex);
    std::vector<unsigned char*>& stacks = spare_stacks().stacks;
    if (!stacks.empty()) {
      unsigned char* stack = stacks.back();
      stacks.pop_back();
      return stack;
    }
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("cuda_on_cpu: no memory for a fiber's stack");
    std::abort();
  }
  return static_cast<unsigned char*>(memory) + page;
}

void give_stack_back(unsigned char* stack) {
  const std::lock_guard<std::mutex> lock(spare_stacks().mutex);
  spare_stacks().stacks.push_back(stack);
}

struct Span {
  unsigned char* begin = nullptr;
  size_t size = 0;

  bool contains(const void* pointer, size_t bytes) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer), first = reinterpret_cast<uintptr_t>(begin);
    return at >= first && at + bytes <= first + size;
  }
};

// This library's thread-local storage: `registers` and all static __shared__ arrays.
Span thread_storage() {
  Span found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          const Span span{static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
          if (!span.contains(&registers, sizeof registers)) continue;
          *static_cast<Span*>(result) = span;
          return 1;
        }
        return 0;
      },
      &found);
  return found;
}

std::string text(const char* name, Site site) {
  return std::string(name) + " at " + site.file + ":" + std::to_string(site.line);
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string hex(const void* pointer) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%p", pointer);
  return buffer;
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

uint3 index_in(uint64_t linear, dim3 size) {
  return {static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
          static_cast<unsigned>(linear / size.x / size.y)};
}

uint64_t volume(dim3 size) { return static_cast<uint64_t>(size.x) * size.y * size.z; }

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;
  Site site;
};

struct Fiber : Context {
  uint3 index = {};
  bool done = false;
  const char* waits_in = nullptr;
  Site site = {};
  std::vector<Copy> copies;         // not done yet, oldest first
  std::vector<size_t> group_sizes;  // of the closed groups among them, oldest first
};

struct Barrier {
  int arrived = 0;
  const char* name = nullptr;
  Site site = {};
};

struct Warp {
  Barrier barrier;
  Perform perform = nullptr;
  void* lanes[kWarp] = {};
};

// What the workers of one launch share.
struct Shared {
  explicit Shared(const Launch& what) : launch(what) {}
  const Launch& launch;
  std::vector<uint64_t> order;  // of the blocks
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
};

}  // namespace

class Worker {
 public:
  explicit Worker(Shared& shared) : shared_(shared), launch_(shared.launch) {
    const int threads = static_cast<int>(volume(launch_.block));
    fibers_.resize(static_cast<size_t>(threads));
    warps_.resize(static_cast<size_t>((threads + kWarp - 1) / kWarp));
    for (Fiber& fiber : fibers_) {
      fiber.stack = take_stack();
      fiber.size = kStackSize;
    }
    if (posix_memalign(&dynamic_, kSharedAlignment, launch_.shared_bytes + kCanary) != 0) std::abort();
    static_ = thread_storage();
  }

  ~Worker() {
    for (Fiber& fiber : fibers_) give_stack_back(fiber.stack);
    std::free(dynamic_);
  }

  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void run_blocks() {
    while (!shared_.failed) {
      const uint64_t i = shared_.next++;
      if (i >= shared_.order.size()) return;
      run_block(shared_.order[i]);
    }
  }

  int lane() const { return current_ % kWarp; }

  void block_barrier(Site site) {
    meet(block_, "__syncthreads", site, static_cast<int>(fibers_.size()));
    Fiber& self = wait("__syncthreads", site);
    if (++block_.arrived == static_cast<int>(fibers_.size())) {
      block_.arrived = 0;
      const size_t first = ready_.size();
      for (int i = 0; i < static_cast<int>(fibers_.size()); ++i) make_ready(i);
      std::shuffle(ready_.begin() + static_cast<std::ptrdiff_t>(first), ready_.end(), random_);
    }
    go_on_elsewhere(self);
  }

  void warp_collective(const char* name, Perform perform, void* mine, Site site) {
    const int first = current_ / kWarp * kWarp;
    if (first + kWarp > static_cast<int>(fibers_.size()))
      fail(text(name, site) + " needs a full warp, and the block's last has fewer threads");
    Warp& warp = warps_[static_cast<size_t>(current_ / kWarp)];
    meet(warp.barrier, name, site, kWarp);
    warp.lanes[lane()] = mine;
    if (++warp.barrier.arrived < kWarp) {
      go_on_elsewhere(wait(name, site));
      return;
    }
    warp.barrier.arrived = 0;
    perform(warp.lanes);
    const int mix = static_cast<int>(random_() % kWarp);
    for (int i = 0; i < kWarp; ++i)
      if ((i ^ mix) != lane()) make_ready(first + (i ^ mix));
  }

  [[noreturn]] void fail(const std::string& message) {
    abort_launch(message + " (thread " + text(registers.thread_index) + ")");
  }

  void check_shared(const char* name, const void* pointer, size_t bytes, size_t alignment, Site site) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
      fail(text(name, site) + ": shared address " + hex(pointer) + " is not a multiple of " +
           std::to_string(alignment));
    const Span dynamic{static_cast<unsigned char*>(dynamic_), launch_.shared_bytes};
    if (!dynamic.contains(pointer, bytes) && !static_.contains(pointer, bytes))
      fail(text(name, site) + ": " + std::to_string(bytes) + " bytes at " + hex(pointer) +
           " are not in the block's shared memory");
  }

  void queue_copy(const Copy& copy) {
    check_shared("cp_async", copy.shared, static_cast<size_t>(copy.bytes), static_cast<size_t>(copy.bytes), copy.site);
    if (reinterpret_cast<uintptr_t>(copy.global) % static_cast<uintptr_t>(copy.bytes) != 0)
      fail(text("cp_async", copy.site) + ": global address " + hex(copy.global) + " is not a multiple of " +
           std::to_string(copy.bytes));
    if (copy.valid < 0 || copy.valid > copy.bytes)
      fail(text("cp_async", copy.site) + ": " + std::to_string(copy.valid) + " valid bytes of " +
           std::to_string(copy.bytes));
    // From here to the wait the destination's contents are undefined.
    std::memset(copy.shared, kPoison, static_cast<size_t>(copy.bytes));
    fiber().copies.push_back(copy);
  }

  void close_group() {
    size_t open = fiber().copies.size();
    for (size_t size : fiber().group_sizes) open -= size;
    fiber().group_sizes.push_back(open);
  }

  void wait_for_groups(size_t pending) {
    Fiber& self = fiber();
    if (self.group_sizes.size() <= pending) return;
    const auto newest = self.group_sizes.end() - static_cast<std::ptrdiff_t>(pending);
    size_t due = 0;
    for (auto group = self.group_sizes.begin(); group != newest; ++group) due += *group;
    for (size_t i = 0; i < due; ++i) {
      const Copy& copy = self.copies[i];
      std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
      if (copy.valid) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid));
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(due));
    self.group_sizes.erase(self.group_sizes.begin(), newest);
  }

 private:
  Fiber& fiber() { return fibers_[static_cast<size_t>(current_)]; }

  void run_block(uint64_t linear) {
    // Shared memory keeps nothing from one block to the next.
    std::memset(static_.begin, kPoison, static_.size);
    std::memset(dynamic_, kPoison, launch_.shared_bytes + kCanary);
    new (&registers) Registers();
    registers.block_index = index_in(linear, launch_.grid);
    registers.grid_dim = launch_.grid;
    registers.block_dim = launch_.block;
    registers.dynamic_shared = static_cast<unsigned char*>(dynamic_);
    registers.worker = this;
    random_.seed(static_cast<std::minstd_rand::result_type>(settings().seed * 0x9e3779b97f4a7c15u + linear + 1));
    block_ = Barrier();
    for (Warp& warp : warps_) warp.barrier = Barrier();
    ready_.clear();
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = index_in(i, launch_.block);
      fiber.done = false;
      fiber.copies.clear();
      fiber.group_sizes.clear();
      fiber.start_at(&Worker::fiber_main);
      make_ready(static_cast<int>(i));
    }
    std::shuffle(ready_.begin(), ready_.end(), random_);
    live_ = fibers_.size();
    go_on(&main_);
    const unsigned char* canary = static_cast<unsigned char*>(dynamic_) + launch_.shared_bytes;
    if (!std::all_of(canary, canary + kCanary, [](unsigned char byte) { return byte == kPoison; }))
      report("a store beyond the " + std::to_string(launch_.shared_bytes) + " bytes of dynamic shared memory");
    registers = Registers();
  }

  static void fiber_main() {
    Worker& worker = *registers.worker;
    entered_from(worker.left_);
    worker.launch_.call(worker.launch_.arguments);
    worker.exit_fiber();
  }

  [[noreturn]] void exit_fiber() {
    Fiber& self = fiber();
    if (!self.copies.empty())
      fail(text("cp_async", self.copies.front().site) + ": not waited for when the thread ended");
    self.done = true;
    if (--live_ == 0) leave();
    go_on_elsewhere(self);
    std::abort();  // not reached: nothing makes a fiber ready that is done
  }

  // The name and place must be those of the threads that wait already.
  void meet(Barrier& barrier, const char* name, Site site, int count) {
    if (barrier.arrived > 0 && !(same(barrier.site, site) && std::strcmp(barrier.name, name) == 0))
      fail("divergence: " + text(name, site) + ", while " + std::to_string(barrier.arrived) + " of " +
           std::to_string(count) + " threads wait in " + text(barrier.name, barrier.site));
    barrier.name = name;
    barrier.site = site;
  }

  Fiber& wait(const char* name, Site site) {
    Fiber& self = fiber();
    self.waits_in = name;
    self.site = site;
    return self;
  }

  void make_ready(int index) {
    fibers_[static_cast<size_t>(index)].waits_in = nullptr;
    ready_.push_back(index);
  }

  // Returns when `self` has been made ready and chosen.
  void go_on_elsewhere(Fiber& self) {
    if (ready_.empty()) deadlock();
    go_on(&self);
  }

  void go_on(Context* from) {
    current_ = ready_.back();
    ready_.pop_back();
    registers.thread_index = fiber().index;
    if (from == &fiber()) return;
    left_ = from;
    switch_context(from, &fiber());
  }

  [[noreturn]] void leave() {
    Context abandoned;
    switch_context(&abandoned, &main_);
    std::abort();
  }

  [[noreturn]] void deadlock() {
    size_t exited = 0;
    std::vector<std::pair<std::string, int>> waiting;
    for (const Fiber& fiber : fibers_) {
      if (fiber.done) {
        ++exited;
        continue;
      }
      const std::string where = text(fiber.waits_in, fiber.site);
      const auto known = std::find_if(waiting.begin(), waiting.end(), [&](const auto& w) { return w.first == where; });
      if (known == waiting.end())
        waiting.emplace_back(where, 1);
      else
        ++known->second;
    }
    std::string message = "divergence: " + std::to_string(exited) + " threads have exited";
    for (const auto& [where, count] : waiting) message += ", " + std::to_string(count) + " wait in " + where;
    abort_launch(message);
  }

  void report(const std::string& message) {
    shared_.failed = true;
    set_error(cudaErrorLaunchFailure,
              std::string("kernel ") + launch_.name + ", block " + text(registers.block_index) + ": " + message);
  }

  // The block's other fibers are left where they are: kernels hold nothing that needs a destructor.
  [[noreturn]] void abort_launch(const std::string& message) {
    report(message);
    leave();
  }

  Shared& shared_;
  const Launch& launch_;
  Context main_;
  Context* left_ = nullptr;  // who was stopped last
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;  // the last goes on next
  Barrier block_;
  int current_ = 0;
  size_t live_ = 0;
  void* dynamic_ = nullptr;
  Span static_;
  std::minstd_rand random_;
};

int lane() { return registers.worker->lane(); }
void block_barrier(Site site) { registers.worker->block_barrier(site); }
void warp_collective(const char* name, Perform perform, void* mine, Site site) {
  registers.worker->warp_collective(name, perform, mine, site);
}
void fail(const std::string& message, Site site) { registers.worker->fail(text(message.c_str(), site)); }
void check_shared(const char* name, const void* pointer, size_t bytes, size_t alignment, Site site) {
  registers.worker->check_shared(name, pointer, bytes, alignment, site);
}
void queue_copy(void* shared, const void* global, int bytes, int valid, Site site) {
  registers.worker->queue_copy({shared, global, bytes, valid, site});
}
void close_group() { registers.worker->close_group(); }
void wait_for_groups(size_t pending) { registers.worker->wait_for_groups(pending); }

void run(const Launch& launch) {
  const uint64_t threads = volume(launch.block), blocks = volume(launch.grid);
  if (threads == 0 || threads > 1024 || launch.block.z > 64 || blocks == 0 || launch.grid.x > 0x7fffffffu ||
      launch.grid.y > 65535 || launch.grid.z > 65535) {
    set_error(cudaErrorInvalidConfiguration, std::string("kernel ") + launch.name + ": invalid grid " +
                                                 text(uint3{launch.grid.x, launch.grid.y, launch.grid.z}) +
                                                 " or block " +
                                                 text(uint3{launch.block.x, launch.block.y, launch.block.z}));
    return;
  }
  const size_t limit = shared_memory_limit(launch.function);
  if (launch.shared_bytes > limit) {
    set_error(cudaErrorInvalidValue, std::string("kernel ") + launch.name + ": " + std::to_string(launch.shared_bytes) +
                                         " bytes of dynamic shared memory, allowed are " + std::to_string(limit));
    return;
  }
  Shared shared(launch);
  shared.order.resize(blocks);
  for (uint64_t i = 0; i < blocks; ++i) shared.order[i] = i;
  std::shuffle(shared.order.begin(), shared.order.end(), std::minstd_rand(static_cast<unsigned>(settings().seed + 1)));
  const auto work = [&shared] { Worker(shared).run_blocks(); };
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < std::min<uint64_t>(blocks, static_cast<uint64_t>(settings().os_threads)); ++i)
    others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace conv1x1::cuda::emulator
