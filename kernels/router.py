"""Router with selection bias: logits to expert ids and weights (arXiv 2605.27358; DeepSeek-V3's balancing).

Shapes: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor


def route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, scale: float, normalise: bool = True, scoring: str = "sigmoid"
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts a token and weigh them.

    Args:
        logits_TE: float32 router logits.
        bias_E: added for the selection only, never to the weights.
        top_k: K.
        scale: factor on the weights (`routed_scaling_factor`).
        normalise: divide the chosen scores by their sum (`norm_topk_prob`).
        scoring: "sigmoid" scores each expert on its own (MobileMoE), "softmax" all of them against each other.

    Returns:
        ids_TK (int64, best first; of equal candidates the lower id first) and weights_TK (float32, differentiable).
    """
    scores_TE = _scores(logits_TE, scoring)
    # A stable sort, because topk leaves the order of ties open.
    order_TE = torch.sort(scores_TE.detach() + bias_E, dim=-1, descending=True, stable=True).indices
    ids_TK = order_TE[:, :top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * scale


def z_loss_sum(logits_TE: Tensor) -> Tensor:
    """Sum over tokens of the squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(logits_TE, dim=-1).square().sum()


@torch.no_grad()
def entropy_sum(logits_TE: Tensor, scoring: str = "sigmoid") -> Tensor:
    """Sum over tokens of the entropy (nats) of a token's scores, taken as shares of their sum.

    log(E) a token when all experts score alike, 0 when one has everything: falling entropy is a router making up its
    mind, and a sudden fall one that collapses.
    """
    share_TE = _scores(logits_TE, scoring)
    share_TE = share_TE / (share_TE.sum(-1, keepdim=True) + 1e-20)
    return torch.special.entr(share_TE).sum()


def _scores(logits_TE: Tensor, scoring: str) -> Tensor:
    return torch.sigmoid(logits_TE) if scoring == "sigmoid" else torch.softmax(logits_TE, -1)
