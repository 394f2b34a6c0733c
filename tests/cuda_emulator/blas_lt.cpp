// A pretend cuBLASLt: column-major products of half or float matrices with float sums, or of half ones with
// half sums, each taken in an order that only k decides, as an operation of the stream it is given.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
extern "C" int emulator_enqueue(void* stream, const char* label, void (*run)(void*), void (*drop)(void*), void* data);
extern "C" int emulator_holds(const void* address, size_t bytes);
extern "C" int emulator_planned_failure(const char* what);
extern "C" void emulator_note(const char* event);
extern "C" void emulator_note_load(uint64_t kind);

namespace {

enum Status { success = 0, not_initialized = 1, invalid_value = 7, execution_failed = 13, not_supported = 15 };
enum Type { real_32 = 0, real_16 = 2 };
enum Compute { compute_16 = 64, compute_16_pedantic = 65, compute_32 = 68, compute_32_pedantic = 69, compute_32_fast_16 = 74, compute_32_fast_tf32 = 77 };

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
    int order = 0, batches = 1;
    int64_t stride = 0;
    size_t element() const { return type == real_16 ? 2 : 4; }
    // Bytes from the first element to the end of the last.
    size_t span() const {
        if (rows == 0 || columns == 0) return 0;
        return (((size_t)(batches - 1) * (size_t)stride) + (columns - 1) * (size_t)leading + rows) * element();
    }
};
struct Product {
    int compute, scale;
    int transpose_a = 0, transpose_b = 0, epilogue = 1, pointer_mode = 0;
    const void* bias = nullptr;
    int64_t bias_stride = 0;
    int bias_type = -1;
    void* auxiliary = nullptr;
    int64_t auxiliary_leading = 0, auxiliary_stride = 0;
    int auxiliary_type = -1;
    bool half_sums() const { return compute == compute_16 || compute == compute_16_pedantic; }
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
    uint64_t magic, bucket, workspace;
    uint32_t alignment[4];
    uint64_t unused[3];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
const uint64_t algorithm_magic = 0x656d755f616c676full;

Status refuse(Status status, const std::string& why) {
    const char* quiet = getenv("EMULATOR_QUIET");
    if (quiet == nullptr || strcmp(quiet, "1") != 0) fprintf(stderr, "emulator: cublasLt: %s\n", why.c_str());
    return status;
}

// ---- elements

float load(const void* p, int type, size_t i) {
    return type == real_16 ? _cvtsh_ss(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
}
void store(void* p, int type, size_t i, float value) {
    if (type == real_16) static_cast<uint16_t*>(p)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    else static_cast<float*>(p)[i] = value;
}

float half(float value) { return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }

// The tanh form, which cuBLASLt takes.
float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x))); }
float gelu_slope(float x) {
    const float t = std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
}

// ---- one product

struct Work {
    Product product;
    float alpha, beta;
    const char *a, *b, *c;
    char* d;
    Layout la, lb, lc, ld;
    size_t m, n, k;
};

// Rows or columns of a matrix packed as k-major panels of `width` in float, missing ones zero.
void pack(std::vector<float>& panel, const char* matrix, const Layout& layout, bool k_is_row, size_t first, size_t width, size_t limit, size_t k) {
    panel.assign(width * k, 0.0f);
    const size_t count = std::min(width, limit - first);
    const size_t leading = (size_t)layout.leading;
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < k; j++) {
            const size_t at = k_is_row ? (first + i) * leading + j : j * leading + first + i;
            panel[j * width + i] = load(matrix, layout.type, at);
        }
    }
}

const size_t tile_m = 16, tile_n = 6;

// What a tensor core with half accumulators is taken to do: four terms are added to the accumulator in float,
// then it is rounded to half. Four is what experiments found on Volta and Turing (Fasi et al. 2021, Numerical
// behavior of NVIDIA tensor cores); those that take more terms at once round less often than this one.
const size_t half_steps = 4;

__m256 half(__m256 values) { return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT)); }

