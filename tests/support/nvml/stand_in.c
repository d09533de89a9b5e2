/* Stands in for NVIDIA's management library. Every call reads a state file, which the test replaces while it runs:
 *
 *   init CODE                    what initialising returns
 *   stall FUNCTION               this function does not return while the state says so; "-": none
 *   gpu ID OPEN MEMORY PROCESSES DIVIDED MAJOR MINOR TOTAL RESERVED FREE
 *   instance ID OPEN MEMORY PROCESSES DIVIDED MAJOR MINOR TOTAL RESERVED FREE     of the GPU before it
 *   process PID BYTES            on the device before it; BYTES -1: not told
 *
 * OPEN, MEMORY and PROCESSES are what getting its handle, its memory and its processes return; MAJOR.MINOR is its compute
 * capability; memory is in bytes. A GPU that was lost (15) when its handle was asked for stays lost until the library is
 * initialised anew, whatever the state says.
 *
 * With -DOLD_DRIVER what came with version 2 of the memory query, version 3 of the process query and division into
 * instances is not there; with -DANCIENT_DRIVER neither is the function that initialises. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, LOST = 15, VERSION = 25 };
enum { MOST_DEVICES = 16, MOST_PROCESSES = 8, MOST_INSTANCES = 7 };

typedef unsigned long long bytes;

struct process { unsigned pid; bytes used; unsigned gpu_instance, compute_instance; };
struct memory { bytes total, free, used; };
struct memory_v2 { unsigned version; bytes total, reserved, free, used; };

struct device {
    char id[96];
    int parent; /* its GPU's place, or -1 */
    int open, memory, processes, divided, major, minor;
    bytes total, reserved, free;
    struct process list[MOST_PROCESSES];
    unsigned count;
};

static struct device devices[MOST_DEVICES];
static int count, initialise, users;
static char stalled[64];
static char lost[MOST_DEVICES][96];
static int lost_count;

static void look(void) {
    char line[512], id[96];
    int gpu = -1;
    long long used;
    unsigned pid;
    const char *path = getenv("NVML_STAND_IN_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    count = 0;
    initialise = 9; /* no driver */
    strcpy(stalled, "-");
    while (file && fgets(line, sizeof line, file)) {
        struct device next = {.parent = -1};
        if (sscanf(line, "init %d", &initialise) == 1 || sscanf(line, "stall %63s", stalled) == 1) continue;
        if (sscanf(line, "process %u %lld", &pid, &used) == 2) {
            struct device *device = &devices[count - 1];
            device->list[device->count].pid = pid;
            device->list[device->count++].used = (bytes)used;
            continue;
        }
        if (sscanf(line, "%*s %95s %d %d %d %d %d %d %llu %llu %llu", id, &next.open, &next.memory, &next.processes,
                   &next.divided, &next.major, &next.minor, &next.total, &next.reserved, &next.free) != 10) abort();
        strcpy(next.id, id);
        if (strncmp(line, "instance", 8) == 0) next.parent = gpu;
        else gpu = count;
        devices[count++] = next;
    }
    if (file) fclose(file);
}

/* Every function begins with this: read the state, and stay as long as it says so. */
static int enter(const char *function) {
    look();
    while (strcmp(stalled, function) == 0) {
        usleep(5000);
        look();
    }
    return users ? SUCCESS : UNINITIALIZED;
}

#define ENTER() do { int code = enter(__func__); if (code) return code; } while (0)

static int is_lost(const struct device *device) {
    for (int i = 0; i < lost_count; i++)
        if (strcmp(lost[i], device->id) == 0) return 1;
    return 0;
}

#ifndef ANCIENT_DRIVER
int nvmlInitWithFlags(unsigned flags) {
    enter(__func__);
    if (initialise) return initialise;
    if (users++ == 0) lost_count = 0;
    return SUCCESS;
}
#endif

int nvmlShutdown(void) {
    ENTER();
    users--;
    return SUCCESS;
}

/* The binding has words of its own for the codes that it knows. */
const char *nvmlErrorString(int code) {
    (void)code;
    return "an error that the binding does not know";
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    ENTER();
    *out = 0;
    for (int i = 0; i < count; i++) *out += devices[i].parent < 0;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    ENTER();
    for (int i = 0; i < count; i++) {
        if (devices[i].parent >= 0 || index-- != 0) continue;
        if (devices[i].open == LOST && !is_lost(&devices[i])) strcpy(lost[lost_count++], devices[i].id);
        *out = &devices[i];
        return is_lost(&devices[i]) ? LOST : devices[i].open;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(void *handle, char *out, unsigned size) {
    ENTER();
    snprintf(out, size, "Stand-in %d.%d", ((struct device *)handle)->major, ((struct device *)handle)->minor);
    return SUCCESS;
}

struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };

/* A GPU sits on the bus of its number: the first on 01. */
int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *out) {
    ENTER();
    int place = 1;
    for (struct device *each = devices; each != handle; each++) place += each->parent < 0;
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", place);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) {
    ENTER();
    snprintf(out, size, "%s", ((struct device *)handle)->id);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    ENTER();
    *major = ((struct device *)handle)->major;
    *minor = ((struct device *)handle)->minor;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *out) {
    ENTER();
    struct device *device = handle;
    out->total = device->total;
    out->free = device->free;
    out->used = device->total - device->free; /* as the first version has it: with what the driver keeps for itself */
    return device->memory;
}

static int list_processes(struct device *device, unsigned *room, struct process *out) {
    unsigned had = *room;
    *room = device->count;
    if (device->processes) return device->processes;
    if (device->count > had) return INSUFFICIENT_SIZE;
    memcpy(out, device->list, device->count * sizeof *out);
    return SUCCESS;
}

#ifdef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *room, struct process *out) {
    ENTER();
    return list_processes(handle, room, out);
}
#else
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *room, struct process *out) {
    ENTER();
    return list_processes(handle, room, out);
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *out) {
    ENTER();
    struct device *device = handle;
    if (out->version != (sizeof *out | 2 << 24)) return VERSION;
    out->total = device->total;
    out->reserved = device->reserved;
    out->free = device->free;
    out->used = device->total - device->reserved - device->free;
    return device->memory;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending) {
    ENTER();
    *now = *pending = ((struct device *)handle)->divided > 0;
    return ((struct device *)handle)->divided < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *out) {
    ENTER();
    *out = MOST_INSTANCES;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **out) {
    ENTER();
    for (int i = 0; i < count; i++) {
        if (devices[i].parent != (struct device *)handle - devices || index-- != 0) continue;
        *out = &devices[i];
        return devices[i].open;
    }
    return NOT_FOUND;
}
#endif
