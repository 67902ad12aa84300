/* Both directions of a gated recurrent network over unequal trials, and their gradients, on one core.
 *
 *     r, u = sigmoid(x V_ru + c_ru + h W_ru),   n = tanh(x V_n + c_n + r * (h W_n + b)),   h' = n + u * (h - n),
 *
 * and out = h' O for each direction. A job is one direction of a few rows through all time steps, so that all that a
 * step touches stays in this core's cache. Python hands the same `problem` to several threads; each takes the next
 * job until none is left. Jobs depend on the sizes alone and their gradients are summed in one order, so results
 * are the same for any number of threads.
 *
 * Layout: hidden units come in blocks of LANES, padded with zeros. Gates of a block lie together,
 * [block][row][4][LANES], so that a tile of TILE rows by one block has all its gates in registers.
 */
#include "simd.h"

enum { UNIT = LANES > 8 ? LANES : 8, ROWS = 32, STEPS = 4 };

struct problem {
    int64_t rows, steps, in, width, out, keep; /* keep: all states, for the gradient */
    const real *x;                             /* (rows, steps, in) */
    const int64_t *lengths;                    /* (rows) */
    const real *weight_in, *bias_in, *weight, *bias, *weight_out; /* as BidirectionalGRU has them */
    real *y;                                                      /* (2, rows, steps, out) */
    real *packed, *saved, *scratch, *partial;                     /* of the sizes that `sizes` says */
    const real *grad_y;                                           /* (rows, steps, out) */
    real *grad_x;                                                 /* (2, rows, steps, in), or none wanted */
    real *grad_in, *grad_bias_in, *grad_weight, *grad_bias, *grad_out;
    int64_t next; /* job to be taken */
};


/* Sizes that follow from those of the problem. */
struct plan {
    int64_t chunks, chunk, width, blocks, in, in_wide, out, out_wide;
    int64_t panel, packed, states, gates, partial;
};

static struct plan plan_of(const struct problem *p) {
    struct plan s;
    s.chunks = (p->rows + ROWS - 1) / ROWS;
    s.chunk = up((p->rows + s.chunks - 1) / s.chunks, TILE);
    s.width = up(p->width, UNIT), s.blocks = s.width / LANES;
    s.in = up(p->in, SMALL), s.in_wide = up(p->in, LANES);
    s.out = up(p->out, SMALL), s.out_wide = up(p->out, LANES);
    s.panel = (4 + 3 * (p->in + p->width)) * LANES;
    int64_t forward = s.blocks * s.panel + p->width * s.out_wide;
    int64_t backward = s.width * 3 * (s.width + s.in_wide) + p->out * s.width;
    s.packed = forward > backward ? forward : backward;
    s.states = s.chunk * s.width * (p->keep ? p->steps + 1 : 2);
    s.gates = s.chunk * s.width * 4 * (p->keep ? p->steps : 1);
    s.partial = s.width * (3 * (s.in + s.width) + 4) + s.out * s.width;
    return s;
}

/* Elements of packed, saved, scratch (of each worker) and partial; and the number of jobs. */
void sizes(const struct problem *p, int64_t *n) {
    struct plan s = plan_of(p);
    int64_t widest = s.in_wide > s.out_wide ? s.in_wide : s.out_wide;
    n[0] = 2 * s.packed;
    n[1] = 2 * s.chunks * (s.states + s.gates);
    n[2] = s.chunk * (STEPS * (s.in + s.out + 4 * s.width) + s.width + widest);
    n[3] = 2 * s.chunks * s.partial;
    n[4] = 2 * s.chunks;
}

/* ---- products ---- */

/* c (rows, LANES vectors) += a b, for b packed in panels; a is (rows, blocks, count) with these strides. */
#define ROWS_TIMES_PANEL(N)                                                                                         \
    for (int64_t i = 0; i < rows; i += TILE) {                                                                      \
        vec sum[TILE][N];                                                                                           \
        UNROLL for (int m = 0; m < TILE; m++) UNROLL for (int v = 0; v < N; v++)                                    \
            sum[m][v] = AT(c + (i + m) * width + (first + v) * LANES);                                              \
        for (int64_t j = 0; j < blocks; j++)                                                                        \
            advance##N(sum, a + i * row + j * block, row, 1, panel + j * count * N * LANES, N * LANES, 2, count);   \
        UNROLL for (int m = 0; m < TILE; m++) UNROLL for (int v = 0; v < N; v++)                                    \
            AT(c + (i + m) * width + (first + v) * LANES) = sum[m][v];                                              \
    }

