/* The passes on a CPU. library.py compiles this file, and compiled.py calls it; passes.py says what each pass computes.

A block is seen as lines, each a sequence of `depth` elements of one place (lines.py):

    rows        line l is x[l * stride], x[l * stride + 1], ...           one line for each place
    columns     line l is x[l], x[stride + l], x[2 * stride + l], ...     one or more for each place, side by side

Threads share *items*, some lines of one block. One thread works on all lines of a place, and adds in one order: sums
have the same bits however many threads there are. */

#ifndef REAL /* The file includes itself, once for each type of the tensors. */

#include <float.h>
#include <math.h>
#include <stdint.h>

#define LANES 64       /* accumulators of a line */
#define PART 1024      /* elements of a line that are added up before their sum is added in double */
#define WIDEST 1024    /* most lines of an item in columns; compiled.py cuts them */
#define MOST_SEEN 4095 /* gradients that are counted; clipping.py has the same */
#define AXES 8         /* most axes of a box, after those that are one in memory have been joined; sides.py has it, too */

enum { FADE, GAIN, SHIFT, DECAY, KEEP, MOVE, PULL, PUSH, FIRST, SECOND, ROOT, EPS, NUM_NAMES };
enum { STAYS = NUM_NAMES, NUM_NUMBERS }; /* 1 - second */
enum { LEFT_OUT, NUMBER, SCALAR, VECTOR }; /* what a coefficient is: a value, its address, or that of a vector */

typedef struct {
    int64_t in_columns, depth, stride, lines_of_place, first_place;
} Block;

typedef struct {
    int64_t block, first, end; /* lines first, ..., end - 1 of a block */
} Item;

typedef union {
    double number;
    const void *address;
} Word;

/* A coefficient is word * times[0] * times[1] / over at a place; the vectors may be null. */
typedef struct {
    int64_t kind[NUM_NAMES];
    Word word[NUM_NAMES];
    const void *times[NUM_NAMES][2], *over[NUM_NAMES];
} Coefficients;

/* Single elements of tensors. Tensor k has counts[k] of them; their flat indices `at`, and their slots in a vector,
   have 32 or, if they are wide, 64 bits. */
typedef struct {
    int64_t tensors;
    const int64_t *sizes, *counts;
    const void *at, *slots;
    int64_t wide;
} Elements;

/* A box of two tensors, x and y, and the entries of its two sides: for each axis, from the outermost to the innermost,
   its size, and how far a step along it is in x, in y, and in the entries of either side; 0 where these stay. */
typedef struct {
    int64_t axes, size[AXES], x[AXES], y[AXES], first[AXES], second[AXES];
    int64_t first_entry, second_entry; /* where the entries of each side begin */
} Box;

#define ROOT_OF(TYPE, x) (sizeof(TYPE) == 4 ? sqrtf(x) : sqrt(x))
#define MOST(TYPE) (sizeof(TYPE) == 4 ? FLT_MAX : DBL_MAX)
#define INLINE static inline __attribute__((always_inline))
/* Compiled once, so that a step has the same bits whether it is one call or several. */
#define ONCE __attribute__((noinline))

/* Where a line along the innermost axis of a box begins: its places along the others, and in all that is walked over. */
typedef struct {
    int64_t at[AXES], x, y, first, second;
} Line;

/* Go on to the next line; returns whether there is one. */
INLINE int next_line(const Box *box, Line *line) {
    for (int64_t axis = box->axes - 2; axis >= 0; axis--) {
        int64_t by = 1; /* lines along this axis; from the last one back to the first */
        if (++line->at[axis] == box->size[axis]) by = 1 - box->size[axis], line->at[axis] = 0;
        line->x += by * box->x[axis], line->y += by * box->y[axis];
        line->first += by * box->first[axis], line->second += by * box->second[axis];
        if (by == 1) return 1;
    }
    return 0;
}

#define REAL float
#define OF(name) name##_float
#include "passes.c"
#undef REAL
#undef OF
#define REAL double
#define OF(name) name##_double
#include "passes.c"

#else

#define AT(vector, place) ((const REAL *)(vector))[place]

/* A coefficient at a place; one that is left out is 1 if it is `keep`, else 0. */
INLINE REAL OF(coefficient)(const Coefficients *given, int name, int64_t place) {
    const void *const *times = given->times[name], *over = given->over[name];
    REAL value = name == KEEP;
    switch (given->kind[name]) {
    case NUMBER: value = (REAL)given->word[name].number; break;
    case SCALAR: value = AT(given->word[name].address, 0); break;
    case VECTOR: value = AT(given->word[name].address, place); break;
    }
    if (times[0]) value *= AT(times[0], place);
    if (times[1]) value *= AT(times[1], place);
    return over ? value / AT(over, place) : value;
}

