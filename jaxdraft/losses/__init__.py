"""What a draft is trained to minimise: a loss is one function of rows, and ``chunked`` runs it without full logits."""

from jaxdraft.losses.acceptance import agreement, overlap
from jaxdraft.losses.base import Loss, Weights, resolve
from jaxdraft.losses.check import check_loss
from jaxdraft.losses.divergences import JSD, KL, TVD, CrossEntropy, ReverseKL
from jaxdraft.losses.engine import LossOutput, Positions, Shared, batch_statistics, chunked, per_position
from jaxdraft.losses.likelihood import LKHybrid, LogAcceptance, Mixture, parts
from jaxdraft.losses.targets import DenseTarget, StoredTarget, Target, bucketed, log_probs
from jaxdraft.losses.tvdpp import TVDPlusPlus, TVDPlusPlusGlobal, TVDPlusPlusLiteral, TVDPlusPlusSampled
from jaxdraft.losses.weights import DPACE, AdaSPEC, weighted

__all__ = [
    "DPACE",
    "JSD",
    "KL",
    "TVD",
    "AdaSPEC",
    "CrossEntropy",
    "DenseTarget",
    "LKHybrid",
    "LogAcceptance",
    "Loss",
    "LossOutput",
    "Mixture",
    "Positions",
    "ReverseKL",
    "Shared",
    "StoredTarget",
    "TVDPlusPlus",
    "TVDPlusPlusGlobal",
    "TVDPlusPlusLiteral",
    "TVDPlusPlusSampled",
    "Target",
    "Weights",
    "agreement",
    "batch_statistics",
    "bucketed",
    "check_loss",
    "chunked",
    "log_probs",
    "overlap",
    "parts",
    "per_position",
    "resolve",
    "weighted",
]
