/*
 * A simulated NVML: libnvidia-ml.so.1 for machines without a GPU.
 *
 * What it shows comes from DIR/profile.compiled (written by berth.gpu.sim.profile, read again whenever it changes)
 * and from DIR/state, the memory that living processes hold. DIR is BERTH_GPU_SIM, else the directory above the one
 * this library lies in. Structures and codes are those of NVIDIA's nvml.h (R550 and later).
 *
 * A call that is not simulated answers NVML_ERROR_NOT_SUPPORTED or is absent; none reports success for nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MIB (1024ULL * 1024ULL)
#define MAX_GPUS 32
#define MAX_MIGS 7
#define MAX_LINKS 18
#define NO_INSTANCE 0xFFFFFFFFu
#define EVENT_XID 0x8ULL

enum {
    OK = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    OPERATING_SYSTEM = 17,
    MEMORY = 20,
    VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};

/* ---- the profile ------------------------------------------------------------------------------------------- */

struct mig {
    char uuid[80], name[96];
    unsigned instance, slices, multiprocessors;
    uint64_t total, reserved, leak;
};

struct link {
    int to_switch;
    unsigned peer; /* position of the GPU at the other end; for a switch, the switch's number */
};

struct gpu {
    char uuid[80], name[96];
    unsigned index, domain, bus, device, pci_device_id;
    unsigned cc_major, cc_minor, nvlink_version;
    int numa, lost, mig_capable, mig_enabled, persistence, temperature, power_mw;
    unsigned xid, utilization;
    uint64_t total, reserved, leak;
    unsigned mig_count, link_count;
    struct mig migs[MAX_MIGS];
    struct link links[MAX_LINKS];
};

struct profile {
    char driver[80], nvml[80];
    int cuda, show_processes;
    double vram_scale;
    uint64_t context;
    unsigned gpu_count;
    struct gpu gpus[MAX_GPUS];
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct profile current;
static struct {
    char path[4096];
    dev_t device;
    ino_t inode;
    struct timespec changed;
} loaded;
static int initialised;

/* Handles are addresses in this table, so they outlive a reload of the profile: row = position, column 0 = the GPU,
 * column 1 + n = its n-th MIG instance. */
static char handles[MAX_GPUS][1 + MAX_MIGS];

static void lock_before_fork(void) { pthread_mutex_lock(&mutex); }
static void unlock_after_fork(void) { pthread_mutex_unlock(&mutex); }

/* A fork while another thread is in here would leave the child with a mutex that nobody unlocks. */
__attribute__((constructor)) static void guard_forks(void) {
    pthread_atfork(lock_before_fork, unlock_after_fork, unlock_after_fork);
}

static void path_of(const char *name, char *out, size_t size) {
    const char *directory = getenv("BERTH_GPU_SIM");
    Dl_info self;
    if (directory && *directory)
        snprintf(out, size, "%s/%s", directory, name);
    else if (dladdr((void *)path_of, &self) && strrchr(self.dli_fname, '/'))
        snprintf(out, size, "%.*s/../%s", (int)(strrchr(self.dli_fname, '/') - self.dli_fname), self.dli_fname, name);
    else
        snprintf(out, size, "%s", name);
}

static void copy_text(char *out, size_t size, const char *text) { snprintf(out, size, "%s", text); }

static uint64_t mib(const char *text) { return strtoull(text, NULL, 10) * MIB; }

static int read_mig(struct gpu *gpu, const char *text) {
    unsigned long long total, reserved, leak;
    struct mig mig = {0};
    if (gpu->mig_count == MAX_MIGS)
        return 0;
    if (sscanf(text, "%79s %u %u %u %llu %llu %llu %95[^\n]", mig.uuid, &mig.instance, &mig.slices,
               &mig.multiprocessors, &total, &reserved, &leak, mig.name) != 8)
        return 0;
    mig.total = total * MIB;
    mig.reserved = reserved * MIB;
    mig.leak = leak * MIB;
    gpu->migs[gpu->mig_count++] = mig;
    return 1;
}

static int read_link(struct gpu *gpu, const char *text) {
    char kind[8];
    struct link link = {0};
    if (gpu->link_count == MAX_LINKS || sscanf(text, "%7s %u", kind, &link.peer) != 2)
        return 0;
    link.to_switch = strcmp(kind, "switch") == 0;
    gpu->links[gpu->link_count++] = link;
    return 1;
}

static int read_gpu_line(struct gpu *gpu, const char *key, const char *text) {
    if (!strcmp(key, "index")) gpu->index = (unsigned)atoi(text);
    else if (!strcmp(key, "uuid")) copy_text(gpu->uuid, sizeof gpu->uuid, text);
    else if (!strcmp(key, "name")) copy_text(gpu->name, sizeof gpu->name, text);
    else if (!strcmp(key, "pci")) return sscanf(text, "%x:%x:%x", &gpu->domain, &gpu->bus, &gpu->device) == 3;
    else if (!strcmp(key, "pci_device_id")) gpu->pci_device_id = (unsigned)strtoul(text, NULL, 10);
    else if (!strcmp(key, "cc")) return sscanf(text, "%u.%u", &gpu->cc_major, &gpu->cc_minor) == 2;
    else if (!strcmp(key, "numa")) gpu->numa = atoi(text);
    else if (!strcmp(key, "total_mib")) gpu->total = mib(text);
    else if (!strcmp(key, "reserved_mib")) gpu->reserved = mib(text);
    else if (!strcmp(key, "leak_mib")) gpu->leak = mib(text);
    else if (!strcmp(key, "lost")) gpu->lost = atoi(text);
    else if (!strcmp(key, "xid")) gpu->xid = (unsigned)atoi(text);
    else if (!strcmp(key, "mig_capable")) gpu->mig_capable = atoi(text);
    else if (!strcmp(key, "mig_enabled")) gpu->mig_enabled = atoi(text);
    else if (!strcmp(key, "persistence")) gpu->persistence = atoi(text);
    else if (!strcmp(key, "temperature")) gpu->temperature = atoi(text);
    else if (!strcmp(key, "power_mw")) gpu->power_mw = atoi(text);
    else if (!strcmp(key, "utilization")) gpu->utilization = (unsigned)atoi(text);
    else if (!strcmp(key, "nvlink_version")) gpu->nvlink_version = (unsigned)atoi(text);
    else if (!strcmp(key, "mig")) return read_mig(gpu, text);
    else if (!strcmp(key, "link")) return read_link(gpu, text);
    else return 0;
    return 1;
}

static int read_line(struct profile *profile, const char *key, const char *text) {
    if (!strcmp(key, "gpu")) return profile->gpu_count < MAX_GPUS && profile->gpu_count++ == (unsigned)atoi(text);
    if (profile->gpu_count) return read_gpu_line(&profile->gpus[profile->gpu_count - 1], key, text);
    if (!strcmp(key, "driver")) copy_text(profile->driver, sizeof profile->driver, text);
    else if (!strcmp(key, "nvml")) copy_text(profile->nvml, sizeof profile->nvml, text);
    else if (!strcmp(key, "cuda")) profile->cuda = atoi(text);
    else if (!strcmp(key, "vram_scale")) profile->vram_scale = strtod(text, NULL);
    else if (!strcmp(key, "context_mib")) profile->context = mib(text);
    else if (!strcmp(key, "show_processes")) profile->show_processes = atoi(text);
    else return 0;
    return 1;
}

static int parse(FILE *file, struct profile *profile) {
    char line[512];
    memset(profile, 0, sizeof *profile);
    if (!fgets(line, sizeof line, file) || strcmp(line, "berth-gpu-sim 1\n"))
        return 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "end"))
            return 1;
        char *text = strchr(line, ' ');
        if (!text)
            return 0;
        *text++ = 0;
        if (!read_line(profile, line, text))
            return 0;
    }
    return 0;
}

