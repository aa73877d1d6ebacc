"""Losses over the draft vocabulary, computed together with the head's projection."""

from speculators.losses.functions import LOSSES, Draft, Loss, Target, acceptance, mixture, top_k, weighted
from speculators.losses.fused import HeadLoss, Weigh, head_loss, place_loss

__all__ = [
    "LOSSES",
    "Draft",
    "HeadLoss",
    "Loss",
    "Target",
    "Weigh",
    "acceptance",
    "head_loss",
    "mixture",
    "place_loss",
    "top_k",
    "weighted",
]
