"""
Documents of token ids to rows of one length.

    batch = pack(documents, length)          every row at once
    plan(lengths, length, method)            which piece of which document stands in which row: only lengths are read
    fill(plan, rows, ids, offsets)           some of these rows, from documents that stand one behind the other in `ids`

A row is T + 1 tokens: the model reads the first T, and the target of each is its right neighbour. A token sees its own
document (or the piece of it that is in the row) and nothing else, and the first token of a document is never a target,
because nothing that could announce it is visible. So a packed row computes what its documents would compute alone; only
a document that is cut into pieces loses context, never a target: the last token of one piece is the first of the next.
"""

from array import array
from typing import NamedTuple

import numpy as np

LARGEST = np.iinfo(np.int32).max


class Batch(NamedTuple):
    """Rows of tokens for a model, as a trainer takes them.

    tokens  (B, T + 1) int32
    start   (B, T) int32: token t sees tokens start[t] to t, as `functional.attention` takes it. Never decreasing along
            a row; padding sees itself alone.
    mask    (B, T) bool: whether the target of token t, which is tokens[t + 1], counts in the loss
    """

    tokens: np.ndarray
    start: np.ndarray
    mask: np.ndarray

    @property
    def x(self):
        """What the model reads, (B, T)."""
        return self.tokens[:, :-1]

    @property
    def y(self):
        """The targets, (B, T)."""
        return self.tokens[:, 1:]


class Plan(NamedTuple):
    """Which tokens stand in which row: 12 bytes for each piece of a document and 8 for each row.

    document, begin, end  (P,) int32: piece p is tokens begin[p] up to end[p] of document[p]
    first                 (R + 1,) int64: row r holds pieces first[r] up to first[r + 1], from left to right
    length                T: a row has room for T + 1 tokens
    """

    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    first: np.ndarray
    length: int

    @property
    def rows(self):
        """The number of rows, R."""
        return len(self.first) - 1

    @property
    def utilisation(self):
        """The part of all R (T + 1) places that hold a token and not padding; nan without rows."""
        places = self.rows * (self.length + 1)
        return int((self.end - self.begin).sum(dtype=np.int64)) / places if places else float("nan")


def pack(documents, length, method="best_fit", pad_id=0):
    """All documents in rows of length + 1 tokens, as one Batch.

    documents  sequences of ids, or pairs (ids, mask) whose mask says which tokens are trained, as `minillm.chat.render`
               returns them; without a mask, all are. The first token of a document is never trained, so a document of
               one token takes its place and trains nothing.
    method     "best_fit", "greedy" or "pad": see `plan`
    pad_id     the token in places that no document fills

    ValueError: a document that is empty, ids that are not whole numbers from 0 to 2^31 - 1, a mask of another length or
    with other values than 0 and 1 (all name the document); an unknown method, a length below 1.
    """
    whole("pad_id", pad_id, 0)
    ids, offsets, mask = join(documents)
    rows = plan(np.diff(offsets), length, method)
    return fill(rows, np.arange(rows.rows), ids, offsets, mask, pad_id)


def join(documents):
    """Documents, as `pack` takes them, one behind the other: ids (N,) int32, offsets (n + 1,) int64, mask (N,) bool.

    Document i is ids[offsets[i] : offsets[i + 1]]. The mask is None if no document has one. Errors as `pack`.
    """
    parts, masks = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    any_mask = False
    for n, document in enumerate(documents):
        # render's pair is a tuple of two sequences, where a tuple of ids is one of numbers
        masked = isinstance(document, tuple) and len(document) == 2 and np.ndim(document[0]) == 1
        part = np.asarray(document[0] if masked else document)
        if part.size == 0:
            raise ValueError(f"document {n} is empty")
        if part.ndim != 1 or part.dtype.kind not in "iu":
            raise ValueError(f"document {n} has to be one sequence of whole numbers, not {part.dtype} {part.shape}")
        if part.max() > LARGEST or part.min() < 0:
            wrong = next(i for i in part.tolist() if not 0 <= i <= LARGEST)
            raise ValueError(f"document {n} has the id {wrong}, and ids are from 0 to {LARGEST}")
        trained = np.asarray(document[1]) if masked else np.ones(part.size, bool)
        if trained.shape != part.shape:
            raise ValueError(f"document {n} has {part.size} ids and a mask of shape {trained.shape}")
        if trained.dtype != bool and not np.isin(trained, (0, 1)).all():
            raise ValueError(f"document {n} has a mask with other values than 0 and 1")
        parts.append(part)
        masks.append(trained.astype(bool, copy=False))
        any_mask |= masked
    offsets = np.cumsum([part.size for part in parts], dtype=np.int64)
    ids = np.concatenate(parts, dtype=np.int32, casting="unsafe")
    return ids, offsets, np.concatenate(masks) if any_mask else None


# ------------------------------------------------------------------ which piece goes where


