/* Roll-outs of adapted MLPs, and their gradients, in a core's cache.
 *
 *     a_l = h_{l-1} (W_l + u_l v_l') + b_l,   h_l = s(a_l),   h_0 = z,   z' = [z +] a_n or h_n,   clamped or not,
 *
 * for rows z of many recordings, each with its own u and v, and with a W and a b of its own or of all, over `steps`
 * steps. A job is a range of rows of a few recordings. It builds W + u v' in cache and takes a panel of rows through
 * all steps. Backward has the states of every step, makes the hidden layers again, panel by panel, and sums the
 * gradient of the built matrix, from which those of W, u and v follow. Python hands the same `problem` to several
 * threads; each takes the next job until none is left. Jobs depend on the sizes alone and their gradients are summed
 * in one order, so results are the same for any number of threads.
 *
 * Compiled by __init__.py with -DBITS=32 or 64.
 *
 * Layout: within a panel, (feature, row): rows lie along the vectors, so that narrow layers waste nothing. Features are
 * padded to SMALL, and to LANES where they lie along vectors; only sums that are never read go into padding.
 */
#include "simd.h"

enum { LAYERS = 8, PANEL = 3 * LANES, JOBS = 16, SHORTEST = 4 * PANEL };
enum { SILU, TANH };

struct layer {
    int64_t in, out, rank;             /* rank 0: no u and v */
    int64_t own_weight, own_bias;      /* 1: for each recording one, which lie one after the other; 0: of all */
    const real *weight, *bias, *u, *v; /* (out, in), (out), (recordings, in, rank), (recordings, out, rank) */
    real *grad_weight, *grad_bias, *grad_u, *grad_v; /* of the same shapes */
};

struct problem {
    int64_t recordings, rows, steps, layers, activation, activate_last, residual, clamped;
    int64_t need_states, need_weights; /* gradients that are wanted */
    double limit;
    const real *z;                     /* (recordings, rows, d) */
    real *path;                        /* (recordings, rows, steps, d) */
    const real *grad_path;
    real *grad_z, *scratch, *partial; /* the last two of the sizes that `sizes` says */
    int64_t next;                     /* job to be taken */
    struct layer layer[LAYERS];
};

/* Sizes that follow from those of the problem: of jobs, and where things lie in scratch and in partial. */
struct plan {
    int64_t parts, part, group, jobs; /* rows are cut in `parts` of `part`; recordings are taken by the `group` */
    int64_t tall[LAYERS + 1], wide[LAYERS + 1];
    int64_t built[LAYERS], bias[LAYERS], u[LAYERS], v[LAYERS];         /* in scratch: weights, u' and v', */
    int64_t hidden[LAYERS + 1], slope[LAYERS + 1], grad, back, across; /* panels, */
    int64_t grad_built[LAYERS], grad_bias[LAYERS], sums, scratch;      /* and sums */
    int64_t of_built[LAYERS], of_bias[LAYERS], of_job; /* in partial: of each job, */
    int64_t of_own_weight[LAYERS], of_own_bias[LAYERS], of_u[LAYERS], of_v[LAYERS], partial; /* then of each part */
};

INLINE int64_t take(int64_t *total, int64_t count) {
    const int64_t at = *total;
    *total += up(count, LANES);
    return at;
}

/* The gradient of a matrix lies with its longer side along the vectors. */
INLINE int turned(const struct layer *l) { return l->in > l->out; }

