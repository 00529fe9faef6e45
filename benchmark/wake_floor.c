/* What the kernel alone needs until the last of N sleeping processes has seen a word change: the floor under
 * plan_broadcast.py, without Python or rings. Each process then computes WORK microseconds before it takes the time, as
 * one does that decodes a message; with more processes than cores these add up, and no way of waking changes that.
 *
 * cc -O2 -o /tmp/wake_floor benchmark/wake_floor.c && /tmp/wake_floor [WORK_US] [ROUNDS]
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 8, MESSAGES = 200 };

struct shared {
    volatile uint32_t seq;
    volatile uint64_t sent_ns;
    volatile uint64_t late_ns[MOST];
    volatile uint32_t seen[MOST];
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void follow(struct shared *s, int slot, int bell, int futex, int work_us) {
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    epoll_ctl(epoll, EPOLL_CTL_ADD, bell, &event);
    for (uint32_t seen = 0;;) {
        while (s->seq == seen) {
            if (futex)
                syscall(SYS_futex, &s->seq, FUTEX_WAIT, seen, NULL, NULL, 0);
            else
                epoll_wait(epoll, &event, 1, -1);
        }
        seen = s->seq;
        for (uint64_t end = now_ns() + work_us * 1000u; now_ns() < end;) {
        }
        s->late_ns[slot] = now_ns() - s->sent_ns;
        s->seen[slot] = seen;
    }
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median of how late the last of n processes was, in microseconds. */
static double measure(int n, int futex, int work_us) {
    struct shared *s = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int bell = eventfd(0, EFD_NONBLOCK);
    pid_t pids[MOST];
    double late[MESSAGES];
    for (int slot = 0; slot < n; slot++) {
        pids[slot] = fork();
        if (pids[slot] == 0) follow(s, slot, bell, futex, work_us);
    }
    usleep(50000);
    for (int k = 0; k < MESSAGES; k++) {
        s->sent_ns = now_ns();
        s->seq++;
        if (futex)
            syscall(SYS_futex, &s->seq, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        else
            eventfd_write(bell, 1);
        usleep(2000);
        uint64_t last = 0;
        for (int slot = 0; slot < n; slot++) {
            while (s->seen[slot] != s->seq) usleep(100);
            if (s->late_ns[slot] > last) last = s->late_ns[slot];
        }
        late[k] = last / 1000.0;
    }
    for (int slot = 0; slot < n; slot++) {
        kill(pids[slot], SIGKILL);
        waitpid(pids[slot], NULL, 0);
    }
    close(bell);
    munmap(s, 4096);
    qsort(late, MESSAGES, sizeof late[0], by_size);
    return late[MESSAGES / 2];
}

int main(int count, char **words) {
    int work_us = count > 1 ? atoi(words[1]) : 25, rounds = count > 2 ? atoi(words[2]) : 5;
    for (int round = 0; round < rounds; round++)
        for (int futex = 0; futex < 2; futex++) {
            double one = measure(1, futex, work_us), four = measure(4, futex, work_us);
            printf("%-7s one after %.1f us, the last of 4 after %.1f us: %.2fx\n", futex ? "futex" : "eventfd", one,
                   four, four / one);
        }
    return 0;
}