/* All coefficients at `count` lines, from `line` on: c[name * count], c[name * count + 1], ... */
static void OF(fill)(REAL *c, const Coefficients *given, const Block *block, int64_t line, int64_t count) {
    const int64_t each = block->lines_of_place, place = block->first_place + line / each;
    for (int name = 0; name < NUM_NAMES; name++)
        for (int64_t i = 0; i < count; i++) c[name * count + i] = OF(coefficient)(given, name, place + i / each);
    for (int64_t i = 0; i < count; i++)
        c[STAYS * count + i] = given->kind[SECOND] == NUMBER ? (REAL)(1 - given->word[SECOND].number)
                                                             : 1 - c[SECOND * count + i];
}

INLINE REAL OF(lerp)(REAL start, REAL end, REAL weight) { /* in the form that torch takes */
    return weight < (REAL)0.5 ? start + weight * (end - start) : end - (end - start) * (1 - weight);
}

/* Change neighbouring elements, each with coefficients of its own (columns) or all with the same (rows, width 1).
   x[0] are weights, x[1] gradients, x[2] and so on state; the affine pass has weights alone, keep and push. */
INLINE void OF(change)(REAL *const *x, int64_t at, int64_t count, int tensors, const Coefficients *given,
                       const REAL *restrict c, int64_t width, int in_columns) {
    REAL *w = x[0] + at, *m = tensors > 2 ? x[2] + at : 0, *v = tensors > 3 ? x[3] + at : 0;
    REAL *largest = tensors > 4 ? x[4] + at : 0;
    const REAL *g = tensors > 1 ? x[1] + at : 0;
    /* A term that is left out must not become zero: 0 * inf is not 0. */
    const int gains = given->kind[GAIN] != LEFT_OUT, decays = given->kind[DECAY] != LEFT_OUT;
    const int moves = given->kind[MOVE] != LEFT_OUT, pulls = given->kind[PULL] != LEFT_OUT;
#define C(name) c[in_columns ? name * width + i : name]
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        REAL weight = w[i], quotient = 0;
        if (tensors == 3) { /* m = fade m + gain g + shift + decay w */
            quotient = m[i] * C(FADE) + C(SHIFT);
            if (decays) quotient += C(DECAY) * weight;
            if (gains) quotient += C(GAIN) * g[i];
            m[i] = quotient;
        }
        if (tensors > 3) {
            REAL d = C(GAIN) * g[i] + C(SHIFT);
            if (decays) d += C(DECAY) * weight;
            REAL square = C(STAYS) * v[i] + C(SECOND) * d * d; /* no difference: infinities stay infinite */
            v[i] = square;
            if (tensors > 4) { /* what is not a number is kept, as torch.maximum does */
                square = square > largest[i] || square != square ? square : largest[i];
                largest[i] = square;
            }
            m[i] = OF(lerp)(m[i], d, C(FIRST));
            quotient = m[i] / (C(ROOT) * ROOT_OF(REAL, square) + C(EPS));
        }
        /* w = keep w + move m + pull g + push */
        weight = weight * C(KEEP) + C(PUSH);
        if (tensors > 2 && moves) weight += C(MOVE) * quotient;
        if (tensors > 1 && pulls) weight += C(PULL) * g[i];
        w[i] = weight;
    }
#undef C
}

INLINE void OF(change_item)(const Block *block, const Item *item, REAL *const *x, int tensors,
                            const Coefficients *given) {
    REAL c[NUM_NUMBERS * WIDEST];
    if (block->in_columns) {
        const int64_t count = item->end - item->first;
        OF(fill)(c, given, block, item->first, count);
        for (int64_t i = 0; i < block->depth; i++)
            OF(change)(x, i * block->stride + item->first, count, tensors, given, c, count, 1);
    } else {
        OF(fill)(c, given, block, item->first, 1);
        int varying[NUM_NAMES], count = 0; /* the coefficients that differ from line to line */
        for (int name = 0; name < NUM_NAMES; name++)
            if (given->kind[name] == VECTOR || given->times[name][0] || given->over[name]) varying[count++] = name;
        for (int64_t line = item->first; line < item->end; line++) {
            for (int k = 0; k < count; k++)
                c[varying[k]] = OF(coefficient)(given, varying[k], block->first_place + line);
            if (given->kind[SECOND] == VECTOR) c[STAYS] = 1 - c[SECOND];
            OF(change)(x, line * block->stride, block->depth, tensors, given, c, 1, 0);
        }
    }
}

