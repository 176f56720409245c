"""Triton kernels of spatial decay attention: the decay is computed in registers, from gates and coordinates.

Tokens attend to those of their group: one group holds the whole grid, and rows or columns of a decomposed attention
are a group each. Token number n of group g is g * group_stride + n * token_stride, so that no tensor is copied,
whatever its strides (only the last dimension must be contiguous). The output and the gradients are contiguous in the
shape (batch, tokens, heads, D), so that models join the heads without copies too.

Pruned attention takes the tokens in another order: number n is order[n], and vectors of one number a token are in that
order already. A block then visits the tiles of its list only: their count, and their numbers. Without pruning, `order`
and `lists` are `None`, and nothing of this is compiled.

Logits are in units of log 2, as `exp2` is faster than `exp`: s_ij = log2(e) (q_i . k_j * scale + (u_i + u_j) d_ij).

A head of size D is split into D0 + D1 columns, powers of two, as Triton needs: 72 = 64 + 8 of a block of 16.

Every kernel may be started again with the same arguments: it changes none of its inputs.
"""

import triton
import triton.language as tl

from . import pruning

TILE = tl.constexpr(pruning.TILE)
#: The row of tokens beyond the last one.
FAR = tl.constexpr(1e30)
#: Where the running maximum starts: finite, so that keys without any weight make no NaN.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
#: The interpreter, which runs kernels on CPUs for tests, multiplies bf16 numbers as if they were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load_rows(base, tokens, valid, stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Load COLUMNS columns, from FIRST on, of some tokens; zeros beyond D and for tokens that are not valid."""
    columns = FIRST + tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < D)[None, :]
    return tl.load(base + tokens[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, values, tokens, valid, stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < D)[None, :]
    tl.store(base + tokens[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _program(tokens, heads, groups, SIZE: tl.constexpr):
    """Return the block of this program, its group, its sample and head, and the number of both together."""
    blocks = tl.cdiv(tokens, SIZE)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % groups
    pair = (tl.program_id(0) // blocks // groups).to(tl.int64)
    return block, group, pair // heads, pair % heads, pair


@triton.jit
def _list(lists, pair, block, tokens, SIZE: tl.constexpr):
    """Return the list of the tile that a block is in."""
    tiles = tl.cdiv(tokens, TILE)
    return lists + (pair * tiles + block * SIZE // TILE) * (tiles + 1)


@triton.jit
def _first_place(lists, step, SIZE: tl.constexpr):
    """Return where the block of a step starts."""
    if lists is None:
        first = step * SIZE
    else:
        tile = step * SIZE // TILE
        first = (tl.load(lists + 1 + tile) - tile) * TILE + step * SIZE
    return first


@triton.jit
def _load_tokens(
    half_decay, coordinates, order, width, start, stride, first, count, SIZE: tl.constexpr, OWN: tl.constexpr
):
    """Load what a block of tokens is: where its rows and its numbers lie, which are valid, decays and coordinates.

    Beyond the last token, a program's own block repeats it, to store nothing of it. Blocks that it visits go on with
    tokens that are far away and decay without limit: their logits are -inf, without any other mask.
    """
    places = first + tl.arange(0, SIZE)
    valid = places < count
    if OWN:
        places = tl.minimum(places, count - 1)
    inside = places < count
    at = start + places * stride if order is None else places
    tokens = at if order is None else tl.load(order + places, mask=inside, other=0)
    u = tl.load(half_decay + at, mask=inside, other=float("-inf")) * LOG2_E
    if coordinates is None:
        y = tl.floor((tokens + 0.5) * (1.0 / width))  # exact below 2^22 tokens, and faster than dividing integers
        x = tokens - y * width
        y = tl.where(inside, y, FAR)
    else:
        y = tl.load(coordinates + 2 * tokens, mask=inside, other=FAR)
        x = tl.load(coordinates + 2 * tokens + 1, mask=inside, other=0.0)
    return tokens.to(tl.int64), at, valid, u, y, x


@triton.jit
def _distance(y_i, x_i, y_j, x_j, CLAMP: tl.constexpr):
    """Return the Manhattan distance of all pairs; at most 1 for the variant without distances."""
    distance = tl.abs(y_i[:, None] - y_j[None, :]) + tl.abs(x_i[:, None] - x_j[None, :])
    if CLAMP:
        distance = tl.minimum(distance, 1.0)
    return distance


@triton.jit
def forward_kernel(
    query, key, value, output, lse,
    half_decay, coordinates, order, lists,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    coordinate_batch, width, heads, tokens, all_tokens, groups, group_stride, token_stride, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CLAMP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the output of one block of queries, and the logarithm of its softmax's denominator."""
    block, group, batch, head, pair = _program(tokens, heads, groups, BLOCK_M)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    output += (batch * all_tokens * heads + head) * D
    half_decay += pair * all_tokens
    lse += pair * all_tokens
    if coordinates is not None:
        coordinates += batch * coordinate_batch
    start = group * group_stride

    i, at_i, valid_i, u_i, y_i, x_i = _load_tokens(
        half_decay, coordinates, order, width, start, token_stride, block * BLOCK_M, tokens, BLOCK_M, True
    )
    q0 = _load_rows(query, i, valid_i, query_token, 0, D0, D)
    maximum = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = _load_rows(query, i, valid_i, query_token, D0, D1, D)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    steps = tl.cdiv(tokens, BLOCK_N)
    if lists is not None:
        lists = _list(lists, pair, block, tokens, BLOCK_M)
        steps = tl.load(lists) * (TILE // BLOCK_N)
    for step in range(steps):
        first_j = _first_place(lists, step, BLOCK_N)
        j, _, valid_j, u_j, y_j, x_j = _load_tokens(
            half_decay, coordinates, order, width, start, token_stride, first_j, tokens, BLOCK_N, False
        )
        k0 = _load_rows(key, j, valid_j, key_token, 0, D0, D)
        scores = _dot(q0, tl.trans(k0), None, PRECISION)
        if D1 > 0:
            k1 = _load_rows(key, j, valid_j, key_token, D0, D1, D)
            scores = _dot(q1, tl.trans(k1), scores, PRECISION)
        logits = scores * (scale * LOG2_E) + (u_i[:, None] + u_j[None, :]) * _distance(y_i, x_i, y_j, x_j, CLAMP)
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        v0 = _load_rows(value, j, valid_j, value_token, 0, D0, D)
        acc0 = _dot(weights.to(v0.dtype), v0, acc0 * shrink[:, None], PRECISION)
        if D1 > 0:
            v1 = _load_rows(value, j, valid_j, value_token, D0, D1, D)
            acc1 = _dot(weights.to(v1.dtype), v1, acc1 * shrink[:, None], PRECISION)
        maximum = new_maximum
    _store_rows(output, acc0 / total[:, None], i, valid_i, heads * D, 0, D0, D)
    if D1 > 0:
        _store_rows(output, acc1 / total[:, None], i, valid_i, heads * D, D0, D1, D)
    tl.store(lse + at_i, maximum + tl.log2(total), mask=valid_i)


@triton.jit
def backward_query_kernel(
    query, key, value, output, grad_output, lse,
    half_decay, coordinates, order, lists,
    grad_query, exact_delta, row_sums,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    grad_output_batch, grad_output_head, grad_output_token,
    coordinate_batch, width, heads, tokens, all_tokens, groups, group_stride, token_stride, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CLAMP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ and the row sums of dS d of one block of queries.

    With dS = P (dP - delta), delta = sum_j P dP. Flash kernels take delta from the rounded output, near enough
    for dQ; in the row sums its error would be multiplied by the distances. So they are taken apart,
    sum_j dS d = sum_j P dP d - delta sum_j P d, and the exact delta is left for `backward_key_kernel`.
    """
    block, group, batch, head, pair = _program(tokens, heads, groups, BLOCK_M)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    grad_output += batch * grad_output_batch + head * grad_output_head
    first = pair * all_tokens
    half_decay += first
    lse += first
    row_sums += first
    exact_delta += first
    first_row = (batch * all_tokens * heads + head) * D
    output += first_row
    grad_query += first_row
    if coordinates is not None:
        coordinates += batch * coordinate_batch
    start = group * group_stride

    i, at_i, valid_i, u_i, y_i, x_i = _load_tokens(
        half_decay, coordinates, order, width, start, token_stride, block * BLOCK_M, tokens, BLOCK_M, True
    )
    q0 = _load_rows(query, i, valid_i, query_token, 0, D0, D)
    do0 = _load_rows(grad_output, i, valid_i, grad_output_token, 0, D0, D)
    o0 = _load_rows(output, i, valid_i, heads * D, 0, D0, D)
    delta_i = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        q1 = _load_rows(query, i, valid_i, query_token, D0, D1, D)
        do1 = _load_rows(grad_output, i, valid_i, grad_output_token, D0, D1, D)
        o1 = _load_rows(output, i, valid_i, heads * D, D0, D1, D)
        delta_i += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    lse_i = tl.load(lse + at_i, mask=valid_i, other=float("inf"))
    sum_i = tl.zeros([BLOCK_M], tl.float32)
    mean_distance = tl.zeros([BLOCK_M], tl.float32)
    du_i = tl.zeros([BLOCK_M], tl.float32)
    steps = tl.cdiv(tokens, BLOCK_N)
    if lists is not None:
        lists = _list(lists, pair, block, tokens, BLOCK_M)
        steps = tl.load(lists) * (TILE // BLOCK_N)
    for step in range(steps):
        first_j = _first_place(lists, step, BLOCK_N)
        j, _, valid_j, u_j, y_j, x_j = _load_tokens(
            half_decay, coordinates, order, width, start, token_stride, first_j, tokens, BLOCK_N, False
        )
        k0 = _load_rows(key, j, valid_j, key_token, 0, D0, D)
        v0 = _load_rows(value, j, valid_j, value_token, 0, D0, D)
        scores = _dot(q0, tl.trans(k0), None, PRECISION)
        grad_weights = _dot(do0, tl.trans(v0), None, PRECISION)
        if D1 > 0:
            k1 = _load_rows(key, j, valid_j, key_token, D0, D1, D)
            v1 = _load_rows(value, j, valid_j, value_token, D0, D1, D)
            scores = _dot(q1, tl.trans(k1), scores, PRECISION)
            grad_weights = _dot(do1, tl.trans(v1), grad_weights, PRECISION)
        distance = _distance(y_i, x_i, y_j, x_j, CLAMP)
        logits = scores * (scale * LOG2_E) + (u_i[:, None] + u_j[None, :]) * distance
        weights = tl.exp2(logits - lse_i[:, None])
        sum_i += tl.sum(weights * grad_weights, 1)
        mean_distance += tl.sum(weights * distance, 1)
        du_i += tl.sum(weights * grad_weights * distance, 1)
        grad_scores = (weights * (grad_weights - delta_i[:, None])).to(k0.dtype)
        dq0 = _dot(grad_scores, k0, dq0, PRECISION)
        if D1 > 0:
            dq1 = _dot(grad_scores, k1, dq1, PRECISION)
    _store_rows(grad_query, dq0 * scale, i, valid_i, heads * D, 0, D0, D)
    if D1 > 0:
        _store_rows(grad_query, dq1 * scale, i, valid_i, heads * D, D0, D1, D)
    tl.store(row_sums + at_i, du_i - sum_i * mean_distance, mask=valid_i)
    tl.store(exact_delta + at_i, sum_i, mask=valid_i)


@triton.jit
def backward_key_kernel(
    query, key, value, grad_output, exact_delta, lse,
    half_decay, coordinates, order, lists,
    grad_key, grad_value, row_sums, grad_half_decay,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    grad_output_batch, grad_output_head, grad_output_token,
    coordinate_batch, width, heads, tokens, all_tokens, groups, group_stride, token_stride, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CLAMP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dK, dV and the column sums of dS d of one block of keys, transposed: keys are rows here.

    It adds the row sums of `backward_query_kernel`, and takes its exact delta.
    """
    block, group, batch, head, pair = _program(tokens, heads, groups, BLOCK_N)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    grad_output += batch * grad_output_batch + head * grad_output_head
    first = pair * all_tokens
    half_decay += first
    lse += first
    exact_delta += first
    row_sums += first
    grad_half_decay += first
    first_row = (batch * all_tokens * heads + head) * D
    grad_key += first_row
    grad_value += first_row
    if coordinates is not None:
        coordinates += batch * coordinate_batch
    start = group * group_stride

    j, at_j, valid_j, u_j, y_j, x_j = _load_tokens(
        half_decay, coordinates, order, width, start, token_stride, block * BLOCK_N, tokens, BLOCK_N, True
    )
    k0 = _load_rows(key, j, valid_j, key_token, 0, D0, D)
    v0 = _load_rows(value, j, valid_j, value_token, 0, D0, D)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        k1 = _load_rows(key, j, valid_j, key_token, D0, D1, D)
        v1 = _load_rows(value, j, valid_j, value_token, D0, D1, D)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    du_j = tl.zeros([BLOCK_N], tl.float32)
    steps = tl.cdiv(tokens, BLOCK_M)
    if lists is not None:
        lists = _list(lists, pair, block, tokens, BLOCK_N)
        steps = tl.load(lists) * (TILE // BLOCK_M)
    for step in range(steps):
        first_i = _first_place(lists, step, BLOCK_M)
        i, at_i, valid_i, u_i, y_i, x_i = _load_tokens(
            half_decay, coordinates, order, width, start, token_stride, first_i, tokens, BLOCK_M, False
        )
        q0 = _load_rows(query, i, valid_i, query_token, 0, D0, D)
        do0 = _load_rows(grad_output, i, valid_i, grad_output_token, 0, D0, D)
        scores = _dot(k0, tl.trans(q0), None, PRECISION)
        if D1 > 0:
            q1 = _load_rows(query, i, valid_i, query_token, D0, D1, D)
            do1 = _load_rows(grad_output, i, valid_i, grad_output_token, D0, D1, D)
            scores = _dot(k1, tl.trans(q1), scores, PRECISION)
        lse_i = tl.load(lse + at_i, mask=valid_i, other=float("inf"))
        delta_i = tl.load(exact_delta + at_i, mask=valid_i, other=0.0)
        distance = _distance(y_j, x_j, y_i, x_i, CLAMP)
        logits = scores * (scale * LOG2_E) + (u_j[:, None] + u_i[None, :]) * distance
        weights = tl.exp2(logits - lse_i[None, :])  # zero for queries that are not valid
        dv0 = _dot(weights.to(do0.dtype), do0, dv0, PRECISION)
        grad_weights = _dot(v0, tl.trans(do0), None, PRECISION)
        if D1 > 0:
            dv1 = _dot(weights.to(do1.dtype), do1, dv1, PRECISION)
            grad_weights = _dot(v1, tl.trans(do1), grad_weights, PRECISION)
        grad_logits = weights * (grad_weights - delta_i[None, :])
        du_j += tl.sum(grad_logits * distance, 1)
        grad_scores = grad_logits.to(q0.dtype)
        dk0 = _dot(grad_scores, q0, dk0, PRECISION)
        if D1 > 0:
            dk1 = _dot(grad_scores, q1, dk1, PRECISION)
    _store_rows(grad_value, dv0, j, valid_j, heads * D, 0, D0, D)
    _store_rows(grad_key, dk0 * scale, j, valid_j, heads * D, 0, D0, D)
    if D1 > 0:
        _store_rows(grad_value, dv1, j, valid_j, heads * D, D0, D1, D)
        _store_rows(grad_key, dk1 * scale, j, valid_j, heads * D, D0, D1, D)
    du_j += tl.load(row_sums + at_j, mask=valid_j, other=0.0)
    tl.store(grad_half_decay + at_j, du_j, mask=valid_j)