// sums[n][m] of one tile: the order of the sum over k is k ascending, whatever the shape.
void multiply(float (&sums)[tile_n][tile_m], const float* a, const float* b, size_t k, bool half_sums) {
    __m256 sum[tile_n][2];
    for (auto& pair : sum) pair[0] = pair[1] = _mm256_setzero_ps();
    for (size_t i = 0; i < k; i++) {
        const __m256 a0 = _mm256_loadu_ps(a + i * tile_m), a1 = _mm256_loadu_ps(a + i * tile_m + 8);
        for (size_t j = 0; j < tile_n; j++) {
            const __m256 factor = _mm256_set1_ps(b[i * tile_n + j]);
            sum[j][0] = _mm256_fmadd_ps(a0, factor, sum[j][0]);
            sum[j][1] = _mm256_fmadd_ps(a1, factor, sum[j][1]);
        }
        if (half_sums && (i % half_steps == half_steps - 1 || i == k - 1)) {
            for (auto& pair : sum) pair[0] = half(pair[0]), pair[1] = half(pair[1]);
        }
    }
    for (size_t j = 0; j < tile_n; j++) {
        _mm256_storeu_ps(sums[j], sum[j][0]);
        _mm256_storeu_ps(sums[j] + 8, sum[j][1]);
    }
}

void finish(const Work& w, int batch, size_t row, size_t column, float sum) {
    const Product& p = w.product;
    const size_t in_c = (size_t)batch * (size_t)w.lc.stride + column * (size_t)w.lc.leading + row;
    const size_t in_d = (size_t)batch * (size_t)w.ld.stride + column * (size_t)w.ld.leading + row;
    const size_t in_auxiliary = (size_t)batch * (size_t)p.auxiliary_stride + column * (size_t)p.auxiliary_leading + row;
    // With half sums what follows is done in half too, each operation with its rounding.
    const auto rounded = [&](float x) { return p.half_sums() ? half(x) : x; };
    float value = rounded(w.alpha * sum);
    if (w.beta != 0.0f) value = rounded(value + rounded(w.beta * load(w.c, w.lc.type, in_c)));
    if (p.epilogue & 4) value = rounded(value + load(p.bias, p.bias_type < 0 ? w.ld.type : p.bias_type, (size_t)batch * (size_t)p.bias_stride + row));
    const int auxiliary_type = p.auxiliary_type < 0 ? w.ld.type : p.auxiliary_type;
    if (p.epilogue == 192) {
        value *= gelu_slope(load(p.auxiliary, auxiliary_type, in_auxiliary));
    } else if (p.epilogue & 32) {
        if (p.epilogue & 128) store(p.auxiliary, auxiliary_type, in_auxiliary, value);
        value = gelu(value);
    } else if (p.epilogue & 2) {
        value = std::max(value, 0.0f);
    }
    store(w.d, w.ld.type, in_d, value);
}

void run(void* data) {
    const Work& w = *static_cast<Work*>(data);
    std::vector<float> a;
    std::vector<std::vector<float>> b((w.n + tile_n - 1) / tile_n);
    alignas(32) float sums[tile_n][tile_m];
    for (int batch = 0; batch < w.ld.batches; batch++) {
        const char* a_batch = w.a + (size_t)batch * (size_t)w.la.stride * w.la.element();
        const char* b_batch = w.b + (size_t)batch * (size_t)w.lb.stride * w.lb.element();
        for (size_t j = 0; j < b.size(); j++) pack(b[j], b_batch, w.lb, !w.product.transpose_b, j * tile_n, tile_n, w.n, w.k);
        for (size_t i = 0; i < w.m; i += tile_m) {
            pack(a, a_batch, w.la, w.product.transpose_a, i, tile_m, w.m, w.k);
            for (size_t j = 0; j < b.size(); j++) {
                multiply(sums, a.data(), b[j].data(), w.k, w.product.half_sums());
                for (size_t y = 0; y < tile_n && j * tile_n + y < w.n; y++) {
                    for (size_t x = 0; x < tile_m && i + x < w.m; x++) finish(w, batch, i + x, j * tile_n + y, sums[y][x]);
                }
            }
        }
    }
}

// ---- checks

Status check_layout(const char* name, const Layout& layout, int batches) {
    if (layout.type != real_16 && layout.type != real_32) return refuse(not_supported, std::string(name) + ": only half and float are emulated");
    if (layout.order != 0) return refuse(not_supported, std::string(name) + ": only column order is emulated");
    if (layout.rows == 0 || layout.columns == 0) return refuse(invalid_value, std::string(name) + ": an empty matrix");
    if (layout.leading < (int64_t)layout.rows) return refuse(invalid_value, std::string(name) + ": leading dimension " + std::to_string(layout.leading) + " below " + std::to_string(layout.rows) + " rows");
    if (layout.batches != batches) return refuse(invalid_value, std::string(name) + ": batch counts differ");
    return success;
}

