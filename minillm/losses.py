"""
The objectives, as pure functions: sequence and token sums, preferences (reward model, DPO), and the parts of PPO.

What carries a gradient is a Tensor; what does not (old and reference log-probabilities, advantages, returns, rewards)
is an array, and a Tensor in its place is a TypeError. No function here knows a model, and each loss is a scalar Tensor.

A mask (B, T) of bools or of 0 and 1 says which tokens count: those of the response, its end-of-turn token included.
What stands at the others is never used. It may be NaN: losses, gradients (exactly 0 there) and statistics are the same
bits whatever it is. A mask without a valid token gives a loss of 0 with gradient 0.

A loss is a sum over what counts, divided by `count`; None is the number of items here (tokens, pairs or prompts). Where
one optimizer step is made of several batches, give all of them the number in the whole step: their losses, gradients
and statistics then add up to those of one large batch, which a mean of means does not (ragged batches differ in
length). The language model's own loss is F.linear_cross_entropy with weights=token_weights(mask, count), an entropy
bonus the masked_mean of what F.token_logprobs(..., entropy=True) returns.

Everything is computed in the dtype of the Tensor, or in float32 where that has 16 bits.
"""

import math

import numpy as np

from minillm import autograd as ag
from minillm.autograd import Tensor, op
from minillm.kernels.device import upcast, xp_of

# e^20 = 4.9e8 is far beyond any ratio of probabilities that a useful update meets, and its square fits into float32.
LOG_RATIO_LIMIT = 20.0

# ------------------------------------------------------------------ masks and counts


def _same_shape(name, **arrays):
    """ValueError unless all have the first one's shape: (B,) against (B, 1) would broadcast to a loss of B^2 terms."""
    (first, a), *others = arrays.items()
    for what, b in others:
        if b.shape != a.shape:
            raise ValueError(f"{name}: {what} {b.shape} does not go with {first} {a.shape}")


def _valid(name, mask):
    """The mask as bools; ValueError (on the host) where it holds anything but 0 and 1, weights for example."""
    if mask.dtype == bool:
        return mask
    valid = mask == 1
    if isinstance(mask, np.ndarray) and not (valid | (mask == 0)).all():
        raise ValueError(f"{name}: a mask holds nothing but 0 and 1; F.cross_entropy takes weights")
    return valid


def _tensor(x, valid=None):
    """x as a Tensor of at least 32 bits, and 0 where not valid, whatever stood there."""
    if valid is not None:
        x = ag.where(x, 0.0, condition=valid)
    elif not isinstance(x, Tensor):
        x = Tensor(x)
    return ag.cast(x, dtype=np.float32) if x.dtype.itemsize < 4 else x


def _array(name, what, x, valid=None, dtype=None):
    """x, which carries no gradient, as an array of at least 32 bits (or of dtype), and 0 where not valid.

    The masked entries go first: a cast of 1e300, or 0 times NaN, would not leave them without effect.
    """
    if isinstance(x, Tensor):
        raise TypeError(f"{name}: {what} carries no gradient and must be an array; use tensor.data")
    if valid is not None:
        x = xp_of(x).where(valid, x, x.dtype.type(0))
    return upcast(x) if dtype is None else x.astype(dtype, copy=False)


def _divisor(name, valid, count, dtype, axis=None):
    """What a sum over valid is divided by: count, or how many valid there are, and 1 where there are none."""
    xp = xp_of(valid)
    if count is None:
        return xp.asarray(xp.maximum(valid.sum(axis), 1), dtype=dtype)
    if not (count > 0 or (count == 0 and not valid.any())):
        raise ValueError(f"{name}: count must be more than 0, and is {count}")
    return xp.asarray(count or 1, dtype=dtype)


def _mean(name, x, count, valid=None):
    """The sum of a Tensor (those valid of it) over count."""
    valid = xp_of(x.data).ones(x.shape, bool) if valid is None else valid
    return ag.where(x, 0.0, condition=valid).sum() / _divisor(name, valid, count, x.dtype)