static void rows_times(real *c, int64_t vectors, int64_t rows, const real *a, int64_t row, int64_t block,
                       int64_t blocks, int64_t count, const real *b) {
    const int64_t width = vectors * LANES;
    for (int64_t first = 0; first < vectors;) {
        const real *panel = b + blocks * count * first * LANES;
        const int n = panel_width(vectors - first);
        if (n == 3) {
            ROWS_TIMES_PANEL(3)
        } else if (n == 2) {
            ROWS_TIMES_PANEL(2)
        } else {
            ROWS_TIMES_PANEL(1)
        }
        first += n;
    }
}

/* Panels of b[k][n] = from[n * n_stride + (gate * units + unit) * k_stride], where k runs over blocks of
 * LANES units, and within a block over its gates. Zero where there is no such unit or column. */
static void pack_panels(real *to, int64_t count, int64_t gates, int64_t first, int64_t units, const real *from,
                        int64_t k_stride, int64_t n_stride, int64_t columns, int64_t vectors) {
    for (int64_t v = 0; v < vectors;) {
        const int width = panel_width(vectors - v);
        for (int64_t k = 0; k < count; k++) {
            const int64_t unit = k / (gates * LANES) * LANES + k % LANES, gate = first + k / LANES % gates;
            for (int64_t n = v * LANES; n < (v + width) * LANES; n++)
                *to++ = unit < units && n < columns ? from[n * n_stride + (gate * units + unit) * k_stride] : 0;
        }
        v += width;
    }
}

/* ---- one job ---- */

struct job {
    int64_t direction, first, rows, padded; /* rows of the trials; padded to whole tiles with rows of zeros */
    real *states, *gates;
};

static struct job job_of(const struct problem *p, const struct plan *s, int64_t number) {
    struct job j;
    j.direction = number / s->chunks;
    j.first = number % s->chunks * s->chunk;
    j.rows = p->rows - j.first < s->chunk ? p->rows - j.first : s->chunk;
    if (j.rows < 0) j.rows = 0;
    j.padded = up(j.rows, TILE);
    j.states = p->saved + number * (s->states + s->gates);
    j.gates = j.states + s->states;
    return j;
}

/* The bin that step t of a row is about: the backward direction starts at the trial's end, and passes the padding
 * behind it last. */
INLINE int64_t bin(const struct problem *p, const struct job *j, int64_t row, int64_t t) {
    const int64_t length = p->lengths[j->first + row];
    return (j->first + row) * p->steps + (j->direction && t < length ? length - 1 - t : t);
}

INLINE void copy(real *to, const real *from, int64_t n) {
    int64_t k = 0;
    if (n >= LANES) {
        for (; k + LANES < n; k += LANES) AT(to + k) = AT(from + k);
        AT(to + n - LANES) = AT(from + n - LANES); /* the last vector overlaps the one before */
    } else {
        for (; k + SMALL <= n; k += SMALL) memcpy(to + k, from + k, SMALL * sizeof(real));
        for (; k < n; k++) to[k] = from[k];
    }
}

static void gather(real *to, int64_t width, const real *from, int64_t columns, const struct problem *p,
                   const struct job *j, int64_t t, int64_t soon) {
    for (int64_t i = 0; i < j->rows; i++) {
        copy(to + i * width, from + bin(p, j, i, t) * columns, columns);
        __builtin_prefetch(from + bin(p, j, i, soon) * columns);
    }
}

static void scatter(real *to, int64_t columns, const real *from, int64_t width, const struct problem *p,
                    const struct job *j, int64_t t) {
    to += j->direction * p->rows * p->steps * columns;
    for (int64_t i = 0; i < j->rows; i++)
        copy(to + bin(p, j, i, t) * columns, from + i * width, columns);
}

