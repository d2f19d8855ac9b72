"""The loss of a value, text by text, and its gradient in the logits (MEMIT, Meng et al. 2023, eq. 16):

    −Σ_k w_k log p(target_k)  +  kl_factor · KL(p ‖ p_0)

with w_k a target token's weight in its fact's loss, p_0 the distribution behind "{subject} is a" before
the edit. The gradient is w_k (p − 1_target) where a target stands, and kl_factor · p · (log p − log p_0 − KL)
where the divergence is taken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from easyedit_rls.facts.suffix import SuffixPasses


class RowLosses:
    """Losses of the rows of a group of facts.

    Args:
        n_facts: facts in the group.
        kl_factor: weight of the divergence.
        margin: by how many nats a target token must lead, or else it falls short.
    """

    def __init__(self, n_facts: int, kl_factor: float, margin: float) -> None:
        self._n_facts, self._kl_factor, self._margin = n_facts, kl_factor, margin
        self._kl_prompt: Tensor | None = None  # log p_0, (facts, vocabulary)

    def __call__(
        self, logits: Tensor, plan: SuffixPasses, fact: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the outputs say of the rows that ran; the first call holds every fact, before the edit.

        Args:
            logits: of the outputs wanted, (wanted, vocabulary).
            plan: which these are.
            fact: of each row, (rows,).

        Returns:
            Each row's part of the loss, by its target, (rows,), and by the KL prompt's divergence, (rows,);
            how many target tokens fall short of the most probable text, (rows,); the gradient of the parts'
            sum in the logits, (wanted, vocabulary).
        """
        log_probs = F.log_softmax(logits, dim=1)
        targets, token, kl_places = plan.targets, plan.token, plan.kl_places
        part, divergences, falls_short = log_probs.new_zeros(3, len(fact))
        of_target = log_probs[targets, token]
        part.index_add_(0, plan.number[targets], -of_target * plan.weight)
        log_probs[targets, token] = -torch.inf
        others = log_probs.amax(1)[targets]
        log_probs[targets, token] = of_target
        is_short = of_target - others <= self._margin
        falls_short.index_add_(0, plan.number[targets], is_short.to(falls_short))

        if self._kl_prompt is None:
            self._kl_prompt = log_probs.new_empty(self._n_facts, log_probs.shape[1])
            self._kl_prompt[fact[plan.number[kl_places]]] = log_probs[kl_places]
        change = log_probs[kl_places] - self._kl_prompt[fact[plan.number[kl_places]]]
        slope = log_probs.exp_()
        divergence = (slope[kl_places] * change).sum(1, keepdim=True)
        divergences[plan.number[kl_places]] = self._kl_factor * divergence.squeeze(1)
        scale = slope.new_ones(len(slope), 1).index_put((targets,), plan.weight[:, None])
        slope *= scale
        slope[targets, token] -= plan.weight
        slope[kl_places] *= self._kl_factor * (change - divergence)
        return part, divergences, falls_short, slope