static struct plan plan_of(const struct problem *p) {
    struct plan s;
    const int64_t wanted = (JOBS + p->recordings - 1) / p->recordings, most = (p->rows + SHORTEST - 1) / SHORTEST;
    s.parts = wanted < most ? wanted : most;
    s.part = up((p->rows + s.parts - 1) / s.parts, PANEL);
    s.parts = (p->rows + s.part - 1) / s.part;
    s.group = (p->recordings + JOBS - 1) / JOBS;
    s.jobs = (p->recordings + s.group - 1) / s.group * s.parts;
    int64_t widest = 0, longest = PANEL;
    s.scratch = s.of_job = 0;
    for (int64_t n = 0; n <= p->layers; n++) {
        const int64_t width = n ? p->layer[n - 1].out : p->layer[0].in;
        s.tall[n] = up(width, SMALL), s.wide[n] = up(width, LANES);
        if (s.wide[n] > widest) widest = s.wide[n];
        s.hidden[n] = take(&s.scratch, s.tall[n] * PANEL);
        s.slope[n] = take(&s.scratch, s.tall[n] * PANEL);
    }
    s.grad = take(&s.scratch, widest * PANEL);
    s.back = take(&s.scratch, widest * PANEL);
    for (int64_t n = 0; n < p->layers; n++) {
        const struct layer *l = p->layer + n;
        if (l->rank > longest) longest = l->rank;
        s.built[n] = take(&s.scratch, s.tall[n] * s.wide[n + 1]);
        s.bias[n] = take(&s.scratch, s.wide[n + 1]);
        s.u[n] = take(&s.scratch, l->rank * s.wide[n]);
        s.v[n] = take(&s.scratch, l->rank * s.wide[n + 1]);
    }
    s.across = take(&s.scratch, widest * longest);
    s.sums = s.scratch; /* from here on: sums over the rows of a recording */
    for (int64_t n = 0; n < p->layers; n++) {
        const int64_t size = turned(p->layer + n) ? s.tall[n + 1] * s.wide[n] : s.tall[n] * s.wide[n + 1];
        s.grad_built[n] = take(&s.scratch, size);
        s.grad_bias[n] = take(&s.scratch, s.tall[n + 1] * LANES);
        s.of_built[n] = take(&s.of_job, size);
        s.of_bias[n] = take(&s.of_job, s.tall[n + 1] * LANES);
    }
    s.partial = s.jobs * s.of_job;
    for (int64_t n = 0; n < p->layers; n++) {
        const struct layer *l = p->layer + n;
        const int64_t blocks = s.parts * p->recordings;
        s.of_own_weight[n] = take(&s.partial, blocks * l->out * l->in * l->own_weight);
        s.of_own_bias[n] = take(&s.partial, blocks * l->out * l->own_bias);
        s.of_u[n] = take(&s.partial, blocks * l->in * l->rank);
        s.of_v[n] = take(&s.partial, blocks * l->out * l->rank);
    }
    return s;
}

/* Elements of scratch (of each worker) and of partial; and the number of jobs. */
void sizes(const struct problem *p, int64_t *n) {
    const struct plan s = plan_of(p);
    n[0] = s.scratch, n[1] = s.partial, n[2] = s.jobs;
}

/* ---- a panel of rows, n vectors of them: matrices (feature, n * LANES) ---- */

#define PRODUCT_TILE(KIND, M, N)                                                                                    \
    {                                                                                                               \
        vec sum[M][N];                                                                                              \
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < N; v++)                                       \
            sum[m][v] = constant(bias ? bias[i + m] : 0);                                                           \
        KIND##N(sum, w + i * row, row, column, x, N * LANES, 2, count);                                             \
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < N; v++) {                                     \
            const int64_t at = ((i + m) * N + v) * LANES;                                                           \
            if (slope) sum[m][v] *= AT(slope + at);                                                                 \
            AT(to + at) = sum[m][v];                                                                                \
        }                                                                                                           \
        i += M;                                                                                                     \
    }
#define PRODUCT(N)                                                                                                  \
    {                                                                                                               \
        int64_t i = 0;                                                                                              \
        while (i + TILE <= tall) PRODUCT_TILE(advance, TILE, N)                                                     \
        while (i < tall) PRODUCT_TILE(small, SMALL, N)                                                              \
    }

/* to[i] = bias[i] + sum_k w[i * row + k * column] x[k], times slope[i] where there is one. */
INLINE void product(real *to, int n, int64_t tall, const real *w, int64_t row, int64_t column, const real *bias,
                    const real *x, int64_t count, const real *slope) {
    if (n == 3)
        PRODUCT(3)
    else if (n == 2)
        PRODUCT(2)
    else
        PRODUCT(1)
}

static void times_built(real *to, int n, int64_t tall, const real *w, int64_t stride, const real *bias, const real *x,
                        int64_t count) {
    product(to, n, tall, w, 1, stride, bias, x, count, 0);
}

static void back_through(real *to, int n, int64_t tall, const real *w, int64_t stride, const real *grad,
                         int64_t count, const real *slope) {
    if (slope)
        product(to, n, tall, w, stride, 1, 0, grad, count, slope);
    else
        product(to, n, tall, w, stride, 1, 0, grad, count, 0);
}

/* h = s(h) and, where it is wanted, s'(h). */
static void activate(int64_t kind, real *h, real *slope, int64_t vectors) {
    if (kind == TANH)
        for (int64_t k = 0; k < vectors * LANES; k += LANES) {
            const vec t = hyperbolic_tangent(AT(h + k));
            AT(h + k) = t;
            if (slope) AT(slope + k) = (real)1 - t * t;
        }
    else
        for (int64_t k = 0; k < vectors * LANES; k += LANES) {
            const vec a = AT(h + k), s = sigmoid(a), y = a * s;
            AT(h + k) = y;
            if (slope) AT(slope + k) = s + (y - y * s);
        }
}

