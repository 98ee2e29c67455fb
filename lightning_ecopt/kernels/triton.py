"""The passes on an accelerator: device code for Triton. :mod:`~lightning_ecopt.kernels.triton_plan` launches it.

A launch works on the blocks of all parameters, so that there are as many launches for a deep network as for a flat one.
It runs one program for each *item*: some elements of one block.

Memory is read at full speed only where the threads of a program read neighbouring elements, and where the neighbour of
an element is depends on the block. So a block is seen as *lines*, each a sequence of elements of one place, and there
are three kinds of blocks:

=======  =================================================  ===========================  =============================
kind     elements that are neighbours in memory             for instance                 a program reads at a time
=======  =================================================  ===========================  =============================
LONG     those of a line, 512 of them or more               a weight ``[out, 784]``,     1 line, 1024 elements of it
                                                            places ``[out, 1]``
SHORT    those of a line, fewer                             kernels ``[out, 3, 3, 3]``,  16 lines, 32 elements of each
                                                            places ``[out, 1, 1, 1]``
COLUMNS  the same element of one line after the other       a weight ``[in, out]``,      128 lines, 8 elements of each
                                                            places ``[1, out]``
=======  =================================================  ===========================  =============================

In COLUMNS a place may have several lines, one after another: kernels ``[in, out, 3, 3]`` of a transposed convolution
have places ``[1, out, 1, 1]``, and 9 lines of ``in`` elements to each of these.

A program learns from tables in memory what to do. ``owner`` and ``blocks`` describe the items and the blocks, which
stay the same from step to step. ``table`` says where the coefficients and the tensors are, which changes: gradients
have new memory after each ``zero_grad``.

If several lines or items have parts of one sum, they write these down and a second launch adds them up, always in the
same order and without atomic operations: all ranks and all runs find the same bits.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: N803, N806, SIM300

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from lightning_ecopt.kernels import lines as host

#: The kinds of blocks, and the lines (WIDTHS) and elements of a line (SIZES) that a program reads at a time. These
#: stand in the kernels once more, WIDTH and SIZE, as constants that the compiler knows.
LONG, SHORT, COLUMNS = map(constexpr, (host.LONG, host.SHORT, host.COLUMNS))
WIDTHS, SIZES = (1, 16, 128), (1024, 32, 8)
#: How many places, and how many parts of their sums, are added up at a time.
PARTS_WIDTH, PARTS_SIZE = constexpr(4), constexpr(256)

#: The columns of ``blocks``: the number of a block's first item, its kind, how many lines it has, elements of each line
#: (DEPTH), elements of a line in an item (LENGTH), elements in memory from line to line or, in columns, from element to
#: element (STRIDE), and lines of a place;
FIRST_ITEM, KIND, LINES, DEPTH, LENGTH, STRIDE, LINES_OF_PLACE = map(constexpr, range(7))
#: its first place and how many there are, where in the output its sums begin (TARGET) and how much further those of the
#: squares (STEP), and the number of places of all blocks.
FIRST_PLACE, PLACES, TARGET, STEP, ALL_PLACES, NUM_COLUMNS = map(constexpr, range(7, 13))

#: ``table`` begins with a word of 64 bits for each coefficient, in the order of ``lines.NAMES``. Addresses of tensors
#: follow, by block.
FADE, GAIN, SHIFT, DECAY, KEEP, MOVE, PULL, PUSH, FIRST, SECOND, ROOT, EPS, NUM_NAMES = map(constexpr, range(13))
#: GIVEN has one digit to the base 4 for each coefficient: 0 if it is left out, or what its word is.
NUMBER, SCALAR, VECTOR = map(constexpr, (host.NUMBER, host.SCALAR, host.VECTOR))


@triton.jit
def _item(owner, blocks):
    """Return the number and the row of the block that this program works on, and which of its items it is."""
    number = tl.load(owner + tl.program_id(0))
    block = blocks + number * NUM_COLUMNS
    return number, block, (tl.program_id(0) - tl.load(block + FIRST_ITEM)).to(tl.int32)


@triton.jit
def _lines(block, item, KIND_OF: constexpr, WIDTH: constexpr):
    """Return the lines of an item, which of them exist, and their offsets in memory.

    All three have one entry for each of WIDTH lines, and an axis of size 1 for the elements of a line.
    """
    AXIS: constexpr = 0 if KIND_OF == COLUMNS else 1
    lines = tl.load(block + LINES)
    line = tl.expand_dims(item % tl.cdiv(lines, WIDTH).to(tl.int32) * WIDTH + tl.arange(0, WIDTH), AXIS)
    return line, line < lines, line if KIND_OF == COLUMNS else line * tl.load(block + STRIDE)


@triton.jit
def _part(block, item, WIDTH: constexpr):
    """Return which part of its lines an item works on, and the elements at which this starts and ends."""
    part = item // tl.cdiv(tl.load(block + LINES), WIDTH).to(tl.int32)
    length = tl.load(block + LENGTH).to(tl.int32)
    return part, part * length, tl.minimum(part * length + length, tl.load(block + DEPTH).to(tl.int32))


@triton.jit
def _elements(block, first, end, KIND_OF: constexpr, SIZE: constexpr):
    """Return which of the next SIZE elements of a line exist, and their offsets in memory.

    Both have an axis of size 1 for the lines.
    """
    index = tl.expand_dims(first + tl.arange(0, SIZE), 1 if KIND_OF == COLUMNS else 0)
    return index < end, index * tl.load(block + STRIDE) if KIND_OF == COLUMNS else index


@triton.jit
def sums(owner, blocks, table, out, TENSORS: constexpr, DTYPE: constexpr):
    """Find sums and sums of squares of one tensor, or sums of the products of two."""
    number, block, item = _item(owner, blocks)
    for kind in tl.static_range(3):  # the shapes of a program's tensors are constants, so each kind has code of its own
        if tl.load(block + KIND) == kind:
            _sums_of_item(block, item, table + NUM_NAMES + number * TENSORS, out, TENSORS, DTYPE, kind)


@triton.jit
def _sums_of_item(block, item, tensors, out, TENSORS: constexpr, DTYPE: constexpr, KIND_OF: constexpr):
    """Find the sums of one item; WIDTH lines are summed side by side, and SIZE elements of each at a time."""
    WIDTH: constexpr = 1 if KIND_OF == LONG else (16 if KIND_OF == SHORT else 128)
    SIZE: constexpr = 1024 if KIND_OF == LONG else (32 if KIND_OF == SHORT else 8)
    AXIS: constexpr = 0 if KIND_OF == COLUMNS else 1
    WIDE: constexpr = out.dtype.element_ty
    line, known, across = _lines(block, item, KIND_OF, WIDTH)
    part, start, end = _part(block, item, WIDTH)
    one = tl.load(tensors).to(tl.pointer_type(DTYPE)) + across
    other = tl.load(tensors + TENSORS - 1).to(tl.pointer_type(DTYPE)) + across
    total = tl.zeros_like(line).to(WIDE) + tl.expand_dims(tl.zeros((SIZE,), WIDE), 1 - AXIS)
    squares = total
    for first in range(start, end, SIZE):
        inside, along = _elements(block, first, end, KIND_OF, SIZE)
        value = tl.load(one + along, mask=known & inside, other=0.0).to(WIDE)
        if TENSORS == 1:
            total += value
            squares += value * value
        else:
            total += value * tl.load(other + along, mask=known & inside, other=0.0).to(WIDE)
    target = out + tl.load(block + TARGET) + part * tl.load(block + LINES) + line
    tl.store(target, tl.sum(total, AXIS, keep_dims=True), mask=known)
    if TENSORS == 1:
        tl.store(target + tl.load(block + STEP), tl.sum(squares, AXIS, keep_dims=True), mask=known)


@triton.jit
def sums_of_parts(owner, blocks, out):
    """Add up the parts of each place's sum, those of the squares in programs of their own (axis 1 of the grid)."""
    _, block, item = _item(owner, blocks)
    lines_of_place = tl.load(block + LINES_OF_PLACE).to(tl.int32)
    terms = tl.cdiv(tl.load(block + DEPTH), tl.load(block + LENGTH)).to(tl.int32) * lines_of_place
    place = item * PARTS_WIDTH + tl.arange(0, PARTS_WIDTH)
    known = place < tl.load(block + PLACES)
    source = out + tl.load(block + TARGET) + tl.program_id(1) * tl.load(block + STEP) + place * lines_of_place
    total = tl.zeros((PARTS_SIZE, PARTS_WIDTH), out.dtype.element_ty)
    for first in range(0, terms, PARTS_SIZE):
        term = first + tl.arange(0, PARTS_SIZE)
        offset = term // lines_of_place * tl.load(block + LINES) + term % lines_of_place
        total += tl.load(source[None, :] + offset[:, None], mask=(term < terms)[:, None] & known[None, :], other=0.0)
    target = out + tl.program_id(1) * tl.load(block + ALL_PLACES) + tl.load(block + FIRST_PLACE) + place
    tl.store(target, tl.sum(total, 0), mask=known)


