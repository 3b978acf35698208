/*
 * A load for a real guest, that notices when a write is lost
 *
 * Runs in a guest that is migrated, see real-guest.  Each worker has a working
 * set that grows for a while and then shrinks for a while, and checks each page
 * before it writes to it, before it frees it, and at random.
 *
 * What a page has to hold follows from its number and its sequence number,
 * which counts the writes of the worker and is kept in a table elsewhere.  Each
 * word of a page depends on both, and the last one is a checksum of the others.
 * Each eighth write makes it a page of zeroes, as it is when it is new.
 *
 * Every second there is a line on standard output, which ends in "end":
 *   load: SECONDS s, WRITTEN written, CHECKED checked, FREED freed, KIB KiB
 *   MemFree, ERRORS errors, end
 * With an error, each is followed by a line that says what was found first:
 *   load: ERROR ...
 *
 * Usage: guest-load WORKERS MIB PAGES
 *   WORKERS: processes
 *   MIB: the most that the working sets can have together
 *   PAGES: written by each worker in a second
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define PAGE_SIZE 4096
#define PAGE_WORDS (PAGE_SIZE / sizeof(uint64_t))
#define MIB (1024 * 1024)
#define MAX_WORKERS 16

/* What is mapped and freed at once */
#define REGION_PAGES 512

/* Ticks in a second: between them, workers write what they have to write */
#define TICKS 50

/* Pages that are checked for each one that is written */
#define CHECKS 4

/* Writes for each region that is mapped or freed */
#define TURN 128

/* Seconds for which a working set grows, and then shrinks */
#define SWING 10

typedef struct Region {
    uint64_t *memory;                   /* NULL if it is not mapped */
    uint32_t sequence[REGION_PAGES];    /* 0: never written */
} Region;

/* Shared with the parent: what a worker has done so far */
typedef struct Stats {
    uint64_t written;
    uint64_t checked;
    uint64_t freed;
    uint64_t errors;
    char first_error[160];
} Stats;

typedef struct Worker {
    unsigned number;
    Region *regions;
    unsigned nr_regions;
    uint64_t random;
    uint32_t sequence;
    bool shrinks;
    Stats *stats;
} Worker;

static void *map_or_die(size_t size, int flags)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        flags | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        perror("load: ERROR mmap");
        exit(1);
    }
    return memory;
}

/* xorshift64 */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static bool is_zero_write(uint32_t sequence)
{
    return sequence % 8 == 0;
}

/* The words of a page, but for the last, follow from this */
static uint64_t page_seed(const Worker *worker, unsigned page,
                          uint32_t sequence)
{
    return ((uint64_t)(worker->number + 1) << 56 | (uint64_t)page << 32 |
            sequence) * 0x9e3779b97f4a7c15ULL;
}

static uint64_t add_to_sum(uint64_t sum, uint64_t word)
{
    return (sum << 7 | sum >> 57) + word;
}

static void write_page(Worker *worker, uint64_t *words, unsigned page,
                       uint32_t sequence)
{
    uint64_t seed = page_seed(worker, page, sequence);
    uint64_t sum = 0;
    unsigned i;

    if (is_zero_write(sequence)) {
        memset(words, 0, PAGE_SIZE);
        return;
    }
    words[0] = sequence;
    sum = add_to_sum(sum, sequence);
    for (i = 1; i < PAGE_WORDS - 1; i++) {
        words[i] = seed + i;
        sum = add_to_sum(sum, words[i]);
    }
    words[i] = sum;
}

/* Returns the number of the first word that is wrong, or -1 */
static int check_words(const uint64_t *words, uint64_t seed, uint32_t sequence)
{
    uint64_t sum = 0;
    unsigned i;

    if (is_zero_write(sequence)) {
        for (i = 0; i < PAGE_WORDS; i++) {
            if (words[i]) {
                return i;
            }
        }
        return -1;
    }
    if (words[0] != sequence) {
        return 0;
    }
    sum = add_to_sum(sum, sequence);
    for (i = 1; i < PAGE_WORDS - 1; i++) {
        if (words[i] != seed + i) {
            return i;
        }
        sum = add_to_sum(sum, words[i]);
    }
    return words[i] == sum ? -1 : (int)i;
}

static void check_page(Worker *worker, Region *region, unsigned in_region)
{
    Stats *stats = worker->stats;
    const uint64_t *words = region->memory + in_region * PAGE_WORDS;
    uint32_t sequence = region->sequence[in_region];
    unsigned page = (region - worker->regions) * REGION_PAGES + in_region;
    int wrong = check_words(words, page_seed(worker, page, sequence), sequence);

    stats->checked++;
    if (wrong < 0) {
        return;
    }
    if (!stats->errors) {
        snprintf(stats->first_error, sizeof(stats->first_error),
                 "worker %u, page %u: word %d is 0x%llx in a page that begins "
                 "with 0x%llx, after write %u",
                 worker->number, page, wrong,
                 (unsigned long long)words[wrong],
                 (unsigned long long)words[0], sequence);
    }
    stats->errors++;
}