/* One step of TILE rows by one block of units: the gates, and the states after them. */
static void forward_tile(const struct problem *p, const struct plan *s, const real *panel, const real *x,
                         const real *h, const real *before, real *next, real *gates) {
    vec sum[TILE][3];
    real work[TILE * 4 * LANES] __attribute__((aligned(BYTES)));
    const vec b = AT(panel + 3 * LANES);
    UNROLL for (int i = 0; i < TILE; i++) UNROLL for (int v = 0; v < 3; v++) sum[i][v] = AT(panel + v * LANES);
    panel += 4 * LANES;
    advance3(sum, x, s->in, 1, panel, 3 * LANES, 2, p->in);
    panel += 3 * p->in * LANES;
    UNROLL for (int i = 0; i < TILE; i++) AT(work + (4 * i + 3) * LANES) = sum[i][2], sum[i][2] = b;
    advance3(sum, h, s->width, 1, panel, 3 * LANES, 2, p->width);
    UNROLL for (int i = 0; i < TILE; i++) UNROLL for (int v = 0; v < 3; v++)
        AT(work + (4 * i + v) * LANES) = sum[i][v];
    const real *from = work;
    for (int i = 0; i < TILE; i++, from += 4 * LANES, gates += 4 * LANES, before += s->width, next += s->width) {
        const vec r = sigmoid(AT(from)), u = sigmoid(AT(from + LANES)), recurrent = AT(from + 2 * LANES);
        const vec n = hyperbolic_tangent(AT(from + 3 * LANES) + r * recurrent);
        AT(gates) = r;
        AT(gates + LANES) = u;
        AT(gates + 2 * LANES) = recurrent;
        AT(gates + 3 * LANES) = n;
        AT(next) = n + u * (AT(before) - n);
    }
}

static void forward_job(const struct problem *p, const struct plan *s, const struct job *j, real *scratch) {
    const real *packed = p->packed + j->direction * s->packed, *projection = packed + s->blocks * s->panel;
    real *x = scratch, *y = x + s->chunk * s->in;
    const int64_t step = j->padded * s->width;
    memset(x, 0, j->padded * s->in * sizeof(real));
    memset(j->states, 0, step * sizeof(real));
    for (int64_t t = 0; t < p->steps; t++) {
        const real *h = j->states + (p->keep ? t : t & 1) * step;
        real *next = j->states + (p->keep ? t + 1 : (t + 1) & 1) * step;
        real *gates = j->gates + (p->keep ? t : 0) * 4 * step;
        gather(x, s->in, p->x, p->in, p, j, t, t + 2 < p->steps ? t + 2 : t);
        for (int64_t b = 0; b < s->blocks; b++) {
            real *of_block = gates + b * j->padded * 4 * LANES;
            for (int64_t i = 0; i < j->padded; i += TILE)
                forward_tile(p, s, packed + b * s->panel, x + i * s->in, h + i * s->width,
                             h + i * s->width + b * LANES, next + i * s->width + b * LANES, of_block + i * 4 * LANES);
        }
        memset(y, 0, j->padded * s->out_wide * sizeof(real));
        rows_times(y, s->out_wide / LANES, j->padded, next, s->width, 0, 1, p->width, projection);
        scatter(p->y, p->out, y, s->out_wide, p, j, t);
    }
}

/* Gradients of the gates of one block, (row, 4, LANES): of r and u, of the recurrent product, and of what entered n.
 * `h` is the gradient of the states on the way in, and the part that the update gate kept on the way out. */
static void backward_gates(const struct plan *s, int64_t rows, const real *before, const real *gates, real *h, real *d,
                           real *bias, int64_t ahead) {
    vec sum[4];
    for (int v = 0; v < 4; v++) sum[v] = AT(bias + v * LANES);
    for (int64_t i = 0; i < rows; i++, gates += 4 * LANES, d += 4 * LANES, before += s->width, h += s->width) {
        const vec r = AT(gates), u = AT(gates + LANES), recurrent = AT(gates + 2 * LANES), n = AT(gates + 3 * LANES);
        UNROLL for (int v = 0; v < 4; v++) __builtin_prefetch(gates - ahead * 4 + v * LANES, 0, 2);
        __builtin_prefetch(before - ahead, 0, 2);
        const vec whole = AT(h), kept = whole * u;
        const vec of_n = (whole - kept) * ((real)1 - n * n);
        const vec of_u = (AT(before) - n) * (kept - kept * u);
        const vec of_r = of_n * recurrent * (r - r * r), of_product = of_n * r;
        AT(h) = kept;
        AT(d) = of_r, AT(d + LANES) = of_u, AT(d + 2 * LANES) = of_product, AT(d + 3 * LANES) = of_n;
        sum[0] += of_r, sum[1] += of_u, sum[2] += of_product, sum[3] += of_n;
    }
    for (int v = 0; v < 4; v++) AT(bias + v * LANES) = sum[v];
}

