/* Loaded before libc: files below $FULL_DISK_UNDER share a device of $FULL_DISK_BYTES, and writes past that fail with
   "no space left on device". Each process counts by itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Atomic long used;

/* Whether so many more bytes fit. */
static int fits(int fd, size_t bytes) {
    const char *under = getenv("FULL_DISK_UNDER"), *most = getenv("FULL_DISK_BYTES");
    char link[64], path[4096];
    if (!under || !most) return 1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 1;
    path[length] = 0;
    if (strncmp(path, under, strlen(under))) return 1;
    long now = atomic_load(&used);
    do {
        if (now + (long)bytes > atol(most)) return 0;
    } while (!atomic_compare_exchange_weak(&used, &now, now + (long)bytes));
    return 1;
}

#define REPLACE(result, name, parameters, arguments)                                        \
    result name parameters {                                                                \
        static result(*next) parameters;                                                    \
        if (!next) next = (result(*) parameters)dlsym(RTLD_NEXT, #name);                    \
        if (!fits(fd, count)) return errno = ENOSPC, -1;                                    \
        return next arguments;                                                              \
    }

REPLACE(ssize_t, write, (int fd, const void *bytes, size_t count), (fd, bytes, count))
REPLACE(ssize_t, pwrite, (int fd, const void *bytes, size_t count, off_t at), (fd, bytes, count, at))
REPLACE(ssize_t, pwrite64, (int fd, const void *bytes, size_t count, off64_t at), (fd, bytes, count, at))