/* A region gets its memory, or is checked and loses it */
static void turn_over(Worker *worker, Region *region)
{
    unsigned i;

    if (region->memory) {
        for (i = 0; i < REGION_PAGES; i++) {
            check_page(worker, region, i);
        }
        munmap(region->memory, REGION_PAGES * PAGE_SIZE);
        region->memory = NULL;
        worker->stats->freed += REGION_PAGES;
    } else {
        region->memory = map_or_die(REGION_PAGES * PAGE_SIZE, MAP_PRIVATE);
        memset(region->sequence, 0, sizeof(region->sequence));
    }
}

static Region *random_region(Worker *worker)
{
    return &worker->regions[next_random(&worker->random) % worker->nr_regions];
}

/* What is mapped already is not what a working set grows by */
static void change_working_set(Worker *worker)
{
    Region *region = random_region(worker);

    if ((region->memory != NULL) == worker->shrinks) {
        turn_over(worker, region);
    }
}

static void write_some(Worker *worker, unsigned pages)
{
    unsigned done, i;

    for (done = 0; done < pages; done++) {
        Region *region = random_region(worker);
        unsigned in_region = next_random(&worker->random) % REGION_PAGES;
        unsigned page = (region - worker->regions) * REGION_PAGES + in_region;

        if (next_random(&worker->random) % TURN == 0) {
            change_working_set(worker);
        }
        if (region->memory) {
            check_page(worker, region, in_region);
            region->sequence[in_region] = ++worker->sequence;
            write_page(worker, region->memory + in_region * PAGE_WORDS, page,
                       worker->sequence);
            worker->stats->written++;
        }
        for (i = 0; i < CHECKS; i++) {
            region = random_region(worker);
            if (region->memory) {
                check_page(worker, region,
                           next_random(&worker->random) % REGION_PAGES);
            }
        }
    }
}

static void work(Worker *worker, unsigned pages)
{
    const struct timespec tick = { .tv_nsec = 1000000000 / TICKS };
    unsigned ticks;

    for (ticks = 0; ; ticks++) {
        /* Not all workers at the same time */
        worker->shrinks = ticks / TICKS / SWING % 2 != worker->number % 2;
        write_some(worker, (pages + TICKS - 1) / TICKS);
        nanosleep(&tick, NULL);
    }
}

static void start_worker(unsigned number, unsigned nr_regions, unsigned pages,
                         Stats *stats)
{
    Worker worker = {
        .number = number,
        .nr_regions = nr_regions,
        .random = 0x2545f4914f6cdd1dULL + number,
        .stats = stats,
    };
    pid_t pid = fork();

    if (pid < 0) {
        perror("load: ERROR fork");
        exit(1);
    }
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        worker.regions = map_or_die(nr_regions * sizeof(Region), MAP_PRIVATE);
        work(&worker, pages);
    }
}

static long free_kib(void)
{
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    long kib = -1;

    if (!file) {
        return -1;
    }
    while (fgets(line, sizeof(line), file)) {
        sscanf(line, "MemFree: %ld", &kib);
    }
    fclose(file);
    return kib;
}

static void report(unsigned seconds, const Stats *stats, unsigned workers)
{
    Stats all = { .written = 0 };
    unsigned i;

    for (i = 0; i < workers; i++) {
        all.written += stats[i].written;
        all.checked += stats[i].checked;
        all.freed += stats[i].freed;
        all.errors += stats[i].errors;
    }
    printf("load: %u s, %llu written, %llu checked, %llu freed, %ld KiB "
           "MemFree, %llu errors, end\n", seconds,
           (unsigned long long)all.written, (unsigned long long)all.checked,
           (unsigned long long)all.freed, free_kib(),
           (unsigned long long)all.errors);
    for (i = 0; i < workers; i++) {
        if (stats[i].errors) {
            printf("load: ERROR %s\n", stats[i].first_error);
        }
    }
    fflush(stdout);
}

int main(int argc, char **argv)
{
    unsigned workers, nr_regions, pages, i;
    Stats *stats;

    if (argc != 4) {
        fprintf(stderr, "usage: guest-load WORKERS MIB PAGES\n");
        return 2;
    }
    workers = atoi(argv[1]);
    pages = atoi(argv[3]);
    if (workers < 1 || workers > MAX_WORKERS || pages < 1) {
        fprintf(stderr, "guest-load: 1 to %d workers, and pages to write\n",
                MAX_WORKERS);
        return 2;
    }
    nr_regions = (uint64_t)atoi(argv[2]) * MIB /
                 (REGION_PAGES * PAGE_SIZE) / workers;
    if (nr_regions < 2) {
        fprintf(stderr, "guest-load: less than 2 regions for each worker\n");
        return 2;
    }

    stats = map_or_die(workers * sizeof(*stats), MAP_SHARED);
    for (i = 0; i < workers; i++) {
        start_worker(i, nr_regions, pages, &stats[i]);
    }
    for (i = 1; ; i++) {
        sleep(1);
        report(i, stats, workers);
    }
}