/* Change one tensor by the affine pass, two or three by that of SGD, four or five by that of Adam. */
ONCE void OF(update)(const Block *blocks, const Item *items, int64_t num_items, REAL *const *addresses,
                     int64_t tensors, const Coefficients *given, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < num_items; i++) {
        const Block *block = blocks + items[i].block;
        REAL *const *x = addresses + items[i].block * tensors;
        switch (tensors) { /* so that the compiler makes a loop for each */
        case 1: OF(change_item)(block, items + i, x, 1, given); break;
        case 2: OF(change_item)(block, items + i, x, 2, given); break;
        case 3: OF(change_item)(block, items + i, x, 3, given); break;
        case 4: OF(change_item)(block, items + i, x, 4, given); break;
        case 5: OF(change_item)(block, items + i, x, 5, given); break;
        }
    }
}

/* The terms of element i: x and x^2 or, of two tensors, x y. */
#define TERMS(TYPE, i, sum, square)                      \
    const TYPE value = one[i];                           \
    sum += tensors > 1 ? value * (TYPE)other[i] : value; \
    if (tensors == 1) square += value * value;

/* The sums of `count` neighbours, at most PART, so few that their own type is wide enough. */
INLINE void OF(add_part)(const REAL *one, const REAL *other, int64_t count, int tensors, double *sum, double *square) {
    const int64_t end = count < 2 * LANES ? 0 : count / LANES * LANES; /* short lines have nothing to wait for */
    if (end) {
        REAL sums[LANES] = {0}, squares[LANES] = {0}; /* so many that no addition waits for another */
        for (int64_t i = 0; i < end; i += LANES)
            for (int k = 0; k < LANES; k++) {
                TERMS(REAL, i + k, sums[k], squares[k])
            }
        for (int half = LANES / 2; half; half /= 2)
            for (int k = 0; k < half; k++) sums[k] += sums[k + half], squares[k] += squares[k + half];
        *sum += sums[0], *square += squares[0];
    }
    REAL of_rest = 0, square_of_rest = 0;
#pragma omp simd reduction(+ : of_rest, square_of_rest)
    for (int64_t i = end; i < count; i++) {
        TERMS(REAL, i, of_rest, square_of_rest)
    }
    *sum += of_rest, *square += square_of_rest;
}

/* The sums of a line; those that are asked for in a wider type are added up in that. */
INLINE void OF(add_line)(const REAL *one, const REAL *other, int64_t count, int tensors, int64_t wide, double *sum,
                         double *square) {
    if (wide) {
        for (int64_t i = 0; i < count; i++) {
            TERMS(double, i, *sum, *square)
        }
    } else {
        for (int64_t i = 0; i < count; i += PART)
            OF(add_part)(one + i, other + i, count - i < PART ? count - i : PART, tensors, sum, square);
    }
}

/* Sums are written in the type of the blocks or, if that is narrower than what is asked for, in double. */
INLINE void OF(store)(void *out, int64_t wide, int64_t at, double value) {
    if (wide)
        ((double *)out)[at] = value;
    else
        ((REAL *)out)[at] = (REAL)value;
}

/* The sums of some lines in columns, which are added up side by side; several may have parts of one place. */
INLINE void OF(add_columns)(const Block *block, const Item *item, const REAL *one, const REAL *other, int tensors,
                            void *out, int64_t wide, int64_t places) {
    const int64_t lines = item->end - item->first, each = block->lines_of_place;
    double sum[WIDEST] = {0}, square[WIDEST] = {0};
    for (int64_t element = 0; element < block->depth; element++, one += block->stride, other += block->stride) {
#pragma omp simd
        for (int64_t i = 0; i < lines; i++) {
            TERMS(double, item->first + i, sum[i], square[i])
        }
    }
    for (int64_t line = 0; line < lines; line += each) {
        for (int64_t i = 1; i < each; i++) sum[line] += sum[line + i], square[line] += square[line + i];
        const int64_t place = block->first_place + (item->first + line) / each;
        OF(store)(out, wide, place, sum[line]);
        if (tensors == 1) OF(store)(out, wide, places + place, square[line]);
    }
}

INLINE void OF(add_item)(const Block *block, const Item *item, REAL *const *x, int tensors, void *out, int64_t wide,
                         int64_t places) {
    const REAL *one = x[0], *other = x[tensors - 1];
    if (block->in_columns) {
        OF(add_columns)(block, item, one, other, tensors, out, wide, places);
        return;
    }
    for (int64_t line = item->first; line < item->end; line++) {
        const int64_t start = line * block->stride, place = block->first_place + line;
        double sum = 0, square = 0;
        OF(add_line)(one + start, other + start, block->depth, tensors, wide, &sum, &square);
        OF(store)(out, wide, place, sum);
        if (tensors == 1) OF(store)(out, wide, places + place, square);
    }
}

