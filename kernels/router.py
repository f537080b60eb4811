"""Router with selection bias: logits to expert ids and weights (arXiv 2605.27358; DeepSeek-V3's balancing).

Shapes: T tokens, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import use_triton


class Places(NamedTuple):
    """Where each slot stands among its expert's slots: what kernels.permute makes rows of without sorting.

    A slot is one (token, k) pair. Tokens are counted in blocks; `ahead_BE` are an expert's slots in earlier blocks.
    """

    position_TK: Tensor  # int32, within the block
    ahead_BE: Tensor  # int32


class Routing(NamedTuple):
    """Everything that one pass over the router's logits finds out."""

    ids_TK: Tensor  # best first; int64, or int32 from Triton
    weights_TK: Tensor  # float32, differentiable
    counts_E: Tensor  # int64: tokens that chose each expert
    z_loss_sum: Tensor  # see z_loss_sum; differentiable
    entropy_sum: Tensor  # see entropy_sum
    places: Places | None = None  # from Triton only


def route_and_count(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, scale: float, normalise: bool = True, scoring: str = "sigmoid"
) -> Routing:
    """`route`, with the counts and sums that training wants of it; on CUDA one fused kernel and a scan."""
    if use_triton(logits_TE):
        from kernels import router_triton

        ids_TK, weights_TK, counts_E, position_TK, ahead_BE, z_B, entropy_B = router_triton.route(
            logits_TE.float(), bias_E, top_k, scale, normalise, scoring == "softmax"
        )
        places = Places(position_TK, ahead_BE)
        return Routing(ids_TK, weights_TK, counts_E, z_B.sum(), entropy_B.detach().sum(), places)
    ids_TK, weights_TK = route(logits_TE, bias_E, top_k, scale, normalise, scoring)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[1])
    return Routing(ids_TK, weights_TK, counts_E, z_loss_sum(logits_TE), entropy_sum(logits_TE, scoring))


def route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, scale: float, normalise: bool = True, scoring: str = "sigmoid"
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts a token and weigh them: the reference, and all that decoding needs.

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
