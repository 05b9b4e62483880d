"""
Continuous batching: texts that are asked for at different times are decoded together.

    with Batcher(model, tokenizer, size=8) as batcher:
        batcher.submit([Row(prompt=[1, 2, 3], max_new_tokens=20, listener=print)])

One thread owns the model. Between two decoding steps it lets go of rows that are finished or cancelled, and takes in
those that wait, one of each request in turn, up to `size`. A row's text is what minillm.generate makes of its prompt
alone with the same seed, up to the rounding of its logits.

Rows end in the same column of one cache, as with padding on the left: a new one is computed so that its last token
stands in the batch's last column. RoPE is relative and learned positions count from a row's first token, so it does not
matter in which column a row begins. The columns before the earliest row are a waste, and once they are more than half
of all, or a prompt is longer than the batch, the rows are computed again in other columns. That happens at most once
in as many steps as there are tokens in the longest row.
"""

import copy
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import functional as F
from .autograd import no_grad
from .generate import draw, penalise
from .kernels.device import to_host

SLACK = 256  # columns that may be wasted however short the rows are
AT_ONCE = 64  # positions of a prompt whose logits are in memory together


class Closed(Exception):
    """The batcher takes no more rows, or has ended one before it was finished."""


class Token(NamedTuple):
    """A token of a row. Log-probabilities are the model's own, before temperature and filters."""

    id: int
    offset: int  # characters of the text that stand before it
    logprob: float | None  # None for a text's first token, and where none were asked for
    top: list  # [(id, logprob)], the likeliest first


class Piece(NamedTuple):
    """What a row has written since the last piece."""

    text: str
    tokens: list  # of Token: those whose text begins in this piece's
    finish: str | None = None  # "stop", "stop_string" or "length" with the last piece
    error: Exception | None = None  # instead of a finish


@dataclass(eq=False, kw_only=True)
class Row:
    """One text that is asked for.

    prompt          ids, at least one; with max_new_tokens they have to fit into the model's context
    max_new_tokens  0: nothing is written, and the prompt only scored
    settings        temperature, top_k, top_p, min_p, repetition_penalty: as for minillm.generate
    stop_tokens     ids that end the row; stop_strings: texts that do, which are not written
    seed            what np.random.default_rng takes
    alternatives    how many of the likeliest tokens come with each token; None: no log-probabilities at all
    echo            the prompt is a part of the text, and scored where there are alternatives
    continues       the text goes on from the prompt's, as where a character is cut between the two
    stream          a piece for each step that writes something; otherwise one with everything
    listener        called with each Piece, in the batcher's thread
    """

    prompt: np.ndarray
    max_new_tokens: int
    listener: object
    settings: dict = field(default_factory=dict)
    stop_tokens: frozenset = frozenset()
    stop_strings: tuple = ()
    seed: object = 0
    alternatives: int | None = None
    echo: bool = False
    continues: bool = True
    stream: bool = False

    cancelled: bool = field(default=False, init=False)
    ids: list = field(default_factory=list, init=False)  # the new tokens, the one that stops included
    began: float | None = field(default=None, init=False)  # time.perf_counter() at the first token
    ended: float | None = field(default=None, init=False)

    def __post_init__(self):
        self.prompt = np.asarray(self.prompt, np.int64)

    def all_ids(self):
        return np.concatenate([self.prompt, self.ids]).astype(np.int64)


