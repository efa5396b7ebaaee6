"""bfloat16 as its bits, exp and tanh, and sixteen lanes at once."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.compiled.threads import inlined

LANES = 16
"""float32 values in a vector. LLVM cuts it into what the processor has."""


@intrinsic
def _float_of_bits(typing, number):
    return types.float32(types.uint32), lambda context, builder, _, given: builder.bitcast(given[0], FLOAT)


@intrinsic
def _bits_of_float(typing, number):
    return types.uint32(types.float32), lambda context, builder, _, given: builder.bitcast(given[0], I32)


@inlined
def widen(number):
    """bfloat16 bits → float32."""
    return _float_of_bits(np.uint32(number) << np.uint32(16))


@inlined
def narrow(number):
    """float32 → bfloat16 bits, to the nearest, ties to even; NaN stays NaN."""
    wide = _bits_of_float(number)
    rounded = (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if number == number else np.uint16(0x7FC0)


@inlined
def exp(number):
    """eˣ for x ≤ 88, to 5 parts in a million; below -87 it is e⁻⁸⁷. 2ⁿ by its bits, the rest by its series."""
    if number < np.float32(-87.0):
        number = np.float32(-87.0)
    turns = number * np.float32(1.4426950408889634)
    whole = np.floor(turns + np.float32(0.5))
    rest = (turns - whole) * np.float32(0.6931471805599453)
    power = np.float32(1 / 5040)
    power = power * rest + np.float32(1 / 720)
    power = power * rest + np.float32(1 / 120)
    power = power * rest + np.float32(1 / 24)
    power = power * rest + np.float32(1 / 6)
    power = power * rest + np.float32(1 / 2)
    power = power * rest + np.float32(1)
    power = power * rest + np.float32(1)
    return power * _float_of_bits(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@inlined
def tanh(number):
    """1 - 2 / (e²ˣ + 1), to one part in a million of 1; a NaN stays one."""
    if number > np.float32(20):
        return np.float32(1)
    if number < np.float32(-20):
        return np.float32(-1)
    return np.float32(1) - np.float32(2) / (exp(np.float32(2) * number) + np.float32(1))


@inlined
def silu(number):
    """x / (1 + e⁻ˣ); where e⁻ˣ would overflow 0, and NaN for -∞ as x · σ(x) is."""
    if number > np.float32(-88):
        return number / (np.float32(1) + exp(-number))
    return number * np.float32(0)


# Sixteen lanes in registers. LLVM vectorises plain loops by itself; what it does not do is to keep a head's sums in
# registers over a loop, since it cannot know that scores and sums lie apart. These say it.

I16, I32, FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()
VECTOR, VECTOR_I16, VECTOR_I32 = (ir.VectorType(each, LANES) for each in (FLOAT, I16, I32))


class _Lanes:
    """Writes vector instructions at a builder's place. Addresses are integers, offsets bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def pointer(self, address: ir.Value, offset: int, to: ir.Type) -> ir.Value:
        moved = self.builder.add(address, ir.Constant(address.type, offset))
        return self.builder.inttoptr(moved, to.as_pointer())

    def load(self, address: ir.Value, offset: int) -> ir.Value:
        return self.builder.load(self.pointer(address, offset, VECTOR), align=4)

    def load_bfloat16(self, address: ir.Value, offset: int) -> ir.Value:
        narrow = self.builder.load(self.pointer(address, offset, VECTOR_I16), align=2)
        wide = self.builder.shl(self.builder.zext(narrow, VECTOR_I32), ir.Constant(VECTOR_I32, [16] * LANES))
        return self.builder.bitcast(wide, VECTOR)

    def load_everywhere(self, address: ir.Value) -> ir.Value:
        one = self.builder.load(self.pointer(address, 0, FLOAT), align=4)
        nothing = ir.Constant(VECTOR, ir.Undefined)
        first = self.builder.insert_element(nothing, one, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(VECTOR_I32, [0] * LANES))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self._call(f"llvm.fma.v{LANES}f32", ir.FunctionType(VECTOR, [VECTOR] * 3), a, b, c)

    def sum(self, vector: ir.Value) -> ir.Value:
        name, type_ = f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FunctionType(FLOAT, [FLOAT, VECTOR])
        return self._call(name, type_, ir.Constant(FLOAT, -0.0), vector, fastmath=("reassoc",))

    def prefetch(self, address: ir.Value, offset: int) -> None:
        byte = ir.IntType(8).as_pointer()
        type_ = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        to_read, into_all_caches, of_data = (ir.Constant(I32, each) for each in (0, 3, 1))
        where = self.pointer(address, offset, ir.IntType(8))
        self._call("llvm.prefetch.p0", type_, where, to_read, into_all_caches, of_data)

    def _call(self, name: str, type_: ir.FunctionType, *given: ir.Value, fastmath: tuple[str, ...] = ()) -> ir.Value:
        function = cgutils.get_or_insert_function(self.builder.module, type_, name)
        return self.builder.call(function, given, fastmath=fastmath)


