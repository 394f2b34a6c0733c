// Modules, functions and launches.
#include "driver.h"
#include "fiber.h"
#include "image.h"
#include "traffic.h"
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

API CUresult cuInit(unsigned flags);

namespace emulator {

struct Resources {
    int registers;
    size_t static_shared;
};
struct Module;
struct Function {
    Module* module;
    const Kernel* kernel;
    Resources resources;
    int dynamic_limit;
};
struct Range {
    char* start;
    size_t bytes;
};
// The shared variables of a module: thread-local, or in the builds for sanitizers plain ones.
class SharedVariables : public StaticShared {
public:
    void find(void* library, int file);
    // Bytes that the body of a kernel declares: such variables' mangled names begin so.
    size_t of_kernel(const char* kernel) const;
    void fill(unsigned char value) const override;
    bool holds(const void* p, size_t bytes) const override;
    void forget() const override;

private:
    Range thread_local_block() const;
    std::map<std::string, size_t> sizes_;
    std::vector<Range> plain_;
    void* (*anchor_)() = nullptr;  // the address of a thread-local variable
    ptrdiff_t anchor_offset_ = 0;  // of that variable in its block
    size_t block_bytes_ = 0;
    void (*forget_)(char* start, char* stop) = nullptr;
};
struct Module {
    Context* context;
    void* handle;
    unsigned capability;
    SharedVariables shared;
    std::map<std::string, std::unique_ptr<Function>> functions;
};
static auto& modules = *new std::map<void*, std::unique_ptr<Module>>;
static auto& functions = *new std::map<void*, Function*>;

// The thread-local block of the library loaded at `base`.
struct BlockSearch {
    const char* base;
    const char* block;
    size_t bytes;
};
static int search_block(dl_phdr_info* info, size_t, void* data) {
    BlockSearch& search = *static_cast<BlockSearch*>(data);
    if ((const char*)info->dlpi_addr != search.base) return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
        search.bytes = info->dlpi_phdr[i].p_memsz;
        search.block = static_cast<const char*>(info->dlpi_tls_data);
    }
    return 1;
}

void SharedVariables::find(void* library, int file) {
    link_map* map = nullptr;
    if (dlinfo(library, RTLD_DI_LINKMAP, &map) != 0) return;
    char* base = reinterpret_cast<char*>(map->l_addr);
    anchor_ = reinterpret_cast<void* (*)()>(dlsym(library, "emulator_anchor"));
    forget_ = reinterpret_cast<void (*)(char*, char*)>(dlsym(library, "emulator_forget"));
    if (anchor_ != nullptr) {
        const char* anchor = static_cast<char*>(anchor_());  // makes the block, if it was not there
        BlockSearch search = {base, anchor, 0};
        dl_iterate_phdr(search_block, &search);
        anchor_offset_ = anchor - search.block;
        block_bytes_ = search.bytes;
    }
    const off_t bytes = lseek(file, 0, SEEK_END);
    char* start = static_cast<char*>(mmap(nullptr, (size_t)bytes, PROT_READ, MAP_PRIVATE, file, 0));
    if (start == MAP_FAILED) return;
    const auto header = reinterpret_cast<const ElfW(Ehdr)*>(start);
    const auto sections = reinterpret_cast<const ElfW(Shdr)*>(start + header->e_shoff);
    for (unsigned i = 0; i < header->e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto symbols = reinterpret_cast<const ElfW(Sym)*>(start + sections[i].sh_offset);
        const char* names = start + sections[sections[i].sh_link].sh_offset;
        for (size_t j = 0; j < sections[i].sh_size / sizeof *symbols; j++) {
            const ElfW(Sym)& symbol = symbols[j];
            const char* name = names + symbol.st_name;
            if (strncmp(name, "_ZZ", 3) != 0 || symbol.st_shndx >= header->e_shnum) continue;  // not inside a function
            const bool plain = ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT && sections[symbol.st_shndx].sh_type == SHT_NOBITS;
            if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS || plain) sizes_[name] = symbol.st_size;
            if (plain) plain_.push_back({base + symbol.st_value, symbol.st_size});
        }
    }
    munmap(start, (size_t)bytes);
}

size_t SharedVariables::of_kernel(const char* kernel) const {
    const std::string prefix = "_ZZ" + std::to_string(strlen(kernel)) + kernel + "E";
    size_t sum = 0;
    for (const auto& [name, bytes] : sizes_) {
        if (name.compare(0, prefix.size(), prefix) == 0) sum += (bytes + 15) / 16 * 16;
    }
    return sum;
}

