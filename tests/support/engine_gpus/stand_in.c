/* Stands in for GPUs, for llama.cpp: devices that call themselves CUDA0, CUDA1, …, and compute on the processor.
 *
 * `add_gpus(library, count, integrated, overlap)` adds them to the llama.cpp in a loaded library, before a model is loaded.
 * A model's layers, caches and buffers then go to them as they would to GPUs, and its log says where each one went. With
 * `overlap` they claim to compute several passes at once, as NVIDIA's GPUs do.
 *
 * Each is the processor's own device under another name, in memory of its own type. What is written down here of llama.cpp
 * is the order of its functions' tables, which it numbers: where its number is another, nothing is added. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TABLES = 3 }; /* the number of the order below */
enum { MOST_GPUS = 8 };
enum { GPU = 1, INTEGRATED = 2 };
static const size_t MEMORY = (size_t)8 << 30;

typedef void *function;

struct buffer_type { function call[8]; struct device *device; void *context; };
enum { TYPE_NAME = 0, TYPE_ALLOCATE = 1, TYPE_IS_HOST = 7 };

struct buffer { function call[11]; struct buffer_type *type; };

struct backend { void *guid; function call[16]; struct device *device; void *context; };
enum { BACKEND_NAME = 0, BACKEND_SYNCHRONIZE = 7, BACKEND_RECORD = 13, BACKEND_WAIT = 14 };

struct device { function call[15]; void *registry; void *context; };
enum {
    NAME = 0, DESCRIPTION, MEMORY_OF, TYPE, PROPERTIES, BACKEND, BUFFER_TYPE, HOST_BUFFER_TYPE, FROM_POINTER, SUPPORTS,
    SUPPORTS_TYPE, OFFLOADS, EVENT_NEW, EVENT_FREE, EVENT_SYNCHRONIZE
};

struct event { struct device *device; void *context; };

struct properties {
    const char *name, *description;
    size_t free, total;
    int type;
    const char *id;
    bool asynchronous, host_buffer, from_pointer, events, mapping;
};

static struct gpu { struct device device; struct buffer_type type; char name[16]; } gpus[MOST_GPUS];
static struct device *processor;
static struct buffer_type *host_type;
static bool integrated, overlap;
static struct backend *(*new_backend)(void);

static struct gpu *gpu_of(struct device *device) { return device->context; }
static const char *name(struct device *device) { return gpu_of(device)->name; }
static const char *description(struct device *device) { (void)device; return "a stand-in"; }
static void memory(struct device *device, size_t *free, size_t *total) { (void)device; *free = *total = MEMORY; }
static int kind(struct device *device) { (void)device; return integrated ? INTEGRATED : GPU; }

static void describe(struct device *device, struct properties *found) {
    *found = (struct properties){.name = name(device), .description = "a stand-in", .free = MEMORY, .total = MEMORY};
    found->type = kind(device);
    found->asynchronous = found->events = overlap;
}

static const char *backend_name(struct backend *backend) { return name(backend->device); }
static void nothing(void) {}

static struct backend *backend(struct device *device, const char *options) {
    struct backend *made = new_backend();
    (void)options;
    made->device = device;
    made->call[BACKEND_NAME] = (function)backend_name;
    made->call[BACKEND_SYNCHRONIZE] = made->call[BACKEND_RECORD] = made->call[BACKEND_WAIT] = (function)nothing;
    return made;
}

static struct event *event(struct device *device) {
    struct event *made = calloc(1, sizeof *made);
    made->device = device;
    return made;
}
static void forget(struct device *device, struct event *event) { (void)device; free(event); }

static struct buffer_type *buffer_type(struct device *device) { return &gpu_of(device)->type; }
static const char *type_name(struct buffer_type *type) { return name(type->device); }
static bool is_host(struct buffer_type *type) { (void)type; return false; }
static bool takes(struct device *device, struct buffer_type *type) { return type == buffer_type(device); }