/* Under the mutex. What was read last stays in force while the file cannot be read. */
static int refresh(void) {
    static struct profile fresh;
    char path[sizeof loaded.path];
    struct stat now;
    path_of("profile.compiled", path, sizeof path);
    int same_file = !strcmp(path, loaded.path);
    if (stat(path, &now))
        return same_file;
    if (same_file && now.st_dev == loaded.device && now.st_ino == loaded.inode &&
        now.st_mtim.tv_sec == loaded.changed.tv_sec && now.st_mtim.tv_nsec == loaded.changed.tv_nsec)
        return 1;
    FILE *file = fopen(path, "re");
    int good = file && !fstat(fileno(file), &now) && parse(file, &fresh);
    if (file)
        fclose(file);
    if (!good)
        return same_file;
    current = fresh;
    copy_text(loaded.path, sizeof loaded.path, path);
    loaded.device = now.st_dev;
    loaded.inode = now.st_ino;
    loaded.changed = now.st_mtim;
    return 1;
}

/* ---- the memory that processes hold ------------------------------------------------------------------------ */

#define STATE_MAGIC "berthst1"

struct record { /* pid 0: free for use */
    int32_t pid;
    uint32_t is_context;
    uint64_t started, handle, bytes;
    char uuid[64];
};

struct state_header { /* as long as a record, so that record n lies at (n + 1) * sizeof(struct record) */
    char magic[8];
    uint64_t next_handle;
    char unused[sizeof(struct record) - 16];
};

/* Start time of a process in clock ticks since boot; 0 for one that has ended, zombies included (the driver frees
 * their memory too). A pid alone may by now be another process. */
static uint64_t start_of(pid_t pid) {
    char path[64], text[2048];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return 0;
    text[length] = 0;
    char *field = strrchr(text, ')'); /* the name before it may hold blanks and brackets */
    if (!field || field[1] != ' ' || field[2] == 'Z' || field[2] == 'X')
        return 0;
    field += 2; /* field 3 */
    for (int number = 3; number < 22; number++) {
        field = strchr(field, ' ');
        if (!field)
            return 0;
        field++;
    }
    return strtoull(field, NULL, 10);
}

static int lives(const struct record *record) {
    if (!record->pid)
        return 0;
    uint64_t started = start_of(record->pid);
    if (started)
        return started == record->started;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d", (int)record->pid);
    if (!access(path, F_OK))
        return 0;
    /* With hidepid the processes of other users are not in /proc, and yet they live. */
    return kill(record->pid, 0) && errno == EPERM;
}

/* The lock is on an open file of its own, so it holds between threads too, and the kernel drops it with the process. */
static int state_open(int flags, int lock) {
    char path[4096];
    path_of("state", path, sizeof path);
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int failed;
    do
        failed = flock(fd, lock);
    while (failed && errno == EINTR);
    if (failed) {
        close(fd);
        return -1;
    }
    return fd;
}

static int state_read(int fd, struct state_header *header, struct record **records, size_t *count) {
    struct stat status;
    if (fstat(fd, &status) || pread(fd, header, sizeof *header, 0) != (ssize_t)sizeof *header ||
        memcmp(header->magic, STATE_MAGIC, 8))
        return 0;
    *count = (size_t)status.st_size / sizeof(struct record) - 1;
    *records = calloc(*count + 2, sizeof(struct record));
    if (!*records)
        return 0;
    size_t want = *count * sizeof(struct record);
    if (pread(fd, *records, want, sizeof *header) == (ssize_t)want)
        return 1;
    free(*records);
    return 0;
}

static int put(int fd, size_t position, const struct record *record) {
    return pwrite(fd, record, sizeof *record, (off_t)((position + 1) * sizeof *record)) == (ssize_t)sizeof *record;
}

/* Records of living processes, compacted; the caller frees. */
static int snapshot(struct record **records, size_t *count) {
    struct state_header header;
    int fd = state_open(O_RDONLY, LOCK_SH);
    if (fd < 0)
        return 0;
    int good = state_read(fd, &header, records, count);
    close(fd);
    if (!good)
        return 0;
    size_t kept = 0;
    for (size_t i = 0; i < *count; i++)
        if (lives(&(*records)[i]))
            (*records)[kept++] = (*records)[i];
    *count = kept;
    return 1;
}