def plan(lengths, length, method="best_fit"):
    """The Plan for documents of these lengths: the same lengths always give the same.

    lengths  (n,) int, tokens per document
    length   T
    method   "best_fit"  documents stay whole, if they are not longer than a row; rows are padded. For pretraining and
                         SFT.
             "greedy"    all documents as one stream, cut after every T tokens: no padding but in the last row, and
                         documents that cross a cut lose context.
             "pad"       one document per row: no packing.

    Each target of each document is in exactly one row. Documents longer than a row are cut into pieces of T + 1 tokens,
    which overlap by one, and a rest. O(n log n).
    ValueError: no 1-d array of whole numbers from 1 to 2^31 - 1; an unknown method; a length below 1.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise ValueError(f"lengths has to be a 1-d array of whole numbers, not {lengths.dtype} {lengths.shape}")
    whole("length", length, 1)
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: {', '.join(METHODS)}")
    if not lengths.size:
        return Plan(*np.zeros((3, 0), np.int32), np.zeros(1, np.int64), length)
    wrong = np.flatnonzero((lengths < 1) | (lengths > LARGEST))
    if wrong.size:
        found = "is empty" if lengths[wrong[0]] == 0 else f"has {lengths[wrong[0]]} tokens"
        raise ValueError(f"document {wrong[0]} {found}, and a document has from 1 to {LARGEST} tokens")
    document, begin, end, first = METHODS[method](lengths.astype(np.int64), length)
    return Plan(*(part.astype(np.int32) for part in (document, begin, end)), first, length)


def greedy(lengths, T):
    """The stream of all documents in windows of T + 1 tokens, each starting with the last token of the one before."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    left = np.arange(0, max(offsets[-1] - 1, 1), T)  # a lone token is a row, too
    right = np.minimum(left + T + 1, offsets[-1])
    earliest = np.searchsorted(offsets, left, side="right") - 1
    count = np.searchsorted(offsets, right, side="left") - earliest
    document = ranges(earliest, count)
    begin = np.maximum(np.repeat(left, count) - offsets[document], 0)
    end = np.minimum(np.repeat(right, count) - offsets[document], lengths[document])
    return document, begin, end, np.concatenate([[0], np.cumsum(count)])


def best_fit(lengths, T):
    """Best-fit decreasing (Johnson 1973): the longest piece first, each into the fullest row with room for it."""
    document, begin, end = split(lengths, T)
    row = best_fit_rows(end - begin, T + 1)
    order = np.argsort(row, kind="stable")  # in a row, documents keep their order
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return document[order], begin[order], end[order], first


def one_per_row(lengths, T):
    """A row for each document, or for each piece of a long one."""
    document, begin, end = split(lengths, T)
    return document, begin, end, np.arange(len(document) + 1)


METHODS = {"best_fit": best_fit, "greedy": greedy, "pad": one_per_row}


def split(lengths, T):
    """(document, begin, end) of pieces of at most T + 1 tokens. The token at a cut is in both pieces, as the target in
    the one and as what is read in the other."""
    count = np.maximum(1, -(-(lengths - 1) // T))
    document = np.repeat(np.arange(len(lengths)), count)
    begin = T * ranges(np.zeros_like(count), count)
    return document, begin, np.minimum(begin + T + 1, lengths[document])


def best_fit_rows(sizes, room):
    """The row of each piece, (P,) int32. Rows with the same room left are a stack, and one int has a bit for each stack
    that is not empty: the fullest row with enough room is its lowest bit from `size` on."""
    order = np.argsort(-sizes, kind="stable")
    whole_rows = int(np.count_nonzero(sizes == room))  # they come first, and nothing joins them
    found = array("i", range(whole_rows))
    stacks, open_stacks = {}, 0
    rows = whole_rows
    for n in range(whole_rows, len(order), 1 << 16):  # in parts: as Python's ints, sizes would take 36 bytes each
        for size in sizes[order[n : n + (1 << 16)]].tolist():
            fitting = open_stacks >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1
                row = stacks[left].pop()
                if not stacks[left]:
                    open_stacks ^= 1 << left
            else:
                left, row = room, rows
                rows += 1
            left -= size
            found.append(row)
            if left:
                stacks.setdefault(left, []).append(row)
                open_stacks |= 1 << left
    row_of = np.empty(len(sizes), np.int32)
    row_of[order] = found
    return row_of


# ------------------------------------------------------------------ rows of tokens


def fill(plan, rows, ids, offsets, mask=None, pad_id=0):
    """The Batch of some rows of a plan, which may repeat.

    rows          (B,) int, from 0 to plan.rows - 1
    ids, offsets  the documents the plan was made for, as from `join`; `ids` may be memory-mapped, and only what the
                  rows need is read
    mask          None, or (N,) bool for each of ids: whether it is trained
    """
    width = plan.length + 1
    count = plan.first[rows + 1] - plan.first[rows]
    piece = ranges(plan.first[rows], count)
    begin, size = plan.begin[piece], plan.end[piece] - plan.begin[piece]
    row = np.repeat(np.arange(len(rows)), count)
    before = np.cumsum(size, dtype=np.int64) - size
    slot = before - np.repeat(before[np.cumsum(count) - count], count)  # where in its row a piece begins
    source = ranges(offsets[plan.document[piece]] + begin, size)
    place = ranges(row * width + slot, size)

    tokens = np.full((len(rows), width), pad_id, np.int32)
    tokens.reshape(-1)[place] = ids[source]
    start = np.tile(np.arange(width, dtype=np.int32), (len(rows), 1))
    start.reshape(-1)[place] = np.repeat(slot, size)
    trained = np.zeros((len(rows), width), bool)
    trained.reshape(-1)[place] = True if mask is None else mask[source]
    trained[row, slot] = False  # the first of a piece: what announces it is elsewhere, or nowhere
    return Batch(tokens, np.ascontiguousarray(start[:, :-1]), np.ascontiguousarray(trained[:, 1:]))


def ranges(starts, counts):
    """starts[0], starts[0] + 1, ... (counts[0] numbers), then starts[1], ... in one int64 array."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def whole(name, value, least):
    """ValueError where `value` is not a whole number from `least` on."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r} must be a whole number from {least} on")
