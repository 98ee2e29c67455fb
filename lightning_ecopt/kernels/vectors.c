/* What a step does with vectors over rows and over units, between its passes; a part of passes.c, once for each type.
   Nothing here is long enough for a second thread. */

static int64_t OF(entry)(const void *numbers, int64_t wide, int64_t k) {
    return wide ? ((const int64_t *)numbers)[k] : ((const int32_t *)numbers)[k];
}

/* Read elements of tensors into their slots of a vector, or write them from there. The address of tensor k is
   x[k * stride]; null leaves it out. Returns how many elements are not in the tensors by now, and were left out. */
int64_t OF(copy_elements)(const Elements *of, REAL *const *x, int64_t stride, REAL *vector, int64_t write) {
    int64_t first = 0, outside = 0;
    for (int64_t k = 0; k < of->tensors; first += of->counts[k++]) {
        REAL *tensor = x[k * stride];
        for (int64_t i = first; tensor && i < first + of->counts[k]; i++) {
            const int64_t place = OF(entry)(of->at, of->wide, i);
            REAL *slot = vector + OF(entry)(of->slots, of->wide, i);
            if (place >= of->sizes[k])
                outside++;
            else if (write)
                tensor[place] = *slot;
            else
                *slot = tensor[place];
        }
    }
    return outside;
}

/* What is known of the rows; clipping.py says what the vectors are. The first lengths[0] rows have size[0] and
   centre[0], the next lengths[1] have size[1] ... `present` has ones and zeros. All from there on may be null. */
typedef struct {
    int64_t rows;
    const int64_t *lengths;
    const REAL *size, *centre, *second;
    const int16_t *seen;
    const REAL *present, *rho, *to_steps, *own;
    const uint8_t *linear;
    double memory, lifted, slack, tiny, faint;
} OF(Rows);

/* How gradients are centred and clipped, and how long steps are; clipping.py has the same in Python. `scale` may be
   `sums`, and `shift` may be `squares`. Returns how many rows were clipped. */
ONCE int64_t OF(clipping)(const OF(Rows) *of, double factor, const REAL *sums, const REAL *squares, REAL *new_second,
                          int16_t *new_seen, REAL *scale, REAL *shift, REAL *step) {
    const int16_t *seen = of->seen;
    const double log_of_memory = log(of->memory);
    const REAL *second = of->second, *present = of->present, *rho = of->rho;
    const REAL newest = (REAL)(1 - of->memory), lifted = (REAL)of->lifted, slack = (REAL)of->slack;
    REAL count_of_part, total_of_part, mean_square[PART], weight[PART], weight_of_last = 0;
    int16_t last = 0;
    int64_t count = 0, run = 0, end_of_run = 0, end;
    double total = 0;
    for (int64_t first = 0; first < of->rows; first = end) {
        while (first == end_of_run) end_of_run += of->lengths[run++];
        const REAL size = of->size[run - 1], centre = of->centre[run - 1];
        end = first + PART < end_of_run ? first + PART : end_of_run;
        count_of_part = total_of_part = 0;
#pragma omp simd
        for (int64_t k = first; k < end; k++) {
            const REAL mean = sums[k] / size, moved = mean * centre;
            REAL square = squares[k] / size + mean * moved * lifted;
            mean_square[k - first] = square = square < 0 ? 0 : square;
            /* Nothing changes where a gradient is not finite, or where there is none. */
            const REAL share = square <= MOST(REAL) ? newest * (present ? present[k] : 1) : 0;
            new_second[k] = second[k] + (share > 0 ? share * (square - second[k]) : 0);
            new_seen[k] = (int16_t)(seen[k] + (share > 0 && seen[k] < MOST_SEEN));
        }
        for (int64_t k = first; k < end; k++) { /* nearly all rows have seen as many gradients */
            if (new_seen[k] != last) last = new_seen[k], weight_of_last = (REAL)-expm1(last * log_of_memory);
            weight[k - first] = weight_of_last < newest ? newest : weight_of_last;
        }
#pragma omp simd reduction(+ : count_of_part, total_of_part)
        for (int64_t k = first; k < end; k++) {
            const REAL moved = sums[k] / size * centre, square = mean_square[k - first];
            const REAL q = new_second[k] / weight[k - first];
            const REAL ratio = ROOT_OF(REAL, slack * q / square);
            scale[k] = (square <= MOST(REAL)) & (ratio < 1) ? ratio : 1; /* 1 if it is not a number */
            shift[k] = (moved <= MOST(REAL)) & (moved >= -MOST(REAL)) ? moved * scale[k] : 0;
            count_of_part += scale[k] < 1 ? 1 : 0;
            step[k] = ROOT_OF(REAL, q);
            total_of_part += rho ? rho[k] * rho[k] * q : 0;
        }
        count += (int64_t)count_of_part;
        total += total_of_part;
    }
    if (rho) {
        const REAL typical = (REAL)(sqrt(total / of->rows) * of->faint), tiny = (REAL)of->tiny;
#pragma omp simd
        for (int64_t k = 0; k < of->rows; k++) {
            const REAL least = typical / rho[k];
            REAL deviation = least > step[k] || least != least ? least : step[k];
            deviation = deviation < tiny ? tiny : deviation;
            step[k] = (of->to_steps ? of->to_steps[k] : (REAL)factor) * (rho[k] / deviation);
        }
        if (of->own)
            for (int64_t k = 0; k < of->rows; k++) step[k] = of->linear[k] ? step[k] : of->own[k];
    }
    return count;
}

