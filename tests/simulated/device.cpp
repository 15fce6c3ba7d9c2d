// A device that torch takes for a real accelerator, in this process's memory: for tests without a GPU.
//
// Streams are threads, so work is late. Fresh memory is poisoned by a job of its stream. Memory comes from
// torch's caching allocator's rules (c10/cuda/CUDACachingAllocator.cpp). Operations run on the CPU once their
// stream is idle; recorded ones (at::GraphImplInterface) hold addresses, no references, as a CUDA graph does.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/GraphImplInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
using namespace c10;
constexpr auto KIND = DeviceType::PrivateUse1;
constexpr int DEVICES = 2, STREAMS = 33;
constexpr size_t MIB = 1 << 20;

static std::atomic<int> late_over_bus{0}, late_within{0};  // microseconds before a copy begins
static std::mutex counting;
static std::map<std::string, long> counts;
static void count(const char* name, long by = 1) {
  std::lock_guard<std::mutex> guard(counting);
  counts[name] += by;
}

// ---- streams and events --------------------------------------------------------------------------------

struct Recording;

struct Queue {
  std::mutex mutex;
  std::condition_variable wake, idle;
  std::deque<std::function<void()>> jobs;
  bool busy = false, started = false;
  Recording* recording = nullptr;

  void put(std::function<void()> job) {
    std::lock_guard<std::mutex> guard(mutex);
    if (!started) {
      started = true;
      std::thread([this] { run(); }).detach();
    }
    jobs.push_back(std::move(job));
    wake.notify_one();
  }
  void run() {
    InferenceMode mode;  // jobs write to tensors of every mode
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      wake.wait(lock, [this] { return !jobs.empty(); });
      auto job = std::move(jobs.front());
      jobs.pop_front();
      busy = true;
      lock.unlock();
      job();
      lock.lock();
      busy = false;
      if (jobs.empty()) idle.notify_all();
    }
  }
  void sync() {
    std::unique_lock<std::mutex> lock(mutex);
    idle.wait(lock, [this] { return jobs.empty() && !busy; });
  }
  bool done() {
    std::lock_guard<std::mutex> guard(mutex);
    return jobs.empty() && !busy;
  }
};

static Queue* queues() {
  static Queue* all = new Queue[DEVICES * STREAMS];
  return all;
}
static thread_local int current_device = 0, current_stream[DEVICES] = {0, 0};
static thread_local bool in_fallback = false;
static std::atomic<int> next_stream{0};
static Queue& queue(Stream s) { return queues()[s.device_index() * STREAMS + (int)s.id()]; }
static Queue& now(int device) { return queues()[device * STREAMS + current_stream[device]]; }
static Stream stream_of(int device, int id) { return Stream(Stream::UNSAFE, Device(KIND, device), id); }