static void backward_job(const struct problem *p, const struct plan *s, const struct job *j, real *scratch,
                         real *partial) {
    const int64_t rows = j->padded, step = rows * s->width, line = 4 * LANES;
    const real *back = p->packed + j->direction * s->packed, *back_in = back + s->width * 3 * s->width;
    const real *back_n = back_in + s->width * 2 * s->in_wide, *back_out = back_n + s->width * s->in_wide;
    real *x = scratch, *grad_y = x + STEPS * s->chunk * s->in, *h = grad_y + STEPS * s->chunk * s->out;
    real *d = h + s->chunk * s->width, *grad_x = d + STEPS * s->chunk * 4 * s->width;
    real *grad_bias = partial, *grad_in = grad_bias + 4 * s->width, *grad_weight = grad_in + 3 * s->width * s->in;
    real *grad_out = grad_weight + 3 * s->width * s->width;
    memset(scratch, 0, (char *)d - (char *)scratch);
    memset(partial, 0, s->partial * sizeof(real));
    for (int64_t end = p->steps; end > 0;) {
        const int64_t begin = end > STEPS ? end - STEPS : 0;
        const int64_t count = (end - begin) * rows; /* rows of the steps whose weight gradients are made at once */
        for (int64_t t = end - 1; t >= begin; t--) {
            const int64_t slot = (t - begin) * rows;
            real *x_t = x + slot * s->in, *grad_t = grad_y + slot * s->out, *d_t = d + slot * line;
            gather(x_t, s->in, p->x, p->in, p, j, t, t > 2 ? t - 2 : t);
            gather(grad_t, s->out, p->grad_y, p->out, p, j, t, t > 2 ? t - 2 : t);
            rows_times(h, s->blocks, rows, grad_t, s->out, 0, 1, p->out, back_out);
            for (int64_t b = 0; b < s->blocks; b++)
                backward_gates(s, rows, j->states + t * step + b * LANES, j->gates + (t * s->blocks + b) * rows * line,
                               h + b * LANES, d_t + b * count * line, grad_bias + b * line, t > 0 ? step : 0);
            rows_times(h, s->blocks, rows, d_t, line, count * line, s->blocks, 3 * LANES, back);
            if (p->grad_x) {
                const int64_t vectors = s->in_wide / LANES;
                memset(grad_x, 0, rows * s->in_wide * sizeof(real));
                rows_times(grad_x, vectors, rows, d_t, line, count * line, s->blocks, 2 * LANES, back_in);
                rows_times(grad_x, vectors, rows, d_t + 3 * LANES, line, count * line, s->blocks, LANES, back_n);
                scatter(p->grad_x, p->in, grad_x, s->in_wide, p, j, t);
            }
        }
        const real *states = j->states + begin * step;
        for (int64_t b = 0; b < s->blocks; b++) {
            const real *of_block = d + b * count * line;
            outer(grad_in + b * 3 * LANES * s->in, 3 * LANES, s->in, 3, x, 1, s->in, of_block, line, 3, count);
            outer(grad_weight + b * 3 * LANES * s->width, 3 * LANES, s->width, 3, states, 1, s->width, of_block, line, 2,
                  count);
        }
        for (int64_t b = 0; b < s->blocks;) {
            const int n = panel_width(s->blocks - b);
            outer(grad_out + b * LANES, s->width, s->out, n, grad_y, 1, s->out, states + step + b * LANES, s->width, 2,
                  count);
            b += n;
        }
        end = begin;
    }
}

/* ---- what Python calls, in this order ---- */

