/* Vectors of this processor, elementary functions on them, and tiles of matrix products held in registers.
 *
 * For files compiled by __init__.py with -DBITS=32 or 64. GCC's and Clang's vector types stand for AVX-512, AVX, NEON
 * and SSE alike. No option may be used that lets the compiler forget NaN or reorder sums.
 */
#ifndef METASSM_SIMD_H
#define METASSM_SIMD_H
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define TILE 8 /* rows: TILE x 3 accumulators fill the registers */
#elif defined(__AVX__)
#define BYTES 32
#define TILE 4
#elif defined(__aarch64__)
#define BYTES 16
#define TILE 8
#else
#define BYTES 16
#define TILE 4
#endif

#if BITS == 64
typedef double real;
typedef int64_t bits;
#define DEGREE 13 /* of the Taylor series of exp on [-ln(2)/2, ln(2)/2]: the next term is below a rounding */
#define MANTISSA 52
#define EXPONENT_OF_ONE ((bits)1023 << 52)
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52: adding it rounds, and leaves the integer in the low bits */
#define LIMIT 708.0
#else
typedef float real;
typedef int32_t bits;
#define DEGREE 7
#define MANTISSA 23
#define EXPONENT_OF_ONE ((bits)127 << 23)
#define ROUNDER 12582912.0f
#define LIMIT 87.0f
#endif

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
typedef bits mask __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

enum { LANES = BYTES / sizeof(real), SMALL = 2 }; /* SMALL: rows of the tiles that the last rows are left to */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define AT(pointer) (*(vec *)(pointer))

INLINE int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* ---- elementary functions ---- */

INLINE vec constant(real value) { return value - (vec){0}; }
INLINE vec choose(mask where, vec yes, vec no) { return (vec)((where & (mask)yes) | (~where & (mask)no)); }

/* exp(y) = scale (1 + p) for |y| <= LIMIT: returns p, the Taylor series of exp - 1 around the nearest power of two. */
INLINE vec exponential(vec y, vec *scale) {
    const vec rounder = constant(ROUNDER);
    vec shifted = y * (real)1.4426950408889634 + rounder, n = shifted - rounder;
    vec f = y - n * (real)0.6931471805599453;
    *scale = (vec)(((mask)shifted << MANTISSA) + EXPONENT_OF_ONE);
    static const real inverse_factorial[14] = {
        1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
        1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800,
    };
    vec q = constant(inverse_factorial[DEGREE]);
    UNROLL for (int k = DEGREE - 1; k >= 2; k--) q = q * f + inverse_factorial[k];
    return f * f * q + f;
}

/* Between -limit and limit. NaN goes through: a comparison with it is false. */
INLINE vec clamp(vec x, vec limit) {
#if defined(__AVX512F__) && BITS == 32
    return (vec)_mm512_max_ps((__m512)-limit, _mm512_min_ps((__m512)limit, (__m512)x));
#elif defined(__AVX512F__)
    return (vec)_mm512_max_pd((__m512d)-limit, _mm512_min_pd((__m512d)limit, (__m512d)x));
#else
    x = choose(x > limit, limit, x);
    return choose(x < -limit, -limit, x);
#endif
}

/* 1 / x for x between 1 and exp(LIMIT). */
INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__) && BITS == 32 /* half the time of a division: 14 bits, and a step of Newton's */
    const vec y = (vec)_mm512_rcp14_ps((__m512)x);
    return y + y * ((real)1 - x * y);
#else
    return (real)1 / x;
#endif
}

INLINE vec sigmoid(vec a) {
    vec scale, p = exponential(clamp(-a, constant(LIMIT)), &scale);
    return reciprocal(scale * p + (scale + (real)1));
}

/* tanh(|a|) = -m / (m + 2) with m = exp(-2 |a|) - 1: no loss of digits around zero. */
INLINE vec hyperbolic_tangent(vec a) {
    const vec limit = constant(-LIMIT);
    const mask sign = (mask)constant((real)-0.0);
    vec scale, y = (vec)((mask)a | sign) * (real)2;
    y = choose(y < limit, limit, y);
    vec p = exponential(y, &scale);
    vec m = scale * p + (scale - (real)1);
    return (vec)((mask)(m / (m + (real)2)) ^ (~(mask)a & sign));
}

/* ---- products ---- */

/* c[i][v] += sum_k a[i * row + k * column] b[k * stride + v * LANES]; the third vector may lie apart. */
#define ADVANCE(NAME, M, N)                                                                                         \
    INLINE void NAME(vec c[M][N], const real *a, int64_t row, int64_t column, const real *b, int64_t stride,         \
                     int64_t third, int64_t count) {                                                                \
        for (int64_t k = 0; k < count; k++, b += stride, a += column) {                                             \
            vec entry[N];                                                                                           \
            UNROLL for (int v = 0; v < N; v++) entry[v] = AT(b + (v == 2 ? third : v) * LANES);                     \
            UNROLL for (int i = 0; i < M; i++) {                                                                    \
                const vec factor = constant(a[i * row]);                                                            \
                UNROLL for (int v = 0; v < N; v++) c[i][v] += factor * entry[v];                                    \
            }                                                                                                       \
        }                                                                                                           \
    }
