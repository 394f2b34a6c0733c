// mma, ldmatrix and cp.async. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16".
#include "block.h"
#include "traffic.h"

namespace emulator {

// d [16, 8] += a [16, k] b [k, 8]: products of halves are exact in float, each is added to the sum
// with one rounding, in the order of k.
static void product(Warp& warp, int k) {
    alignas(32) uint16_t a_half[16][16], b_half[16][8];
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        const int row = lane >> 2, column = (lane & 3) * 2;
        for (int i = 0; i < k / 4; i++) memcpy(&a_half[row + (i & 1) * 8][column + (i >> 1) * 8], &warp.a[lane][i], 4);
        for (int i = 0; i < k / 8; i++) {
            b_half[column + 8 * i][row] = (uint16_t)warp.b[lane][i];
            b_half[column + 8 * i + 1][row] = (uint16_t)(warp.b[lane][i] >> 16);
        }
        memcpy(&d[row][column], &warp.d[lane][0], 8);
        memcpy(&d[row + 8][column], &warp.d[lane][2], 8);
    }
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < k; j += 8) {
            _mm256_store_ps(&a[i][j], _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(&a_half[i][j]))));
        }
    }
    for (int j = 0; j < k; j++) {
        _mm256_store_ps(b[j], _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(b_half[j]))));
    }
    for (int i = 0; i < 16; i++) {
        __m256 sum = _mm256_load_ps(d[i]);
        for (int j = 0; j < k; j++) sum = _mm256_fmadd_ps(_mm256_set1_ps(a[i][j]), _mm256_load_ps(b[j]), sum);
        _mm256_store_ps(d[i], sum);
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        const int row = lane >> 2, column = (lane & 3) * 2;
        memcpy(&warp.d[lane][0], &d[row][column], 8);
        memcpy(&warp.d[lane][2], &d[row + 8][column], 8);
    }
}

// Lane 8 i + r has brought row r of matrix i; lane 4 g + t takes columns 2 t and 2 t + 1 of row g
// (or rows 2 t and 2 t + 1 of column g) of each matrix.
static void distribute(Warp& warp, bool transposed) {
    for (unsigned lane = 0; lane < 32; lane++) {
        const unsigned g = lane >> 2, t = (lane & 3) * 2;
        for (unsigned i = 0; i < 4; i++) {
            const uint16_t(*matrix)[8] = &warp.rows[8 * i];
            const uint16_t low = transposed ? matrix[t][g] : matrix[g][t];
            const uint16_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
            warp.a[lane][i] = low | (unsigned)high << 16;
        }
    }
}

void carry_out_tensor_core(Meeting meeting, Warp& warp) {
    switch (meeting) {
        case Meeting::mma_k16: product(warp, 16); break;
        case Meeting::mma_k8: product(warp, 8); break;
        default: distribute(warp, meeting == Meeting::ldmatrix_transposed); break;
    }
}

void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site) {
    const unsigned lane = current_thread->lane;
    Warp& warp = *this_fiber().warp;
    memcpy(warp.d[lane], d, sizeof d);
    memcpy(warp.a[lane], a, sizeof a);
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    meet(Meeting::mma_k16, 0xffffffffu, site);
    memcpy(d, warp.d[lane], sizeof d);
}

void mma_m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0, Site site) {
    const unsigned lane = current_thread->lane;
    Warp& warp = *this_fiber().warp;
    memcpy(warp.d[lane], d, sizeof d);
    warp.a[lane][0] = a0;
    warp.a[lane][1] = a1;
    warp.b[lane][0] = b0;
    meet(Meeting::mma_k8, 0xffffffffu, site);
    memcpy(d, warp.d[lane], sizeof d);
}

static bool inside_shared(const void* p) {
    const char *at = static_cast<const char*>(p), *start = static_cast<const char*>(worker->dynamic);
    if (start != nullptr && at >= start && at + 16 <= start + worker->launch->dynamic_bytes) return true;
    return worker->launch->static_shared->holds(p, 16);
}
static void check_shared(const void* p, const char* what, Site site) {
    if ((uintptr_t)p & 15) fail("%s:%d: %s: the shared address is not a multiple of 16", site.file, site.line, what);
    if (!inside_shared(p)) fail("%s:%d: %s: the address is outside of the block's shared memory", site.file, site.line, what);
}

void ldmatrix_x4(unsigned (&r)[4], const void* row, bool transposed, Site site) {
    check_shared(row, "ldmatrix", site);
    seen_read16(row);
    const unsigned lane = current_thread->lane;
    Warp& warp = *this_fiber().warp;
    memcpy(warp.rows[lane], row, 16);
    meet(transposed ? Meeting::ldmatrix_transposed : Meeting::ldmatrix, 0xffffffffu, site);
    memcpy(r, warp.a[lane], sizeof r);
}

static void perform(const PendingCopy& copy) {
    seen_write16(copy.shared);
    if (copy.valid) {
        seen_read16(copy.global);
        memcpy(copy.shared, copy.global, 16);
    } else {
        memset(copy.shared, 0, 16);
    }
}

void copy16(void* shared, const void* global, bool valid, Site site) {
    check_shared(shared, "copy", site);
    if ((uintptr_t)global & 15) fail("%s:%d: copy: the global address is not a multiple of 16", site.file, site.line);
    if (valid) note_traffic(global, 16, false);
    perform(PendingCopy{shared, global, valid, 0});
}

// Forward: as late as allowed, so that a missing wait shows. Reverse: at once, so that a place that is
// still being read shows. Random: either.
void cp_async16(void* shared, const void* global, bool valid, Site site) {
    check_shared(shared, "cp.async", site);
    if ((uintptr_t)global & 15) fail("%s:%d: cp.async: the global address is not a multiple of 16", site.file, site.line);
    if (valid) note_traffic(global, 16, false);
    Fiber& fiber = this_fiber();
    const PendingCopy copy = {shared, global, valid, fiber.copy_group};
    const Order order = worker->schedule.order;
    if (order == Order::reverse || (order == Order::random && (worker->random() & 1))) {
        perform(copy);
    } else {
        if (valid) seen_read16(global);
        fiber.copies.push_back(copy);
    }
}

void cp_async_commit() { this_fiber().copy_group++; }

void cp_async_wait(int groups_left) {
    Fiber& fiber = this_fiber();
    size_t done = 0;
    while (done < fiber.copies.size() && fiber.copies[done].group < fiber.copy_group - groups_left) perform(fiber.copies[done++]);
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + done);
}

}  // namespace emulator