Range SharedVariables::thread_local_block() const {
    return {anchor_ == nullptr ? nullptr : static_cast<char*>(anchor_()) - anchor_offset_, block_bytes_};
}

void SharedVariables::fill(unsigned char value) const {
    std::vector<Range> ranges = plain_;
    ranges.push_back(thread_local_block());
    for (const Range& range : ranges) {
        // Not memset: a sanitizer would look at it.
        volatile char* p = range.start;
        for (size_t i = 0; i < range.bytes; i++) p[i] = (char)value;
    }
}

bool SharedVariables::holds(const void* p, size_t bytes) const {
    const auto inside = [&](const Range& range) { return p >= range.start && (const char*)p + bytes <= range.start + range.bytes; };
    for (const Range& range : plain_) {
        if (inside(range)) return true;
    }
    return inside(thread_local_block());
}

void SharedVariables::forget() const {
    if (forget_ == nullptr) return;
    for (const Range& range : plain_) forget_(range.start, range.start + range.bytes);
}

static CUresult open_library(const std::string& path, Module& module) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return refuse(invalid_image, "cuModuleLoadData: %s: %s", path.c_str(), strerror(errno));
    module.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (module.handle != nullptr) module.shared.find(module.handle, file);
    close(file);
    return module.handle != nullptr ? success : refuse(invalid_image, "cuModuleLoadData: %s", dlerror());
}

// Puts the library of an image beside the driver's own file, under a name of its contents: the loader
// takes two files of one name for the same, and a sanitizer's report needs the file until the end.
static bool unpack(std::string& path, const char* bytes, size_t size) {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)bytes[i]) * 0x100000001B3ull;
    Dl_info info;
    if (dladdr((void*)cuInit, &info) == 0) return false;
    path = info.dli_fname;
    path = path.substr(0, path.rfind('/') + 1) + "loaded";
    mkdir(path.c_str(), 0777);
    char name[64];
    snprintf(name, sizeof name, "/%016llx-%zu.so", (unsigned long long)hash, size);
    path += name;
    if (access(path.c_str(), R_OK) == 0) return true;
    const std::string unfinished = path + "." + std::to_string(getpid()) + "." + std::to_string((uintptr_t)&info);
    FILE* file = fopen(unfinished.c_str(), "wb");
    if (file == nullptr) return false;
    const bool written = fwrite(bytes, 1, size, file) == size;
    return fclose(file) == 0 && written && rename(unfinished.c_str(), path.c_str()) == 0;
}

static CUresult load(Module** result, const void* image) {
    if (const CUresult error = usable()) return error;
    if (image == nullptr) return invalid_value;
    const unsigned device = (unsigned)settings().architecture->capability;
    auto module = std::make_unique<Module>();
    module->context = current;
    char path[1001];
    ImageHeader header;
    if (memcmp(image, "//emulator-ptx", 14) == 0) {
        if (sscanf(static_cast<const char*>(image), ptx_format, &module->capability, path) != 2) return invalid_ptx;
        if (module->capability > device) return refuse(invalid_ptx, "PTX of compute_%u on a device of capability %u", module->capability, device);
        if (const CUresult error = open_library(path, *module)) return error;
    } else {
        if (memcmp(image, image_magic, sizeof image_magic) != 0) return invalid_image;
        memcpy(&header, image, sizeof header);
        if (header.emulator != interface_version) return refuse(invalid_image, "the image was made for another version of the emulator");
        module->capability = header.capability;
        if (header.capability / 10 != device / 10 || header.capability > device) return refuse(no_binary_for_gpu, "CUBIN of sm_%u on a device of capability %u", header.capability, device);
        std::string unpacked;
        if (!unpack(unpacked, static_cast<const char*>(image) + sizeof header, header.bytes)) return refuse(out_of_memory, "no room for the image in %s", unpacked.c_str());
        if (const CUresult error = open_library(unpacked, *module)) return error;
    }
    count_on(current->device, "modules");
    count_beside_nccl("module_loads", current->device);
    trace("load_module", "\"capability\":" + std::to_string(module->capability));
    std::lock_guard<std::mutex> lock(state);
    *result = module.get();
    modules[module.get()] = std::move(module);
    return success;
}