def token_weights(mask, count=None):
    """mask / count, float64 (B, T): the weights that make F.cross_entropy and F.linear_cross_entropy the sum over the
    mask divided by count, the number of valid tokens in the whole optimizer step (None: in this mask)."""
    valid = _valid("token_weights", mask)
    return valid / _divisor("token_weights", valid, count, np.float64)


def last_token(mask):
    """Index of the last valid token of each row of mask (B, T), which is where the EOS stands: (B,) int, -1 if none."""
    valid = _valid("last_token", mask)
    xp = xp_of(valid)
    return xp.where(valid, xp.arange(valid.shape[1]), -1).max(1)


def masked_mean(x, mask, count=None, axis=None):
    """sum of the valid x / count, over all axes or one: x and mask (B, T). A Tensor gives a Tensor, an array an array.

    Without a valid entry the mean is 0. count: the divisor; None is the number of valid entries (along axis).
    """
    _same_shape("masked_mean", x=x, mask=mask)
    valid = _valid("masked_mean", mask)
    total = _tensor(x, valid).sum(axis)
    mean = total / _divisor("masked_mean", valid, count, total.dtype, axis)
    return mean if isinstance(x, Tensor) else mean.data


def masked_var(x, mask, sample=False):
    """Variance of the valid entries of an array x (B, T), 0 if there are none.

    The population's, sum (x - mean)^2 / n, as in lm-human-preferences; sample=True divides by n - 1 (Bessel), which
    TRL does.
    """
    _same_shape("masked_var", x=x, mask=mask)
    valid = _valid("masked_var", mask)
    x = _array("masked_var", "x", x, valid)
    squares = _array("masked_var", "x", (x - masked_mean(x, valid)) ** 2, valid).sum()
    return squares / xp_of(x).maximum(valid.sum() - int(sample), 1).astype(squares.dtype)


def whiten(x, mask, shift_mean=True, sample=False, eps=1e-8):
    """(x - mean) / sqrt(var + eps) over the valid entries of an array x (B, T); 0 at the others.

    shift_mean=True removes the mean: for advantages. False adds it back, so that only the spread is normalised: for
    rewards, whose sign means something. (Name and meaning are those of lm-human-preferences.) sample: which variance,
    see masked_var; the population's by default.
    """
    _same_shape("whiten", x=x, mask=mask)
    valid = _valid("whiten", mask)
    x = _array("whiten", "x", x, valid)
    mean = masked_mean(x, valid)
    white = (x - mean) / xp_of(x).sqrt(masked_var(x, valid, sample) + eps)
    return _array("whiten", "x", white if shift_mean else white + mean, valid)


def sequence_logprobs(logp, mask, normalize="sum"):
    """log pi(y|x) = sum of the response's token log-probabilities, EOS included: logp and mask (B, T), result (B,).

    normalize="mean" divides each row by its number of valid tokens. A row without any gives 0. A Tensor gives a Tensor.
    """
    _one_of("sequence_logprobs: normalize", normalize, ("sum", "mean"))
    return masked_mean(logp, mask, axis=-1, count=1 if normalize == "sum" else None)


def _one_of(what, value, choices):
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, and is {value!r}")


# ------------------------------------------------------------------ preferences: reward model and DPO


def _soft_label_loss(d, p):
    """p softplus(-d) + (1 - p) softplus(d): the cross-entropy of sigmoid(d) against a label p, where softplus(-d) is
    -log sigmoid(d). Neither term is ever a difference, so both keep their digits far out."""
    loss = ag.log_sigmoid(d) * -p
    return loss if isinstance(p, float) and p == 1 else loss - ag.log_sigmoid(-d) * (1 - p)


def _number_or_array(name, what, x, like):
    """A Python number as a float, an array in like's dtype; ValueError where its shape is not like's."""
    if isinstance(x, int | float | np.number):
        return float(x)
    x = _array(name, what, x, dtype=like.dtype)
    _same_shape(name, **{"the batch": like, what: x})
    return x