static void pack_forward(const struct problem *p) {
    const struct plan s = plan_of(p);
    for (int64_t d = 0; d < 2; d++) {
        const int64_t width = 3 * p->width;
        real *to = p->packed + d * s.packed;
        for (int64_t b = 0; b < s.blocks; b++) { /* c of three gates, b, V and W of three gates */
            const real *in[3] = {p->bias_in + d * width, p->weight_in + d * p->in * width,
                                 p->weight + d * p->width * width};
            const int64_t count[3] = {1, p->in, p->width};
            for (int part = 0; part < 3; part++) {
                for (int64_t k = 0; k < count[part]; k++)
                    for (int gate = 0; gate < 3; gate++)
                        for (int64_t unit = b * LANES; unit < (b + 1) * LANES; unit++)
                            *to++ = unit < p->width ? in[part][k * width + gate * p->width + unit] : 0;
                for (int64_t unit = b * LANES; part == 0 && unit < (b + 1) * LANES; unit++)
                    *to++ = unit < p->width ? p->bias[d * p->width + unit] : 0;
            }
        }
        pack_panels(to, p->width, 1, 0, p->width, p->weight_out + d * p->width * p->out, p->out, 1, p->out,
                    s.out_wide / LANES);
    }
}

static void pack_backward(const struct problem *p) {
    const struct plan s = plan_of(p);
    const int64_t width = 3 * p->width, vectors_in = s.in_wide / LANES;
    for (int64_t d = 0; d < 2; d++) {
        const real *weight_in = p->weight_in + d * p->in * width;
        real *to = p->packed + d * s.packed;
        pack_panels(to, 3 * s.width, 3, 0, p->width, p->weight + d * p->width * width, 1, width, p->width, s.blocks);
        to += s.width * 3 * s.width;
        pack_panels(to, 2 * s.width, 2, 0, p->width, weight_in, 1, width, p->in, vectors_in);
        to += s.width * 2 * s.in_wide;
        pack_panels(to, s.width, 1, 2, p->width, weight_in, 1, width, p->in, vectors_in);
        to += s.width * s.in_wide;
        pack_panels(to, p->out, 1, 0, p->out, p->weight_out + d * p->width * p->out, 1, p->out, p->width, s.blocks);
    }
}

/* Weights in the order in which a pass reads them. */
void pack(const struct problem *p, int64_t backward) {
    if (backward)
        pack_backward(p);
    else
        pack_forward(p);
}

void work(struct problem *p, int64_t backward, int64_t worker) {
    const struct plan s = plan_of(p);
    int64_t n[5], number;
    sizes(p, n);
    real *scratch = p->scratch + worker * n[2];
    while ((number = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < n[4]) {
        const struct job j = job_of(p, &s, number);
        if (backward)
            backward_job(p, &s, &j, scratch, p->partial + number * s.partial);
        else
            forward_job(p, &s, &j, scratch);
    }
}

static void add_second_half(real *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += to[n + i];
}

/* Sums over the directions and, for the weights' gradients, over the jobs in their order. Too small to be shared; and
 * threads of PyTorch that wait for a next sum would keep ours from the cores. */
void finish(const struct problem *p, int64_t backward) {
    if (!backward) {
        add_second_half(p->y, p->rows * p->steps * p->out);
        return;
    }
    if (p->grad_x) add_second_half(p->grad_x, p->rows * p->steps * p->in);
    const struct plan s = plan_of(p);
    const int64_t width = 3 * p->width;
    for (int64_t d = 0; d < 2; d++) {
        real *total = p->partial + d * s.chunks * s.partial;
        for (int64_t c = 1; c < s.chunks; c++)
            for (int64_t i = 0; i < s.partial; i++) total[i] += total[c * s.partial + i];
        const real *in = total + 4 * s.width, *weight = in + 3 * s.width * s.in, *out = weight + 3 * s.width * s.width;
        for (int64_t unit = 0; unit < p->width; unit++) {
            const int64_t b = unit / LANES, lane = unit % LANES;
            for (int64_t gate = 0; gate < 3; gate++) {
                const int64_t column = d * width + gate * p->width + unit;
                p->grad_bias_in[column] = total[(4 * b + (gate == 2 ? 3 : gate)) * LANES + lane];
                for (int64_t k = 0; k < p->in; k++)
                    p->grad_in[d * (p->in - 1) * width + k * width + column] =
                        in[((b * s.in + k) * 3 + gate) * LANES + lane];
                for (int64_t k = 0; k < p->width; k++)
                    p->grad_weight[d * (p->width - 1) * width + k * width + column] =
                        weight[((b * s.width + k) * 3 + gate) * LANES + lane];
            }
            p->grad_bias[d * p->width + unit] = total[(4 * b + 2) * LANES + lane];
            for (int64_t k = 0; k < p->out; k++)
                p->grad_out[(d * p->width + unit) * p->out + k] = out[k * s.width + unit];
        }
    }
}