static uint64_t held(const struct record *records, size_t count, const char *uuid) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++)
        if (records[i].pid && !strcmp(records[i].uuid, uuid))
            sum += records[i].bytes;
    return sum;
}

/* ---- handles ----------------------------------------------------------------------------------------------- */

/* A GPU as it was when the call came in, so that no lock is held while the answer is made. */
struct view {
    struct gpu gpu;
    unsigned position;
    int mig; /* which instance of the GPU is meant, -1 for the GPU itself */
    int show_processes;
};

static int ready(void) {
    pthread_mutex_lock(&mutex);
    int good = initialised > 0;
    if (good)
        refresh();
    pthread_mutex_unlock(&mutex);
    return good ? OK : UNINITIALIZED;
}

static int look(const void *handle, struct view *view) {
    uintptr_t offset = (uintptr_t)handle - (uintptr_t)handles;
    int code = ready();
    if (code)
        return code;
    if ((uintptr_t)handle < (uintptr_t)handles || offset >= sizeof handles)
        return INVALID_ARGUMENT;
    view->position = (unsigned)(offset / sizeof handles[0]);
    view->mig = (int)(offset % sizeof handles[0]) - 1;
    pthread_mutex_lock(&mutex);
    view->gpu = current.gpus[view->position];
    view->show_processes = current.show_processes;
    int known = view->position < current.gpu_count && view->mig < (int)view->gpu.mig_count;
    pthread_mutex_unlock(&mutex);
    if (!known)
        return INVALID_ARGUMENT;
    return view->gpu.lost ? GPU_IS_LOST : OK;
}

#define LOOK(handle)                                                                                                  \
    struct view view;                                                                                                 \
    int code_ = look(handle, &view);                                                                                  \
    if (code_)                                                                                                        \
    return code_

#define GPU_ONLY()                                                                                                    \
    if (view.mig >= 0)                                                                                                \
    return NOT_SUPPORTED

static int give_text(char *out, unsigned size, const char *text) {
    if (!out)
        return INVALID_ARGUMENT;
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

static int give_number(unsigned *out, unsigned value) {
    if (!out)
        return INVALID_ARGUMENT;
    *out = value;
    return OK;
}

/* ---- NVML: the system -------------------------------------------------------------------------------------- */

API int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&mutex);
    int good = refresh();
    initialised += good;
    pthread_mutex_unlock(&mutex);
    return good ? OK : DRIVER_NOT_LOADED;
}

API int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API int nvmlInit(void) { return nvmlInitWithFlags(0); }

API int nvmlShutdown(void) {
    pthread_mutex_lock(&mutex);
    int good = initialised > 0;
    initialised -= good;
    pthread_mutex_unlock(&mutex);
    return good ? OK : UNINITIALIZED;
}

static int give_profile_text(char *out, unsigned size, const char *field) {
    char text[80];
    int code = ready();
    if (code)
        return code;
    pthread_mutex_lock(&mutex);
    copy_text(text, sizeof text, field);
    pthread_mutex_unlock(&mutex);
    return give_text(out, size, text);
}

API int nvmlSystemGetDriverVersion(char *out, unsigned size) { return give_profile_text(out, size, current.driver); }
API int nvmlSystemGetNVMLVersion(char *out, unsigned size) { return give_profile_text(out, size, current.nvml); }

/* Answers before nvmlInit too, as the real one does. */
API int nvmlSystemGetCudaDriverVersion(int *out) {
    if (!out)
        return INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    int good = refresh();
    *out = current.cuda;
    pthread_mutex_unlock(&mutex);
    return good ? OK : DRIVER_NOT_LOADED;
}

API int nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }

API int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned size) {
    char path[64], text[1024];
    int code = ready();
    if (code)
        return code;
    if (!out || !size)
        return INVALID_ARGUMENT;
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NOT_FOUND;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return NOT_FOUND;
    text[length] = 0;
    snprintf(out, size, "%s", text);
    return OK;
}

API const char *nvmlErrorString(int code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case 13: return "Function Not Found";
    case GPU_IS_LOST: return "GPU is lost";
    case OPERATING_SYSTEM: return "Operating System";
    case MEMORY: return "Insufficient Memory";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

/* ---- NVML: finding GPUs ------------------------------------------------------------------------------------ */

/* A lost GPU is still counted, as by the real driver. */
API int nvmlDeviceGetCount_v2(unsigned *out) {
    int code = ready();
    return code ? code : give_number(out, current.gpu_count);
}

API int nvmlDeviceGetCount(unsigned *out) { return nvmlDeviceGetCount_v2(out); }

static int give_handle(void **out, unsigned position, unsigned column) {
    *out = &handles[position][column];
    return current.gpus[position].lost ? GPU_IS_LOST : OK;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    int code = ready();
    if (code || !out)
        return code ? code : INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    code = INVALID_ARGUMENT;
    for (unsigned position = 0; position < current.gpu_count; position++)
        if (current.gpus[position].index == index)
            code = give_handle(out, position, 0);
    pthread_mutex_unlock(&mutex);
    return code;
}

API int nvmlDeviceGetHandleByIndex(unsigned index, void **out) { return nvmlDeviceGetHandleByIndex_v2(index, out); }

API int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    int code = ready();
    if (code || !out || !uuid)
        return code ? code : INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    code = NOT_FOUND;
    for (unsigned position = 0; position < current.gpu_count; position++) {
        const struct gpu *gpu = &current.gpus[position];
        if (!strcmp(gpu->uuid, uuid))
            code = give_handle(out, position, 0);
        for (unsigned i = 0; i < gpu->mig_count; i++)
            if (!strcmp(gpu->migs[i].uuid, uuid))
                code = give_handle(out, position, 1 + i);
    }
    pthread_mutex_unlock(&mutex);
    return code;
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **out) {
    unsigned domain, bus, device;
    int code = ready();
    if (code || !out || !bus_id)
        return code ? code : INVALID_ARGUMENT;
    if (sscanf(bus_id, "%x:%x:%x", &domain, &bus, &device) != 3)
        return INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    code = NOT_FOUND;
    for (unsigned position = 0; position < current.gpu_count; position++) {
        const struct gpu *gpu = &current.gpus[position];
        if (gpu->domain == domain && gpu->bus == bus && gpu->device == device)
            code = give_handle(out, position, 0);
    }
    pthread_mutex_unlock(&mutex);
    return code;
}