// Registers per thread from the file that EMULATOR_REGISTERS names: lines of architecture, kernel,
// registers, as tests/kernel_code.rs writes them. A kernel that is not there is taken to use all that its
// launch bounds leave.
static Resources resources_of(const Module& module, const Kernel& kernel) {
    static const auto& table = *new auto([] {
        std::map<std::pair<unsigned, std::string>, int> table;
        const char* path = getenv("EMULATOR_REGISTERS");
        FILE* file = path == nullptr ? nullptr : fopen(path, "r");
        if (file == nullptr) return table;
        char line[512], name[256];
        unsigned capability;
        int registers;
        while (fgets(line, sizeof line, file) != nullptr) {
            if (sscanf(line, "%u %255s %d", &capability, name, &registers) == 3) table[{capability, name}] = registers;
        }
        fclose(file);
        return table;
    }());
    const size_t shared = module.shared.of_kernel(kernel.name);
    const auto found = table.find({module.capability, kernel.name});
    if (found != table.end()) return {found->second, shared};
    const unsigned threads = kernel.max_threads == 0 ? 256 : std::max(32u, kernel.max_threads);
    return {(int)std::min(255u, 65536 / threads), shared};
}

// Unloads a module whose work is done. With `state` held.
static void unload(Module* module) {
    for (const auto& [name, function] : module->functions) functions.erase(function.get());
    void* library = module->handle;
    modules.erase(module);
    dlclose(library);
}
void unload_modules_of(Context& context) {
    std::lock_guard<std::mutex> lock(state);
    for (auto next = modules.begin(); next != modules.end();) {
        Module* module = (next++)->second.get();
        if (module->context == &context) unload(module);
    }
}

static CUresult check_launch(const Function& f, dim3 grid, dim3 block, unsigned dynamic_bytes) {
    const char* name = f.kernel->name;
    const unsigned long long threads = (unsigned long long)block.x * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) return refuse(invalid_value, "%s: an empty grid or block: (%u,%u,%u) x (%u,%u,%u)", name, grid.x, grid.y, grid.z, block.x, block.y, block.z);
    if (grid.x > 2147483647 || grid.y > 65535 || grid.z > 65535) return refuse(invalid_value, "%s: the grid (%u,%u,%u) is too large", name, grid.x, grid.y, grid.z);
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) return refuse(invalid_value, "%s: the block (%u,%u,%u) is too large", name, block.x, block.y, block.z);
    if (f.kernel->max_threads != 0 && threads > f.kernel->max_threads) return refuse(invalid_value, "%s: %llu threads, its launch bound is %u", name, threads, f.kernel->max_threads);
    // Registers are given to warps in pieces of 256.
    const unsigned long long warps = (threads + 31) / 32, per_warp = ((unsigned long long)f.resources.registers * 32 + 255) / 256 * 256;
    if (warps * per_warp > 65536) return refuse(launch_out_of_resources, "%s: %llu threads x %d registers%s", name, threads, f.resources.registers, f.kernel->max_threads == 0 ? " (it has no __launch_bounds__: a thread may use 255)" : "");
    const unsigned long long shared = f.resources.static_shared + dynamic_bytes;
    const unsigned long long limit = std::max<unsigned long long>(settings().architecture->shared_per_block, f.resources.static_shared + f.dynamic_limit);
    if (shared > limit) return refuse(invalid_value, "%s: %u bytes of dynamic and %zu of static shared memory, %llu are allowed (cuFuncSetAttribute raises it to at most %u)", name, dynamic_bytes, f.resources.static_shared, limit, settings().architecture->shared_opt_in);
    return success;
}

// The values of a launch's arguments, kept until it runs.
struct Arguments {
    std::vector<std::unique_ptr<char[]>> values;
    std::vector<void*> addresses;
};

static std::string geometry_json(const Kernel& kernel, dim3 grid, dim3 block, unsigned dynamic_bytes) {
    char text[400];
    snprintf(text, sizeof text, "\"kernel\":\"%s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%u", kernel.name, grid.x, grid.y, grid.z, block.x, block.y, block.z, dynamic_bytes);
    return text;
}

