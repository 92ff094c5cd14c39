"""A clock that is fast for all processes of one host, although all hosts share the kernel's.

A small library is loaded into each process before C's. libfaketime does the same, but does not know of the waits until
a moment that Ray's C++ code asks of the kernel directly; they then last longer by as much as the clock is fast.
"""

from __future__ import annotations

import shutil
import subprocess

from tests.lab.hosts import SHARED, Lab

# Times of day are large numbers, and those of the monotonic clock are small. So a wait until a moment is known by its
# size to be one of the time of day, and the kernel is given the true moment.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static long ahead;
__attribute__((constructor)) static void begin(void) { ahead = atol(getenv("DISTREC_TEST_CLOCK") ?: "0"); }

static const struct timespec *true_moment(const struct timespec *moment, struct timespec *room) {
    if (!moment || moment->tv_sec < 1000000000) return moment;
    *room = *moment;
    room->tv_sec -= ahead;
    return room;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead;
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
int timespec_get(struct timespec *now, int base) {
    return clock_gettime(CLOCK_REALTIME, now) ? 0 : base;
}
int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *moment) {
    REAL(pthread_cond_timedwait);
    struct timespec room;
    return real(c, m, true_moment(moment, &room));
}
int pthread_cond_clockwait(pthread_cond_t *c, pthread_mutex_t *m, clockid_t clock, const struct timespec *moment) {
    REAL(pthread_cond_clockwait);
    struct timespec room;
    return real(c, m, clock, true_moment(moment, &room));
}
int pthread_mutex_timedlock(pthread_mutex_t *m, const struct timespec *moment) {
    REAL(pthread_mutex_timedlock);
    struct timespec room;
    return real(m, true_moment(moment, &room));
}
int sem_timedwait(sem_t *s, const struct timespec *moment) {
    REAL(sem_timedwait);
    struct timespec room;
    return real(s, true_moment(moment, &room));
}
int sem_clockwait(sem_t *s, clockid_t clock, const struct timespec *moment) {
    REAL(sem_clockwait);
    struct timespec room;
    return real(s, clock, true_moment(moment, &room));
}
long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long a[6];
    va_list given;
    va_start(given, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(given, long);
    va_end(given);
    struct timespec room;
    if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET)
        a[3] = (long)true_moment((const struct timespec *)a[3], &room);
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""


def lacks_compiler() -> str | None:
    """Why no such clock can be made here, if so."""
    return None if shutil.which("cc") else "there is no C compiler"


def fast_clock(lab: Lab, seconds: int) -> dict[str, str]:
    """The environment of a host of the lab whose clock is fast; the library is on the disk that hosts share."""
    name = "fast_clock.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", str(lab.shared / name), "-ldl"]
    subprocess.run(command, input=_SOURCE, text=True, check=True, timeout=60)
    return {"LD_PRELOAD": f"{SHARED}/{name}", "DISTREC_TEST_CLOCK": str(seconds)}
