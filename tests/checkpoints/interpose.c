/* Counts the calls that change files, and at the n-th kills the process or fails.

   Built as a shared library and loaded before libc (LD_PRELOAD). Calls are counted once
   `arm` was called; what goes to the terminal or a pipe of its own is not counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL_BEFORE, KILL_AFTER, FAIL };

static atomic_long calls;
static long nth;
static int mode = OFF, error;

void arm(long n, int how, int code) {
  atomic_store(&calls, 0);
  nth = n;
  error = code;
  mode = how;
}

long count(void) { return atomic_load(&calls); }

static int is_file(int fd) {
  struct stat found;
  return fd > 2 && !fstat(fd, &found) && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
}

/* 1 if the call must fail; `*last` if the process must die once it is done. */
static int enter(int fails, int *last) {
  *last = 0;
  if (mode == OFF) return 0;
  long now = atomic_fetch_add(&calls, 1) + 1;
  if (mode == FAIL) {
    if (fails && now >= nth) {
      errno = error;
      return 1;
    }
    return 0;
  }
  if (now == nth && mode == KILL_BEFORE) kill(getpid(), SIGKILL);
  *last = now == nth && mode == KILL_AFTER;
  return 0;
}

static void leave(int last) {
  if (last) kill(getpid(), SIGKILL);
}

#define CALL(type, name, params, args, counted, fails)              \
  type name params {                                                \
    static type(*real) params;                                      \
    if (!real) real = (type(*) params)dlsym(RTLD_NEXT, #name);      \
    int last = 0;                                                   \
    if ((counted) && enter(fails, &last)) return -1;                \
    type out = real args;                                           \
    leave(last);                                                    \
    return out;                                                     \
  }

CALL(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), is_file(fd), 1)
CALL(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), is_file(fd), 1)
CALL(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), is_file(fd), 1)
CALL(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), is_file(fd), 1)
CALL(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o), is_file(fd), 1)
CALL(ssize_t, pwritev64, (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o), is_file(fd), 1)
CALL(ssize_t, copy_file_range, (int a, off64_t *p, int b, off64_t *q, size_t n, unsigned f), (a, p, b, q, n, f), 1, 1)
CALL(ssize_t, sendfile, (int a, int b, off_t *p, size_t n), (a, b, p, n), 1, 1)
CALL(int, ftruncate, (int fd, off_t n), (fd, n), is_file(fd), 1)
CALL(int, ftruncate64, (int fd, off64_t n), (fd, n), is_file(fd), 1)
CALL(int, fallocate, (int fd, int m, off_t o, off_t n), (fd, m, o, n), 1, 1)
CALL(int, fsync, (int fd), (fd), is_file(fd), 1)
CALL(int, fdatasync, (int fd), (fd), is_file(fd), 1)
CALL(int, rename, (const char *a, const char *b), (a, b), 1, 0)
CALL(int, renameat, (int i, const char *a, int j, const char *b), (i, a, j, b), 1, 0)
CALL(int, renameat2, (int i, const char *a, int j, const char *b, unsigned f), (i, a, j, b, f), 1, 0)
CALL(int, link, (const char *a, const char *b), (a, b), 1, 0)
CALL(int, linkat, (int i, const char *a, int j, const char *b, int f), (i, a, j, b, f), 1, 0)
CALL(int, symlink, (const char *a, const char *b), (a, b), 1, 0)
CALL(int, unlink, (const char *a), (a), 1, 0)
CALL(int, unlinkat, (int i, const char *a, int f), (i, a, f), 1, 0)
CALL(int, mkdir, (const char *a, mode_t m), (a, m), 1, 1)
CALL(int, mkdirat, (int i, const char *a, mode_t m), (i, a, m), 1, 1)
CALL(int, rmdir, (const char *a), (a), 1, 0)

#define OPEN(name, before, ...)                                               \
  int name(before, int flags, ...) {                                          \
    static int (*real)(before, int, ...);                                     \
    if (!real) real = (int (*)(before, int, ...))dlsym(RTLD_NEXT, #name);     \
    mode_t bits = 0;                                                          \
    if (flags & (O_CREAT | O_TMPFILE)) {                                      \
      va_list rest;                                                           \
      va_start(rest, flags);                                                  \
      bits = va_arg(rest, mode_t);                                            \
      va_end(rest);                                                           \
    }                                                                         \
    int last = 0;                                                             \
    if ((flags & O_CREAT) && enter(1, &last)) return -1;                      \
    int out = real(__VA_ARGS__, flags, bits);                                 \
    leave(last);                                                              \
    return out;                                                               \
  }
#define COMMA ,

OPEN(open, const char *path, path)
OPEN(open64, const char *path, path)
OPEN(openat, int at COMMA const char *path, at, path)
OPEN(openat64, int at COMMA const char *path, at, path)
