/* What a refresh and what looks at gradients and weights do with whole tensors, in one pass over memory; a part of
   passes.c, once for each type. */

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
void OF(both_sides)(const Box *boxes, int64_t count, const REAL *const *addresses, double sign, double *total,
                    double *size, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; k++) {
        const Box *box = boxes + k;
        const int64_t inner = box->axes - 1, by_x = box->x[inner], by_y = box->y[inner];
        const int64_t by_first = box->first[inner], by_second = box->second[inner];
        const int is_plain = by_x == 1 && by_y == 1 && by_first <= 1 && by_second <= 1;
        Line line = {{0}, 0, 0, box->first_entry, box->second_entry};
        do {
#define NEIGHBOURS(BY_X, BY_Y, BY_FIRST, BY_SECOND)                                                              \
    OF(add_neighbours)(addresses[2 * k] + line.x, addresses[2 * k + 1] + line.y, box->size[inner], BY_X, BY_Y,   \
                       BY_FIRST, BY_SECOND, sign, total + line.first, size + line.first, total + line.second,    \
                       size + line.second)
            switch (is_plain ? 2 * by_first + by_second : -1) { /* so that the compiler makes a loop for each */
            case 0: NEIGHBOURS(1, 1, 0, 0); break;
            case 1: NEIGHBOURS(1, 1, 0, 1); break;
            case 2: NEIGHBOURS(1, 1, 1, 0); break;
            case 3: NEIGHBOURS(1, 1, 1, 1); break;
            default: NEIGHBOURS(by_x, by_y, by_first, by_second);
            }
#undef NEIGHBOURS
        } while (next_line(box, &line));
    }
}

/* Multiply the elements of a line by the product of the factors of their two entries, and round once. */
INLINE void OF(multiply_neighbours)(REAL *x, int64_t count, int64_t by_x, const double *first, int64_t by_first,
                                    const double *second, int64_t by_second) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        x[i * by_x] = (REAL)((double)x[i * by_x] * (first[i * by_first] * second[i * by_second]));
}

/* Multiply x in each box by the factors of the entries of both sides. */
void OF(rescale)(const Box *boxes, int64_t count, REAL *const *addresses, const double *factors,
                 int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; k++) {
        const Box *box = boxes + k;
        const int64_t inner = box->axes - 1, by_x = box->x[inner];
        const int64_t by_first = box->first[inner], by_second = box->second[inner];
        Line line = {{0}, 0, 0, box->first_entry, box->second_entry};
        do {
            REAL *x = addresses[2 * k] + line.x;
            const double *first = factors + line.first, *second = factors + line.second;
            if (by_x == 1 && !by_first && by_second == 1)
                OF(multiply_neighbours)(x, box->size[inner], 1, first, 0, second, 1);
            else if (by_x == 1 && !by_first && !by_second)
                OF(multiply_neighbours)(x, box->size[inner], 1, first, 0, second, 0);
            else
                OF(multiply_neighbours)(x, box->size[inner], by_x, first, by_first, second, by_second);
        } while (next_line(box, &line));
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
