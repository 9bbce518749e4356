// TVM's parallel loops on OpenMP's threads.
//
// Generated code launches its parallel loops through the variable below, which TVM's loader fills where a library
// exports it. Two pools in one process cost each other their cores: the one that has just finished a loop spins while
// the other one works. Linked into an artifact beside a library that runs on OpenMP, this definition takes the place of
// the weak one in each of TVM's objects and hides it from the loader, so that everything runs on OpenMP's pool.
//
// The number of threads is OpenMP's: OMP_NUM_THREADS, or the cores that the process may use.

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>

extern "C" {
// From TVM's FFI, which generated code needs as well. Raised errors belong to the thread that raised them.
void TVMFFIErrorMoveFromRaised(void** error);
void TVMFFIErrorSetRaised(void* error);
void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
int TVMFFIObjectDecRef(void* object);
}

namespace {

// As in tvm/runtime/c_backend_api.h, which artifacts are not compiled against.
struct ParallelGroup {
  void* sync_handle;
  int32_t num_task;
};

using Task = int (*)(int index, ParallelGroup* group, void* closure);

// The first error of a loop's tasks, on its way from the task's thread to the caller's.
class FirstError {
 public:
  void take() {
    void* mine = nullptr;
    void* none = nullptr;
    TVMFFIErrorMoveFromRaised(&mine);
    failed_.store(true);
    if (mine && !error_.compare_exchange_strong(none, mine)) TVMFFIObjectDecRef(mine);
  }

  int raise() {
    if (!failed_.load()) return 0;
    if (void* error = error_.load()) {
      TVMFFIErrorSetRaised(error);
      TVMFFIObjectDecRef(error);
    } else {
      TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a task of a parallel loop failed without an error");
    }
    return -1;
  }

 private:
  std::atomic<bool> failed_{false};
  std::atomic<void*> error_{nullptr};
};

// Where the tasks of one loop wait for each other. They can where each has a thread of its own; generated code does not
// look at what a barrier returns, so that the loop has to remember that it did not hold.
class Barrier {
 public:
  explicit Barrier(int tasks) : tasks_(tasks) {}

  void set_threads(int threads) { together_.store(threads >= tasks_); }

  int wait() {
    if (!together_.load()) {
      broken_.store(true);
      return -1;
    }
    const int phase = phase_.load();
    if (arrived_.fetch_add(1) + 1 == tasks_) {
      arrived_.store(0);
      phase_.store(phase + 1);
    } else {
      while (phase_.load() == phase) std::this_thread::yield();
    }
    return 0;
  }

  int raise() {
    if (!broken_.load()) return 0;
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a barrier needs a thread for each task of its loop");
    return -1;
  }

 private:
  const int tasks_;
  std::atomic<bool> together_{false}, broken_{false};
  std::atomic<int> arrived_{0}, phase_{0};
};

// Runs the tasks of one loop. `asked` is how many, 0 where that is for the pool to say: then as many as threads.
int launch(Task task, void* closure, int asked) {
  // Within a parallel region there is one thread to give: the loop runs where it is.
  const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int tasks = asked > 0 ? asked : threads;
  Barrier barrier(tasks);
  ParallelGroup group{&barrier, tasks};
  if (threads == 1 || tasks == 1) {
    barrier.set_threads(1);
    for (int i = 0; i < tasks; ++i) {
      if (const int failed = task(i, &group, closure)) return failed;
    }
    return barrier.raise();
  }
  FirstError error;
#pragma omp parallel num_threads(tasks < threads ? tasks : threads)
  {
    barrier.set_threads(omp_get_num_threads());
#pragma omp for schedule(static, 1)
    for (int i = 0; i < tasks; ++i) {
      if (task(i, &group, closure) != 0) error.take();
    }
  }
  if (const int failed = error.raise()) return failed;
  return barrier.raise();
}

int wait_at_barrier(int, ParallelGroup* group) { return static_cast<Barrier*>(group->sync_handle)->wait(); }

}  // namespace

// The names of the variables that TVM's code generator declares.
extern "C" {
__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Task, void*, int) = launch;
__attribute__((visibility("hidden"))) int (*__TVMBackendParallelBarrier)(int, ParallelGroup*) = wait_at_barrier;
}
