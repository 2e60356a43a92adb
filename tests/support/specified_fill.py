"""The specification's sampler as a plain loop, and the one by confidence: what the policies of these names are held against."""

import torch

from difftrain.sampling.choosing import Choice, choose, random_numbers
from difftrain.sampling.policies import make_policy
from difftrain.sampling.settling import State, settle


def scores_of(logits_of):
    """Scores of a function from ids to logits (B, T, V), with a count of its calls and what they asked for."""

    def scores(x, where):
        scores.passes += 1
        scores.asked.append(where.clone())
        return logits_of(x)[where]

    scores.passes, scores.asked = 0, []
    return scores


def settled(logits_of, x, mask_id, policy, steps, choice, *, seed=0, samples=None, **options):
    """Texts x settled by a policy of this name, and the scores that counted its passes."""
    scores = scores_of(logits_of)
    state = State.of(x, mask_id)
    samples = torch.arange(len(x), dtype=torch.int64, device=x.device) if samples is None else samples
    settle(
        scores, state, mask_id, make_policy(policy, **options),
        steps=steps, choice=choice, seed=seed, samples=samples,
    )  # fmt: skip
    return state, scores


def specified_fill(logits_of, x, mask_id, *, max_steps, temperature, top_k=0, by_confidence=False, seed=0):
    """Up to max_steps times predict all positions, sample each, fill those that are [MASK]; the rest without [MASK].

    With ``by_confidence`` each step fills its share, the most probable first, and [MASK] is forbidden. The
    random numbers are those that difftrain has for (seed, sample, pass, position).
    """
    x = x.clone()
    choice = Choice(temperature, top_k)
    for step in range(max_steps + 1):
        is_masked = x == mask_id
        if not is_masked.any():
            break
        logits = logits_of(x).float()
        if by_confidence or step == max_steps:
            logits[..., mask_id] = -torch.inf
        u = random_numbers(seed, torch.arange(len(x)), step, x.shape[1])
        word, confidence = (t.view(x.shape) for t in choose(logits.flatten(0, 1), choice, u.flatten()))
        if by_confidence:
            budget = -(-is_masked.sum(1, keepdim=True) // (max_steps - step))
            order = confidence.masked_fill(~is_masked, -1.0).argsort(dim=1, descending=True, stable=True)
            is_masked &= order.argsort(dim=1) < budget
        x = torch.where(is_masked, word, x)
    return x
