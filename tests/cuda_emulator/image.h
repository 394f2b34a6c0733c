// What the pretend compiler hands to the pretend driver. A "CUBIN" is this header and the bytes of a
// shared library; a "PTX" is a line of text that names the file of one.
#pragma once

#include <cstdint>

namespace emulator {

const char image_magic[8] = {'E', 'M', 'U', 'C', 'U', 'B', 'I', 'N'};
struct ImageHeader {
    char magic[8];
    uint32_t capability;
    uint32_t emulator;  // which build of the emulator it was compiled for
    uint64_t bytes;
};
const char ptx_format[] = "//emulator-ptx capability=%u image=%1000s";

// A module whose layout of Kernel differs would be misread: counts up with changes of cuda_emulator.h.
const uint32_t interface_version = 1;

}  // namespace emulator
