"""minillm.data.pack: every target once, with exactly its own document in sight; packed, documents compute what they do
alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minillm import functional as F
from minillm.data.pack import LARGEST, METHODS, fill, join, pack, plan
from minillm.model import Config, Llama

STORIES = Path(__file__).parents[2] / "shared/data/pretrain/tinystories.jsonl"
PAD = 0

every_method = pytest.mark.parametrize("method", METHODS)
all_lengths = st.lists(st.integers(1, 40), max_size=20)


def numbered(lengths):
    """Documents whose tokens are 1, 2, 3, ... through all of them: an id says which document it is of, and where."""
    ends = np.cumsum(lengths, dtype=int)
    return [np.arange(end - n, end) + 1 for n, end in zip(lengths, ends, strict=True)]


# ------------------------------------------------------------------ what each token sees, and which are trained


def first_visible(method, offset, i, T):
    """Where in its document the context of token i begins, if the document begins at `offset` of the stream."""
    if method == "greedy":
        window = (offset + i - 1) // T * T
        return max(window - offset, 0)
    return (i - 1) // T * T


def walk(batch, documents, masks, method):
    """Assert of each place of each row what the module promises, and count that no target is missing."""
    place_of = {int(token): (d, i) for d, ids in enumerate(documents) for i, token in enumerate(ids)}
    offsets = np.cumsum([0, *map(len, documents)]).tolist()
    tokens, start, mask = batch
    B, T = start.shape
    assert (tokens.shape, tokens.dtype, start.dtype) == ((B, T + 1), np.int32, np.int32)
    assert (mask.shape, mask.dtype) == ((B, T), bool)
    assert batch.x.tolist() == tokens[:, :T].tolist() and batch.y.tolist() == tokens[:, 1:].tolist()
    found = []
    for b in range(B):
        for t in range(T):
            assert 0 <= start[b, t] <= t
            assert t == 0 or start[b, t - 1] <= start[b, t]
            token, target = int(tokens[b, t]), int(tokens[b, t + 1])
            if token == PAD:
                assert start[b, t] == t and target == PAD and not mask[b, t]
                continue
            d, i = place_of[token]
            seen = tokens[b, start[b, t] : t + 1].tolist()
            assert seen == documents[d][i + 1 - len(seen) : i + 1].tolist()
            follows = target != PAD and place_of[target] == (d, i + 1)
            assert mask[b, t] == (follows and masks[d][i + 1])
            if follows:
                assert i + 1 - len(seen) == first_visible(method, offsets[d], i + 1, T)
                found.append((d, i + 1))
    assert sorted(found) == [(d, i) for d, ids in enumerate(documents) for i in range(1, len(ids))]


@every_method
@given(lengths=all_lengths, T=st.integers(1, 17), data=st.data())
@example(lengths=[1], T=1, data=None)
@example(lengths=[5, 4, 9, 8], T=4, data=None)  # at, before and behind the end of a row
def test_every_target_is_there_once_and_sees_its_own_document_from_its_beginning(method, lengths, T, data):
    documents = numbered(lengths)
    masks = [np.ones(n, bool) for n in lengths]
    walk(pack(documents, T, method, PAD), documents, masks, method)
    if data is not None:
        masks = [np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in lengths]
        walk(pack(list(zip(documents, masks, strict=True)), T, method, PAD), documents, masks, method)


def test_five_tokens_by_hand():
    tokens, start, mask = pack([[11, 12, 13], ([21, 22], [True, True])], 5, pad_id=9)
    assert tokens.tolist() == [[11, 12, 13, 21, 22, 9]]
    assert start.tolist() == [[0, 0, 0, 3, 3]]
    assert mask.tolist() == [[True, True, False, True, False]]


def test_a_mask_is_about_the_target():
    """As render gives them: a prompt of two tokens, then an answer of two, whose first is the target of the prompt."""
    document = (np.array([5, 6, 7, 8], np.uint16), np.array([False, False, True, True]))
    assert pack([document], 4, "pad").mask.tolist() == [[False, True, True, False]]
    assert pack([document, [1, 2]], 6).mask.tolist() == [[False, True, True, False, True, False]]


def test_a_tuple_of_two_ids_is_a_document():
    assert pack([(3, 4)], 1).tokens.tolist() == [[3, 4]]


@every_method
def test_no_documents_are_no_rows(method):
    tokens, start, mask = pack([], 4, method)
    assert (tokens.shape, start.shape, mask.shape) == ((0, 5), (0, 4), (0, 4))


# ------------------------------------------------------------------ the plan


@every_method
@given(lengths=all_lengths, T=st.integers(1, 17))
def test_a_plan_is_the_same_each_time_and_its_rows_stand_alone(method, lengths, T):
    first, again = plan(lengths, T, method), plan(np.array(lengths, np.uint16), T, method)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    ids, offsets, _ = join(numbered(lengths))
    whole = fill(first, np.arange(first.rows), ids, offsets)
    some = np.random.default_rng(len(lengths)).integers(0, max(first.rows, 1), 5 if first.rows else 0)
    for part, all_rows in zip(fill(first, some, ids, offsets), whole, strict=True):
        assert np.array_equal(part, all_rows[some])


def naive_best_fit(sizes, room):
    """How full the rows are, by the definition: the longest first, each into the fullest row that has room."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [n for n, full in enumerate(rows) if full + size <= room]
        if fitting:
            rows[max(fitting, key=rows.__getitem__)] += size
        else:
            rows.append(size)
    return sorted(rows)


