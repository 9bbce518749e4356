/* Goes along with candidates to a device: POSIX C that says what the device is, and runs a function in a child.

   A candidate that crashes takes the whole session with it, and some servers do not come back from that. So each is run
   once in a child of the session's process first. That must be before any function ran in the process itself: threads
   of a pool do not live on in a child. */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/prctl.h>
#endif

#include <tvm/ffi/c_api.h>

typedef int (*Function)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

enum { RAISED = 77, LATE = -1, UNTRIED = -2 };

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void be_child(Function function, const TVMFFIAny* args, int32_t count) {
  TVMFFIAny result;
  struct rlimit none = {0, 0};
  setrlimit(RLIMIT_CORE, &none);
#ifdef __linux__
  prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
  for (int each = 1; each < 32; ++each) signal(each, SIG_DFL); /* of the server's handlers none is for this */
  memset(&result, 0, sizeof(result));
  _exit(function(NULL, args, count, &result) ? RAISED : 0);
}

/* The child's wait status; LATE where it was killed after that many seconds, UNTRIED where there is no child. */
static int64_t waited_for(pid_t child, double seconds) {
  int status = 0;
  double until = now() + seconds;
  struct timespec nap = {0, 200000};
  while (1) {
    pid_t ended = waitpid(child, &status, WNOHANG);
    if (ended == child) return status;
    if (ended < 0 && errno != EINTR) return UNTRIED;
    if (now() > until) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      return LATE;
    }
    nanosleep(&nap, NULL);
    if (nap.tv_nsec < 10000000) nap.tv_nsec *= 2;
  }
}

/* Seconds that it may take, then the function's own arguments. */
static int guarded(Function function, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  pid_t child = count > 0 ? fork() : -1;
  if (child == 0) be_child(function, args + 1, count - 1);
  result->type_index = kTVMFFIInt;
  result->v_int64 = child < 0 ? UNTRIED : waited_for(child, args[0].v_float64);
  return 0;
}

#define GUARDED(name)                                                             \
  int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);             \
  int __tvm_ffi_guarded_##name(void* self, const TVMFFIAny* args, int32_t count, \
                               TVMFFIAny* result) {                              \
    (void)self;                                                                  \
    return guarded(__tvm_ffi_##name, args, count, result);                       \
  }

typedef struct {
  char text[16384];
  size_t length;
} Said;

static void say(Said* said, const char* name, const char* value) {
  int wrote = snprintf(said->text + said->length, sizeof(said->text) - said->length, "%s\t%s\n", name, value);
  if (wrote > 0) said->length += wrote;
  if (said->length >= sizeof(said->text)) said->length = sizeof(said->text) - 1;
}

/* The first processor's lines of /proc/cpuinfo, each "name <tab> : value". */
static void say_processor(Said* said) {
  static char line[8192];
  FILE* file = fopen("/proc/cpuinfo", "r");
  while (file != NULL && fgets(line, sizeof(line), file) != NULL && line[0] != '\n') {
    char* value = strchr(line, ':');
    if (value == NULL) continue;
    *value++ = 0;
    line[strcspn(line, "\t\n")] = 0;
    value[strcspn(value, "\n")] = 0;
    say(said, line, value);
  }
  if (file != NULL) fclose(file);
}

/* Of the processors, those that are the first of their core, as far as the system lists them. */
static long cores(long processors) {
  long found = 0;
  for (long each = 0; each < processors; ++each) {
    char path[96];
    long first = each;
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%ld/topology/thread_siblings_list", each);
    FILE* file = fopen(path, "r");
    if (file != NULL && fscanf(file, "%ld", &first) != 1) first = each;
    if (file != NULL) fclose(file);
    found += first == each;
  }
  return found > 0 ? found : 1;
}

/* What pipeline.runtime has pools of threads read for a model, unless the server was started with something else. */
static void settle(long processors) {
  char number[32];
  snprintf(number, sizeof(number), "%ld", cores(processors));
  setenv("TVM_NUM_THREADS", number, 0);
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "1000", 0);
  setenv("GOMP_SPINCOUNT", "1000", 0);
}

/* Lines of "name <tab> value": what the system says of itself, its board and its processor. Asked before all else. */
int __tvm_ffi_tvmake_device(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  static Said said;
  struct utsname system;
  char board[256] = "", number[32];
  long processors = sysconf(_SC_NPROCESSORS_ONLN);
  FILE* file = fopen("/proc/device-tree/model", "r");
  (void)self, (void)args, (void)count;
  said.length = 0;
  if (uname(&system) == 0) say(&said, "machine", system.machine);
  if (file != NULL && fgets(board, sizeof(board), file) != NULL) say(&said, "board", board);
  if (file != NULL) fclose(file);
#ifdef __linux__
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof(usable), &usable) == 0) processors = CPU_COUNT(&usable);
#endif
  snprintf(number, sizeof(number), "%ld", processors);
  say(&said, "processors", number);
  for (const char** name = (const char*[]){"OMP_NUM_THREADS", "TVM_NUM_THREADS", NULL}; *name != NULL; ++name)
    if (getenv(*name) != NULL) say(&said, *name, getenv(*name));
  say_processor(&said);
  settle(processors);
  TVMFFIByteArray bytes = {said.text, said.length};
  return TVMFFIStringFromByteArray(&bytes, result);
}