class Writing:
    """The text of a row as it comes: what may go out, and what waits because a stop string may begin there."""

    def __init__(self, tokenizer, row):
        self.decoder, self.stops = tokenizer.decoder(skip_special=True), row.stop_strings
        self.scored, self.stopped = row.alternatives is not None, False
        self.out, self.waiting = "", ""  # not taken yet; not sure yet
        self.written = 0  # characters before those that wait
        self.tokens = []  # not taken yet

    def prompt(self, ids, scores, echo):
        """The ids that the text goes on from; where they are echoed, its beginning. scores: [(logprob, top)]."""
        for token, (logprob, top) in zip(ids, scores or [(None, [])] * len(ids), strict=True):
            if echo and self.scored:
                self.tokens.append(Token(token, self.written, logprob, top))
            text = self._text(token)
            if echo:
                self.out += text
                self.written += len(text)

    def push(self, token, logprob, top):
        """Whether this token completes a stop string."""
        if self.scored:
            self.tokens.append(Token(token, self.written + len(self.waiting), logprob, top))
        return self._add(self._text(token))

    def end(self):
        """No more tokens come: nothing has to wait any longer."""
        if not self.stopped:
            self.waiting += self.decoder.flush()
            self._release(len(self.waiting))

    def take(self, everything=False):
        """(text, tokens) that can go out."""
        text, tokens = self.out, self.tokens
        self.out, self.tokens = "", []
        if not everything:  # a token goes with its first character
            self.tokens = [token for token in tokens if token.offset >= self.written]
            tokens = tokens[: len(tokens) - len(self.tokens)]
        return text, tokens

    def _text(self, token):
        try:
            return self.decoder.push(token)
        except ValueError:  # an embedding may have more rows than there are tokens
            return "\N{REPLACEMENT CHARACTER}"

    def _add(self, text):
        self.waiting += text
        found = [place for stop in self.stops if (place := self.waiting.find(stop)) >= 0]
        if found:
            self._release(min(found))
            self.waiting, self.stopped = "", True
            self.tokens = [token for token in self.tokens if token.offset < self.written]
        else:
            self._release(len(self.waiting) - max((_overlap(self.waiting, stop) for stop in self.stops), default=0))
        return self.stopped

    def _release(self, count):
        self.out += self.waiting[:count]
        self.waiting = self.waiting[count:]
        self.written += count


