// A pretend NVRTC: compiles kernels for the emulator with the C++ compiler of this machine.
#include "image.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <fstream>
#include <regex>
#include <spawn.h>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
extern char** environ;

namespace {

enum Result { success = 0, invalid_input = 3, invalid_program = 4, invalid_option = 5, compilation = 6, internal_error = 11 };

struct Program {
    std::string source, name;
    std::vector<std::pair<std::string, std::string>> headers;  // name, text
    std::string log, cubin, ptx;
};

std::string environment(const char* name, const std::string& otherwise) {
    const char* value = getenv(name);
    return value == nullptr || *value == 0 ? otherwise : value;
}

std::string own_folder() {
    Dl_info info;
    if (dladdr((void*)own_folder, &info) == 0 || info.dli_fname == nullptr) return ".";
    char* path = realpath(info.dli_fname, nullptr);
    std::string folder = path == nullptr ? info.dli_fname : path;
    free(path);
    return folder.substr(0, folder.rfind('/'));
}

std::string read_text(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

bool write_text(const std::string& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    return (bool)file.flush();
}

// A folder that goes with all its files.
struct TemporaryFolder {
    std::string path;
    TemporaryFolder() {
        std::string pattern = environment("TMPDIR", "/tmp") + "/emulator-XXXXXX";
        if (mkdtemp(pattern.data()) != nullptr) path = pattern;
    }
    ~TemporaryFolder() {
        if (DIR* folder = path.empty() ? nullptr : opendir(path.c_str())) {
            while (const dirent* entry = readdir(folder)) unlink((path + "/" + entry->d_name).c_str());
            closedir(folder);
            rmdir(path.c_str());
        }
    }
};

// Runs the compiler in a folder; true when it succeeded. The sanitizers of this process are not its.
bool run_compiler(const std::string& folder, std::vector<std::string> arguments, const std::string& output) {
    arguments.insert(arguments.begin(), environment("EMULATOR_CXX", "g++"));
    std::vector<char*> argv, envp;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    for (char** variable = environ; *variable != nullptr; variable++) {
        if (strncmp(*variable, "LD_PRELOAD=", 11) != 0 && strncmp(*variable, "LC_", 3) != 0) envp.push_back(*variable);
    }
    std::string locale = "LC_ALL=C";
    envp.push_back(locale.data());
    envp.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addchdir_np(&actions, folder.c_str());
    posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t child;
    const int failed = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), envp.data());
    posix_spawn_file_actions_destroy(&actions);
    if (failed) {
        write_text(output, "cannot run " + arguments[0] + ": " + strerror(failed) + "\n");
        return false;
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

std::vector<std::string> words(const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> list;
    for (std::string word; stream >> word;) list.push_back(word);
    return list;
}

// ---- options

struct Options {
    unsigned capability = 52;
    bool virtual_architecture = true;
    std::vector<std::string> definitions;
    std::string unknown;
};

Options read_options(int number, const char* const* texts) {
    // What real NVRTC knows and means nothing here; a trailing * takes any ending.
    static const char* const ignored[] = {"--std=", "-std=", "--fmad=", "-fmad=", "--use_fast_math", "-use_fast_math", "--ftz=", "-ftz=", "--prec-div=", "-prec-div=", "--prec-sqrt=", "-prec-sqrt=", "--ptxas-options", "-Xptxas", "--maxrregcount=", "-maxrregcount=", "--generate-line-info", "-lineinfo", "--device-debug", "-G", "--default-device", "-default-device", "--device-as-default-execution-space", "--restrict", "-restrict", "--extra-device-vectorization", "--extensible-whole-program", "-ewp", "--disable-warnings", "-w", "--diag-suppress=", "-diag-suppress=", "--minimal", "-minimal", "--split-compile=", "--no-source-include", "-no-source-include", "--display-error-number", "--dopt="};
    Options options;
    for (int i = 0; i < number; i++) {
        std::string option = texts[i];
        if ((option == "-arch" || option == "--gpu-architecture") && i + 1 < number) option += std::string("=") + texts[++i];
        static const std::regex architecture("(?:-arch|--gpu-architecture)=(sm|compute)_([0-9]+)a?");
        std::smatch match;
        if (std::regex_match(option, match, architecture)) {
            options.virtual_architecture = match[1] == "compute";
            options.capability = (unsigned)std::stoul(match[2]);
        } else if (option.compare(0, 2, "-D") == 0) {
            options.definitions.push_back(option);
        } else if (option.compare(0, 15, "--define-macro=") == 0) {
            options.definitions.push_back("-D" + option.substr(15));
        } else {
            bool known = false;
            for (const char* prefix : ignored) known = known || option.compare(0, strlen(prefix), prefix) == 0;
            if (!known) options.unknown = option;
        }
    }
    return options;
}

void supported(std::vector<int>& architectures, int& major, int& minor) {
    architectures = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90};
    if (sscanf(environment("EMULATOR_NVRTC_VERSION", "12.8").c_str(), "%d.%d", &major, &minor) != 2) major = 12, minor = 8;
    if (major > 12 || minor >= 8) architectures.insert(architectures.end(), {100, 101, 120});
}

// ---- compilation

std::string sanitizer_flags() {
    const std::string sanitizer = environment("EMULATOR_SANITIZE", "");
    if (sanitizer == "address") return "-O1 -g -fno-omit-frame-pointer -DEMULATOR_PLAIN_SHARED -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined";
    if (sanitizer == "thread") return "-O1 -g -fno-omit-frame-pointer -DEMULATOR_PLAIN_SHARED -fsanitize=thread";
    // Its calls are answered by the driver, which counts: traffic.cpp.
    if (sanitizer == "traffic") return "-O2 -g1 -fsanitize=thread";
    // The driver brings the handlers of these two: a misaligned access or a bad index is an error of
    // the launch.
    return "-O2 -g1 -fsanitize=alignment,bounds -fno-sanitize-recover=alignment,bounds";
}

// The table of kernels that the driver reads, for the kernels found in a preprocessed source.
std::string kernel_table(const std::string& preprocessed) {
    static const std::regex kernel("extern\\s+\"C\"\\s+__global__\\s+void\\s+(?:__launch_bounds__\\s*\\(((?:[^()]|\\([^()]*\\))*)\\)\\s*)?(\\w+)\\s*\\(");
    std::string table = "\n#line 1 \"table of kernels\"\nextern \"C\" {\nextern const emulator::Kernel emulator_kernels[] = {\n";
    unsigned number = 0;
    for (std::sregex_iterator found(preprocessed.begin(), preprocessed.end(), kernel), end; found != end; ++found, number++) {
        const std::string name = (*found)[2], entry = "emulator::Entry<&" + name + ">::";
        table += "    {\"" + name + "\", " + entry + "call, " + entry + "arguments, " + entry + "count, emulator::launch_bound(" + (*found)[1].str() + ")},\n";
    }
    return table + "    {}};\nextern const unsigned emulator_kernel_count = " + std::to_string(number) + ";\n"
        "#if !defined(EMULATOR_PLAIN_SHARED)\n"
        "static thread_local char emulator_anchor_byte;\n"
        "void* emulator_anchor() { return &emulator_anchor_byte; }\n"
        "#endif\n"
        "#if defined(__SANITIZE_THREAD__)\n"
        "void emulator_forget(char* start, char* stop) { emulator::forget_accesses(start, stop); }\n"
        "#endif\n}\n";
}

bool compile(Program& program, const Options& options, const std::string& library) {
    const TemporaryFolder folder;
    const std::string libraries = own_folder(), include = environment("EMULATOR_INCLUDE", EMULATOR_SOURCES);
    std::string name = program.name.substr(program.name.rfind('/') + 1);
    if (name.empty()) name = "program.cu";
    bool written = !folder.path.empty() && write_text(folder.path + "/" + name, program.source);
    for (const auto& [header, text] : program.headers) written = written && write_text(folder.path + "/" + header, text);
    if (!written) {
        program.log = "no room for temporary files in " + environment("TMPDIR", "/tmp") + "\n";
        return false;
    }
    const std::string output = folder.path + "/.output";
    std::vector<std::string> flags = words("-x c++ -std=c++17 -march=x86-64-v3 -fno-strict-aliasing -fPIC -Wall -Wno-unknown-pragmas -Wno-unused-function -Wno-unused-variable -Wno-unused-but-set-variable -DMP_TRAIN_EMULATION -D__CUDACC__ -D__CUDACC_RTC__ -I.");
    flags.push_back("-D__CUDA_ARCH__=" + std::to_string(options.capability * 10));
    flags.push_back("-I" + include);
    flags.insert(flags.end(), options.definitions.begin(), options.definitions.end());

    std::vector<std::string> scan = flags;
    for (const char* flag : {"-E", "-P", "-DEMULATOR_SCAN"}) scan.push_back(flag);
    scan.push_back(name);
    if (!run_compiler(folder.path, scan, output)) {
        program.log = read_text(output);
        return false;
    }
    if (!write_text(folder.path + "/" + name, "#line 1 \"" + name + "\"\n" + program.source + kernel_table(read_text(output)))) return false;
    for (const std::string& flag : words(sanitizer_flags() + " " + environment("EMULATOR_CXXFLAGS", ""))) flags.push_back(flag);
    for (const std::string& flag : {std::string("-c"), name, std::string("-o"), std::string(".object")}) flags.push_back(flag);
    if (!run_compiler(folder.path, flags, output)) {
        program.log = read_text(output);
        return false;
    }
    program.log = read_text(output);
    std::vector<std::string> link = words("-shared .object -Wl,-Bsymbolic -Wl,-z,defs -lm -o");
    link.push_back(library);
    link.push_back("-L" + libraries);
    link.push_back("-lcuda");
    const std::string sanitizer = environment("EMULATOR_SANITIZE", "");
    if (sanitizer == "address") link.push_back("-fsanitize=address,undefined");
    if (sanitizer == "thread") link.push_back("-fsanitize=thread");
    if (!run_compiler(folder.path, link, output)) {
        program.log += read_text(output);
        return false;
    }
    return true;
}

uint64_t digest(const std::string& text, uint64_t hash) {
    for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001B3ull;
    return (hash ^ text.size()) * 0x100000001B3ull;
}

// Compiled libraries are kept: the same source with the same settings is compiled once.
std::string library_path(const Program& program, const Options& options) {
    std::string all = program.source + '\0' + program.name + '\0' + environment("EMULATOR_CXX", "") + environment("EMULATOR_CXXFLAGS", "") + '\0' + sanitizer_flags() + '\0' + std::to_string(options.capability) + '\0';
    all += read_text(environment("EMULATOR_INCLUDE", EMULATOR_SOURCES) + "/cuda_emulator.h") + '\0';
    for (const auto& [name, text] : program.headers) all += name + '\0' + text + '\0';
    for (const std::string& definition : options.definitions) all += definition + '\0';
    char name[64];
    snprintf(name, sizeof name, "%016llx%016llx.so", (unsigned long long)digest(all, 0xcbf29ce484222325ull), (unsigned long long)digest(all, 0x9E3779B97F4A7C15ull));
    const std::string folder = environment("EMULATOR_CACHE", own_folder() + "/compiled");
    mkdir(folder.c_str(), 0777);
    return folder + "/" + name;
}

}  // namespace

