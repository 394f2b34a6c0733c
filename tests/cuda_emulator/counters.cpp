// What a test can ask afterwards: counters, a trace of calls; and failures planned beforehand.
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
    const std::string line = "{\"event\":" + json_text(event) + (members.empty() ? "" : "," + members) + "}\n";
    if (write(file, line.data(), line.size()) < 0) perror("emulator: EMULATOR_TRACE");
}

// ---- planned failures

struct PlannedFailure {
    std::string what;
    long long number;
};
static std::vector<PlannedFailure> read_plan() {
    std::vector<PlannedFailure> plan;
    const char* text = getenv("EMULATOR_FAIL");
    std::string rest = text == nullptr ? "" : text;
    while (!rest.empty()) {
        const size_t comma = rest.find(',');
        const std::string one = rest.substr(0, comma);
        const size_t colon = one.rfind(':');
        if (colon == std::string::npos) {
            fprintf(stderr, "emulator: EMULATOR_FAIL: %s has no number\n", one.c_str());
            abort();
        }
        plan.push_back({one.substr(0, colon), atoll(one.c_str() + colon + 1)});
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    }
    return plan;
}
static const std::vector<PlannedFailure>& plan() {
    static const std::vector<PlannedFailure> plan = read_plan();
    return plan;
}

bool planned_failure(const std::string& what) {
    static std::map<std::string, long long> calls;
    if (plan().empty()) return false;
    std::lock_guard<std::mutex> lock(counters_mutex);
    const long long call = ++calls[what];
    for (const PlannedFailure& planned : plan()) {
        if (planned.what == what && planned.number == call) return true;
    }
    return false;
}

size_t planned_memory_limit() {
    for (const PlannedFailure& planned : plan()) {
        if (planned.what == "out_of_memory_after") return (size_t)planned.number;
    }
    return SIZE_MAX;
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
    const long long live = emulator::counters()["live_bytes"];
    emulator::counters().clear();
    emulator::counters()["live_bytes"] = emulator::counters()["peak_bytes"] = live;
}

// An event of another library: counted and traced.
API void emulator_note(const char* event) {
    emulator::count(event);
    emulator::trace(event);
}
