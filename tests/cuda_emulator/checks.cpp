// Handlers of the compiler's own checks in kernels (-fsanitize=alignment,bounds): what a GPU answers
// with "misaligned address", and an index outside of an array of registers or shared memory.
#include "cuda_emulator.h"

namespace {
struct Place {
    const char* file;
    unsigned line, column;
};
struct Type {
    uint16_t kind, info;
    char name[1];
};
struct TypeMismatch {
    Place place;
    const Type* type;
    unsigned char log_alignment, kind;
};
struct OutOfBounds {
    Place place;
    const Type *array, *index;
};
}  // namespace

#define HANDLER extern "C" __attribute__((visibility("default"), weak))

HANDLER void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t address) {
    emulator::fail("%s:%u: misaligned address: %s at %llx needs a multiple of %u", data->place.file, data->place.line, data->type->name, (unsigned long long)address, 1u << data->log_alignment);
}

HANDLER void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uintptr_t index) {
    emulator::fail("%s:%u: index %lld is outside of %s", data->place.file, data->place.line, (long long)index, data->array->name);
}