/* The paths; allocation.py says what they are, and has the same in Python. H stands for no unit. */
typedef struct {
    int64_t rows, units;
    const int32_t *unit_of_row, *root, *target;
    const uint8_t *is_free;
    REAL *beta;
    double start, least, most; /* least and most factor of a coordinate; zero if there is no guard */
} OF(Paths);

/* By what weights are divided to be coordinates, for each row. */
static void OF(weight_scale)(const OF(Paths) *of, REAL *scale) {
    for (int64_t k = 0; k < of->rows; k++) scale[k] = 1 / of->beta[of->unit_of_row[k]];
}

INLINE REAL OF(free_value)(const OF(Paths) *of, int64_t unit) {
    return of->is_free[unit] ? (REAL)of->start * of->beta[unit] : 1;
}

/* The gradients of the free coordinates. `sums` has sums of w g over rows; weights and gradients are those of the
   skeleton, 2 H each, the fixed ones first; `at_root` has room for H + 1 sums. */
ONCE void OF(free_gradient)(const OF(Paths) *of, const REAL *sums, const REAL *weights, const REAL *gradients,
                            double *at_root, REAL *gradient) {
    const int64_t n = of->units;
    for (int64_t h = 0; h <= n; h++) at_root[h] = 0;
    for (int64_t k = 0; k < of->rows; k++)
        if (of->unit_of_row[k] < n) at_root[of->root[of->unit_of_row[k]]] += sums[k];
    for (int64_t h = 0; h < n; h++) at_root[of->root[h]] -= weights[h] * gradients[h];
    for (int64_t h = 0; h < n; h++) {
        const double own = weights[n + h] * gradients[n + h] - at_root[h];
        gradient[h] = of->is_free[h] ? (REAL)own / OF(free_value)(of, h) : 0;
    }
}

/* Take over the free coordinates, which were multiplied by `factors`: beta changes, and `skeleton` gets the skeleton
   weights, which may be `weights` itself. `ratio`, H + 1, is by what beta was multiplied. Returns at how many units the
   guard was needed. */
ONCE int64_t OF(allocate)(const OF(Paths) *of, const REAL *factors, const REAL *weights, REAL *skeleton, REAL *ratio) {
    const int64_t n = of->units;
    const REAL least = (REAL)of->least, most = (REAL)of->most;
    int64_t count = 0;
    for (int64_t h = 0; h < n; h++) {
        const REAL factor = of->is_free[h] ? factors[h] : 1;
        const int finite = factor <= MOST(REAL) && factor >= -MOST(REAL);
        REAL allowed = of->most > 0 && factor < least ? least : of->most > 0 && factor > most ? most : factor;
        allowed = finite && allowed != 0 ? allowed : 1;
        count += of->is_free[h] && allowed != factor;
        ratio[h] = allowed; /* 1 at units without a free weight, for now */
        skeleton[h] = weights[h];
        /* A weight that the optimizer has spoilt is spoilt, but no beta, and by it no other weight. */
        skeleton[n + h] = weights[n + h] * (finite ? allowed : factor);
    }
    ratio[n] = 1;
    for (int64_t h = 0; h < n; h++)
        if (!of->is_free[h]) ratio[h] = ratio[of->root[h]]; /* a root has a free one, or is none */
    for (int64_t h = 0; h < n; h++) {
        of->beta[h] *= ratio[h];
        skeleton[n + h] /= ratio[of->target[h]];
    }
    return count;
}