static CUresult run_launch(Context& context, const Function& f, const Arguments& arguments, dim3 grid, dim3 block, size_t dynamic_bytes) {
    const Kernel& kernel = *f.kernel;
    for (unsigned i = 0; i < kernel.argument_count; i++) {
        if (!kernel.arguments[i].pointer) continue;
        CUdeviceptr address;
        memcpy(&address, arguments.addresses[i], sizeof address);
        if (const CUresult error = check_kernel_pointer(context, address, kernel.name, i)) return error;
    }
    static const char* const skipped = getenv("EMULATOR_SKIP_KERNELS");
    if (skipped != nullptr && strcmp(skipped, "1") == 0) return success;
    Launch launch = {&kernel, const_cast<void**>(arguments.addresses.data()), grid, block, dynamic_bytes, &f.module->shared};
    Schedule schedule;
    {
        std::lock_guard<std::mutex> lock(state);
        schedule = settings().schedule;
    }
    // The builds for sanitizers keep shared variables in plain ones, which all threads share.
    static std::mutex sanitized;
    std::unique_lock<std::mutex> alone(sanitized, std::defer_lock);
    if (address_sanitizer() || thread_sanitizer() || traffic_is_counted()) alone.lock();
    const auto start = std::chrono::steady_clock::now();
    const std::string error = traffic_is_counted() ? run_counting_traffic(launch, schedule) : run(launch, schedule);
    const auto duration = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start);
    count(std::string("microseconds:") + kernel.name, duration.count());
    if (error.empty()) return success;
    return refuse(launch_failed, "%s: %s", kernel.name, error.c_str());
}

// Kernels take their outputs first: the first pointer that is not null.
static void spoil_first_output(const Kernel& kernel, const Arguments& arguments) {
    for (unsigned i = 0; i < kernel.argument_count; i++) {
        CUdeviceptr address = 0;
        if (kernel.arguments[i].pointer) memcpy(&address, arguments.addresses[i], sizeof address);
        if (address != 0) return put_nans(address);
    }
}

static CUresult launch_kernel(Function* f, dim3 grid, dim3 block, unsigned dynamic_bytes, void* handle, void** parameters, void** extra) {
    if (const CUresult error = usable()) return error;
    {
        std::lock_guard<std::mutex> lock(state);
        if (functions.count(f) == 0) return invalid_handle;
    }
    const StreamRef stream = find_stream(handle);
    if (!stream) return invalid_handle;
    const Kernel& kernel = *f->kernel;
    if (stream->context != current || f->module->context != current) return refuse(invalid_handle, "%s: kernel, stream and thread have different contexts", kernel.name);
    if (extra != nullptr) return refuse(not_supported, "%s: launched with packed arguments", kernel.name);
    if (parameters == nullptr && kernel.argument_count > 0) return invalid_value;
    if (const CUresult error = check_launch(*f, grid, block, dynamic_bytes)) return error;
    auto arguments = std::make_shared<Arguments>();
    for (unsigned i = 0; i < kernel.argument_count; i++) {
        if (parameters[i] == nullptr) return refuse(invalid_value, "%s: argument %u is missing", kernel.name, i);
        arguments->values.push_back(std::make_unique<char[]>(kernel.arguments[i].bytes));
        memcpy(arguments->values.back().get(), parameters[i], kernel.arguments[i].bytes);
        arguments->addresses.push_back(arguments->values.back().get());
    }
    count_on(current->device, "launches");
    count(std::string("launch:") + kernel.name);
    trace("launch", geometry_json(kernel, grid, block, dynamic_bytes));
    Context& context = *current;
    if (planned_failure("host_hang", context.device, kernel.name)) {
        say("%s: its launch never returns, as EMULATOR_FAIL says", kernel.name);
        while (true) pause();
    }
    if (planned_failure("gpu_hang", context.device, kernel.name)) {
        say("%s: never ends, as EMULATOR_FAIL says", kernel.name);
        return enqueue_hang(stream);
    }
    const bool fails = planned_failure("launch", context.device, kernel.name);
    const bool spoils = planned_failure("nan", context.device, kernel.name);
    return enqueue(stream, [=, &context]() -> CUresult {
        if (fails) return refuse(launch_failed, "%s: fails, as EMULATOR_FAIL says", f->kernel->name);
        const CUresult error = run_launch(context, *f, *arguments, grid, block, dynamic_bytes);
        if (spoils && error == success) spoil_first_output(*f->kernel, *arguments);
        return error;
    });
}

}  // namespace emulator

using namespace emulator;

API CUresult cuModuleLoadData(Module** module, const void* image) { return load(module, image); }
API CUresult cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) { return load(module, image); }

API CUresult cuModuleLoad(Module** module, const char* path) {
    FILE* file = fopen(path, "rb");
    if (file == nullptr) return file_not_found;
    std::vector<char> bytes;
    char part[65536];
    for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) bytes.insert(bytes.end(), part, part + n);
    fclose(file);
    bytes.push_back(0);
    ImageHeader header = {};
    if (bytes.size() > sizeof header) memcpy(&header, bytes.data(), sizeof header);
    if (memcmp(header.magic, image_magic, 8) == 0 && header.bytes > bytes.size() - sizeof header) return invalid_image;
    return load(module, bytes.data());
}