@triton.jit
def _coefficient(table, place, known, GIVEN: constexpr, NAME: constexpr, DTYPE: constexpr):
    """Return a coefficient that is given, as one number or for each line."""
    word = tl.load(table + NAME)
    if GIVEN // 4**NAME % 4 == NUMBER:
        value = word.to(tl.float64, bitcast=True).to(DTYPE)
    elif GIVEN // 4**NAME % 4 == SCALAR:
        value = tl.load(word.to(tl.pointer_type(DTYPE)))
    else:
        value = tl.load(word.to(tl.pointer_type(DTYPE)) + place, mask=known)
    return value


@triton.jit
def _times(value, table, place, known, GIVEN: constexpr, NAME: constexpr):
    """Multiply by a coefficient; one that is left out is 1."""
    if GIVEN // 4**NAME % 4:
        value *= _coefficient(table, place, known, GIVEN, NAME, value.dtype)
    return value


@triton.jit
def _plus(value, factor, table, place, known, GIVEN: constexpr, NAME: constexpr):
    """Add a coefficient times ``factor``; one that is left out is 0, whatever the factor is."""
    if GIVEN // 4**NAME % 4:
        value += _coefficient(table, place, known, GIVEN, NAME, value.dtype) * factor
    return value


@triton.jit
def _lerp(start, end, weight):
    """Interpolate in the form that torch takes, so that results agree to rounding."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def update(owner, blocks, table, GIVEN: constexpr, TENSORS: constexpr, DTYPE: constexpr):
    """Change one tensor by the affine pass, two or three by that of SGD, four or five by that of Adam.

    The affine pass is a step of SGD without gradients: its ``times`` is ``keep``, and its ``plus`` is ``push``.
    """
    number, block, item = _item(owner, blocks)
    for kind in tl.static_range(3):
        if tl.load(block + KIND) == kind:
            _update_item(block, item, table, table + NUM_NAMES + number * TENSORS, GIVEN, TENSORS, DTYPE, kind)


@triton.jit
def _update_item(
    block, item, table, tensors, GIVEN: constexpr, TENSORS: constexpr, DTYPE: constexpr, KIND_OF: constexpr
):
    """Change one item, SIZE elements of WIDTH lines at a time; everything is read once and written once."""
    WIDTH: constexpr = 1 if KIND_OF == LONG else (16 if KIND_OF == SHORT else 128)
    SIZE: constexpr = 1024 if KIND_OF == LONG else (32 if KIND_OF == SHORT else 8)
    line, known, across = _lines(block, item, KIND_OF, WIDTH)
    _, start, end = _part(block, item, WIDTH)
    at = tl.load(block + FIRST_PLACE) + line // tl.load(block + LINES_OF_PLACE).to(tl.int32)
    for first in range(start, end, SIZE):
        inside, along = _elements(block, first, end, KIND_OF, SIZE)
        inside = known & inside
        offsets = across + along
        weights = tl.load(tensors).to(tl.pointer_type(DTYPE)) + offsets
        w = tl.load(weights, mask=inside)
        if TENSORS > 1:
            g = tl.load(tl.load(tensors + 1).to(tl.pointer_type(DTYPE)) + offsets, mask=inside)
        if TENSORS == 3:
            m = _momentum(w, g, tensors, offsets, inside, table, at, known, GIVEN, DTYPE)
        if TENSORS > 3:
            m = _adam_quotient(w, g, tensors, offsets, inside, table, at, known, GIVEN, TENSORS, DTYPE)
        # w = keep w + move m + pull g + push
        w = _times(w, table, at, known, GIVEN, KEEP)
        if TENSORS > 2:
            w = _plus(w, m, table, at, known, GIVEN, MOVE)
        if TENSORS > 1:
            w = _plus(w, g, table, at, known, GIVEN, PULL)
        w = _plus(w, 1.0, table, at, known, GIVEN, PUSH)
        tl.store(weights, w, mask=inside)


@triton.jit
def _momentum(w, g, tensors, offsets, inside, table, at, known, GIVEN: constexpr, DTYPE: constexpr):
    """Update the momentum of some elements: m = fade m + gain g + shift + decay w."""
    momenta = tl.load(tensors + 2).to(tl.pointer_type(DTYPE)) + offsets
    m = _times(tl.load(momenta, mask=inside), table, at, known, GIVEN, FADE)
    m = _plus(m, w, table, at, known, GIVEN, DECAY)
    m = _plus(m, g, table, at, known, GIVEN, GAIN)
    m = _plus(m, 1.0, table, at, known, GIVEN, SHIFT)
    tl.store(momenta, m, mask=inside)
    return m


@triton.jit
def _adam_quotient(
    w, g, tensors, offsets, inside, table, at, known, GIVEN: constexpr, TENSORS: constexpr, DTYPE: constexpr
):
    """Update Adam's state of some elements, and return m / (root sqrt(v) + eps)."""
    d = _times(g, table, at, known, GIVEN, GAIN)
    d = _plus(d, 1.0, table, at, known, GIVEN, SHIFT)
    d = _plus(d, w, table, at, known, GIVEN, DECAY)
    means = tl.load(tensors + 2).to(tl.pointer_type(DTYPE)) + offsets
    m = _lerp(tl.load(means, mask=inside), d, _coefficient(table, at, known, GIVEN, FIRST, DTYPE))
    tl.store(means, m, mask=inside)
    squares = tl.load(tensors + 3).to(tl.pointer_type(DTYPE)) + offsets
    second = _coefficient(table, at, known, GIVEN, SECOND, DTYPE)
    v = (1 - second) * tl.load(squares, mask=inside) + second * d * d  # no difference: infinities stay infinite
    tl.store(squares, v, mask=inside)
    if TENSORS > 4:
        maxima = tl.load(tensors + 4).to(tl.pointer_type(DTYPE)) + offsets
        largest = tl.load(maxima, mask=inside)
        # As torch.maximum does, and unlike tl.maximum by default, keep what is not a number.
        v = tl.where((v > largest) | (v != v), v, largest)
        tl.store(maxima, v, mask=inside)
    # In float32 Triton's own root and division are approximate.
    root = tl.sqrt_rn(v) if DTYPE == tl.float32 else tl.sqrt(v)
    root = _times(root, table, at, known, GIVEN, ROOT)
    root = _plus(root, 1.0, table, at, known, GIVEN, EPS)
    return tl.div_rn(m, root) if DTYPE == tl.float32 else m / root
