/* Threads for the kernels, one set per calling thread.
 *
 * OpenMP deals each thread its share and then waits for all of them. On a machine that does anything else, one of them
 * is often not running at that moment, and a kernel of 50 us takes the scheduler's milliseconds. Here shares are small
 * and taken as they come: a helper that is late finds nothing left to do, and nobody waits for it. Helpers look out for
 * the next kernel for a while (a forward pass calls one every few microseconds), giving way to other threads, then
 * sleep.
 */
#include "pool.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define BUSY_NS 20000   /* a helper spins this long without giving way */
#define AWAKE_NS 300000 /* and goes to sleep after this long */
#define MAX_HELPERS 255

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    _Atomic int64_t job;  /* number of the newest job */
    _Atomic int open;     /* whether helpers may still join it */
    _Atomic int active;   /* helpers that are in it, or about to find it closed */
    _Atomic int64_t next; /* the index to be taken next */
    _Atomic int sleeping;
    int64_t count; /* these four: written by the caller while the job is closed and nobody is active */
    Task task;
    void *context;
    int threads;
    int stop; /* under the lock */
    int helpers;
    pthread_t ids[MAX_HELPERS];
} Pool;

typedef struct {
    Pool *pool;
    int thread;
} Helper;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void take_shares(Pool *pool, int thread) {
    for (;;) {
        const int64_t i = atomic_fetch_add(&pool->next, 1);
        if (i >= pool->count) return;
        pool->task(pool->context, i, thread);
    }
}

/* Waits for a job after `seen`. Returns its number, or -1 when the pool ends. */
static int64_t await_job(Pool *pool, int64_t seen) {
    const int64_t started = now_ns();
    for (int64_t waited = 0; waited < AWAKE_NS; waited = now_ns() - started) {
        for (int i = 0; i < 64; i++) {
            if (atomic_load(&pool->job) != seen) return atomic_load(&pool->job);
            pause_cpu();
        }
        if (waited > BUSY_NS) sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleeping, 1);
    while (atomic_load(&pool->job) == seen && !pool->stop) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleeping, 1);
    const int64_t job = pool->stop ? -1 : atomic_load(&pool->job);
    pthread_mutex_unlock(&pool->lock);
    return job;
}

static void *help(void *argument) {
    const Helper me = *(Helper *)argument;
    free(argument);
    for (int64_t job = 0; (job = await_job(me.pool, job)) >= 0;) {
        atomic_fetch_add(&me.pool->active, 1);
        if (atomic_load(&me.pool->open) && me.thread < me.pool->threads) take_shares(me.pool, me.thread);
        atomic_fetch_sub(&me.pool->active, 1);
    }
    return NULL;
}

static void end_pool(void *argument) {
    Pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    pool->stop = 1;
    atomic_fetch_add(&pool->job, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->helpers; i++) pthread_join(pool->ids[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* A child process has none of its parent's threads. */
static void forget_pool(void) { pthread_setspecific(key, NULL); }

static void prepare(void) {
    pthread_key_create(&key, end_pool);
    pthread_atfork(NULL, NULL, forget_pool);
}

/* The calling thread's pool with at least `helpers` helpers, or with as many as could be had; NULL without memory. */
static Pool *own_pool(int helpers) {
    pthread_once(&once, prepare);
    Pool *pool = pthread_getspecific(key);
    if (!pool) {
        if (!(pool = calloc(1, sizeof(Pool)))) return NULL;
        pthread_mutex_init(&pool->lock, NULL);
        pthread_cond_init(&pool->wake, NULL);
        pthread_setspecific(key, pool);
    }
    while (pool->helpers < helpers && pool->helpers < MAX_HELPERS) {
        Helper *helper = malloc(sizeof(Helper));
        if (!helper) break;
        *helper = (Helper){pool, pool->helpers + 1};
        if (pthread_create(&pool->ids[pool->helpers], NULL, help, helper)) {
            free(helper);
            break;
        }
        pool->helpers++;
    }
    return pool;
}

void vrm_parallel(Task task, void *context, int64_t count, int threads) {
    Pool *pool = threads > 1 && count > 1 ? own_pool(threads - 1) : NULL;
    if (!pool || !pool->helpers) {
        for (int64_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    pool->task = task;
    pool->context = context;
    pool->count = count;
    pool->threads = threads;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->open, 1);
    atomic_fetch_add(&pool->job, 1);
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    take_shares(pool, 0);
    atomic_store(&pool->open, 0);
    for (int spins = 0; atomic_load(&pool->active); spins++) {
        if (spins < 2000) pause_cpu();
        else sched_yield();
    }
}
