"""What a draft is trained to minimise: a loss is one function of rows, and ``chunked`` runs it without full logits."""

from jaxdraft.losses.acceptance import agreement, overlap
from jaxdraft.losses.base import DenseTarget, Loss, LossOutput, chunked, log_probs, resolve_loss
from jaxdraft.losses.divergences import KL, TVD, CrossEntropy
from jaxdraft.losses.tvdpp import TVDPlusPlus

__all__ = [
    "KL",
    "TVD",
    "CrossEntropy",
    "DenseTarget",
    "Loss",
    "LossOutput",
    "TVDPlusPlus",
    "agreement",
    "chunked",
    "log_probs",
    "overlap",
    "resolve_loss",
]