API int nvmlDeviceGetHandleByPciBusId(const char *bus_id, void **out) {
    return nvmlDeviceGetHandleByPciBusId_v2(bus_id, out);
}

/* ---- NVML: one GPU ----------------------------------------------------------------------------------------- */

API int nvmlDeviceGetName(void *handle, char *out, unsigned size) {
    LOOK(handle);
    return give_text(out, size, view.mig < 0 ? view.gpu.name : view.gpu.migs[view.mig].name);
}

API int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) {
    LOOK(handle);
    return give_text(out, size, view.mig < 0 ? view.gpu.uuid : view.gpu.migs[view.mig].uuid);
}

API int nvmlDeviceGetIndex(void *handle, unsigned *out) {
    LOOK(handle);
    return give_number(out, view.mig < 0 ? view.gpu.index : (unsigned)view.mig);
}

API int nvmlDeviceGetMinorNumber(void *handle, unsigned *out) {
    LOOK(handle);
    GPU_ONLY();
    return give_number(out, view.position);
}

struct pci_v2 {
    char bus_id[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id, reserved[4];
};

struct pci_v3 {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

static void fill_pci(struct pci_v3 *out, unsigned domain, unsigned bus, unsigned device, unsigned id) {
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", domain & 0xFFFF, bus & 0xFF,
             device & 0xFF);
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", domain, bus, device);
    out->domain = domain;
    out->bus = bus;
    out->device = device;
    out->pci_device_id = id;
}

API int nvmlDeviceGetPciInfo_v3(void *handle, struct pci_v3 *out) {
    LOOK(handle);
    GPU_ONLY();
    if (!out)
        return INVALID_ARGUMENT;
    fill_pci(out, view.gpu.domain, view.gpu.bus, view.gpu.device, view.gpu.pci_device_id);
    return OK;
}

API int nvmlDeviceGetPciInfo_v2(void *handle, struct pci_v2 *out) {
    struct pci_v3 pci;
    if (!out)
        return INVALID_ARGUMENT;
    int code = nvmlDeviceGetPciInfo_v3(handle, &pci);
    if (code)
        return code;
    memset(out, 0, sizeof *out);
    memcpy(out, &pci, 16 + 5 * sizeof(unsigned));
    return OK;
}

/* The first version ends before pci_subsystem_id. */
API int nvmlDeviceGetPciInfo(void *handle, void *out) {
    struct pci_v3 pci;
    if (!out)
        return INVALID_ARGUMENT;
    int code = nvmlDeviceGetPciInfo_v3(handle, &pci);
    if (!code)
        memcpy(out, &pci, 16 + 4 * sizeof(unsigned));
    return code;
}

struct memory_v1 {
    unsigned long long total, free, used;
};

struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

static int measure(const struct view *view, struct memory_v2 *out) {
    struct record *records;
    size_t count;
    const struct gpu *gpu = &view->gpu;
    if (!snapshot(&records, &count))
        return UNKNOWN;
    if (view->mig >= 0) {
        const struct mig *mig = &gpu->migs[view->mig];
        out->total = mig->total;
        out->reserved = mig->reserved;
        out->used = mig->leak + held(records, count, mig->uuid);
    } else {
        out->total = gpu->total;
        out->reserved = gpu->reserved;
        out->used = gpu->leak + held(records, count, gpu->uuid);
        for (unsigned i = 0; i < gpu->mig_count; i++)
            out->used += gpu->migs[i].leak + held(records, count, gpu->migs[i].uuid);
    }
    free(records);
    unsigned long long taken = out->reserved + out->used;
    out->free = taken < out->total ? out->total - taken : 0;
    return OK;
}

/* In the first version the driver's own reserve counts as used; in the second it stands apart. */
API int nvmlDeviceGetMemoryInfo(void *handle, struct memory_v1 *out) {
    struct memory_v2 memory;
    LOOK(handle);
    if (!out)
        return INVALID_ARGUMENT;
    int code = measure(&view, &memory);
    if (code)
        return code;
    out->total = memory.total;
    out->free = memory.free;
    out->used = memory.total - memory.free;
    return OK;
}

API int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *out) {
    LOOK(handle);
    if (!out)
        return INVALID_ARGUMENT;
    if (out->version != (sizeof *out | 2u << 24))
        return VERSION_MISMATCH;
    return measure(&view, out);
}

API int nvmlDeviceGetUtilizationRates(void *handle, unsigned out[2]) {
    LOOK(handle);
    GPU_ONLY();
    if (!out)
        return INVALID_ARGUMENT;
    if (view.gpu.mig_enabled)
        return NOT_SUPPORTED;
    out[0] = out[1] = view.gpu.utilization;
    return OK;
}

API int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *out) {
    LOOK(handle);
    GPU_ONLY();
    if (sensor)
        return INVALID_ARGUMENT;
    return view.gpu.temperature < 0 ? NOT_SUPPORTED : give_number(out, (unsigned)view.gpu.temperature);
}

API int nvmlDeviceGetPowerUsage(void *handle, unsigned *out) {
    LOOK(handle);
    GPU_ONLY();
    return view.gpu.power_mw < 0 ? NOT_SUPPORTED : give_number(out, (unsigned)view.gpu.power_mw);
}

API int nvmlDeviceGetPersistenceMode(void *handle, unsigned *out) {
    LOOK(handle);
    GPU_ONLY();
    return give_number(out, (unsigned)view.gpu.persistence);
}

API int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    LOOK(handle);
    if (!major || !minor)
        return INVALID_ARGUMENT;
    *major = (int)view.gpu.cc_major;
    *minor = (int)view.gpu.cc_minor;
    return OK;
}