def reward_loss(chosen, rejected, margin=None, centring=0.0, preference=1.0, count=None):
    """Bradley-Terry: mean of p softplus(-d) + (1 - p) softplus(d) with d = r_w - r_l - m, plus c mean (r_w + r_l)^2.

    chosen, rejected  (B,) scores r_w and r_l of the better and the worse response (Stiennon et al. 2020, section 3.4)
    margin            m, a number or an array (B,): how much better (Touvron et al. 2023, "Llama 2", eq. 2)
    centring          c: pulls the scores, which only differences determine, towards mean 0 (Eisenstein et al. 2023)
    preference        p, a number or an array (B,) in [0, 1]: the probability that the label is right; 0.5 for a tie
    count             the number of pairs in the whole optimizer step (B if None)
    At p = 1 and m = c = 0, dL/dr_w = -sigmoid(-d) / count.
    """
    _same_shape("reward_loss", chosen=chosen, rejected=rejected)
    chosen, rejected = _tensor(chosen), _tensor(rejected)
    d = chosen - rejected
    if margin is not None:
        d = d - _number_or_array("reward_loss", "margin", margin, d)
    p = _number_or_array("reward_loss", "preference", preference, d)
    if isinstance(p, float | np.ndarray) and not ((np.asarray(p) >= 0) & (np.asarray(p) <= 1)).all():
        raise ValueError("reward_loss: preference is a probability, and one of them is outside [0, 1]")
    losses = _soft_label_loss(d, p)
    if centring:
        losses = losses + (chosen + rejected) ** 2 * centring
    return _mean("reward_loss", losses, count)


def ranking_loss(scores, mask=None, kind="pairs", count=None, ranks=None):
    """Loss of the scores r (..., K) of K responses to each prompt, the best first; a mean over prompts.

    "pairs"          mean over the C(K, 2) pairs i < j of -log sigmoid(r_i - r_j) (Ouyang et al. 2022, eq. 1): all of a
                     prompt's pairs in one pass, because spread over batches they overfit (same, section 3.5)
    "plackett_luce"  sum_i [log sum_(j >= i) e^r_j - r_i] = -log of the ranking's probability, drawn best first without
                     replacement (Plackett 1975; Rafailov et al. 2023, appendix A.3)
    "best_of_k"      the first term of that sum: only which one is best is known (Ziegler et al. 2019, eq. 1)
    mask   (..., K): the responses that are there; the ranking is that of the valid ones, and a prompt with fewer than
           two is no prompt
    count  the number of prompts in the whole optimizer step (those here with two valid responses, if None)
    ranks  (..., K) int: 0 for the best, larger for worse ones (None: 0 to K - 1); responses with equal ranks are not
           compared: no pair, and neither is in the other's sum
    With K = 2 all three are reward_loss. All of them depend on differences alone.
    """
    _one_of("ranking_loss: kind", kind, ("pairs", "plackett_luce", "best_of_k"))
    xp, K = xp_of(scores.data if isinstance(scores, Tensor) else scores), scores.shape[-1]
    mask = xp.ones(scores.shape, bool) if mask is None else mask
    _same_shape("ranking_loss", scores=scores, mask=mask)
    valid = _valid("ranking_loss", mask)
    r = _tensor(scores, valid)
    ranks = xp.broadcast_to(xp.arange(K) if ranks is None else xp.asarray(ranks), scores.shape)
    better = ranks[..., :, None] < ranks[..., None, :]
    pair = better & valid[..., :, None] & valid[..., None, :]  # (..., K, K)
    d = r.reshape(*r.shape, 1) - r.reshape(*r.shape[:-1], 1, K)  # r_i - r_j
    if kind == "pairs":
        pairs = xp.maximum(pair.sum((-2, -1)), 1).astype(r.dtype)
        losses = ag.where(-ag.log_sigmoid(d), 0.0, condition=pair).sum((-2, -1)) / pairs
    else:
        # log(e^r_i + sum_(j > i) e^r_j) - r_i = softplus(a), a = log sum_(j > i) e^(r_j - r_i): with one j, a = -d
        rest = ag.logsumexp(ag.where(-d, -math.inf, condition=pair))
        drawn = pair.any(-1)
        if kind == "best_of_k":
            best = xp.where(valid, ranks, ranks.max() if ranks.size else 0).min(-1, keepdims=True)
            drawn = drawn & (ranks == best)
        losses = ag.where(-ag.log_sigmoid(-rest), 0.0, condition=drawn).sum(-1)
    return _mean("ranking_loss", losses, count, pair.any((-2, -1)))


