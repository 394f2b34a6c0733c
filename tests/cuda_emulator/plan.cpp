// Failures planned beforehand: EMULATOR_FAIL.
#include "driver.h"
#include <cstdio>
#include <cstdlib>

namespace emulator {

// What a failure is written with: NAME, NAME:N or NAME:KERNEL:N, each with @PLACE or without.
enum class Form { alone, number, kernel };
struct Known {
    const char* name;
    Form form;
};
static const Known known[] = {
    {"out_of_memory_after", Form::number}, {"allocation", Form::number}, {"product", Form::number},
    {"launch", Form::kernel}, {"host_hang", Form::kernel}, {"gpu_hang", Form::kernel}, {"nan", Form::kernel},
    {"peer_copy_hang", Form::alone}, {"peer_copy_error", Form::alone}, {"peer_copy_garbage", Form::alone},
    {"nccl_error", Form::number}, {"nccl_hang", Form::number}, {"nccl_init_hang", Form::alone},
};

struct PlannedFailure {
    std::string name, kernel;
    long long number = 0;
    bool onwards = false;  // N+: this call and all later ones
    int place = -1;        // -1: everywhere
    long long calls = 0;
};

[[noreturn]] static void bad_plan(const std::string& one) {
    fprintf(stderr, "emulator: EMULATOR_FAIL: %s is none of", one.c_str());
    for (const Known& k : known) fprintf(stderr, " %s%s", k.name, k.form == Form::alone ? "" : k.form == Form::number ? ":N" : ":KERNEL:N");
    fprintf(stderr, ", each with @DEVICE or @RANK or without\n");
    abort();
}

static bool read_number(std::string text, long long& number) {
    char* end;
    number = strtoll(text.c_str(), &end, 10);
    return end != text.c_str() && *end == 0;
}

static PlannedFailure read_one(const std::string& one) {
    PlannedFailure planned;
    std::string rest = one;
    const size_t at = rest.rfind('@');
    if (at != std::string::npos) {
        long long place;
        if (!read_number(rest.substr(at + 1), place)) bad_plan(one);
        planned.place = (int)place;
        rest.resize(at);
    }
    const size_t colon = rest.find(':');
    planned.name = rest.substr(0, colon);
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
    for (const Known& k : known) {
        if (planned.name != k.name) continue;
        if (k.form == Form::alone) {
            if (colon != std::string::npos) bad_plan(one);
            return planned;
        }
        if (k.form == Form::kernel) {
            const size_t end = rest.rfind(':');
            if (end == std::string::npos) bad_plan(one);
            planned.kernel = rest.substr(0, end);
            rest = rest.substr(end + 1);
        }
        planned.onwards = !rest.empty() && rest.back() == '+';
        if (planned.onwards) rest.pop_back();
        if (!read_number(rest, planned.number)) bad_plan(one);
        return planned;
    }
    bad_plan(one);
}

static std::vector<PlannedFailure> read_plan(const std::string& text) {
    std::vector<PlannedFailure> plan;
    for (size_t start = 0; start < text.size();) {
        const size_t comma = std::min(text.find(',', start), text.size());
        plan.push_back(read_one(text.substr(start, comma - start)));
        start = comma + 1;
    }
    return plan;
}

static std::mutex plan_mutex;
static std::vector<PlannedFailure>& plan() {
    static auto& plan = *new std::vector<PlannedFailure>([] {
        const char* text = getenv("EMULATOR_FAIL");
        return read_plan(text == nullptr ? "" : text);
    }());
    return plan;
}

void plan_failures(const std::string& text) {
    std::lock_guard<std::mutex> lock(plan_mutex);
    plan() = read_plan(text);
}

bool planned_failure(const std::string& what, int place, const std::string& kernel) {
    std::lock_guard<std::mutex> lock(plan_mutex);
    bool fails = false;
    for (PlannedFailure& planned : plan()) {
        if (planned.name != what || (planned.place >= 0 && planned.place != place)) continue;
        if (planned.kernel != "*" && planned.kernel != kernel) continue;
        const long long call = ++planned.calls;
        fails |= call == planned.number || (planned.onwards && call >= planned.number);
    }
    return fails;
}

bool planned_always(const std::string& what, int place) {
    std::lock_guard<std::mutex> lock(plan_mutex);
    for (const PlannedFailure& planned : plan()) {
        if (planned.name == what && (planned.place < 0 || planned.place == place)) return true;
    }
    return false;
}

size_t planned_memory_limit(int device) {
    std::lock_guard<std::mutex> lock(plan_mutex);
    size_t limit = SIZE_MAX;
    for (const PlannedFailure& planned : plan()) {
        if (planned.name == "out_of_memory_after" && (planned.place < 0 || planned.place == device)) limit = std::min(limit, (size_t)planned.number);
    }
    return limit;
}

}  // namespace emulator