/* c (m, wide) += sum over rows of a[m] b[wide], both (feature, n * LANES); b is turned to (row, feature) first. */
static void add_outer(real *c, int64_t m, int64_t wide, const real *a, const real *b, int64_t columns, int n,
                      real *across) {
    const int64_t rows = n * LANES;
    transpose(across, wide, b, rows, columns, rows);
    for (int64_t r = 0; columns < wide && r < rows; r++)
        memset(across + r * wide + columns, 0, (wide - columns) * sizeof(real));
    for (int64_t v = 0; v < wide / LANES;) {
        const int width = panel_width(wide / LANES - v);
        outer(c + v * LANES, wide, m, width, a, rows, 1, across + v * LANES, wide, 2, rows);
        v += width;
    }
}

/* ---- a recording ---- */

/* W + u v' of every layer, (in, wide), and the padded biases. */
static void build(const struct problem *p, const struct plan *s, int64_t recording, real *scratch) {
    for (int64_t n = 0; n < p->layers; n++) {
        const struct layer *l = p->layer + n;
        const int64_t wide = s->wide[n + 1];
        const real *weight = l->weight + l->own_weight * recording * l->out * l->in;
        real *w = scratch + s->built[n], *ut = scratch + s->u[n], *vt = scratch + s->v[n];
        memset(w, 0, s->tall[n] * wide * sizeof(real));
        transpose(w, wide, weight, l->in, l->out, l->in);
        memset(scratch + s->bias[n], 0, wide * sizeof(real));
        memcpy(scratch + s->bias[n], l->bias + l->own_bias * recording * l->out, l->out * sizeof(real));
        if (!l->rank) continue;
        const real *u = l->u + recording * l->in * l->rank;
        memset(ut, 0, l->rank * s->wide[n] * sizeof(real));
        memset(vt, 0, l->rank * wide * sizeof(real));
        transpose(ut, s->wide[n], u, l->rank, l->in, l->rank);
        transpose(vt, wide, l->v + recording * l->out * l->rank, l->rank, l->out, l->rank);
        for (int64_t k = 0; k < l->in; k++)
            for (int64_t q = 0; q < l->rank; q++) {
                const vec factor = constant(u[k * l->rank + q]);
                for (int64_t f = 0; f < wide; f += LANES) AT(w + k * wide + f) += factor * AT(vt + q * wide + f);
            }
    }
}

INLINE real sum_of(vec x) {
    real sum = 0;
    UNROLL for (int k = 0; k < LANES; k++) sum += x[k];
    return sum;
}

/* The built matrix has the gradient g (m, wide): a, a factor (m, rank), has g b, and b' (rank, wide) has a' g. */
static void through_factors(const real *g, int64_t m, int64_t wide, int64_t rank, const real *a, const real *b,
                            real *grad_a, real *grad_b) {
    memset(grad_b, 0, rank * wide * sizeof(real));
    for (int64_t i = 0; i < m; i++)
        for (int64_t q = 0; q < rank; q++) {
            const vec factor = constant(a[i * rank + q]);
            vec sum = {0};
            for (int64_t k = 0; k < wide; k += LANES) {
                const vec entry = AT(g + i * wide + k);
                AT(grad_b + q * wide + k) += factor * entry;
                sum += entry * AT(b + q * wide + k);
            }
            grad_a[i * rank + q] = sum_of(sum);
        }
}

/* The gradients of weight and bias, (out, in) and (out), from the sums that make them. */
static void weight_of(real *to, const struct plan *s, const struct layer *l, int64_t n, const real *g) {
    if (turned(l))
        for (int64_t f = 0; f < l->out; f++) memcpy(to + f * l->in, g + f * s->wide[n], l->in * sizeof(real));
    else
        transpose(to, l->in, g, s->wide[n + 1], l->in, l->out);
}

static void bias_of(real *to, const struct layer *l, const real *sums) {
    for (int64_t f = 0; f < l->out; f++) to[f] = sum_of(AT(sums + f * LANES));
}