struct Milestone {  // versions of it that were recorded, and that have been reached
  std::mutex mutex;
  std::condition_variable reached;
  long wanted = 0, done = 0;
};

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device d) const override {
    return Device(KIND, std::exchange(current_device, d.index()));
  }
  Device getDevice() const override { return Device(KIND, current_device); }
  void setDevice(Device d) const override { current_device = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current_device = d.index(); }
  int index(Device d) const { return d.has_index() ? d.index() : current_device; }
  Stream getStream(Device d) const override { return stream_of(index(d), current_stream[index(d)]); }
  Stream getDefaultStream(Device d) const override { return stream_of(index(d), 0); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  Stream getNewStream(Device d, int) const override {
    count("streams");
    return stream_of(index(d), 1 + next_stream++ % (STREAMS - 1));
  }
  Stream exchangeStream(Stream s) const override {
    int d = s.device_index();
    return stream_of(d, std::exchange(current_stream[d], (int)s.id()));
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}  // jobs may still point to it
  void record(void** event, const Stream& s, const DeviceIndex, const EventFlag) const override {
    if (!*event) *event = new Milestone;
    auto* e = (Milestone*)*event;
    long version;
    {
      std::lock_guard<std::mutex> guard(e->mutex);
      version = ++e->wanted;
    }
    count("events");
    queue(s).put([e, version] {
      {
        std::lock_guard<std::mutex> guard(e->mutex);
        e->done = std::max(e->done, version);
      }
      e->reached.notify_all();
    });
  }
  void block(void* event, const Stream& s) const override {
    if (!event) return;
    auto* e = (Milestone*)event;
    long version;
    {
      std::lock_guard<std::mutex> guard(e->mutex);
      version = e->wanted;
    }
    queue(s).put([e, version] {
      std::unique_lock<std::mutex> lock(e->mutex);
      e->reached.wait(lock, [&] { return e->done >= version; });
    });
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    std::lock_guard<std::mutex> guard(((Milestone*)event)->mutex);
    return ((Milestone*)event)->done >= ((Milestone*)event)->wanted;
  }
  bool queryStream(const Stream& s) const override { return queue(s).done(); }
  void synchronizeStream(const Stream& s) const override { queue(s).sync(); }
  void synchronizeEvent(void* event) const override {
    count("spins");  // as CUDA's events do unless they are made otherwise
    auto* e = (Milestone*)event;
    std::unique_lock<std::mutex> lock(e->mutex);
    e->reached.wait(lock, [e, version = e->wanted] { return e->done >= version; });
  }
  void synchronizeDevice(const DeviceIndex d) const override {
    for (int i = 0; i < STREAMS; i++) queues()[d * STREAMS + i].sync();
  }
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- device memory: one pool a stream, and one a recording ---------------------------------------------

struct Block {
  char* at;
  size_t size;
  bool small, used;
  int pool;
  Block *before, *after;
};
struct Less {
  bool operator()(const Block* a, const Block* b) const {
    return std::tie(a->pool, a->size, a->at) < std::tie(b->pool, b->size, b->at);
  }
};
struct Memory {
  std::set<Block*, Less> free_[2];
  std::map<void*, Block*> used;
  size_t allocated = 0, allocated_peak = 0, reserved = 0, reserved_peak = 0, limit = SIZE_MAX;
  long fails_in = -1;  // allocations until one is refused
};
static Memory* memories() {
  static Memory* all = new Memory[DEVICES];
  return all;
}
static std::recursive_mutex allocating;
static size_t total_memory = 8ull << 30;

struct Recording {
  int pool;
  std::vector<std::function<void()>> nodes;
};

static void release_cached(Memory& m) {
  for (auto& pool : m.free_)
    for (auto it = pool.begin(); it != pool.end();) {
      Block* b = *it;
      if (b->before || b->after) {
        ++it;
        continue;
      }
      it = pool.erase(it);
      m.reserved -= b->size;
      ::free(b->at);
      delete b;
    }
}
static void* take(int device, size_t wanted) {
  std::lock_guard<std::recursive_mutex> guard(allocating);
  Memory& m = memories()[device];
  size_t size = std::max<size_t>((wanted + 511) / 512 * 512, 512);
  bool small = size <= MIB;
  auto* recording = now(device).recording;
  int pool = recording ? recording->pool : current_stream[device];
  Block key{nullptr, size, small, false, pool, nullptr, nullptr};
  auto it = m.free_[small].lower_bound(&key);
  Block* b = nullptr;
  if (m.fails_in >= 0 && m.fails_in-- == 0)
    TORCH_CHECK_WITH(OutOfMemoryError, false, "simgpu out of memory. Tried to allocate ", wanted, " bytes");
  if (it != m.free_[small].end() && (*it)->pool == pool) {
    b = *it;
    m.free_[small].erase(it);
  } else {
    size_t segment = small ? 2 * MIB : size < 10 * MIB ? 20 * MIB : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    if (m.reserved + segment > m.limit) {
      Guard().synchronizeDevice(device);
      release_cached(m);
    }
    if (m.reserved + segment > m.limit)
      TORCH_CHECK_WITH(OutOfMemoryError, false, "simgpu out of memory. Tried to allocate ", wanted, " bytes");
    b = new Block{(char*)::aligned_alloc(512, segment), segment, small, false, pool, nullptr, nullptr};
    m.reserved += segment;
    m.reserved_peak = std::max(m.reserved, m.reserved_peak);
  }
  size_t rest_size = b->size - size;
  if (small ? rest_size >= 512 : rest_size > MIB) {
    auto* rest = new Block{b->at + size, rest_size, small, false, pool, b, b->after};
    if (b->after) b->after->before = rest;
    b->after = rest;
    b->size = size;
    m.free_[small].insert(rest);
  }
  b->used = true;
  m.used[b->at] = b;
  m.allocated += b->size;
  m.allocated_peak = std::max(m.allocated, m.allocated_peak);
  return b->at;
}
static void give(int device, void* at) {
  std::lock_guard<std::recursive_mutex> guard(allocating);
  Memory& m = memories()[device];
  Block* b = m.used.at(at);
  m.used.erase(at);
  m.allocated -= b->size;
  b->used = false;
  auto& pool = m.free_[b->small];
  if (Block* o = b->before; o && !o->used) {
    pool.erase(o);
    b->at = o->at, b->size += o->size, b->before = o->before;
    if (b->before) b->before->after = b;
    delete o;
  }
  if (Block* o = b->after; o && !o->used) {
    pool.erase(o);
    b->size += o->size, b->after = o->after;
    if (b->after) b->after->before = b;
    delete o;
  }
  pool.insert(b);
}
static void give0(void* at) { give(0, at); }
static void give1(void* at) { give(1, at); }

struct Allocator_ final : DeviceAllocator {
  DataPtr allocate(size_t n) override {
    int device = current_device;
    if (!n) return {nullptr, Device(KIND, device)};
    void* at = take(device, n);
    if (!now(device).recording) now(device).put([at, n, wait = !in_fallback] {
      if (wait) std::this_thread::sleep_for(std::chrono::microseconds(late_within));
      memset(at, 0xff, n);
    });
    return {at, at, device ? give1 : give0, Device(KIND, device)};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override {
    for (int d = 0; d < DEVICES; d++) now(d).sync();
    memcpy(to, from, n);
  }
  bool initialized() override { return true; }
  void emptyCache(MempoolId_t) override {
    std::lock_guard<std::recursive_mutex> guard(allocating);
    for (int i = 0; i < DEVICES; i++) {
      Guard().synchronizeDevice(i);
      release_cached(memories()[i]);
    }
  }
  void recordStream(const DataPtr&, Stream) override {}
  CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex i) override {
    std::lock_guard<std::recursive_mutex> guard(allocating);
    CachingDeviceAllocator::DeviceStats s;
    Memory& m = memories()[i];
    s.allocated_bytes[0].current = m.allocated, s.allocated_bytes[0].peak = m.allocated_peak;
    s.reserved_bytes[0].current = m.reserved, s.reserved_bytes[0].peak = m.reserved_peak;
    for (auto& pool : m.free_)
      for (Block* b : pool)
        if (b->before || b->after) s.inactive_split_bytes[0].current += b->size;
    return s;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex i) override {
    std::lock_guard<std::recursive_mutex> guard(allocating);
    memories()[i].allocated_peak = memories()[i].allocated;
    memories()[i].reserved_peak = memories()[i].reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex i) override {
    return {std::min(total_memory, memories()[i].limit) - memories()[i].reserved, total_memory};
  }
};
static Allocator_ allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

// ---- page-locked memory: powers of two, kept; never reused while a copy reads it -----------------------

struct Pinned {
  size_t size;
  bool used;
  std::atomic<int> copies{0};
};
static std::mutex pinning;
static std::map<char*, Pinned> pinned;
static bool refuse_pinned = false;
static Pinned* pinned_of(const void* at) {
  std::lock_guard<std::mutex> guard(pinning);
  auto it = pinned.upper_bound((char*)at);
  if (it == pinned.begin()) return nullptr;
  --it;
  return (char*)at < it->first + it->second.size ? &it->second : nullptr;
}
static void unpin(void* at) {
  std::lock_guard<std::mutex> guard(pinning);
  pinned.at((char*)at).used = false;
}
struct Host final : at::HostAllocator {
  DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, Device(DeviceType::CPU)};
    TORCH_CHECK(!refuse_pinned, "simgpu error: out of memory");
    size_t size = std::max<size_t>(llvm::PowerOf2Ceil(n), 4096);
    std::lock_guard<std::mutex> guard(pinning);
    char* at = nullptr;
    for (auto& [each, block] : pinned)
      if (block.size == size && !block.used && !block.copies) at = each;
    if (!at) {
      at = (char*)::aligned_alloc(4096, size);
      memset(at, 0, size);
      pinned[at].size = size;
      count("pinned_bytes", size);
    }
    pinned[at].used = true;
    return {at, at, unpin, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return unpin; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {
    std::lock_guard<std::mutex> guard(pinning);
    for (auto it = pinned.begin(); it != pinned.end();) {
      bool is_free = !it->second.used && !it->second.copies;
      if (is_free) ::free(it->first);
      it = is_free ? pinned.erase(it) : std::next(it);
    }
  }
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
  void begin_allocate_to_pool(MempoolId_t, std::function<bool(Stream)>) override {}
  void end_allocate_to_pool(MempoolId_t) override {}
  void release_pool(MempoolId_t) override {}
};
static Host host;
REGISTER_HOST_ALLOCATOR(KIND, &host);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(DeviceIndex d) const override { current_device = d; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return std::exchange(current_device, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  bool isPinnedPtr(const void* at) const override { return pinned_of(at) != nullptr; }
  Allocator* getPinnedMemoryAllocator() const override { return &host; }
};

// ---- operations ----------------------------------------------------------------------------------------

static at::Tensor on_host(const at::Tensor& t) {  // its memory, without a reference: a kernel keeps nothing alive
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(kCPU));
}
static at::Tensor borrowed(const at::Tensor& t) {
  return at::for_blob(t.data_ptr(), t.sizes()).strides(t.strides()).options(t.options())
      .target_device(t.device()).make_tensor();
}
static void require_no_recording(int device) {
  TORCH_CHECK(in_fallback || !now(device).recording, "operation not permitted when stream is capturing");
}
static void copy_now(at::Tensor from, at::Tensor to) {
  at::AutoDispatchBelowAutograd guard;
  to.copy_(from);
}
static at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  int device = to.is_cpu() ? self.device().index() : to.device().index();
  bool over_bus = self.is_cpu() || to.is_cpu();
  if (over_bus) require_no_recording(device);
  auto& q = now(device);
  if (!in_fallback) {
    count(self.is_cpu() ? "to_device" : to.is_cpu() ? "to_host" : "within");
    count(self.is_cpu() ? "bytes_to_device" : to.is_cpu() ? "bytes_to_host" : "bytes_within", to.nbytes());
  }
  Pinned* source = self.is_cpu() ? pinned_of(self.data_ptr()) : nullptr;
  at::Tensor a = self.is_cpu() && !source ? self.clone() : on_host(self), b = on_host(to);  // pageable: staged
  if (source) source->copies++;
  if (self.is_cpu() && !source && non_blocking && !in_fallback) count("pageable");
  if (q.recording && !in_fallback)
    q.recording->nodes.push_back([a = on_host(self), b] { copy_now(a, b); });
  q.put([a, b, source, over_bus, wait = !in_fallback] {
    int us = over_bus ? late_over_bus : late_within;
    if (us && wait) std::this_thread::sleep_for(std::chrono::microseconds(us));
    copy_now(a, b);
    if (source) source->copies--;
  });
  if (to.is_cpu() || (self.is_cpu() && !non_blocking)) q.sync();
  return to;
}
static at::Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                        std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> format) {
  DeviceGuard guard(device_or_default(device));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                   dtype_or_default(dtype), format);
}
static at::Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                                std::optional<Layout>, std::optional<Device> device, std::optional<bool>) {
  DeviceGuard guard(device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                           dtype_or_default(dtype));
}
static at::Tensor as_strided(const at::Tensor& t, SymIntArrayRef size, SymIntArrayRef stride,
                             std::optional<SymInt> offset) {
  return at::cpu::as_strided_symint(t, size, stride, offset);
}
static at::Tensor view(const at::Tensor& t, SymIntArrayRef size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}
static at::Tensor reshape_alias(const at::Tensor& t, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
static at::Scalar scalar(const at::Tensor& t) {
  require_no_recording(t.device().index());
  now(t.device().index()).sync();
  count("waits_of_host");
  return at::native::_local_scalar_dense_cpu(on_host(t));
}
static const at::Tensor& resize(const at::Tensor& t, SymIntArrayRef size, std::optional<MemoryFormat> format) {
  DeviceGuard guard(t.device());
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
static at::Tensor& set_part(at::Tensor& t, at::Storage s, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::set_(t, s, offset, size, stride);
}
static at::Tensor& set_whole(at::Tensor& t, at::Storage s) { return at::native::set_(t, s); }
static at::Tensor copy_from_resize(const at::Tensor& from, const at::Tensor& to) {
  DeviceGuard guard(to.is_cpu() ? from.device() : to.device());
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes(), std::nullopt);
  return const_cast<at::Tensor&>(to).copy_(from);
}

static void each_tensor(const IValue& value, const std::function<void(const at::Tensor&)>& use) {
  if (value.isTensor() && value.toTensor().defined()) use(value.toTensor());
  if (value.isTensorList())
    for (const at::Tensor& t : value.toTensorVector()) use(t);
}
static IValue aliased(const IValue& value) {
  auto of = [](const at::Tensor& t) { return t.defined() && t.device().type() == KIND ? borrowed(t) : t; };
  if (value.isTensor()) return of(value.toTensor());
  if (value.isTensorList()) {
    List<at::Tensor> found;
    for (const at::Tensor& t : value.toTensorVector()) found.push_back(of(t));
    return found;
  }
  if (value.isOptionalTensorList()) {
    List<std::optional<at::Tensor>> found;
    for (const auto& t : value.toOptionalTensorVector())
      found.push_back(t ? std::optional<at::Tensor>(of(*t)) : std::nullopt);
    return found;
  }
  return value;
}
static void on_cpu(const OperatorHandle& op, torch::jit::Stack* stack) {
  in_fallback = true;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    in_fallback = false;
    throw;
  }
  in_fallback = false;
}
static void fallback(const OperatorHandle& op, torch::jit::Stack* stack) {
  count("operations");
  size_t n = op.schema().arguments().size(), results = op.schema().returns().size();
  int device = current_device;
  bool found = false;
  for (size_t i = stack->size() - n; i < stack->size() && !found; i++) {
    each_tensor((*stack)[i], [&](const at::Tensor& t) {
      if (t.device().type() == KIND && !found) device = t.device().index(), found = true;
    });
    if ((*stack)[i].isDevice() && (*stack)[i].toDevice().has_index()) device = (*stack)[i].toDevice().index();
  }
  auto* recording = now(device).recording;
  if (!recording) return on_cpu(op, stack);
  torch::jit::Stack asked(stack->end() - n, stack->end()), given, made;
  on_cpu(op, stack);
  for (const IValue& each : asked) given.push_back(aliased(each));  // what is written to has its size by now
  asked.clear();
  for (size_t i = stack->size() - results; i < stack->size(); i++) made.push_back(aliased((*stack)[i]));
  recording->nodes.push_back([op, given, made, results] {
    torch::jit::Stack again = given;
    on_cpu(op, &again);
    for (size_t i = 0; i < results; i++) {
      std::vector<at::Tensor> old;
      each_tensor(made[i], [&](const at::Tensor& t) { old.push_back(t); });
      size_t k = 0;
      each_tensor(again[again.size() - results + i], [&](const at::Tensor& t) {
        if (t.data_ptr() != old[k].data_ptr()) copy_now(on_host(t), on_host(old[k]));
        k++;
      });
    }
  });
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_local_scalar_dense", scalar);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_whole);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

// ---- recorded work -------------------------------------------------------------------------------------

static std::atomic<int> next_pool{STREAMS};

struct Graph final : at::GraphImplInterface {
  Recording recording{next_pool++, {}};
  Queue* from = nullptr;
  int device = 0;

  Graph(const at::GraphImplArgs&) {}
  ~Graph() override { reset(); }
  void capture_begin(MempoolId_t, at::GraphCaptureMode) override {
    device = current_device;
    TORCH_CHECK(current_stream[device], "a graph must be recorded on a stream that is not the default one");
    from = &now(device);
    from->recording = &recording;
  }
  void capture_end() override {
    from->recording = nullptr;
    count("recordings");
    count("recorded", recording.nodes.size());
  }
  void instantiate() override {}
  void replay() override {
    InferenceMode mode;
    DeviceGuard guard(Device(KIND, device));
    count("replays");
    for (auto& node : recording.nodes) {
      now(device).sync();
      node();
    }
  }
  void reset() override { recording.nodes.clear(); }
  MempoolId_t pool() const override { return {0, (unsigned long long)recording.pool}; }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override {}
};
namespace at {
REGISTER_GRAPH_IMPL(SIMGPU, ::Graph);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("delay", [](int over_bus, int within) { late_over_bus = over_bus, late_within = within; });
  m.def("limit", [](int device, size_t nbytes) { memories()[device].limit = nbytes; });
  m.def("fail_in", [](int device, long allocations) { memories()[device].fails_in = allocations; });
  m.def("refuse_pinned", [](bool on) { refuse_pinned = on; });
  m.def("counts", [] {
    std::lock_guard<std::mutex> guard(counting);
    return counts;
  });
}