// EMULATOR_EPILOGUES=plain: a library without algorithms for epilogues that have a side matrix.
bool plain_epilogues() {
    static const bool plain = [] {
        const char* value = getenv("EMULATOR_EPILOGUES");
        return value != nullptr && strcmp(value, "plain") == 0;
    }();
    return plain;
}

Status check(const Product& p, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    if (p.half_sums()) {
        // As the table of cublasLtMatmul has it: everything is half.
        if (p.scale != real_16) return refuse(not_supported, "half sums have half factors alpha and beta");
        for (const Layout* layout : {&a, &b, &c, &d}) {
            if (layout->type != real_16) return refuse(not_supported, "half sums of matrices, or into one, that are not half");
        }
        if (p.bias_type >= 0 && p.bias_type != real_16) return refuse(not_supported, "half sums with a bias that is not half");
        if (p.auxiliary_type >= 0 && p.auxiliary_type != real_16) return refuse(not_supported, "half sums with a side matrix that is not half");
    } else {
        if (p.compute != compute_32 && p.compute != compute_32_pedantic && p.compute != compute_32_fast_16 && p.compute != compute_32_fast_tf32) return refuse(not_supported, "compute type " + std::to_string(p.compute));
        if (p.scale != real_32) return refuse(not_supported, "float sums have float factors alpha and beta");
    }
    if (p.pointer_mode != 0) return refuse(not_supported, "alpha and beta must be on the host");
    if (Status bad = check_layout("A", a, d.batches)) return bad;
    if (Status bad = check_layout("B", b, d.batches)) return bad;
    if (Status bad = check_layout("C", c, d.batches)) return bad;
    if (Status bad = check_layout("D", d, d.batches)) return bad;
    if (a.type != b.type) return refuse(not_supported, "A and B have different types");
    if (c.type != d.type) return refuse(not_supported, "C and D have different types");
    if (a.type == real_32 && d.type == real_16) return refuse(not_supported, "float factors with a half product");
    const uint64_t m = p.transpose_a ? a.columns : a.rows, k = p.transpose_a ? a.rows : a.columns;
    const uint64_t n = p.transpose_b ? b.rows : b.columns, k_of_b = p.transpose_b ? b.columns : b.rows;
    if (k != k_of_b || m != d.rows || n != d.columns || c.rows != d.rows || c.columns != d.columns) {
        return refuse(invalid_value, "shapes do not fit: " + std::to_string(m) + " x " + std::to_string(k) + " times " + std::to_string(k_of_b) + " x " + std::to_string(n) + " to " + std::to_string(d.rows) + " x " + std::to_string(d.columns));
    }
    switch (p.epilogue) {
        case 1: case 2: case 4: case 6: case 32: case 36: break;
        case 160: case 164: case 192:
            // As cuBLASLt documents it for these: the leading dimension of the side matrix is a
            // multiple of 8.
            if (p.auxiliary == nullptr || p.auxiliary_leading % 8 != 0 || p.auxiliary_leading < (int64_t)d.rows) return refuse(invalid_value, "the epilogue's side matrix: no pointer or a bad leading dimension");
            if ((uintptr_t)p.auxiliary % 16 != 0) return refuse(invalid_value, "the epilogue's side matrix: not aligned to 16 bytes");
            if (plain_epilogues()) return not_supported;
            break;
        default: return refuse(not_supported, "epilogue " + std::to_string(p.epilogue));
    }
    return success;
}

Status check_pointer(const char* name, const void* p, const Layout& layout) {
    if (p == nullptr) return refuse(invalid_value, std::string(name) + ": a null pointer");
    if ((uintptr_t)p % layout.element() != 0) return refuse(invalid_value, std::string(name) + ": misaligned");
    if (!emulator_holds(p, layout.span())) return refuse(execution_failed, std::string(name) + ": the matrix reaches beyond its allocation");
    return success;
}

// What an algorithm was chosen for. By default it refuses any other shape, which the library may do;
// EMULATOR_ALGORITHMS=any lets it do all shapes of its types, which the library mostly does.
bool any_shape() {
    static const bool any = [] {
        const char* value = getenv("EMULATOR_ALGORITHMS");
        return value != nullptr && strcmp(value, "any") == 0;
    }();
    return any;
}
uint64_t kind(const Product& p, const Layout& a, const Layout& d) {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const uint64_t part : {(uint64_t)p.transpose_a, (uint64_t)p.transpose_b, (uint64_t)p.compute, (uint64_t)a.type, (uint64_t)d.type, (uint64_t)p.epilogue}) hash = (hash ^ part) * 0x100000001B3ull;
    return hash;
}
uint64_t bucket(const Product& p, const Layout& a, const Layout& b, const Layout& d) {
    uint64_t hash = kind(p, a, d);
    if (any_shape()) return hash;
    for (const uint64_t part : {d.rows, d.columns, p.transpose_a ? a.rows : a.columns, (uint64_t)d.batches, (uint64_t)a.leading, (uint64_t)b.leading, (uint64_t)d.leading}) hash = (hash ^ part) * 0x100000001B3ull;
    return hash;
}