/* One bit for each NUMA node. */
API int nvmlDeviceGetMemoryAffinity(void *handle, unsigned size, unsigned long *out, unsigned scope) {
    LOOK(handle);
    unsigned bits = 8 * sizeof *out;
    if (!out || !size || scope > 1)
        return INVALID_ARGUMENT;
    if (view.gpu.numa < 0 || (unsigned)view.gpu.numa >= size * bits)
        return NOT_SUPPORTED;
    memset(out, 0, size * sizeof *out);
    out[(unsigned)view.gpu.numa / bits] = 1UL << ((unsigned)view.gpu.numa % bits);
    return OK;
}

/* ---- NVML: processes --------------------------------------------------------------------------------------- */

struct process_v1 {
    unsigned pid;
    unsigned long long used;
};

struct process_v2 {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

static size_t collect(const struct view *view, unsigned place, const struct record *records, size_t count,
                      struct process_v2 *out, size_t found) {
    const struct gpu *gpu = &view->gpu;
    const char *uuid = place ? gpu->migs[place - 1].uuid : gpu->uuid;
    size_t first = found;
    for (size_t i = 0; i < count; i++) {
        size_t at = first;
        if (strcmp(records[i].uuid, uuid))
            continue;
        while (at < found && out[at].pid != (unsigned)records[i].pid)
            at++;
        if (at == found) {
            out[found].pid = (unsigned)records[i].pid;
            out[found].used = 0;
            out[found].gpu_instance = place ? gpu->migs[place - 1].instance : NO_INSTANCE;
            out[found].compute_instance = place ? 0 : NO_INSTANCE;
            found++;
        }
        out[at].used += records[i].bytes;
    }
    return found;
}

static int list_processes(void *handle, unsigned *size, void *out, int version) {
    struct record *records;
    size_t count, found = 0;
    LOOK(handle);
    if (!size || (*size && !out))
        return INVALID_ARGUMENT;
    if (!view.show_processes) {
        *size = 0;
        return OK;
    }
    if (!snapshot(&records, &count))
        return UNKNOWN;
    struct process_v2 *all = calloc(count + 1, sizeof *all);
    if (!all) {
        free(records);
        return MEMORY;
    }
    unsigned first = view.mig < 0 ? 0 : 1 + (unsigned)view.mig;
    unsigned last = view.mig < 0 ? view.gpu.mig_count : first;
    for (unsigned place = first; place <= last; place++)
        found = collect(&view, place, records, count, all, found);
    int fits = found <= *size;
    for (size_t i = 0; fits && i < found; i++) {
        if (version == 1)
            ((struct process_v1 *)out)[i] = (struct process_v1){all[i].pid, all[i].used};
        else
            ((struct process_v2 *)out)[i] = all[i];
    }
    *size = (unsigned)found;
    free(all);
    free(records);
    return fits ? OK : INSUFFICIENT_SIZE;
}

API int nvmlDeviceGetComputeRunningProcesses(void *h, unsigned *n, void *out) { return list_processes(h, n, out, 1); }
API int nvmlDeviceGetComputeRunningProcesses_v2(void *h, unsigned *n, void *out) { return list_processes(h, n, out, 2); }
API int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *n, void *out) { return list_processes(h, n, out, 2); }

/* Simulated processes compute; none draws. */
static int list_no_processes(void *handle, unsigned *size) {
    LOOK(handle);
    return give_number(size, 0);
}

API int nvmlDeviceGetGraphicsRunningProcesses(void *h, unsigned *n, void *out) { (void)out; return list_no_processes(h, n); }
API int nvmlDeviceGetGraphicsRunningProcesses_v2(void *h, unsigned *n, void *out) { (void)out; return list_no_processes(h, n); }
API int nvmlDeviceGetGraphicsRunningProcesses_v3(void *h, unsigned *n, void *out) { (void)out; return list_no_processes(h, n); }

/* ---- NVML: topology ---------------------------------------------------------------------------------------- */

API int nvmlDeviceGetTopologyCommonAncestor(void *one, void *other, unsigned *out) {
    struct view peer;
    LOOK(one);
    GPU_ONLY();
    int code = look(other, &peer);
    if (code)
        return code;
    if (peer.position == view.position)
        return give_number(out, 0);
    return give_number(out, view.gpu.numa >= 0 && view.gpu.numa == peer.gpu.numa ? 40 : 50);
}

static int linked(const struct view *one, const struct view *other) {
    for (unsigned i = 0; i < one->gpu.link_count; i++) {
        const struct link *link = &one->gpu.links[i];
        if (!link->to_switch && link->peer == other->position)
            return 1;
        for (unsigned j = 0; link->to_switch && j < other->gpu.link_count; j++)
            if (other->gpu.links[j].to_switch && other->gpu.links[j].peer == link->peer)
                return 1;
    }
    return 0;
}

/* Of the capabilities only NVLink (2) is simulated. */
API int nvmlDeviceGetP2PStatus(void *one, void *other, int capability, unsigned *out) {
    struct view peer;
    LOOK(one);
    GPU_ONLY();
    int code = look(other, &peer);
    if (code)
        return code;
    if (capability != 2)
        return NOT_SUPPORTED;
    if (peer.mig >= 0 || peer.position == view.position)
        return INVALID_ARGUMENT;
    return give_number(out, linked(&view, &peer) ? 0 : 5);
}

#define LOOK_LINK(handle, number)                                                                                     \
    LOOK(handle);                                                                                                     \
    GPU_ONLY();                                                                                                       \
    if ((number) >= MAX_LINKS)                                                                                        \
        return INVALID_ARGUMENT;                                                                                      \
    if (!view.gpu.link_count)                                                                                         \
    return NOT_SUPPORTED

API int nvmlDeviceGetNvLinkState(void *handle, unsigned number, unsigned *out) {
    LOOK_LINK(handle, number);
    return give_number(out, number < view.gpu.link_count);
}

API int nvmlDeviceGetNvLinkVersion(void *handle, unsigned number, unsigned *out) {
    LOOK_LINK(handle, number);
    return view.gpu.nvlink_version ? give_number(out, view.gpu.nvlink_version) : NOT_SUPPORTED;
}