@given(lengths=st.lists(st.integers(1, 21), min_size=1, max_size=60), T=st.integers(1, 20))
def test_best_fit_is_best_fit_decreasing(lengths, T):
    rows = plan(lengths, T)
    sizes = rows.end - rows.begin
    assert sorted(np.add.reduceat(sizes, rows.first[:-1]).tolist()) == naive_best_fit(sizes.tolist(), T + 1)


@pytest.mark.parametrize(
    "lengths, sizes", [([7, 1, 30, 2, 2, 9], [9, 9, 9, 9, 9, 9, 3]), ([8, 9], [9, 9]), ([8, 10], [9, 9, 2]), ([1], [1])]
)
def test_greedy_pads_only_the_last_row(lengths, sizes):
    rows = plan(lengths, 8, "greedy")
    assert np.add.reduceat(rows.end - rows.begin, rows.first[:-1]).tolist() == sizes
    assert rows.utilisation == sum(sizes) / (9 * len(sizes))


def next_fit_rows(lengths, room):
    """How many rows whole documents take where each goes into the last row, or begins one."""
    rows, left = 0, 0
    for n in lengths:
        if n > left:
            rows, left = rows + 1, room
        left -= n
    return rows


def test_best_fit_wastes_less_than_one_document_after_the_other():
    if not STORIES.exists():
        pytest.skip(f"needs the stories in {STORIES}")
    lines = STORIES.read_text(encoding="utf-8").split("\n")
    lengths = np.array([len(json.loads(line)["text"].split()) for line in lines if line])
    lengths = lengths[lengths <= 513]
    best = plan(lengths, 512)
    assert best.rows < 0.9 * next_fit_rows(lengths, 513)
    assert best.utilisation > 0.95 > 2 * plan(lengths, 512, "pad").utilisation