// Large products with a long k want room for partial sums, as split-k algorithms do.
size_t wanted_workspace(const Product& p, const Layout& a, const Layout& d) {
    const uint64_t k = p.transpose_a ? a.rows : a.columns;
    return k >= 4 * d.rows ? (size_t)(d.rows * d.columns * 4) : 0;
}

template <class T> Status set(T& field, const void* value, size_t bytes) {
    if (bytes != sizeof field) return invalid_value;
    memcpy(&field, value, sizeof field);
    return success;
}

}  // namespace

// ---- handles and descriptors

API Status cublasLtCreate(void** handle) {
    *handle = malloc(1);
    return *handle == nullptr ? not_initialized : success;
}
API Status cublasLtDestroy(void* handle) {
    free(handle);
    return success;
}
API size_t cublasLtGetVersion() { return 120800; }
API size_t cublasLtGetCudartVersion() { return 12080; }
API const char* cublasLtGetStatusName(Status status) {
    switch (status) {
        case success: return "CUBLAS_STATUS_SUCCESS";
        case not_initialized: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case invalid_value: return "CUBLAS_STATUS_INVALID_VALUE";
        case execution_failed: return "CUBLAS_STATUS_EXECUTION_FAILED";
        default: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
}
API const char* cublasLtGetStatusString(Status status) { return cublasLtGetStatusName(status); }

API Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{type, rows, columns, leading};
    return success;
}
API Status cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return success;
}
API Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0: return set(layout->type, value, bytes);
        case 1: return set(layout->order, value, bytes);
        case 2: return set(layout->rows, value, bytes);
        case 3: return set(layout->columns, value, bytes);
        case 4: return set(layout->leading, value, bytes);
        case 5: return set(layout->batches, value, bytes);
        case 6: return set(layout->stride, value, bytes);
        default: return refuse(not_supported, "layout attribute " + std::to_string(attribute));
    }
}

API Status cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    *product = new Product;
    (*product)->compute = compute;
    (*product)->scale = scale;
    return success;
}
API Status cublasLtMatmulDescDestroy(Product* product) {
    delete product;
    return success;
}
API Status cublasLtMatmulDescSetAttribute(Product* p, int attribute, const void* value, size_t bytes) {
    switch (attribute) {
        case 0: return set(p->compute, value, bytes);
        case 1: return set(p->scale, value, bytes);
        case 2: return set(p->pointer_mode, value, bytes);
        case 3: return set(p->transpose_a, value, bytes);
        case 4: return set(p->transpose_b, value, bytes);
        case 7: return set(p->epilogue, value, bytes);
        case 8: return set(p->bias, value, bytes);
        case 10: return set(p->bias_stride, value, bytes);
        case 11: return set(p->auxiliary, value, bytes);
        case 12: return set(p->auxiliary_leading, value, bytes);
        case 13: return set(p->auxiliary_stride, value, bytes);
        case 22: return set(p->auxiliary_type, value, bytes);
        case 26: return set(p->bias_type, value, bytes);
        default: return refuse(not_supported, "product attribute " + std::to_string(attribute));
    }
}

API Status cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return success;
}
API Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return success;
}
API Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (attribute == 1) return set(preference->workspace, value, bytes);
    if (attribute >= 5 && attribute <= 8) return set(preference->alignment[attribute - 5], value, bytes);
    return attribute == 0 || attribute == 3 || attribute == 12 ? success : refuse(not_supported, "preference " + std::to_string(attribute));
}

// ---- algorithms and products

