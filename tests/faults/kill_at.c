/* Ends a process with SIGKILL at the n-th call that changes a file below a folder, made by Python or by C++.

   cc -shared -fPIC -o kill_at.so kill_at.c -ldl; LD_PRELOAD=kill_at.so KILL_BELOW=FOLDER/ KILL_AT=N COMMAND */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static void at_path(const char *path) {
    static int calls;
    const char *below = getenv("KILL_BELOW"), *at = getenv("KILL_AT");
    if (below && at && path && strstr(path, below) && __sync_add_and_fetch(&calls, 1) == atoi(at)) kill(getpid(), SIGKILL);
}

static void at_file(int fd) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size > 0) path[size] = 0, at_path(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_PATH(name, given, ...) \
    int name given { at_path(path); return REAL(name)(__VA_ARGS__); }
#define ON_FILE(type, name, given, ...) \
    type name given { at_file(fd); return REAL(name)(__VA_ARGS__); }
#define OPENING(name, given, ...) \
    int name given { \
        va_list rest; va_start(rest, flags); mode_t mode = flags & O_CREAT ? va_arg(rest, int) : 0; va_end(rest); \
        if (flags & (O_CREAT | O_TRUNC)) at_path(path); \
        return REAL(name)(__VA_ARGS__, flags, mode); \
    }

OPENING(open, (const char *path, int flags, ...), path)
OPENING(open64, (const char *path, int flags, ...), path)
OPENING(openat, (int dir, const char *path, int flags, ...), dir, path)
OPENING(openat64, (int dir, const char *path, int flags, ...), dir, path)
ON_PATH(mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH(rename, (const char *old, const char *path), old, path)
ON_PATH(renameat, (int from, const char *old, int to, const char *path), from, old, to, path)
ON_PATH(link, (const char *old, const char *path), old, path)
ON_PATH(unlink, (const char *path), path)
ON_PATH(unlinkat, (int dir, const char *path, int flags), dir, path, flags)
ON_PATH(rmdir, (const char *path), path)
ON_FILE(ssize_t, write, (int fd, const void *from, size_t size), fd, from, size)
ON_FILE(ssize_t, writev, (int fd, const struct iovec *from, int count), fd, from, count)
ON_FILE(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t at), fd, from, size, at)
ON_FILE(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at), fd, from, size, at)
ON_FILE(int, fsync, (int fd), fd)
ON_FILE(int, fdatasync, (int fd), fd)