@every_method
def test_many_documents(method):
    lengths = np.random.default_rng(0).lognormal(5.3, 0.8, 200_000).astype(int) + 1
    T = 256
    rows = plan(lengths, T, method)
    sizes = rows.end - rows.begin
    full = np.add.reduceat(sizes, rows.first[:-1], dtype=int)
    assert sizes.min() >= 1 and full.max() <= T + 1
    # In the order of documents, a piece begins where the last one's targets end: no target is missing or there twice.
    order = np.lexsort((rows.begin, rows.document))
    document, begin, end = (part[order] for part in rows[:3])
    new = np.diff(document, prepend=-1) == 1
    assert np.array_equal(document[new], np.arange(len(lengths)))
    assert not begin[new].any() and np.array_equal(begin[~new], end[:-1][~new[1:]] - 1)
    assert np.array_equal(end[np.append(new[1:], True)], lengths)
    assert rows.utilisation > {"best_fit": 0.999, "greedy": 0.9999, "pad": 0.5}[method]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "documents, message",
    [
        ([[1, 2], []], "document 1 is empty"),
        ([[1, 2], ([], [])], "document 1 is empty"),
        ([[1.0, 2.0]], r"document 0 has to be one sequence of whole numbers, not float64 \(2,\)"),
        ([[[1, 2], [1, 1]]], r"document 0 has to be one sequence of whole numbers, not int64 \(2, 2\)"),
        ([np.array([True, False])], "document 0 has to be one sequence of whole numbers, not bool"),
        ([[1], [1, -1]], f"document 1 has the id -1, and ids are from 0 to {LARGEST}"),
        ([[1], [LARGEST + 1]], f"document 1 has the id {LARGEST + 1}, and ids are from 0 to {LARGEST}"),
        ([np.array([2**64 - 1], np.uint64)], f"document 0 has the id {2**64 - 1}"),
        ([[1], ([1, 2], [True])], r"document 1 has 2 ids and a mask of shape \(1,\)"),
        ([([1, 2], [0.5, 1])], "document 0 has a mask with other values than 0 and 1"),
    ],
)
def test_a_bad_document_is_refused_by_its_number(documents, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pack(documents, 4)


@pytest.mark.parametrize("length", [0, -1, 1.5, True, None])
def test_a_bad_length_is_refused(length):
    with pytest.raises(ValueError, match=r"^length = .* must be a whole number from 1 on$"):
        pack([[1, 2]], length)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^no method 'worst_fit': best_fit, greedy, pad$"):
        pack([[1, 2]], 4, "worst_fit")
    with pytest.raises(ValueError, match=r"^pad_id = -1 must be a whole number from 0 on$"):
        pack([[1, 2]], 4, pad_id=-1)
    with pytest.raises(ValueError, match=r"^document 1 is empty, and a document has from 1"):
        plan([3, 0], 4)
    with pytest.raises(ValueError, match=r"^document 1 has 2147483648 tokens, and a document has from 1"):
        plan([3, LARGEST + 1], 4)
    for lengths in ([1.0, 2.0], [[1, 2]], 5):
        with pytest.raises(ValueError, match=r"^lengths has to be a 1-d array of whole numbers"):
            plan(lengths, 4)


# ------------------------------------------------------------------ through a model


def summed_loss(model, tokens, start, mask):
    """The sum of losses over a mask, and the gradient of it for all parameters."""
    model.flat_grad[...] = 0
    hidden = model.hidden(tokens[:, :-1], start)
    loss = F.linear_cross_entropy(hidden, model.head, tokens[:, 1:], weights=mask.astype(np.float64))
    loss.backward()
    return loss.item(), model.flat_grad.copy()


@every_method
@pytest.mark.parametrize("masked", [False, True], ids=["pretraining", "answers only"])
def test_packed_rows_compute_what_their_pieces_compute_alone(method, masked):
    rng = np.random.default_rng(5)
    config = Config(19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = Llama(config, dtype=np.float64)
    model.flat += 0.2 * rng.standard_normal(model.flat.size)
    lengths, T = [5, 2, 9, 1, 7, 3, 30, 4], 11
    documents = [rng.integers(1, 19, n) for n in lengths]
    masks = [rng.random(n) < 0.6 if masked else np.ones(n, bool) for n in lengths]
    tokens, start, mask = pack(list(zip(documents, masks, strict=True)), T, method)

    alone, gradient = 0.0, np.zeros(model.flat.size)
    for d, begin, end in zip(*plan(lengths, T, method)[:3], strict=True):
        if end - begin > 1:
            ids, trained = documents[d][None, begin:end], masks[d][None, begin + 1 : end]
            loss, g = summed_loss(model, ids, None, trained)
            alone, gradient = alone + loss, gradient + g
    packed, packed_gradient = summed_loss(model, tokens, start, mask)
    assert abs(packed - alone) < 1e-10 * abs(alone)
    assert np.abs(packed_gradient - gradient).max() < 1e-10 * np.abs(gradient).max()
    if method != "pad":  # and rows whose documents see each other are another matter
        assert abs(summed_loss(model, tokens, None, mask)[0] - alone) > 1e-4 * abs(alone)