API Status cublasLtMatmulAlgoGetHeuristic(void* handle, const Product* product, const Layout* a, const Layout* b, const Layout* c, const Layout* d, const Preference* preference, int wanted, Heuristic* results, int* found) {
    if (handle == nullptr) return not_initialized;
    if (wanted < 1) return invalid_value;
    emulator_note("algorithms");
    *found = 0;
    if (const Status bad = check(*product, *a, *b, *c, *d)) return bad;
    memset(results, 0, sizeof *results);
    size_t workspace = wanted_workspace(*product, *a, *d);
    if (workspace > preference->workspace) workspace = 0;
    results->algorithm.magic = algorithm_magic;
    results->algorithm.bucket = bucket(*product, *a, *b, *d);
    results->algorithm.workspace = results->workspace = workspace;
    memcpy(results->algorithm.alignment, preference->alignment, sizeof preference->alignment);
    results->waves = 1.0f;
    *found = 1;
    return success;
}

API Status cublasLtMatmulAlgoCheck(void* handle, const Product* product, const Layout* a, const Layout* b, const Layout* c, const Layout* d, const Algorithm* algorithm, Heuristic* result) {
    if (handle == nullptr) return not_initialized;
    if (const Status bad = check(*product, *a, *b, *c, *d)) return bad;
    if (algorithm->magic != algorithm_magic) return invalid_value;
    if (algorithm->bucket != bucket(*product, *a, *b, *d)) return not_supported;
    memset(result, 0, sizeof *result);
    result->algorithm = *algorithm;
    result->workspace = algorithm->workspace;
    result->waves = 1.0f;
    return success;
}

API Status cublasLtMatmul(void* handle, const Product* product, const void* alpha_at, const void* a, const Layout* la, const void* b, const Layout* lb, const void* beta_at, const void* c, const Layout* lc, void* d, const Layout* ld, const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (handle == nullptr) return not_initialized;
    if (alpha_at == nullptr || beta_at == nullptr) return invalid_value;
    if (const Status bad = check(*product, *la, *lb, *lc, *ld)) return bad;
    const float alpha = load(alpha_at, product->scale, 0), beta = load(beta_at, product->scale, 0);
    if (const Status bad = check_pointer("A", a, *la)) return bad;
    if (const Status bad = check_pointer("B", b, *lb)) return bad;
    if (const Status bad = check_pointer("D", d, *ld)) return bad;
    if (beta != 0.0f) {
        if (const Status bad = check_pointer("C", c, *lc)) return bad;
        if (c == d && lc->leading != ld->leading) return refuse(invalid_value, "C and D are the same memory with different leading dimensions");
    }
    if (product->epilogue & 4) {
        const Layout bias = {product->bias_type < 0 ? ld->type : product->bias_type, ld->rows, 1, (int64_t)ld->rows};
        if (const Status bad = check_pointer("bias", product->bias, bias)) return bad;
    }
    if (product->epilogue & 128) {
        Layout side = *ld;
        side.type = product->auxiliary_type < 0 ? ld->type : product->auxiliary_type;
        side.leading = product->auxiliary_leading;
        side.stride = product->auxiliary_stride;
        if (const Status bad = check_pointer("side matrix", product->auxiliary, side)) return bad;
    }
    if (algorithm != nullptr) {
        if (algorithm->magic != algorithm_magic) return refuse(invalid_value, "the algorithm comes from nowhere");
        if (algorithm->bucket != bucket(*product, *la, *lb, *ld)) return refuse(not_supported, "the algorithm was chosen for another shape");
        const void* const at[4] = {a, b, c, d};
        for (int i = 0; i < 4; i++) {
            if ((i != 2 || beta != 0.0f) && (uintptr_t)at[i] % algorithm->alignment[i] != 0) return refuse(invalid_value, std::string(1, "ABCD"[i]) + ": not aligned to the " + std::to_string(algorithm->alignment[i]) + " bytes that the algorithm was asked for with");
        }
        if (algorithm->workspace > workspace_bytes) return refuse(invalid_value, "the algorithm needs more workspace");
    }
    if (workspace_bytes > 0) {
        if (workspace == nullptr || (uintptr_t)workspace % 16 != 0) return refuse(invalid_value, "workspace: null or misaligned");
        if (!emulator_holds(workspace, workspace_bytes)) return refuse(execution_failed, "the workspace reaches beyond its allocation");
    }
    if (emulator_planned_failure("product")) return execution_failed;
    emulator_note_load(kind(*product, *la, *ld));
    auto* work = new Work{*product, alpha, beta, static_cast<const char*>(a), static_cast<const char*>(b), static_cast<const char*>(c), static_cast<char*>(d), *la, *lb, *lc, *ld, ld->rows, ld->columns, product->transpose_a ? la->rows : la->columns};
    const int error = emulator_enqueue(stream, "products", run, [](void* data) { delete static_cast<Work*>(data); }, work);
    return error == 0 ? success : execution_failed;
}
