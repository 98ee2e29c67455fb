/* What is looked at in gradients and in weights, in one pass over memory; a part of passes.c, once for each type. */

#ifndef AXES
#define AXES 8 /* most axes of a box, after those that are one in memory have been joined; looks.py has the same */
#endif

/* A box of two tensors, x and y, and the entries of its two sides: for each axis, from the outermost to the innermost,
   its size, and how far a step along it is in x, in y, and in the entries of either side; 0 where these stay. */
typedef struct {
    int64_t axes, size[AXES], x[AXES], y[AXES], first[AXES], second[AXES];
    int64_t first_entry, second_entry; /* where the entries of each side are in `total` and `size` */
} OF(Box);

/* Add up x y, and its magnitude, along the innermost axis. */
INLINE void OF(add_neighbours)(const REAL *x, const REAL *y, int64_t count, int64_t by_x, int64_t by_y, int64_t by_first,
                               int64_t by_second, double sign, double *restrict first, double *restrict size_of_first,
                               double *restrict second, double *restrict size_of_second) {
    double sum = 0, size = 0; /* for sides of which all neighbours have the same entry */
#pragma omp simd reduction(+ : sum, size)
    for (int64_t i = 0; i < count; i++) {
        const double value = (double)x[i * by_x] * (double)y[i * by_y], magnitude = fabs(value);
        if (!by_first || !by_second) sum += value, size += magnitude;
        if (by_first) first[i * by_first] += value, size_of_first[i * by_first] += magnitude;
        if (by_second) second[i * by_second] += sign * value, size_of_second[i * by_second] += magnitude;
    }
    if (!by_first) *first += sum, *size_of_first += size;
    if (!by_second) *second += sign * sum, *size_of_second += size;
}

/* Add up x y, and its magnitude, for the entries of either side of each box; those of the second side with a sign.
   Boxes have entries of their own, which are zero before. Threads share boxes. */
void OF(both_sides)(const OF(Box) *boxes, int64_t count, const REAL *const *addresses, double sign, double *total,
                    double *size, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; k++) {
        const OF(Box) *box = boxes + k;
        const int64_t inner = box->axes - 1, neighbours = box->size[inner];
        int64_t at[AXES] = {0}, x = 0, y = 0, one = box->first_entry, other = box->second_entry, axis;
        do {
#define NEIGHBOURS(BY_X, BY_Y, BY_FIRST, BY_SECOND)                                                            \
    OF(add_neighbours)(addresses[2 * k] + x, addresses[2 * k + 1] + y, neighbours, BY_X, BY_Y, BY_FIRST,       \
                       BY_SECOND, sign, total + one, size + one, total + other, size + other)
            const int64_t by_first = box->first[inner], by_second = box->second[inner];
            if (box->x[inner] != 1 || box->y[inner] != 1 || by_first > 1 || by_second > 1)
                NEIGHBOURS(box->x[inner], box->y[inner], by_first, by_second);
            else if (by_first && by_second) /* so that the compiler makes a loop for each */
                NEIGHBOURS(1, 1, 1, 1);
            else if (by_first)
                NEIGHBOURS(1, 1, 1, 0);
            else if (by_second)
                NEIGHBOURS(1, 1, 0, 1);
            else
                NEIGHBOURS(1, 1, 0, 0);
#undef NEIGHBOURS
            for (axis = inner - 1; axis >= 0; axis--) { /* the next place of the outer axes */
                x += box->x[axis], y += box->y[axis], one += box->first[axis], other += box->second[axis];
                if (++at[axis] < box->size[axis]) break;
                x -= at[axis] * box->x[axis], y -= at[axis] * box->y[axis];
                one -= at[axis] * box->first[axis], other -= at[axis] * box->second[axis];
                at[axis] = 0;
            }
        } while (axis >= 0);
    }
}

/* Of each tensor: its largest magnitude, NaN if an element is NaN; how many elements have it; and of its first `sample`
   elements how many are not zero, and how many of these end, in 32 bits, in four and in twelve zeros. */
void OF(magnitudes)(int64_t count, const REAL *const *addresses, const int64_t *sizes, int64_t sample, double *found,
                    int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; k++) {
        const REAL *x = addresses[k];
        const int64_t n = sizes[k], seen = n < sample ? n : sample;
        REAL largest = 0;
        int64_t undefined = 0, equal = 0, proper = 0, four = 0, twelve = 0;
#pragma omp simd reduction(max : largest) reduction(+ : undefined)
        for (int64_t i = 0; i < n; i++) {
            const REAL magnitude = x[i] < 0 ? -x[i] : x[i];
            largest = magnitude > largest ? magnitude : largest;
            undefined += x[i] != x[i];
        }
#pragma omp simd reduction(+ : equal)
        for (int64_t i = 0; i < n; i++) equal += (x[i] < 0 ? -x[i] : x[i]) == largest;
        for (int64_t i = 0; i < seen; i++) {
            const union {
                float value;
                int32_t bits;
            } shortened = {(float)x[i]};
            const int32_t bits = shortened.value == x[i] ? shortened.bits : -1; /* which ends in ones */
            const int64_t is_proper = x[i] != 0;
            proper += is_proper;
            four += is_proper & !(bits & 15);
            twelve += is_proper & !(bits & 4095);
        }
        double *of = found + 5 * k;
        of[0] = undefined ? (double)NAN : (double)largest;
        of[1] = undefined ? 0 : (double)equal;
        of[2] = (double)proper, of[3] = (double)four, of[4] = (double)twelve;
    }
}
