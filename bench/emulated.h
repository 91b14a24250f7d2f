/* The intrinsics of AVX2 and AVX-512 in plain C, through SIMDe (package libsimde-dev), and what it lacks. */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <stdint.h>
#include <string.h>

static __m512i widened16(__m256i halves) {
    uint16_t from[16];
    uint32_t to[16];
    memcpy(from, &halves, 32);
    for (int j = 0; j < 16; j++) to[j] = from[j];
    return _mm512_loadu_si512(to);
}
static __m512i widened8(__m128i bytes) {
    int8_t from[16];
    int32_t to[16];
    memcpy(from, &bytes, 16);
    for (int j = 0; j < 16; j++) to[j] = from[j];
    return _mm512_loadu_si512(to);
}
static __m512i widened32(__m256i words) {
    uint32_t from[8];
    uint64_t to[8];
    memcpy(from, &words, 32);
    for (int j = 0; j < 8; j++) to[j] = from[j];
    return _mm512_loadu_si512(to);
}
static __m512 as_floats(__m512i whole) {
    int32_t from[16];
    float to[16];
    memcpy(from, &whole, 64);
    for (int j = 0; j < 16; j++) to[j] = from[j];
    return _mm512_loadu_ps(to);
}
static float summed_ps(__m512 a) {
    float each[16], sum = 0;
    memcpy(each, &a, 64);
    for (int j = 0; j < 16; j++) sum += each[j];
    return sum;
}
static int32_t summed_epi32(__m512i a) {
    int32_t each[16], sum = 0;
    memcpy(each, &a, 64);
    for (int j = 0; j < 16; j++) sum += each[j];
    return sum;
}
#define _mm512_cvtepu16_epi32 widened16
#define _mm512_cvtepi8_epi32 widened8
#define _mm512_cvtepu32_epi64 widened32
#define _mm512_cvtepi32_ps as_floats
#define _mm512_reduce_add_ps summed_ps
#define _mm512_reduce_add_epi32 summed_epi32
#define _mm_prefetch(place, hint) ((void)0)

static __m512i expanded(uint64_t mask, const void *values, int size) {
    uint8_t placed[64] = {0};
    for (int j = 0, count = 0; j < 64 / size; j++)
        if (mask >> j & 1) memcpy(placed + size * j, (const uint8_t *)values + size * count++, size);
    return _mm512_loadu_si512(placed);
}
#define expand8(mask, values) expanded(mask, values, 1)
#define expand_bytes(mask, bytes) expanded(mask, &(bytes), 1)
#define expand16(mask, values) expanded(mask, values, 2)
#define expand32(mask, values) expanded(mask, values, 4)