/* The sums of a recording enter those of the job, or are its own gradients, and make those of its u and v. */
static void end_recording(const struct problem *p, const struct plan *s, int64_t recording, int64_t part,
                          real *scratch, real *partial) {
    for (int64_t n = 0; n < p->layers; n++) {
        const struct layer *l = p->layer + n;
        const int64_t block = part * p->recordings + recording, rank = l->rank;
        const real *g = scratch + s->grad_built[n];
        for (int64_t k = s->of_built[n]; k < (n + 1 < p->layers ? s->of_built[n + 1] : s->of_job); k++)
            partial[k] += g[k - s->of_built[n]]; /* the bias lies behind, in both */
        if (l->own_weight) weight_of(p->partial + s->of_own_weight[n] + block * l->out * l->in, s, l, n, g);
        if (l->own_bias) bias_of(p->partial + s->of_own_bias[n] + block * l->out, l, scratch + s->grad_bias[n]);
        if (!rank) continue;
        real *grad_u = p->partial + s->of_u[n] + block * l->in * rank;
        real *grad_v = p->partial + s->of_v[n] + block * l->out * rank, *other = scratch + s->across;
        if (turned(l)) {
            through_factors(g, l->out, s->wide[n], rank, l->v + recording * l->out * rank, scratch + s->u[n], grad_v,
                            other);
            transpose(grad_u, rank, other, s->wide[n], rank, l->in);
        } else {
            through_factors(g, l->in, s->wide[n + 1], rank, l->u + recording * l->in * rank, scratch + s->v[n], grad_u,
                            other);
            transpose(grad_v, rank, other, s->wide[n + 1], rank, l->out);
        }
    }
}

/* ---- a job ---- */

/* Rows of `from`, `stride` apart, to a panel. Vectors beyond the last row get zeros. */
static void load(real *to, int n, const real *from, int64_t stride, int64_t rows, int64_t columns) {
    if (rows < n * LANES) memset(to, 0, columns * n * LANES * sizeof(real));
    transpose(to, n * LANES, from, stride, rows, columns);
}

static void add(real *to, const real *x, int64_t vectors) {
    for (int64_t k = 0; k < vectors * LANES; k += LANES) AT(to + k) += AT(x + k);
}

/* The layers from hidden[0] on; with the slopes of the activations, and without the last layer, where asked. */
static void through_layers(const struct problem *p, const struct plan *s, real *scratch, int n, int slopes,
                           int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        real *h = scratch + s->hidden[k + 1];
        times_built(h, n, s->tall[k + 1], scratch + s->built[k], s->wide[k + 1], scratch + s->bias[k],
                    scratch + s->hidden[k], p->layer[k].in);
        if (k + 1 < p->layers || p->activate_last)
            activate(p->activation, h, slopes ? scratch + s->slope[k + 1] : 0, s->tall[k + 1] * n);
    }
}

static void forward_panel(const struct problem *p, const struct plan *s, int64_t first, int64_t rows, int n,
                          real *scratch) {
    const int64_t in = p->layer[0].in, out = p->layer[p->layers - 1].out, line = p->steps * out;
    const vec limit = constant((real)p->limit);
    real *z = scratch + s->hidden[0], *y = scratch + s->hidden[p->layers];
    load(z, n, p->z + first * in, in, rows, in);
    for (int64_t t = 0; t < p->steps; t++) {
        through_layers(p, s, scratch, n, 0, p->layers);
        if (p->residual) add(y, z, out * n);
        for (int64_t k = 0; p->clamped && k < out * n * LANES; k += LANES)
            AT(y + k) = clamp(AT(y + k), limit);
        transpose(p->path + first * line + t * out, line, y, n * LANES, out, rows);
        if (t + 1 < p->steps) memcpy(z, y, out * n * LANES * sizeof(real));
    }
}