/* P2P (0), atomics between GPUs (2) and validity (5) hold for an active link; those of system memory and SLI do not. */
API int nvmlDeviceGetNvLinkCapability(void *handle, unsigned number, unsigned capability, unsigned *out) {
    LOOK_LINK(handle, number);
    if (capability > 5)
        return INVALID_ARGUMENT;
    int has = capability == 0 || capability == 2 || capability == 5;
    return give_number(out, has && number < view.gpu.link_count);
}

API int nvmlDeviceGetNvLinkRemoteDeviceType(void *handle, unsigned number, unsigned *out) {
    LOOK_LINK(handle, number);
    if (number >= view.gpu.link_count)
        return NOT_SUPPORTED;
    return give_number(out, view.gpu.links[number].to_switch ? 2 : 0);
}

/* Behind a switch the remote end is the switch, as on the real boards. */
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *handle, unsigned number, struct pci_v3 *out) {
    LOOK_LINK(handle, number);
    if (!out)
        return INVALID_ARGUMENT;
    if (number >= view.gpu.link_count)
        return NOT_SUPPORTED;
    const struct link *link = &view.gpu.links[number];
    if (link->to_switch) {
        fill_pci(out, 0, 0xF0 + link->peer, 0, 0);
        return OK;
    }
    pthread_mutex_lock(&mutex);
    struct gpu peer = current.gpus[link->peer];
    pthread_mutex_unlock(&mutex);
    fill_pci(out, peer.domain, peer.bus, peer.device, peer.pci_device_id);
    return OK;
}

API int nvmlDeviceGetNvLinkRemotePciInfo(void *handle, unsigned number, struct pci_v2 *out) {
    struct pci_v3 pci;
    int code = nvmlDeviceGetNvLinkRemotePciInfo_v2(handle, number, &pci);
    if (code || !out)
        return code ? code : INVALID_ARGUMENT;
    memset(out, 0, sizeof *out);
    memcpy(out, &pci, 16 + 5 * sizeof(unsigned));
    return OK;
}

/* ---- NVML: MIG --------------------------------------------------------------------------------------------- */

API int nvmlDeviceGetMigMode(void *handle, unsigned *mode, unsigned *pending) {
    LOOK(handle);
    GPU_ONLY();
    if (!view.gpu.mig_capable)
        return NOT_SUPPORTED;
    int code = give_number(mode, (unsigned)view.gpu.mig_enabled);
    return code ? code : give_number(pending, (unsigned)view.gpu.mig_enabled);
}

API int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *out) {
    LOOK(handle);
    GPU_ONLY();
    return give_number(out, view.gpu.mig_capable ? MAX_MIGS : 0);
}

API int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned number, void **out) {
    LOOK(handle);
    GPU_ONLY();
    if (!out || number >= MAX_MIGS)
        return INVALID_ARGUMENT;
    if (!view.gpu.mig_enabled)
        return NOT_SUPPORTED;
    if (number >= view.gpu.mig_count)
        return NOT_FOUND;
    *out = &handles[view.position][1 + number];
    return OK;
}

API int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **out) {
    LOOK(handle);
    if (!out || view.mig < 0)
        return INVALID_ARGUMENT;
    *out = &handles[view.position][0];
    return OK;
}

API int nvmlDeviceIsMigDeviceHandle(void *handle, unsigned *out) {
    LOOK(handle);
    return give_number(out, view.mig >= 0);
}

API int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *out) {
    LOOK(handle);
    return view.mig < 0 ? NOT_SUPPORTED : give_number(out, view.gpu.migs[view.mig].instance);
}

API int nvmlDeviceGetComputeInstanceId(void *handle, unsigned *out) {
    LOOK(handle);
    return view.mig < 0 ? NOT_SUPPORTED : give_number(out, 0);
}

struct attributes {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
    unsigned long long memory_mib;
};

API int nvmlDeviceGetAttributes_v2(void *handle, struct attributes *out) {
    LOOK(handle);
    if (!out)
        return INVALID_ARGUMENT;
    if (view.mig < 0)
        return NOT_SUPPORTED;
    const struct mig *mig = &view.gpu.migs[view.mig];
    memset(out, 0, sizeof *out);
    out->multiprocessors = mig->multiprocessors;
    out->gpu_slices = out->compute_slices = mig->slices;
    out->memory_mib = mig->total / MIB;
    return OK;
}

API int nvmlDeviceGetAttributes(void *handle, struct attributes *out) { return nvmlDeviceGetAttributes_v2(handle, out); }

/* ---- NVML: events ------------------------------------------------------------------------------------------ */

struct event_set {
    struct event_set *next;
    int watched[MAX_GPUS];
    unsigned seen[MAX_GPUS];
};

static struct event_set *sets;

/* Under the mutex. */
static struct event_set *known_set(const void *handle) {
    for (struct event_set *set = sets; set; set = set->next)
        if (set == handle)
            return set;
    return NULL;
}

API int nvmlEventSetCreate(void **out) {
    int code = ready();
    if (code || !out)
        return code ? code : INVALID_ARGUMENT;
    struct event_set *set = calloc(1, sizeof *set);
    if (!set)
        return MEMORY;
    pthread_mutex_lock(&mutex);
    set->next = sets;
    sets = set;
    pthread_mutex_unlock(&mutex);
    *out = set;
    return OK;
}

API int nvmlEventSetFree(void *handle) {
    int code = ready();
    if (code)
        return code;
    pthread_mutex_lock(&mutex);
    struct event_set **at = &sets, *set = known_set(handle);
    while (set && *at != set)
        at = &(*at)->next;
    if (set)
        *at = set->next;
    pthread_mutex_unlock(&mutex);
    free(set);
    return set ? OK : INVALID_ARGUMENT;
}

API int nvmlDeviceGetSupportedEventTypes(void *handle, unsigned long long *out) {
    LOOK(handle);
    if (!out)
        return INVALID_ARGUMENT;
    *out = EVENT_XID;
    return OK;
}