/* Find the sums over the elements at each place of the products of two tensors, or of one tensor and of its squares.
   Each block has `each` addresses, of which the first `tensors` are read. */
ONCE void OF(sums)(const Block *blocks, const Item *items, int64_t num_items, REAL *const *addresses, int64_t each,
                   int64_t tensors, void *out, int64_t wide, int64_t places, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < num_items; i++) {
        const Block *block = blocks + items[i].block;
        REAL *const *x = addresses + items[i].block * each;
        if (tensors == 1)
            OF(add_item)(block, items + i, x, 1, out, wide, places);
        else
            OF(add_item)(block, items + i, x, 2, out, wide, places);
    }
}

#include "vectors.c"
#include "looks.c"

/* A whole step: the sums of gradients, what they say of the rows, and the pass of the base. Places are rows. The second
   moments, and the numbers of gradients in them, change in place. For each row `found` has room for the scale, which is the sum first, the
   shift, which is the sum of squares first, and the step. */
int64_t OF(step)(const Block *blocks, const Item *items, int64_t num_items, REAL *const *addresses, int64_t tensors,
                 const Coefficients *given, const OF(Rows) *of, double factor, REAL *found, int64_t threads) {
    const int64_t n = of->rows, wide = sizeof(REAL) == sizeof(double);
    OF(sums)(blocks, items, num_items, addresses + 1, tensors, 1, found, wide, n, threads); /* of gradients */
    const int64_t count = OF(clipping)(of, factor, found, found + n, (REAL *)of->second, (int16_t *)of->seen,
                                       found, found + n, found + 2 * n);
    OF(update)(blocks, items, num_items, addresses, tensors, given, threads);
    return count;
}

/* A whole step in path coordinates. Places are rows; `free_blocks` has the one block of all H free coordinates, which
   move with the coefficients `of_free`. `found` has room for

       to_weights [R], which are sums first; weight_scale [R]; skeleton elements [2 H] of each tensor;
       free coordinates [H]; their gradients [H]; ratio [H + 1]

   and at_root for H + 1 sums. Returns at how many units the guard was needed; or, if elements are not in their tensors
   by now, minus their number, and then nothing has changed. */
int64_t OF(path_step)(const Block *blocks, const Item *items, int64_t num_items, REAL *const *addresses,
                      int64_t tensors, const Coefficients *given, const Block *free_blocks, const Item *free_items,
                      int64_t num_free_items, const Coefficients *of_free, const OF(Paths) *of,
                      const Elements *elements, REAL *found, double *at_root, int64_t threads) {
    const int64_t rows = of->rows, n = of->units, wide = sizeof(REAL) == sizeof(double);
    REAL *scale = found + rows, *at = scale + rows, *moved = at + 2 * n * tensors, *gradient = moved + n;
    REAL *of_units[5] = {moved, gradient};
    for (int64_t k = 2; k < tensors; k++) of_units[k] = at + (2 * k + 1) * n; /* the state of free weights */
    OF(sums)(blocks, items, num_items, addresses, tensors, 2, found, wide, rows, threads); /* of weights x gradients */
    for (int64_t i = 0; i < 2 * n * tensors; i++) at[i] = 0; /* where a unit has no element */
    int64_t outside = 0;
    for (int64_t k = 0; k < tensors; k++)
        outside += OF(copy_elements)(elements, addresses + k, tensors, at + 2 * n * k, 0);
    if (outside) return -outside;
    OF(free_gradient)(of, found, at, at + 2 * n, at_root, gradient);
    for (int64_t h = 0; h < n; h++) moved[h] = OF(free_value)(of, h);
    OF(weight_scale)(of, scale);
    OF(update)(free_blocks, free_items, num_free_items, of_units, tensors, of_free, 1);
    for (int64_t h = 0; h < n; h++) moved[h] /= OF(free_value)(of, h);
    const int64_t count = OF(allocate)(of, moved, at, at, gradient + n);
    OF(weight_scale)(of, found);
    OF(update)(blocks, items, num_items, addresses, tensors, given, threads);
    for (int64_t k = 0; k < tensors; k++) {
        if (k == 1) continue; /* gradients stay as they are */
        for (int64_t h = 0; k && h < n; h++) at[2 * n * k + h] = 0; /* fixed weights have no state */
        OF(copy_elements)(elements, addresses + k, tensors, at + 2 * n * k, 1);
    }
    return count;
}

#endif
