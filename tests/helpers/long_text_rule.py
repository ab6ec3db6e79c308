"""The rule of long texts as documented, with the whole text run again for every token."""

from __future__ import annotations

import math

import torch


def final_states(base, ids):
    """States after the last layer, before the final norm: ``[T, d]``."""
    kept = []
    handle = base.model.layers[-1].register_forward_hook(lambda *call: kept.append(call[2]))
    base(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0]


@torch.inference_mode()
def written_out(base, prompt, rule, new, constraint=None):
    """Tokens, triggers as (index, statistic), and how many tokens were re-weighed.

    Args:
        constraint: whose forced tokens are taken without a choice; None: there is none.
    """
    ids, made, triggers, reweighed, until = list(prompt), [], [], 0, 0
    for index in range(new):
        out = base(torch.tensor([ids]), use_cache=False)
        found = final_states(base, ids)[len(prompt) - 1 :]
        states = [state / state.norm() for state in found]
        logits = out.logits[0, -1].clone()
        if index >= rule.window:
            gaps = [
                min(float((states[t] - states[s]).square().sum()) for s in range(t))
                for t in range(index - rule.window + 1, index + 1)
            ]
            mean = torch.stack(states).mean(0)
            spread = sum(float((state - mean).square().sum()) for state in states) / len(states)
            statistic = sum(gaps) / rule.window / spread
            if statistic < rule.threshold:
                if index >= until:
                    triggers.append((index, round(statistic, 9)))
                until = index + rule.tokens
        forced = constraint is not None and constraint.forced()
        if 0 < index < until and not forced:
            reweighed += 1
            for token in set(made):
                similar = max(
                    float(states[-1] @ states[s]) for s in range(index) if made[s] == token
                )
                logits[token] -= rule.strength * math.exp(-rule.sharpness * (1 - similar))
        if constraint is not None:
            logits = constraint.mask(logits)
        made.append(forced[0] if forced else int(logits.argmax()))
        if constraint is not None:
            constraint.advance(made[-1])
        ids.append(made[-1])
    return made, triggers, reweighed