def _number(literal: types.Type) -> int | None:
    return literal.literal_value if isinstance(literal, types.IntegerLiteral) else None


CACHE_LINE = 64


@intrinsic(prefer_literal=True)
def prefetch_page(typing, address, block_size, head_dim):
    """Asks for a bfloat16 page [block_size, head_dim], both constants; nothing waits for it."""
    positions, dims = _number(block_size), _number(head_dim)
    if positions is None or dims is None:
        return None

    def write(context, builder, signature, given):
        for offset in range(0, positions * dims * 2, CACHE_LINE):
            _Lanes(builder).prefetch(given[0], offset)
        return context.get_dummy_value()

    return types.void(types.intp, block_size, head_dim), write


@intrinsic(prefer_literal=True)
def dot_heads(typing, key, queries, scores, row_bytes, num_heads, head_dim):
    """scores[head] = Σ key · queries[head] for a bfloat16 key [head_dim] and float32 queries [num_heads, head_dim].

    The first four are addresses and a distance: scores of two heads lie `row_bytes` apart. The last two are constants.
    """
    heads, dims = _number(num_heads), _number(head_dim)
    if heads is None or dims is None:
        return None

    def write(context, builder, signature, given):
        lanes, (key, queries, score, row_bytes) = _Lanes(builder), given[:4]
        parts = [lanes.load_bfloat16(key, 2 * at) for at in range(0, dims, LANES)]
        for head in range(heads):
            total = ir.Constant(VECTOR, [0.0] * LANES)
            for i, part in enumerate(parts):
                total = lanes.multiply_add(part, lanes.load(queries, 4 * (head * dims + i * LANES)), total)
            builder.store(lanes.sum(total), lanes.pointer(score, 0, FLOAT), align=4)
            score = builder.add(score, row_bytes)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, num_heads, head_dim), write


