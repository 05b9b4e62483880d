"""
An update of next-token training as one CUDA graph: meant for models so small that Python asks for their kernels more
slowly than a GPU runs them.
"""

from typing import NamedTuple

from ..functional import checked_start
from ..kernels.device import check_ids, number
from ..kernels.graph import Graph
from ..optim import gpu_clip_scale
from .common import next_token_backward, parts, targets_and_weights, weighted_loss


class Inputs(NamedTuple):
    """What a batch is to the GPU: arrays (B, T), as `weighted_loss` takes them."""

    tokens: object
    start: object
    targets: object
    weights: object


def updates_of(config, model, optimizer):
    """function(run, batch, **numbers): an update of `model` with the settings of a trainer on packed rows, as a CUDA
    graph where they ask for one; `numbers` go to its row of metrics, too."""
    recorded = config.cuda_graph and RecordedUpdate(model, optimizer, config.micro_batch_size, config.max_grad_norm)

    def update(run, batch, **numbers):
        if recorded:
            run.updated(recorded(batch, run.lr) | numbers, tokens=batch.x.size)
        else:
            loss = next_token_backward(model, batch, config.micro_batch_size, config.workers)
            run.update(optimizer, {"loss": loss} | numbers, tokens=batch.x.size)

    return update


class RecordedUpdate:
    """next_token_backward in parts of `size` rows, the gradients' norm, clipping to `longest`, AdamW and zero_grad.

    update(batch, lr)  {"loss", "grad_norm"}, arrays () on the GPU that the next call overwrites. Batches of one shape
                       are one graph, whatever is in them; each other shape is another, which takes time and memory

    ValueError: an id that is outside the vocabulary, or a `start` that attention does not take.
    """

    def __init__(self, model, optimizer, size, longest):
        self.model, self.optimizer, self.size, self.longest = model, optimizer, size, longest
        self.graph = Graph(self._update)

    def __call__(self, batch, lr):
        vocabulary = self.model.config.vocab_size
        check_ids("tokens", batch.x, vocabulary)
        check_ids("targets", batch.y[batch.mask], vocabulary)
        start = checked_start(batch.start, *batch.start.shape, batch.start)
        inputs = batch.x, start, *targets_and_weights(self.model, batch, max(1, int(batch.mask.sum())))
        loss, norm = self.graph(*inputs, self.optimizer.rates(lr))
        return {"loss": loss, "grad_norm": norm}

    def _update(self, *inputs):
        *inputs, rates = inputs
        total = 0.0
        for part in parts(Inputs(*inputs), self.size):
            loss = weighted_loss(self.model, *part)
            loss.backward()
            total = total + number(loss.data)
        norm = self.optimizer.grad_norm()
        self.optimizer.step_at(rates, gpu_clip_scale(norm, self.longest, total))
        self.optimizer.zero_grad()
        return total, norm