ADVANCE(advance1, TILE, 1)
ADVANCE(advance2, TILE, 2)
ADVANCE(advance3, TILE, 3)
ADVANCE(small1, SMALL, 1)
ADVANCE(small2, SMALL, 2)
ADVANCE(small3, SMALL, 3)

/* A panel of a product is as many vectors wide as leaves no narrow rest. */
INLINE int panel_width(int64_t vectors) { return vectors == 3 || vectors > 4 ? 3 : vectors > 1 ? 2 : 1; }

/* c (m, n vectors) += a' b over `count` rows of a (count, m) and b (count, n vectors); m a multiple of SMALL. */
#define OUTER_TILE(KIND, M, N)                                                                                      \
    {                                                                                                               \
        vec sum[M][N];                                                                                              \
        UNROLL for (int r = 0; r < M; r++) UNROLL for (int v = 0; v < N; v++)                                       \
            sum[r][v] = AT(c + (i + r) * width + v * LANES);                                                        \
        KIND##N(sum, a + i * row, row, column, b, stride, third, count);                                            \
        UNROLL for (int r = 0; r < M; r++) UNROLL for (int v = 0; v < N; v++)                                       \
            AT(c + (i + r) * width + v * LANES) = sum[r][v];                                                        \
        i += M;                                                                                                     \
    }
#define OUTER(N)                                                                                                    \
    {                                                                                                               \
        int64_t i = 0;                                                                                              \
        while (i + TILE <= m) OUTER_TILE(advance, TILE, N)                                                          \
        while (i < m) OUTER_TILE(small, SMALL, N)                                                                   \
    }

/* Entry i of row k of a is a[i * row + k * column]. */
INLINE void outer(real *c, int64_t width, int64_t m, int n, const real *a, int64_t row, int64_t column, const real *b,
                  int64_t stride, int64_t third, int64_t count) {
    if (n == 3)
        OUTER(3)
    else if (n == 2)
        OUTER(2)
    else
        OUTER(1)
}

/* ---- transposition ---- */

#define FIRST(j, s) ((j) & (s) ? LANES + (j) - (s) : (j))
#define SECOND(j, s) ((j) & (s) ? LANES + (j) : (j) + (s))
#define TWO(F, j, s) F(j, s), F(j + 1, s)
#define FOUR(F, j, s) TWO(F, j, s), TWO(F, j + 2, s)
#define EIGHT(F, j, s) FOUR(F, j, s), FOUR(F, j + 4, s)
#define SIXTEEN(F, j, s) EIGHT(F, j, s), EIGHT(F, j + 8, s)
#if BYTES * 8 / BITS == 16
#define EACH SIXTEEN
#elif BYTES * 8 / BITS == 8
#define EACH EIGHT
#elif BYTES * 8 / BITS == 4
#define EACH FOUR
#else
#define EACH TWO
#endif
#ifdef __clang__
#define SHUFFLE(a, b, F, s) __builtin_shufflevector(a, b, EACH(F, 0, s))
#else
#define SHUFFLE(a, b, F, s) __builtin_shuffle(a, b, (mask){EACH(F, 0, s)})
#endif
/* Swaps the off-diagonal blocks of size s of every pair of rows that are s apart. */
#define SWAP_BLOCKS(s)                                                                                              \
    UNROLL for (int i = 0; i < LANES; i++) if (LANES > s && !(i & s)) {                                              \
        const vec first = SHUFFLE(x[i], x[(i + s) % LANES], FIRST, s % LANES);                                      \
        x[(i + s) % LANES] = SHUFFLE(x[i], x[(i + s) % LANES], SECOND, s % LANES);                                  \
        x[i] = first;                                                                                               \
    }

/* to[j * to_row + i] = from[i * from_row + j] for i < m and j < n. */
static void transpose(real *to, int64_t to_row, const real *from, int64_t from_row, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            if (i + LANES <= m && j + LANES <= n) {
                vec x[LANES];
                UNROLL for (int k = 0; k < LANES; k++) x[k] = AT(from + (i + k) * from_row + j);
                SWAP_BLOCKS(1)
                SWAP_BLOCKS(2)
                SWAP_BLOCKS(4)
                SWAP_BLOCKS(8)
                UNROLL for (int k = 0; k < LANES; k++) AT(to + (j + k) * to_row + i) = x[k];
            } else {
                for (int64_t r = i; r < m && r < i + LANES; r++)
                    for (int64_t c = j; c < n && c < j + LANES; c++) to[c * to_row + r] = from[r * from_row + c];
            }
        }
}

#endif