API Result nvrtcVersion(int* major, int* minor) {
    std::vector<int> architectures;
    supported(architectures, *major, *minor);
    return success;
}

API Result nvrtcGetNumSupportedArchs(int* number) {
    std::vector<int> architectures;
    int major, minor;
    supported(architectures, major, minor);
    *number = (int)architectures.size();
    return success;
}

API Result nvrtcGetSupportedArchs(int* list) {
    std::vector<int> architectures;
    int major, minor;
    supported(architectures, major, minor);
    memcpy(list, architectures.data(), architectures.size() * sizeof(int));
    return success;
}

API const char* nvrtcGetErrorString(Result result) {
    switch (result) {
        case success: return "NVRTC_SUCCESS";
        case invalid_input: return "NVRTC_ERROR_INVALID_INPUT";
        case invalid_program: return "NVRTC_ERROR_INVALID_PROGRAM";
        case invalid_option: return "NVRTC_ERROR_INVALID_OPTION";
        case compilation: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
}

API Result nvrtcCreateProgram(Program** program, const char* source, const char* name, int number, const char* const* headers, const char* const* names) {
    if (program == nullptr || source == nullptr || number < 0) return invalid_input;
    *program = new Program{source, name == nullptr ? "" : name, {}, {}, {}, {}};
    for (int i = 0; i < number; i++) (*program)->headers.emplace_back(names[i], headers[i]);
    return success;
}

API Result nvrtcDestroyProgram(Program** program) {
    if (program == nullptr || *program == nullptr) return invalid_program;
    delete *program;
    *program = nullptr;
    return success;
}

API Result nvrtcCompileProgram(Program* program, int number, const char* const* texts) {
    if (program == nullptr) return invalid_program;
    const Options options = read_options(number, texts);
    if (!options.unknown.empty()) {
        program->log = "unrecognized option " + options.unknown + " found\n";
        return invalid_option;
    }
    std::vector<int> architectures;
    int major, minor;
    supported(architectures, major, minor);
    bool known = false;
    for (const int architecture : architectures) known = known || architecture == (int)options.capability;
    if (!known) {
        program->log = "invalid value for --gpu-architecture: " + std::to_string(options.capability) + "\n";
        return invalid_option;
    }
    const std::string library = library_path(*program, options);
    if (access(library.c_str(), R_OK) != 0) {
        const std::string unfinished = library + "." + std::to_string(getpid()) + "." + std::to_string((uintptr_t)program);
        if (!compile(*program, options, unfinished)) {
            unlink(unfinished.c_str());
            return compilation;
        }
        if (rename(unfinished.c_str(), library.c_str()) != 0) return internal_error;
    }
    const std::string bytes = read_text(library);
    emulator::ImageHeader header = {};
    memcpy(header.magic, emulator::image_magic, sizeof header.magic);
    header.capability = options.capability;
    header.emulator = emulator::interface_version;
    header.bytes = bytes.size();
    program->cubin.clear();
    if (!options.virtual_architecture) program->cubin = std::string(reinterpret_cast<const char*>(&header), sizeof header) + bytes;
    program->ptx = "//emulator-ptx capability=" + std::to_string(options.capability) + " image=" + library + "\n";
    return success;
}

API Result nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    if (program == nullptr) return invalid_program;
    *bytes = program->cubin.size();
    return success;
}
API Result nvrtcGetCUBIN(Program* program, char* bytes) {
    if (program == nullptr) return invalid_program;
    memcpy(bytes, program->cubin.data(), program->cubin.size());
    return success;
}
API Result nvrtcGetPTXSize(Program* program, size_t* bytes) {
    if (program == nullptr || program->ptx.empty()) return invalid_program;
    *bytes = program->ptx.size() + 1;
    return success;
}
API Result nvrtcGetPTX(Program* program, char* text) {
    if (program == nullptr || program->ptx.empty()) return invalid_program;
    memcpy(text, program->ptx.c_str(), program->ptx.size() + 1);
    return success;
}
API Result nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    if (program == nullptr) return invalid_program;
    *bytes = program->log.size() + 1;
    return success;
}
API Result nvrtcGetProgramLog(Program* program, char* text) {
    if (program == nullptr) return invalid_program;
    memcpy(text, program->log.c_str(), program->log.size() + 1);
    return success;
}