static bool computes(struct device *device, const void *operation) {
    bool (*supports)(struct device *, const void *) = processor->call[SUPPORTS];
    (void)device;
    return supports(processor, operation);
}

static struct buffer *allocate(struct buffer_type *type, size_t size) {
    struct buffer *(*host)(struct buffer_type *, size_t) = host_type->call[TYPE_ALLOCATE];
    struct buffer *made = host(host_type, size);
    if (made) made->type = type;
    return made;
}

static void add(struct gpu *gpu, int place) {
    snprintf(gpu->name, sizeof gpu->name, "CUDA%d", place);
    gpu->type = *host_type;
    gpu->type.device = &gpu->device;
    gpu->type.call[TYPE_NAME] = (function)type_name;
    gpu->type.call[TYPE_ALLOCATE] = (function)allocate;
    gpu->type.call[TYPE_IS_HOST] = (function)is_host;
    gpu->device = *processor;
    gpu->device.context = gpu;
    gpu->device.call[NAME] = (function)name;
    gpu->device.call[DESCRIPTION] = (function)description;
    gpu->device.call[MEMORY_OF] = (function)memory;
    gpu->device.call[TYPE] = (function)kind;
    gpu->device.call[PROPERTIES] = (function)describe;
    gpu->device.call[BACKEND] = (function)backend;
    gpu->device.call[BUFFER_TYPE] = (function)buffer_type;
    gpu->device.call[FROM_POINTER] = NULL;
    gpu->device.call[SUPPORTS] = (function)computes;
    gpu->device.call[SUPPORTS_TYPE] = (function)takes;
    gpu->device.call[EVENT_NEW] = (function)event;
    gpu->device.call[EVENT_FREE] = (function)forget;
    gpu->device.call[EVENT_SYNCHRONIZE] = (function)nothing;
}

/* Return how many were added; -1: this llama.cpp's tables have another order, or it does not show its functions. */
int add_gpus(const char *path, int count, int shared, int asynchronous) {
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    void *(*registry)(void) = library ? dlsym(library, "ggml_backend_cpu_reg") : NULL;
    struct device *(*device_of)(void *, size_t) = library ? dlsym(library, "ggml_backend_reg_dev_get") : NULL;
    struct buffer_type *(*type_of_host)(void) = library ? dlsym(library, "ggml_backend_cpu_buffer_type") : NULL;
    void (*announce)(struct device *) = library ? dlsym(library, "ggml_backend_device_register") : NULL;
    new_backend = library ? dlsym(library, "ggml_backend_cpu_init") : NULL;
    if (!registry || !device_of || !type_of_host || !announce || !new_backend || count > MOST_GPUS) return -1;
    if (*(int *)registry() != TABLES) return -1;
    processor = device_of(registry(), 0);
    host_type = type_of_host();
    integrated = shared, overlap = asynchronous;
    for (int place = 0; place < count; place++) {
        add(&gpus[place], place);
        announce(&gpus[place].device);
    }
    return count;
}

/* Preloaded into a `llama-server`, this adds them as it looks for its backends: as many as CUDA_VISIBLE_DEVICES names,
 * and one where it is not set. STAND_IN_GPUS has the two numbers that `add_gpus` takes. */
void ggml_backend_load_all(void) {
    static bool added;
    void (*load_all)(void) = dlsym(RTLD_NEXT, "ggml_backend_load_all");
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *told = getenv("STAND_IN_GPUS");
    int count = !visible || *visible, shared = 0, asynchronous = 0;
    if (load_all) load_all();
    if (added || !told || sscanf(told, "%d %d", &shared, &asynchronous) != 2) return;
    for (; visible && *visible; visible++) count += *visible == ',';
    added = true;
    if (add_gpus("libggml.so.0", count, shared, asynchronous) != count) fprintf(stderr, "no stand-in\n");
}
