/* A disk that fails: preloaded, it counts the calls that change files below $DISK_ROOT and, at call
   number $DISK_AT, kills its process ($DISK_HOW=kill), fails once (EIO), or is full from then on
   (ENOSPC: what would need room fails). All processes of a run share the count, in $DISK_COUNT.
   $DISK_LOG gets a line for each call: number, function, path. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long *count;
static long at;
static int log_file = -1;
static const char *root, *how;

__attribute__((constructor)) void disk_begin(void) {
  const char *place = getenv("DISK_COUNT");
  count = NULL, log_file = -1;
  if (!place || !getenv("DISK_ROOT") || !getenv("DISK_HOW")) return;
  root = strdup(getenv("DISK_ROOT")), how = strdup(getenv("DISK_HOW"));
  at = atol(getenv("DISK_AT"));
  int file = open(place, O_RDWR);
  if (file >= 0) count = mmap(0, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (count == MAP_FAILED) count = NULL;
  const char *log = getenv("DISK_LOG");
  if (log) log_file = open(log, O_WRONLY | O_APPEND | O_CREAT, 0600);
}

static int below(const char *path) {
  size_t n = strlen(root);
  return !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static int is_ours(int folder, const char *path, char *whole) {
  if (!count) return 0;
  if (path && path[0] == '/') {
    snprintf(whole, PATH_MAX, "%s", path);
    return below(path);
  }
  if (folder == AT_FDCWD) {
    if (!getcwd(whole, PATH_MAX)) return 0;
  } else {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, whole, PATH_MAX - 1);
    if (n < 0) return 0;
    whole[n] = 0;
  }
  return below(whole);
}

/* Whether this call fails; needs_room: whether a full disk minds it. */
#define fails(folder, path, needs_room) fails_in(__func__, folder, path, needs_room)
static int fails_in(const char *function, int folder, const char *path, int needs_room) {
  char whole[PATH_MAX];
  int before = errno;
  int ours = is_ours(folder, path, whole);
  errno = before;
  if (!ours) return 0;
  long number = __sync_add_and_fetch(count, 1);
  if (log_file >= 0) {
    const char *rest = path && path[0] != '/' ? path : "";
    dprintf(log_file, "%ld %s %s%s%s\n", number, function, whole, *rest ? "/" : "", rest);
    errno = before;
  }
  if (at <= 0 || number < at) return 0;
  if (!strcmp(how, "kill") && number == at) {
    kill(getpid(), SIGKILL);
    pause();
  }
  if (!strcmp(how, "EIO") && number == at) return errno = EIO, 1;
  if (!strcmp(how, "ENOSPC") && needs_room) return errno = ENOSPC, 1;
  return 0;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define ON_FILE(type, name, room, parameters, arguments, ...) \
  type name parameters { REAL(type, name, __VA_ARGS__); \
    return fails(file, NULL, room) ? -1 : real arguments; }

ON_FILE(ssize_t, write, 1, (int file, const void *b, size_t n), (file, b, n), int, const void *, size_t)
ON_FILE(ssize_t, pwrite, 1, (int file, const void *b, size_t n, off_t o), (file, b, n, o), int, const void *, size_t, off_t)
ON_FILE(ssize_t, pwrite64, 1, (int file, const void *b, size_t n, off64_t o), (file, b, n, o), int, const void *, size_t, off64_t)
ON_FILE(ssize_t, writev, 1, (int file, const struct iovec *v, int n), (file, v, n), int, const struct iovec *, int)
ON_FILE(ssize_t, sendfile, 1, (int file, int in, off_t *o, size_t n), (file, in, o, n), int, int, off_t *, size_t)
ON_FILE(ssize_t, sendfile64, 1, (int file, int in, off64_t *o, size_t n), (file, in, o, n), int, int, off64_t *, size_t)
ON_FILE(int, fsync, 0, (int file), (file), int)
ON_FILE(int, fdatasync, 0, (int file), (file), int)
ON_FILE(int, ftruncate, 1, (int file, off_t n), (file, n), int, off_t)
ON_FILE(int, ftruncate64, 1, (int file, off64_t n), (file, n), int, off64_t)

ssize_t copy_file_range(int in, off64_t *i, int out, off64_t *o, size_t n, unsigned flags) {
  REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
  return fails(out, NULL, 1) ? -1 : real(in, i, out, o, n, flags);
}
int rename(const char *a, const char *b) {
  REAL(int, rename, const char *, const char *);
  return fails(AT_FDCWD, b, 0) ? -1 : real(a, b);
}
int renameat(int f, const char *a, int g, const char *b) {
  REAL(int, renameat, int, const char *, int, const char *);
  return fails(g, b, 0) ? -1 : real(f, a, g, b);
}
int link(const char *a, const char *b) {
  REAL(int, link, const char *, const char *);
  return fails(AT_FDCWD, b, 1) ? -1 : real(a, b);
}
int symlink(const char *a, const char *b) {
  REAL(int, symlink, const char *, const char *);
  return fails(AT_FDCWD, b, 1) ? -1 : real(a, b);
}
int unlink(const char *a) {
  REAL(int, unlink, const char *);
  return fails(AT_FDCWD, a, 0) ? -1 : real(a);
}
int unlinkat(int f, const char *a, int flags) {
  REAL(int, unlinkat, int, const char *, int);
  return fails(f, a, 0) ? -1 : real(f, a, flags);
}
int rmdir(const char *a) {
  REAL(int, rmdir, const char *);
  return fails(AT_FDCWD, a, 0) ? -1 : real(a);
}
int mkdir(const char *a, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  return fails(AT_FDCWD, a, 1) ? -1 : real(a, mode);
}
static int opened(int folder, const char *path, int flags, int mode, int (*real)(int, const char *, int, ...)) {
  if (flags & O_CREAT && fails(folder, path, 1)) return -1;
  return real(folder, path, flags, mode);
}
#define MODE(last) int mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { \
  va_list rest; va_start(rest, last); mode = va_arg(rest, int); va_end(rest); }
typedef int (*Open)(int, const char *, int, ...);
#define OPENAT ((Open)dlsym(RTLD_NEXT, "openat"))
int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode, OPENAT); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode, OPENAT); }
int openat(int f, const char *path, int flags, ...) { MODE(flags) return opened(f, path, flags, mode, OPENAT); }
int openat64(int f, const char *path, int flags, ...) { MODE(flags) return opened(f, path, flags | O_LARGEFILE, mode, OPENAT); }
