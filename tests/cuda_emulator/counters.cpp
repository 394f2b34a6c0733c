// What a test can ask afterwards: counters, and a trace of calls.
#include "driver.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <unistd.h>

namespace emulator {

static std::mutex counters_mutex;
static std::map<std::string, long long>& counters() {
    static auto* map = new std::map<std::string, long long>;  // outlives the exit handlers
    return *map;
}

void count(const std::string& name, long long by) {
    std::lock_guard<std::mutex> lock(counters_mutex);
    counters()[name] += by;
}

void count_on(int device, const std::string& name, long long by) {
    std::lock_guard<std::mutex> lock(counters_mutex);
    counters()[name] += by;
    counters()[name + ":" + std::to_string(device)] += by;
}

std::atomic<int> nccl_groups_open[most_devices];

void count_beside_nccl(const char* what, int device) {
    if (nccl_groups_open[device] > 0) count_on(device, std::string(what) + "_beside_nccl");
}

void set_peak(const std::string& name, long long value) {
    std::lock_guard<std::mutex> lock(counters_mutex);
    long long& peak = counters()[name];
    if (peak < value) peak = value;
}

std::string json_text(const std::string& text) {
    std::string json = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') json += '\\';
        if ((unsigned char)c < 0x20) {
            char code[8];
            snprintf(code, sizeof code, "\\u%04x", c);
            json += code;
        } else {
            json += c;
        }
    }
    return json + "\"";
}

void trace(const char* event, const std::string& members) {
    static const int file = [] {
        const char* path = getenv("EMULATOR_TRACE");
        return path == nullptr ? -1 : open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    }();
    if (file < 0) return;
    const bool named = current == nullptr || members.find("\"device\":") != std::string::npos;
    const std::string device = named ? "" : ",\"device\":" + std::to_string(current->device);
    const std::string line = "{\"event\":" + json_text(event) + device + (members.empty() ? "" : "," + members) + "}\n";
    if (write(file, line.data(), line.size()) < 0) perror("emulator: EMULATOR_TRACE");
}

// ---- the report at exit

static std::string report() {
    std::lock_guard<std::mutex> lock(counters_mutex);
    std::string json = "{";
    for (const auto& [name, value] : counters()) {
        json += (json.size() > 1 ? ",\n " : "\n ") + json_text(name) + ": " + std::to_string(value);
    }
    return json + "\n}\n";
}

__attribute__((destructor)) static void write_report() {
    check_all_red_zones();
    const char* path = getenv("EMULATOR_REPORT");
    if (path == nullptr) return;
    FILE* file = fopen(path, "w");
    if (file == nullptr) {
        perror("emulator: EMULATOR_REPORT");
        return;
    }
    fputs(report().c_str(), file);
    fclose(file);
}

}  // namespace emulator

API long long emulator_counter(const char* name) {
    std::lock_guard<std::mutex> lock(emulator::counters_mutex);
    const auto found = emulator::counters().find(name);
    return found == emulator::counters().end() ? 0 : found->second;
}

// Sets all but the bytes in use to zero; the peak starts at those.
API void emulator_reset_counters() {
    std::lock_guard<std::mutex> lock(emulator::counters_mutex);
    std::map<std::string, long long> kept;
    for (const auto& [name, value] : emulator::counters()) {
        if (name.compare(0, 10, "live_bytes") == 0) kept[name] = kept["peak" + name.substr(4)] = value;
    }
    emulator::counters() = std::move(kept);
}

// An event of another library: counted and traced.
API void emulator_note(const char* event) {
    emulator::count(event);
    emulator::trace(event);
}
API void emulator_note_load(uint64_t kind) {
    static std::mutex mutex;
    static auto& loaded = *new std::set<std::pair<int, uint64_t>>;
    const emulator::Context* context = emulator::current_context();
    if (context == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex);
    if (loaded.insert({context->device, kind}).second) emulator::count_beside_nccl("product_loads", context->device);
}