def dpo_loss(
    policy_chosen,
    policy_rejected,
    reference_chosen,
    reference_rejected,
    beta,
    kind="sigmoid",
    label_smoothing=0.0,
    margin=0.0,
    normalize="sum",
    lengths=None,
    count=None,
):
    """Direct preference optimization; the mean over pairs of a function of h = beta (u_w - u_l) - margin, where
    u = log pi(y|x) - log pi_ref(y|x) of the chosen (w) and the rejected (l) response.

    "sigmoid"  (1 - e) softplus(-h) + e softplus(h): e = 0 is DPO (Rafailov et al. 2023, eq. 7), e > 0 conservative DPO
               (Mitchell 2023), whose optimum is finite: sigmoid(h) = p (1 - e) + (1 - p) e for a true preference p
    "robust"   [(1 - e) softplus(-h) - e softplus(h)] / (1 - 2 e): if labels are flipped with probability e, its
               expectation is DPO's loss without flips (Chowdhury et al. 2024). Not bounded below
    "hinge"    max(0, 1 - h) (Zhao et al. 2023, in the form of Liu et al. 2024)
    "ipo"      (u_w - u_l - (margin + 1/2) / beta)^2, where beta is the paper's tau (Azar et al. 2023, eq. 17)

    policy_chosen, policy_rejected        (B,) log pi, summed over the response (sequence_logprobs)
    reference_chosen, reference_rejected  (B,) arrays, the same for the reference; None for both: then u = log pi
    label_smoothing  e in [0, 0.5), for "sigmoid" and "robust"
    normalize        "sum", as in the papers, or "mean": u is divided by the response's length first. For IPO, whose
                     target 1 / (2 beta) is a fixed distance, TRL takes means, on its authors' advice, and the original
                     code sums; the two need very different betas
    lengths          for "mean": (chosen, rejected), arrays (B,) of token counts, those under the mask
    count            the number of pairs in the whole optimizer step (B if None)
    SimPO (Meng et al. 2024, eq. 6) is "sigmoid" with no reference, normalize="mean" and margin gamma.

    For DPO, dL/dlogpi_w = -beta sigmoid(-h) / count = -dL/dlogpi_l. Where policy and reference agree, L = ln 2.
    """
    _one_of("dpo_loss: kind", kind, ("sigmoid", "robust", "hinge", "ipo"))
    _one_of("dpo_loss: normalize", normalize, ("sum", "mean"))
    if not beta > 0:
        raise ValueError(f"dpo_loss: beta must be more than 0, and is {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo_loss: label_smoothing must be in [0, 0.5), and is {label_smoothing}")
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(f"dpo_loss: there is no label_smoothing for kind {kind!r}")
    if (lengths is None) == (normalize == "mean"):
        raise ValueError("dpo_loss: normalize='mean' goes with lengths=(chosen, rejected), and 'sum' with none")
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("dpo_loss: give both reference log-probabilities, or None for both")
    _same_shape("dpo_loss", policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    u_w, u_l = _tensor(policy_chosen), _tensor(policy_rejected)
    if reference_chosen is not None:
        u_w = u_w - _number_or_array("dpo_loss", "reference_chosen", reference_chosen, u_w)
        u_l = u_l - _number_or_array("dpo_loss", "reference_rejected", reference_rejected, u_l)
    if normalize == "mean":
        n_w, n_l = (xp_of(n).maximum(_number_or_array("dpo_loss", "lengths", n, u_w), 1) for n in lengths)
        u_w, u_l = u_w / n_w, u_l / n_l  # an empty response has u = 0, and 0 it stays
    if kind == "ipo":
        return _mean("dpo_loss", (u_w - u_l - (margin + 0.5) / beta) ** 2, count)
    h = (u_w - u_l) * beta - margin
    if kind == "hinge":
        return _mean("dpo_loss", ag.relu(1 - h), count)
    p = 1 - label_smoothing
    return _mean("dpo_loss", _soft_label_loss(h, p if kind == "sigmoid" else p / (1 - 2 * label_smoothing)), count)


def dpo_rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """The rewards that a policy implies, beta (log pi - log pi_ref), of the chosen and of the rejected responses: two
    arrays (B,), for logging (Rafailov et al. 2023, eq. 5, without beta log Z). The policy's may be Tensors."""
    pairs = ((policy_chosen, reference_chosen), (policy_rejected, reference_rejected))
    rewards = []
    for policy, reference in pairs:
        _same_shape("dpo_rewards", policy=policy, reference=reference)
        logp = upcast(policy.data if isinstance(policy, Tensor) else policy)
        rewards.append(beta * (logp - _array("dpo_rewards", "the reference", reference, dtype=logp.dtype)))
    return tuple(rewards)


# ------------------------------------------------------------------ the Kullback-Leibler divergence, estimated


@op
def _k3(d):
    """k = e^-d - 1 + d: d (...). Where -d > LOG_RATIO_LIMIT, e^-d goes on along its tangent.

    dd = g (1 - e^-d) = -g expm1(-d), which is also what keeps k's own digits at small d, where k is about d^2 / 2.
    Keeps expm1(-d).
    Example: _k3(randn(A, B))
    """
    xp = xp_of(d)
    exponent = xp.minimum(-d, d.dtype.type(LOG_RATIO_LIMIT))
    slope = xp.expm1(exponent)
    return slope + d + (-d - exponent) * (slope + 1), (lambda g: -g * slope,)


def kl_estimate(logp, reference_logp, kind="k1", mask=None):
    """Estimates, one per token, of KL(pi || ref) from samples of pi (Schulman 2020, "Approximating KL divergence").

    With d = log pi(x) - log ref(x) and r = e^-d = ref(x) / pi(x):
    "k1"  d              unbiased; may be negative. For the reward (kl_rewards), where the score function gives
                         E[k1 grad log pi] = grad KL(pi || ref). Never as a loss: E[grad k1] = 0
    "k2"  d^2 / 2        biased, low variance. The one for a loss: E[grad k2] = grad KL(pi || ref), on policy
    "k3"  (r - 1) + d    unbiased, never negative, low variance. For logging only: as a loss, E[grad k3] is
                         grad KL(ref || pi), the other direction; in the reward, E[k3 grad log pi] =
                         grad KL(pi || ref) - grad KL(ref || pi), which does not even pull pi towards ref

    logp            log pi of each token, of any shape; a Tensor gives a Tensor, an array an array
    reference_logp  an array of its shape
    mask            None, or of the same shape: 0 where it is not valid
    k3 is finite at every finite d: beyond d = -20 its e^-d goes on along its tangent, with the slope's sign kept.
    """
    _one_of("kl_estimate: kind", kind, ("k1", "k2", "k3"))
    _same_shape("kl_estimate", logp=logp, reference_logp=reference_logp)
    valid = None
    if mask is not None:
        _same_shape("kl_estimate", logp=logp, mask=mask)
        valid = _valid("kl_estimate", mask)
    wide = _tensor(logp, valid)
    d = wide - _array("kl_estimate", "reference_logp", reference_logp, valid, wide.dtype)
    k = d if kind == "k1" else d * d * 0.5 if kind == "k2" else _k3(d)
    return k if isinstance(logp, Tensor) else k.data


# ------------------------------------------------------------------ rewards and advantages


def kl_rewards(scores, logp, reference_logp, mask, beta):
    """R_t = -beta kl_t + [t is the last valid token] score, kl_t = log pi(y_t) - log ref(y_t) of the sampled tokens.

    scores                    (B,) array: the reward model's score, a missing EOS already punished
    logp, reference_logp      (B, T) arrays: of the policy that sampled, at its temperature, and of the reference
    mask                      (B, T): the response's tokens, EOS included, so that the score lands on the EOS
    Returns (R, kl), arrays (B, T), 0 where not valid. The sum of R over a row is the estimate of score - beta KL
    (Ziegler et al. 2019, eq. 2). kl is k1 (see kl_estimate for why), so single entries may be negative.
    A row without a valid token has no reward.
    """
    _same_shape("kl_rewards", mask=mask, logp=logp, reference_logp=reference_logp)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"kl_rewards: scores {scores.shape} must have one entry per row of mask {mask.shape}")
    valid, last = _valid("kl_rewards", mask), last_token(mask)
    kl = kl_estimate(_array("kl_rewards", "logp", logp), reference_logp, "k1", valid)
    is_last = xp_of(kl).arange(mask.shape[1]) == last[:, None]
    scores = _array("kl_rewards", "scores", scores, last >= 0, kl.dtype)
    return -beta * kl + xp_of(kl).where(is_last, scores[:, None], kl.dtype.type(0)), kl


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: A_t = sum_l (gamma lam)^l delta_(t + l), delta_t = R_t + gamma V_(t + 1) - V_t
    (Schulman et al. 2016, eq. 16), by A_t = delta_t + gamma lam A_(t + 1) from the end.

    rewards, values  (B, T) arrays; V_t is predicted from the state before token t
    mask             (B, T): t + 1 is the next valid token, so prompts, padding and gaps are stepped over. After the
                     last one V and A are 0: the episode ends there, also where it was cut at the maximal length
    Returns (advantages, returns), arrays (B, T), 0 where not valid; returns = A + V, the targets of the values.
    lam = 0: A = delta, the temporal difference. lam = 1: A = discounted sum of the rewards to come - V.
    """
    for what, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"gae: {what} must be in [0, 1], and is {value}")
    _same_shape("gae", mask=mask, rewards=rewards, values=values)
    valid = _valid("gae", mask)
    rewards, values = _array("gae", "rewards", rewards, valid), _array("gae", "values", values, valid)
    xp, dtype = xp_of(rewards), np.result_type(rewards.dtype, values.dtype, np.float32)
    advantages = xp.zeros(valid.shape, dtype)
    next_value, next_advantage = xp.zeros(len(valid), dtype), xp.zeros(len(valid), dtype)
    for t in reversed(range(valid.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = xp.where(valid[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = xp.where(valid[:, t], values[:, t], next_value)
        advantages[:, t] = xp.where(valid[:, t], next_advantage, 0)
    return advantages, advantages + values


# ------------------------------------------------------------------ PPO


def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2, count=None):
    """sum over valid tokens of max(-A r, -A clip(r, 1 - clip, 1 + clip)) / count, r = pi / pi_old: minus the clipped
    surrogate of Schulman et al. 2017, eq. 7.

    logp        (B, T): log pi of the sampled tokens, at the temperature they were sampled with
    old_logp    (B, T) array: the same before the first update, from the same forward pass, so that r starts at 1
    advantages  (B, T) array, whitened by the caller
    count       valid tokens in the whole optimizer step (in this mask, if None)
    The gradient is that of -A r, dL/dlogp = -A r / count, and 0 where clipping is the worse of the two: A > 0 and
    r > 1 + clip, or A < 0 and r < 1 - clip. log r is clamped to +-LOG_RATIO_LIMIT (gradient 0 beyond), so that e^ can
    not overflow.

    Returns (loss, statistics), the latter 0-dimensional arrays in float64:
        clipfrac            share of tokens whose gradient clipping has taken away
        approx_kl_k1 .. k3  KL(pi_old || pi), estimated (kl_estimate)
        ratio, ratio_var    mean of r, and of (r - 1)^2: its variance, as E_old[r] = 1
        ratio_max           largest r, 0 if there is none
    All but the last are sums over count, and add up over the batches of a step as the loss does.
    """
    _check_clip("ppo_policy_loss", clip)
    _same_shape("ppo_policy_loss", mask=mask, logp=logp, old_logp=old_logp, advantages=advantages)
    valid = _valid("ppo_policy_loss", mask)
    logp = _tensor(logp, valid)
    old_logp = _array("ppo_policy_loss", "old_logp", old_logp, valid, logp.dtype)
    minus_a = -_array("ppo_policy_loss", "advantages", advantages, valid, logp.dtype)
    ratio = ag.exp(ag.clip(logp - old_logp, low=-LOG_RATIO_LIMIT, high=LOG_RATIO_LIMIT))
    free, clipped = ratio * minus_a, ag.clip(ratio, low=1 - clip, high=1 + clip) * minus_a
    losses = ag.maximum(free, clipped)  # inside the interval both are equal, and the gradient goes to the free one

    def mean(x):
        return masked_mean(x.astype(np.float64), valid, count)

    r = ratio.data.astype(np.float64)
    old, new = old_logp.astype(np.float64), logp.data.astype(np.float64)
    statistics = {"clipfrac": mean(clipped.data > free.data), "ratio": mean(r), "ratio_var": mean((r - 1) ** 2)}
    statistics |= {f"approx_kl_{kind}": mean(kl_estimate(old, new, kind)) for kind in ("k1", "k2", "k3")}
    statistics["ratio_max"] = xp_of(r).where(valid, r, 0.0).max()
    return _mean("ppo_policy_loss", losses, count, valid), statistics


def ppo_value_loss(values, old_values, returns, mask, clip=0.2, count=None):
    """1/2 sum over valid tokens of max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / count.

    The clipped value loss of the PPO code of OpenAI baselines and of lm-human-preferences (not in the PPO paper).
    values      (B, T): V_t, predicted from the state before token t
    old_values  (B, T) array: the same before the first update
    returns     (B, T) array: the targets R_t, from gae
    clip        how far V may move from V_old; math.inf for no clipping: half the mean squared error
    The gradient is (V - R) / count, and 0 where V has moved by more than clip and is nearer to R than the clipped V.
    Returns (loss, {"clipfrac": share of tokens whose gradient clipping has taken away}).
    """
    _check_clip("ppo_value_loss", clip)
    _same_shape("ppo_value_loss", mask=mask, values=values, old_values=old_values, returns=returns)
    valid = _valid("ppo_value_loss", mask)
    values = _tensor(values, valid)
    old_values, returns = (
        _array("ppo_value_loss", what, x, valid, values.dtype)
        for what, x in (("old_values", old_values), ("returns", returns))
    )
    free = (values - returns) ** 2
    clipped = (ag.clip(values, low=old_values - clip, high=old_values + clip) - returns) ** 2
    loss = _mean("ppo_value_loss", ag.maximum(free, clipped) * 0.5, count, valid)
    taken = (clipped.data > free.data).astype(np.float64)
    return loss, {"clipfrac": masked_mean(taken, valid, count)}


def _check_clip(name, clip):
    if not clip > 0:
        raise ValueError(f"{name}: clip must be more than 0, and is {clip}")


class AdaptiveKL:
    """The coefficient beta of the KL penalty, steered towards a KL (Ziegler et al. 2019, section 2.2):

        e = clip(KL / target - 1, -0.2, 0.2),    beta <- beta (1 + e steps / horizon)

    coefficient  beta, now: 1.0 or so with scores of spread 1
    target       the KL per response (a sum over its tokens, a mean over responses) to settle at; None: beta is fixed
    horizon      how many responses it takes to correct by as much as e; the paper's K_beta is steps / horizon
    """

    def __init__(self, coefficient, target=None, horizon=10_000):
        if coefficient < 0 or (target is not None and not target > 0) or not horizon > 0:
            raise ValueError("AdaptiveKL: coefficient must be at least 0, target and horizon more than 0")
        self.coefficient, self.target, self.horizon = float(coefficient), target, horizon

    def update(self, kl, steps):
        """beta after `steps` responses whose mean KL was kl. ValueError where kl is NaN, which would stay for ever."""
        if math.isnan(kl):
            raise ValueError("AdaptiveKL: the KL is NaN")
        if self.target is None:
            return self.coefficient
        if 0.2 * steps >= self.horizon:
            raise ValueError(f"AdaptiveKL: {steps} responses at once are too many for a horizon of {self.horizon}")
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * steps / self.horizon
        return self.coefficient

    def state_dict(self):
        """What a checkpoint keeps: {"coefficient"}; target and horizon are configuration."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state):
        """Go on from `state_dict()`."""
        self.coefficient = float(state["coefficient"])