@intrinsic(prefer_literal=True)
def add_weighted(typing, values, weights, row_bytes, sums, count, num_heads, head_dim):
    """sums[head] += Σ weights[head, i] · values[i] over `count` bfloat16 values [head_dim], one behind another.

    Weights of two heads lie `row_bytes` apart; `sums` is [num_heads, head_dim]; `count` is at least 1. The sums stay in
    registers, 32 vectors at most where the processor has as many.
    """
    heads, dims = _number(num_heads), _number(head_dim)
    if heads is None or dims is None:
        return None

    def write(context, builder, signature, given):
        lanes, (values, weights, row_bytes, sums, count) = _Lanes(builder), given[:5]
        offsets = [4 * (head * dims + at) for head in range(heads) for at in range(0, dims, LANES)]
        began, before = builder.block, [lanes.load(sums, offset) for offset in offsets]
        body, after = builder.append_basic_block("weigh"), builder.append_basic_block("weighed")
        builder.branch(body)
        builder.position_at_end(body)
        left, value, weight = (_loop_value(builder, each, began) for each in (count, values, weights))
        totals = [_loop_value(builder, each, began) for each in before]
        parts = [lanes.load_bfloat16(value, 2 * at) for at in range(0, dims, LANES)]
        grown, of_head = [], weight
        for head in range(heads):
            factor = lanes.load_everywhere(of_head)
            for i, part in enumerate(parts):
                grown.append(lanes.multiply_add(factor, part, totals[head * len(parts) + i]))
            of_head = builder.add(of_head, row_bytes)
        one, number = ir.Constant(left.type, 1), lambda size: ir.Constant(left.type, size)
        nexts = [builder.sub(left, one), builder.add(value, number(2 * dims)), builder.add(weight, number(4))]
        for phi, grown_value in zip([left, value, weight, *totals], [*nexts, *grown], strict=True):
            phi.add_incoming(grown_value, body)
        builder.cbranch(builder.icmp_signed(">", nexts[0], number(0)), body, after)
        builder.position_at_end(after)
        for offset, total in zip(offsets, grown, strict=True):
            builder.store(total, lanes.pointer(sums, offset, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, num_heads, head_dim), write


def _loop_value(builder: ir.IRBuilder, first: ir.Value, before: ir.Block) -> ir.Value:
    phi = builder.phi(first.type)
    phi.add_incoming(first, before)
    return phi


@intrinsic(prefer_literal=True)
def multiply_rows(typing, weights, row_bytes, x, x_bytes, products, steps, num_rows, num_x, bytes_ahead):
    """products[i, r] = Σ weights[r] · x[i] over 32 * `steps` elements, at least one step.

    `weights` is the address of bfloat16 rows, `x` of float32 rows, `products` of float32 [num_x, num_rows]; the last
    three are constants. Several rows are read side by side and asked for `bytes_ahead` of their use: one stream alone
    does not keep a core's memory busy.
    """
    rows, columns, ahead = _number(num_rows), _number(num_x), _number(bytes_ahead)
    if rows is None or columns is None or ahead is None:
        return None

    def write(context, builder, signature, given):
        lanes, (weights, row_bytes, x, x_bytes, products, steps) = _Lanes(builder), given[:6]
        began, body, after = builder.block, *(builder.append_basic_block(name) for name in ("multiply", "multiplied"))
        builder.branch(body)
        builder.position_at_end(body)
        left, weight, first_x = (_loop_value(builder, each, began) for each in (steps, weights, x))
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        sums = [[_loop_value(builder, zero, began) for _ in range(2)] for _ in range(rows * columns)]
        moved = lambda address, by: builder.add(address, ir.Constant(address.type, by))  # noqa: E731
        of_x, at = [], first_x
        for _ in range(columns):
            of_x.append([lanes.load(at, half * 4 * LANES) for half in range(2)])
            at = builder.add(at, x_bytes)
        grown, at = [], weight
        for row in range(rows):
            lanes.prefetch(at, ahead)
            parts = [lanes.load_bfloat16(at, half * 2 * LANES) for half in range(2)]
            for column in range(columns):
                before = sums[row * columns + column]
                grown.append([lanes.multiply_add(*each) for each in zip(parts, of_x[column], before, strict=True)])
            at = builder.add(at, row_bytes)
        left_after = moved(left, -1)
        phis = [left, weight, first_x, *(each for pair in sums for each in pair)]
        nexts = [left_after, moved(weight, 4 * LANES), moved(first_x, 8 * LANES), *(e for pair in grown for e in pair)]
        for phi, value in zip(phis, nexts, strict=True):
            phi.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed(">", left_after, ir.Constant(left.type, 0)), body, after)
        builder.position_at_end(after)
        for index, (first, second) in enumerate(grown):
            row, column = divmod(index, columns)
            total = lanes.sum(builder.fadd(first, second))
            builder.store(total, lanes.pointer(products, 4 * (column * rows + row), FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, num_rows, num_x, bytes_ahead), write