/* Only what happens after this call is an event, as with the real driver. */
API int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *set_handle) {
    LOOK(handle);
    GPU_ONLY();
    if (types & ~EVENT_XID)
        return NOT_SUPPORTED;
    pthread_mutex_lock(&mutex);
    struct event_set *set = known_set(set_handle);
    if (set && types) {
        set->watched[view.position] = 1;
        set->seen[view.position] = view.gpu.xid;
    }
    pthread_mutex_unlock(&mutex);
    return set ? OK : INVALID_ARGUMENT;
}

struct event_v2 {
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

static int next_event(void *handle, struct event_v2 *out) {
    int code = TIMEOUT;
    pthread_mutex_lock(&mutex);
    refresh();
    struct event_set *set = known_set(handle);
    for (unsigned position = 0; set && code && position < current.gpu_count; position++) {
        unsigned xid = current.gpus[position].xid;
        if (!set->watched[position] || set->seen[position] == xid)
            continue;
        set->seen[position] = xid;
        if (xid) {
            *out = (struct event_v2){&handles[position][0], EVENT_XID, xid, NO_INSTANCE, NO_INSTANCE};
            code = OK;
        }
    }
    pthread_mutex_unlock(&mutex);
    return set ? code : INVALID_ARGUMENT;
}

static int wait_event(void *handle, struct event_v2 *out, unsigned timeout_ms) {
    const struct timespec nap = {0, 20 * 1000 * 1000};
    struct timespec begin, now;
    int code = ready();
    clock_gettime(CLOCK_MONOTONIC, &begin);
    while (!code) {
        code = next_event(handle, out);
        if (code != TIMEOUT)
            return code;
        clock_gettime(CLOCK_MONOTONIC, &now);
        double passed = (double)(now.tv_sec - begin.tv_sec) * 1e3 + (double)(now.tv_nsec - begin.tv_nsec) / 1e6;
        if (timeout_ms != 0xFFFFFFFFu && passed >= timeout_ms)
            return TIMEOUT;
        nanosleep(&nap, NULL);
        code = ready();
    }
    return code;
}

API int nvmlEventSetWait_v2(void *handle, struct event_v2 *out, unsigned timeout_ms) {
    struct event_v2 event;
    int code = out ? wait_event(handle, &event, timeout_ms) : INVALID_ARGUMENT;
    if (!code)
        *out = event;
    return code;
}

API int nvmlEventSetWait(void *handle, void *out, unsigned timeout_ms) {
    struct event_v2 event;
    int code = out ? wait_event(handle, &event, timeout_ms) : INVALID_ARGUMENT;
    if (!code)
        memcpy(out, &event, sizeof(void *) + 2 * sizeof(unsigned long long));
    return code;
}

/* ---- NVML: asked for by common tools and not simulated ------------------------------------------------------ */

#define REFUSE(name)                                                                                                  \
    API int name(void) { return ready() ? UNINITIALIZED : NOT_SUPPORTED; }

REFUSE(nvmlDeviceGetBAR1MemoryInfo)
REFUSE(nvmlDeviceGetBoardId)
REFUSE(nvmlDeviceGetBoardPartNumber)
REFUSE(nvmlDeviceGetBrand)
REFUSE(nvmlDeviceGetClockInfo)
REFUSE(nvmlDeviceGetComputeMode)
REFUSE(nvmlDeviceGetCpuAffinity)
REFUSE(nvmlDeviceGetCurrPcieLinkGeneration)
REFUSE(nvmlDeviceGetCurrPcieLinkWidth)
REFUSE(nvmlDeviceGetDecoderUtilization)
REFUSE(nvmlDeviceGetDisplayActive)
REFUSE(nvmlDeviceGetDisplayMode)
REFUSE(nvmlDeviceGetEccMode)
REFUSE(nvmlDeviceGetEncoderUtilization)
REFUSE(nvmlDeviceGetEnforcedPowerLimit)
REFUSE(nvmlDeviceGetFanSpeed)
REFUSE(nvmlDeviceGetFieldValues)
REFUSE(nvmlDeviceGetGpuFabricInfo)
REFUSE(nvmlDeviceGetGpuFabricInfoV)
REFUSE(nvmlDeviceGetMaxClockInfo)
REFUSE(nvmlDeviceGetMaxPcieLinkGeneration)
REFUSE(nvmlDeviceGetMaxPcieLinkWidth)
REFUSE(nvmlDeviceGetMPSComputeRunningProcesses)
REFUSE(nvmlDeviceGetMPSComputeRunningProcesses_v2)
REFUSE(nvmlDeviceGetMPSComputeRunningProcesses_v3)
/* The NUMA node that a GPU's own memory is (Grace Hopper), not the one that it is near to. */
REFUSE(nvmlDeviceGetNumaNodeId)
REFUSE(nvmlDeviceGetPcieThroughput)
REFUSE(nvmlDeviceGetPerformanceState)
REFUSE(nvmlDeviceGetPowerManagementLimit)
REFUSE(nvmlDeviceGetProcessUtilization)
REFUSE(nvmlDeviceGetProcessesUtilizationInfo)
REFUSE(nvmlDeviceGetRemappedRows)
REFUSE(nvmlDeviceGetRetiredPages)
REFUSE(nvmlDeviceGetRunningProcessDetailList)
REFUSE(nvmlDeviceGetSerial)
REFUSE(nvmlDeviceGetTemperatureThreshold)
REFUSE(nvmlDeviceGetTemperatureV)
REFUSE(nvmlDeviceGetTotalEccErrors)
REFUSE(nvmlDeviceGetTotalEnergyConsumption)
REFUSE(nvmlDeviceGetVbiosVersion)
REFUSE(nvmlDeviceSetComputeMode)
REFUSE(nvmlDeviceSetMigMode)
REFUSE(nvmlDeviceSetPersistenceMode)
REFUSE(nvmlDeviceSetPowerManagementLimit)

/* ---- the allocator ------------------------------------------------------------------------------------------ */

/* Codes of berth_sim_allocate; the same numbers stand in allocator.py. */
enum { TAKEN = 0, OUT_OF_MEMORY = 1, NO_SUCH_GPU = 2, LOST = 3, BROKEN = 4 };

struct berth_sim_answer {
    uint64_t handle, asked, free, total; /* bytes; asked with the context if it was due */
};

struct target {
    uint64_t total, blocked, context;
    double scale;
};

static int find_target(const char *uuid, struct target *out) {
    int code = NO_SUCH_GPU;
    pthread_mutex_lock(&mutex);
    int good = refresh();
    out->context = current.context;
    out->scale = current.vram_scale;
    for (unsigned position = 0; good && position < current.gpu_count; position++) {
        const struct gpu *gpu = &current.gpus[position];
        /* Work runs on the instances of a GPU in MIG mode, never on the GPU itself. */
        if (!gpu->mig_enabled && !strcmp(gpu->uuid, uuid)) {
            out->total = gpu->total;
            out->blocked = gpu->reserved + gpu->leak;
            code = gpu->lost ? LOST : TAKEN;
        }
        for (unsigned i = 0; i < gpu->mig_count; i++)
            if (!strcmp(gpu->migs[i].uuid, uuid)) {
                out->total = gpu->migs[i].total;
                out->blocked = gpu->migs[i].reserved + gpu->migs[i].leak;
                code = gpu->lost ? LOST : TAKEN;
            }
    }
    pthread_mutex_unlock(&mutex);
    return good ? code : BROKEN;
}

static void reap(int fd, struct record *records, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (records[i].pid && !lives(&records[i])) {
            memset(&records[i], 0, sizeof records[i]);
            put(fd, i, &records[i]);
        }
}

static int has_context(const struct record *records, size_t count, const struct record *own) {
    for (size_t i = 0; i < count; i++)
        if (records[i].pid == own->pid && records[i].is_context && !strcmp(records[i].uuid, own->uuid))
            return 1;
    return 0;
}

/* Into the first free place, else behind the last. */
static int add(int fd, struct record *records, size_t *count, const struct record *record) {
    size_t at = 0;
    while (at < *count && records[at].pid)
        at++;
    *count += at == *count;
    records[at] = *record;
    return put(fd, at, record);
}

/* Admission under the exclusive lock: what is free is counted and taken in one step, so nothing is sold twice. */
static int admit(int fd, const char *uuid, uint64_t bytes, const struct target *target, struct berth_sim_answer *out) {
    struct state_header header;
    struct record *records, own = {0};
    size_t count;
    if (!state_read(fd, &header, &records, &count))
        return BROKEN;
    reap(fd, records, count);
    own.pid = (int32_t)getpid();
    own.started = start_of(getpid());
    copy_text(own.uuid, sizeof own.uuid, uuid);
    uint64_t context = has_context(records, count, &own) ? 0 : target->context;
    uint64_t taken = target->blocked + held(records, count, uuid);
    out->total = target->total;
    out->free = taken < target->total ? target->total - taken : 0;
    out->asked = bytes + context;
    int code = out->asked > out->free ? OUT_OF_MEMORY : TAKEN;
    if (!code) {
        out->handle = header.next_handle++;
        int good = pwrite(fd, &header, sizeof header, 0) == (ssize_t)sizeof header;
        own.is_context = 1;
        own.bytes = context;
        if (good && !has_context(records, count, &own))
            good = add(fd, records, &count, &own);
        own.is_context = 0;
        own.bytes = bytes;
        own.handle = out->handle;
        if (!good || !add(fd, records, &count, &own))
            code = BROKEN;
    }
    free(records);
    return code;
}

/* Take `bytes` on a GPU for this process; with `scaled`, times the profile's vram_scale. */
API int berth_sim_allocate(const char *uuid, uint64_t bytes, int scaled, struct berth_sim_answer *out) {
    struct target target;
    memset(out, 0, sizeof *out);
    int code = find_target(uuid, &target);
    if (code)
        return code;
    if (scaled)
        bytes = (uint64_t)ceil((double)bytes * target.scale);
    int fd = state_open(O_RDWR, LOCK_EX);
    if (fd < 0)
        return BROKEN;
    code = admit(fd, uuid, bytes, &target, out);
    close(fd);
    return code;
}

/* Give back what berth_sim_allocate took for this process. The context stays until the process ends, as in CUDA. */
API int berth_sim_free(uint64_t handle) {
    struct state_header header;
    struct record *records;
    const struct record nothing = {0};
    size_t count;
    int fd = state_open(O_RDWR, LOCK_EX), code = NO_SUCH_GPU;
    if (fd < 0)
        return BROKEN;
    if (!state_read(fd, &header, &records, &count)) {
        close(fd);
        return BROKEN;
    }
    for (size_t i = 0; i < count; i++)
        if (records[i].pid == (int32_t)getpid() && !records[i].is_context && records[i].handle == handle && handle)
            code = put(fd, i, &nothing) ? TAKEN : BROKEN;
    free(records);
    close(fd);
    return code;
}

/* The GPUs in index order and the instances after theirs, a line for each: index, UUID, parent's UUID or "-", lost,
 * in MIG mode. Returns the length, of which at most size - 1 characters were written; -1 without a profile. */
API int berth_sim_list(char *out, size_t size) {
    size_t length = 0;
    char line[256];
    pthread_mutex_lock(&mutex);
    int good = refresh();
    for (unsigned index = 0; good && index < current.gpu_count; index++)
        for (unsigned position = 0; position < current.gpu_count; position++) {
            const struct gpu *gpu = &current.gpus[position];
            if (gpu->index != index)
                continue;
            for (unsigned i = 0; i <= gpu->mig_count; i++) {
                size_t more = (size_t)snprintf(line, sizeof line, "%u %s %s %d %d\n", index,
                                               i ? gpu->migs[i - 1].uuid : gpu->uuid, i ? gpu->uuid : "-", gpu->lost,
                                               !i && gpu->mig_enabled);
                if (length + more < size)
                    memcpy(out + length, line, more + 1);
                length += more;
            }
        }
    pthread_mutex_unlock(&mutex);
    return good ? (int)length : -1;
}