static void backward_panel(const struct problem *p, const struct plan *s, int64_t first, int64_t rows, int n,
                           real *scratch) {
    const int64_t last = p->layers, in = p->layer[0].in, out = p->layer[last - 1].out, line = p->steps * out;
    const vec limit = constant((real)p->limit);
    real *z = scratch + s->hidden[0], *y = scratch + s->hidden[last];
    real *grad = scratch + s->slope[0], *across = scratch + s->across; /* z has no activation, and no slope */
    for (int64_t t = p->steps - 1; t >= 0; t--) {
        real *g = scratch + s->grad, *next = scratch + s->back, *swap;
        load(g, n, p->grad_path + first * line + t * out, line, rows, out);
        if (t + 1 < p->steps) add(g, grad, out * n);
        if (t)
            load(z, n, p->path + first * line + (t - 1) * out, line, rows, in);
        else
            load(z, n, p->z + first * in, in, rows, in);
        through_layers(p, s, scratch, n, 1, p->clamped || p->activate_last ? last : last - 1);
        for (int64_t k = 0; p->clamped && k < out * n * LANES; k += LANES) {
            vec a = AT(y + k);
            if (p->residual) a += AT(z + k);
            AT(g + k) = choose((a >= -limit) & (a <= limit), AT(g + k), (vec){0});
        }
        if (p->residual) memcpy(grad, g, out * n * LANES * sizeof(real));
        const real *slope = scratch + s->slope[last];
        for (int64_t k = 0; p->activate_last && k < out * n * LANES; k += LANES) AT(g + k) *= AT(slope + k);
        for (int64_t k = last - 1; k >= 0; k--) {
            const struct layer *l = p->layer + k;
            const real *x = scratch + s->hidden[k];
            real *sums = scratch + s->grad_built[k], *bias = scratch + s->grad_bias[k];
            if (p->need_weights) {
                if (turned(l))
                    add_outer(sums, s->tall[k + 1], s->wide[k], g, x, l->in, n, across);
                else
                    add_outer(sums, s->tall[k], s->wide[k + 1], x, g, l->out, n, across);
                for (int64_t f = 0; f < l->out; f++)
                    for (int v = 0; v < n; v++) AT(bias + f * LANES) += AT(g + (f * n + v) * LANES);
            }
            if (k == 0 && t == 0 && !p->need_states) break;
            back_through(next, n, s->tall[k], scratch + s->built[k], s->wide[k + 1], g, l->out,
                         k ? scratch + s->slope[k] : 0);
            swap = g, g = next, next = swap;
        }
        if (p->residual)
            add(grad, g, in * n);
        else
            memcpy(grad, g, in * n * LANES * sizeof(real));
    }
    if (p->need_states) transpose(p->grad_z + first * in, in, grad, n * LANES, in, rows);
}

/* What Python calls: all jobs of a pass, together with the other workers. */
void work(struct problem *p, int64_t backward, int64_t worker) {
    const struct plan s = plan_of(p);
    real *scratch = p->scratch + worker * s.scratch;
    int64_t number;
    memset(scratch, 0, s.scratch * sizeof(real));
    while ((number = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < s.jobs) {
        const int64_t part = number % s.parts, from = number / s.parts * s.group;
        const int64_t first = part * s.part, end = first + s.part < p->rows ? first + s.part : p->rows;
        real *partial = p->partial + number * s.of_job;
        if (backward && p->need_weights) memset(partial, 0, s.of_job * sizeof(real));
        for (int64_t r = from; r < from + s.group && r < p->recordings; r++) {
            build(p, &s, r, scratch);
            if (backward) memset(scratch + s.sums, 0, (s.scratch - s.sums) * sizeof(real));
            for (int64_t i = first; i < end;) {
                const int n = panel_width((end - i + LANES - 1) / LANES);
                const int64_t rows = end - i < n * LANES ? end - i : n * LANES;
                if (backward)
                    backward_panel(p, &s, r * p->rows + i, rows, n, scratch);
                else
                    forward_panel(p, &s, r * p->rows + i, rows, n, scratch);
                i += rows;
            }
            if (backward && p->need_weights) end_recording(p, &s, r, part, scratch, partial);
        }
    }
}

/* to = the sum over the parts, of `count` each. */
static void sum_parts(real *to, const real *from, int64_t parts, int64_t count) {
    if (count) memcpy(to, from, count * sizeof(real));
    for (int64_t part = 1; part < parts; part++)
        for (int64_t k = 0; k < count; k++) to[k] += from[part * count + k];
}

/* Gradients of the weights: the sums of the jobs', or of the parts', in their order. */
void finish(const struct problem *p) {
    const struct plan s = plan_of(p);
    for (int64_t j = 1; j < s.jobs; j++)
        for (int64_t k = 0; k < s.of_job; k++) p->partial[k] += p->partial[j * s.of_job + k];
    for (int64_t n = 0; n < p->layers; n++) {
        const struct layer *l = p->layer + n;
        const int64_t all = p->recordings;
        if (l->own_weight)
            sum_parts(l->grad_weight, p->partial + s.of_own_weight[n], s.parts, all * l->out * l->in);
        else
            weight_of(l->grad_weight, &s, l, n, p->partial + s.of_built[n]);
        if (l->own_bias)
            sum_parts(l->grad_bias, p->partial + s.of_own_bias[n], s.parts, all * l->out);
        else
            bias_of(l->grad_bias, l, p->partial + s.of_bias[n]);
        sum_parts(l->grad_u, p->partial + s.of_u[n], s.parts, all * l->in * l->rank);
        sum_parts(l->grad_v, p->partial + s.of_v[n], s.parts, all * l->out * l->rank);
    }
}