def _overlap(text, stop):
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Batcher:
    """The thread that decodes. `tell` is called with one line about each error that is no fault of a request's."""

    def __init__(self, model, tokenizer, size=8, tell=print):
        self.model, self.tokenizer, self.size, self.tell = model, tokenizer, size, tell
        self.context = model.config.max_position_embeddings
        self.changed = threading.Condition()
        self.requests = deque()  # of deques of the rows that wait
        self.deadline = None  # when all rows are ended; nothing new is taken from when it is set
        self.rows, self.writings, self.streams = [], [], []  # of the rows in the cache, in its order
        self.begins = np.zeros(size, np.int32)  # the column where each begins
        self.length = 0  # columns in use
        self.clean = 0  # columns that hold numbers: a masked nan would still be a nan
        self.cache = model.new_cache(size, 2 * self.context + SLACK + 2)
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.drain(0)
        self.thread.join()

    def submit(self, rows):
        """Ask for the texts of one request. Closed: too late."""
        with self.changed:
            if self.deadline is not None:
                raise Closed("the server is shutting down")
            if rows:
                self.requests.append(deque(rows))
                self.changed.notify()

    def cancel(self, rows):
        """Nobody listens to these any more."""
        for row in rows:
            row.cancelled = True
        with self.changed:
            waiting = (deque(row for row in rows if not row.cancelled) for rows in self.requests)
            self.requests = deque(rows for rows in waiting if rows)

    def drain(self, seconds):
        """Take nothing new, and end what is not finished after so many seconds."""
        with self.changed:
            self.deadline = time.monotonic() + seconds
            self.changed.notify()

    # -------------------------------------------------------------- the thread

    def _run(self):
        with no_grad():
            while self._work_to_do():
                try:
                    self._step()
                except Exception as error:  # the rows that met it are lost, and the next ones may be well
                    place = error.__traceback__
                    while place.tb_next:
                        place = place.tb_next
                    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
                    self.tell(f"error in the model: {type(error).__name__}: {error} ({where})")
                    self._fail(error)
            with self.changed:
                late = [row for rows in self.requests for row in rows]
                self.requests.clear()
            closed = Closed("the server is shutting down")
            self._fail(closed)
            for row in late:
                self._send(row, Piece("", [], error=closed))

    def _work_to_do(self):
        """Wait for rows; False when it is time to end."""
        with self.changed:
            while not (self.rows or self.requests):
                if self.deadline is not None:
                    return False
                self.changed.wait()
            return self.deadline is None or time.monotonic() < self.deadline

    def _fail(self, error):
        for row in self.rows:
            self._send(row, Piece("", [], error=error))
        self.rows, self.writings, self.streams = [], [], []
        self.clean = 0  # what they left in the cache may be nan, and a masked one would still be one

    def _step(self):
        """Take in what waits, and write one token of each row."""
        self._drop([n for n, row in enumerate(self.rows) if row.cancelled])
        new = []
        with self.changed:
            while self.requests and len(self.rows) + len(new) < self.size:
                rows = self.requests.popleft()
                row = rows.popleft()
                if rows:
                    self.requests.append(rows)
                if not row.cancelled:
                    new.append(row)
        if new:
            self._admit(new)
        if self.rows:
            self._decode()

    def _admit(self, new):
        """Compute the prompts of new rows and their first tokens."""
        first = len(self.rows)
        new.sort(key=lambda row: len(row.prompt))
        longest = len(new[-1].prompt)
        self.rows += new
        self.writings += [Writing(self.tokenizer, row) for row in new]
        self.streams += [np.random.default_rng(row.seed) for row in new]
        if first == 0:
            self._reach(longest)
        elif longest > self.length:
            self._compute_again(first, longest)
        logits = []
        for n, hidden in self._fill(first, [row.prompt for row in new]):
            for row, writing, states in zip(self.rows[n:], self.writings[n:], hidden, strict=False):
                states = states[len(states) - len(row.prompt) :]
                if row.continues or row.echo:
                    scores = self._scores(row, states) if row.echo and row.alternatives is not None else None
                    writing.prompt(row.prompt.tolist(), scores, row.echo)
            logits.append(self._logits(hidden[:, -1]))
        self._write(first, np.concatenate(logits))

    def _decode(self):
        """One token more in each row."""
        wasted, longest = self._wasted()
        if wasted > longest + SLACK:
            self._compute_again(len(self.rows), longest)
        tokens = np.array([row.ids[-1:] for row in self.rows])
        start = self.begins[: len(self.rows), None]
        cache = self._part(0, len(self.rows), self.length)
        self._reach(self.length + 1)
        hidden = self.model.hidden(tokens, start, cache).data
        self._write(0, self._logits(hidden[:, -1]))

    def _reach(self, length):
        """Let the batch end in column `length`. Memory is touched, and so taken, as far as it is needed."""
        self.length = length
        if length > self.clean:
            new = slice(self.clean, min(max(length, 2 * self.clean), self.cache.capacity))
            self.cache.keys[:, :, new], self.cache.values[:, :, new] = 0, 0
            self.clean = new.stop

    def _wasted(self):
        """Columns before the first row begins, and behind."""
        wasted = int(self.begins[: len(self.rows)].min())
        return wasted, self.length - wasted

    def _compute_again(self, count, length):
        """Let the first `count` rows of the cache end in column `length`. Each one's last token is not in it yet."""
        self._reach(length)
        for _ in self._fill(0, [row.all_ids()[:-1] for row in self.rows[:count]]):
            pass

    def _fill(self, first, sequences):
        """Compute sequences as rows first, first + 1, ... of the cache, so that all of them end where the batch does;
        neighbours of similar lengths together. Yields (n, hidden (k, T, D)) for rows n to n + k - 1."""
        end = 0
        while end < len(sequences):
            begin = end
            lengths = [len(ids) for ids in sequences[begin:]]
            while end < len(sequences) and max(lengths[: end - begin + 1]) <= 2 * min(lengths[: end - begin + 1]):
                end += 1
            longest = max(lengths[: end - begin])
            pads = longest - np.array(lengths[: end - begin], np.int32)
            tokens = np.array([np.pad(ids, (p, 0)) for ids, p in zip(sequences[begin:end], pads, strict=True)])
            rows = slice(first + begin, first + end)
            self.begins[rows] = self.length - longest + pads
            start = np.repeat(self.begins[rows, None], longest, 1)
            cache = self._part(rows.start, rows.stop, self.length - longest)
            yield rows.start, self.model.hidden(tokens, start, cache).data

    def _part(self, first, last, length):
        """The cache of some rows, of which `length` columns are in use: a view."""
        part = copy.copy(self.cache)
        part.keys, part.values = self.cache.keys[:, first:last], self.cache.values[:, first:last]
        part.length = length
        return part

    def _logits(self, hidden):
        return to_host(F.linear(hidden, self.model.head.data).data).astype(np.float64)

    def _scores(self, row, hidden):
        """(logprob, top) of each token of a prompt."""
        scores = [(None, [])]
        for n in range(0, len(row.prompt) - 1, AT_ONCE):
            following = row.prompt[n + 1 : n + 1 + AT_ONCE]
            logprobs = log_softmax(self._logits(hidden[n : n + len(following)]))
            scores += [scored(*pair, row.alternatives) for pair in zip(logprobs, following.tolist(), strict=True)]
        return scores

    def _write(self, first, logits):
        """Draw the next token of rows first, first + 1, ... from logits (k, V), and let go of those that are finished.
        Rows with the same settings are drawn together."""
        if not np.isfinite(logits).all():
            raise FloatingPointError("the logits are not finite")
        rows, now = self.rows[first:], time.perf_counter()
        alike = {}
        for n, row in enumerate(rows):
            alike.setdefault(tuple(sorted(row.settings.items())), []).append(n)
        picks = np.zeros(len(rows), np.int64)
        for settings, members in alike.items():
            filters, x = dict(settings), logits[members]
            if (penalty := filters.pop("repetition_penalty", 1.0)) != 1:
                penalise(x, [rows[n].all_ids() for n in members], penalty)
            picks[members], _ = draw(x, [self.streams[first + n] for n in members], **filters)
        finished = []
        for n, (row, token) in enumerate(zip(rows, picks.tolist(), strict=True), first):
            row.began, row.ended = row.began or now, now
            if finish := self._take(row, self.writings[n], token, logits[n - first]):
                finished.append(n)
                self.writings[n].end()
            text, tokens = self.writings[n].take(everything=finish is not None) if finish or row.stream else ("", [])
            if text or tokens or finish:
                self._send(row, Piece(text, tokens, finish))
        self._drop(finished)

    def _take(self, row, writing, token, logits):
        """Append a token to a row; how the row is finished, or None."""
        if row.max_new_tokens == 0:
            return "length"
        row.ids.append(token)
        logprob, top = None, []
        if row.alternatives is not None:
            logprob, top = scored(log_softmax(logits), token, row.alternatives)
        found = writing.push(token, logprob, top)
        if token in row.stop_tokens:
            return "stop"
        if found:
            return "stop_string"
        full = len(row.ids) == row.max_new_tokens or len(row.prompt) + len(row.ids) == self.context
        return "length" if full else None

    def _drop(self, places):
        """Let go of these rows of the cache; the last ones move to their places."""
        for n in reversed(places):
            last = len(self.rows) - 1
            if n < last:
                columns = slice(int(self.begins[last]), self.length)
                for array in (self.cache.keys, self.cache.values):
                    array[:, n, columns] = array[:, last, columns]
                self.begins[n] = self.begins[last]
            for own in (self.rows, self.writings, self.streams):
                own[n] = own[last]
                own.pop()

    def _send(self, row, piece):
        if row.cancelled:
            return
        try:
            row.listener(piece)
        except Exception:  # whoever listened is gone
            row.cancelled = True


def log_softmax(x):
    """log(exp(x) / sum(exp(x))) along the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scored(logprobs, token, count):
    """A token's log-probability, and [(id, logprob)] of the `count` likeliest, from the logprobs (V,) of its place."""
    count = min(count, len(logprobs))
    top = np.argpartition(-logprobs, count - 1)[:count] if count else np.zeros(0, int)
    top = top[np.lexsort((top, -logprobs[top]))]
    return float(logprobs[token]), [(int(i), float(logprobs[i])) for i in top]