API CUresult cuModuleUnload(Module* module) {
    if (const CUresult error = usable()) return error;
    {
        std::lock_guard<std::mutex> lock(state);
        if (modules.count(module) == 0) return invalid_handle;
    }
    const CUresult error = finish(*module->context);
    std::lock_guard<std::mutex> lock(state);
    unload(module);
    return error;
}

API CUresult cuModuleGetFunction(Function** function, Module* module, const char* name) {
    if (const CUresult error = usable()) return error;
    std::lock_guard<std::mutex> lock(state);
    if (modules.count(module) == 0) return invalid_handle;
    std::unique_ptr<Function>& known = module->functions[name];
    if (!known) {
        const auto kernels = static_cast<const Kernel*>(dlsym(module->handle, "emulator_kernels"));
        const auto number = static_cast<const unsigned*>(dlsym(module->handle, "emulator_kernel_count"));
        for (unsigned i = 0; kernels != nullptr && number != nullptr && i < *number; i++) {
            if (strcmp(kernels[i].name, name) != 0) continue;
            const Resources resources = resources_of(*module, kernels[i]);
            const int limit = std::max(0, (int)settings().architecture->shared_per_block - (int)resources.static_shared);
            known = std::make_unique<Function>(Function{module, &kernels[i], resources, limit});
            functions[known.get()] = known.get();
        }
        if (!known) {
            module->functions.erase(name);
            return not_found;
        }
        count_beside_nccl("module_loads", current->device);  // CUDA_MODULE_LOADING=LAZY loads it now
    }
    *function = known.get();
    return success;
}

API CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, Module*, const char* name) {
    return refuse(not_found, "cuModuleGetGlobal(%s): kernels have no global variables here", name);
}

API CUresult cuFuncGetAttribute(int* value, int attribute, Function* f) {
    if (const CUresult error = usable()) return error;
    switch (attribute) {
        case 0: *value = f->kernel->max_threads != 0 ? (int)f->kernel->max_threads : std::min(1024, 65536 / std::max(1, f->resources.registers) / 32 * 32); break;
        case 1: *value = (int)f->resources.static_shared; break;
        case 4: *value = f->resources.registers; break;
        case 5:
        case 6: *value = (int)f->module->capability; break;
        case 8: *value = f->dynamic_limit; break;
        case 9: *value = -1; break;
        default: *value = 0; break;
    }
    return success;
}

API CUresult cuFuncSetAttribute(Function* f, int attribute, int value) {
    if (const CUresult error = usable()) return error;
    if (attribute == 9) return value >= -1 && value <= 100 ? success : invalid_value;
    if (attribute != 8) return invalid_value;
    const long long limit = (long long)settings().architecture->shared_opt_in - (long long)f->resources.static_shared;
    if (value < 0 || value > limit) return refuse(invalid_value, "%s: %d bytes of dynamic shared memory, this device offers %lld", f->kernel->name, value, limit);
    f->dynamic_limit = value;
    return success;
}
API CUresult cuFuncSetCacheConfig(Function*, int) { return usable(); }

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* f, int threads, size_t dynamic_bytes) {
    if (const CUresult error = usable()) return error;
    if (threads <= 0) return invalid_value;
    const Architecture& a = *settings().architecture;
    const unsigned warps = (unsigned)(threads + 31) / 32;
    const unsigned reserved = a.capability >= 80 ? 1024 : 0;
    const size_t shared = f->resources.static_shared + dynamic_bytes + reserved;
    unsigned most = std::min(a.blocks_per_multiprocessor, a.threads_per_multiprocessor / (warps * 32));
    most = std::min(most, 65536 / (warps * (((unsigned)f->resources.registers * 32 + 255) / 256 * 256)));
    if (shared > 0) most = std::min<unsigned>(most, (unsigned)(a.shared_per_multiprocessor / shared));
    *blocks = (int)most;
    return success;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* f, int threads, size_t dynamic_bytes, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, f, threads, dynamic_bytes);
}

API CUresult cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned dynamic_bytes, void* stream, void** parameters, void** extra) {
    return launch_kernel(f, dim3(gx, gy, gz), dim3(bx, by, bz), dynamic_bytes, stream, parameters, extra);
}
