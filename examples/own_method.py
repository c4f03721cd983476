"""A method of your own: distil the teachers' mean, and regress the features of all of them.

gdviz run --methods labels both-graphs examples.own_method:KDAndHint
"""

import torch
from torch import nn

from gdviz.student.losses import hint_loss, kd_loss
from gdviz.student.methods import Method


class KDAndHint(Method):
    """Uniform KD (Hinton et al. 2015) and a hint (FitNets, Romero et al. 2015)."""

    label, marker = "KD and hint", "v"
    terms = ("kd", "hint")  # each is scaled to the cross-entropy's gradient

    def __init__(self, setting):
        super().__init__(setting)
        self.regress = nn.Linear(setting.student_dim, sum(setting.bank.dims))  # trained along

    def losses(self, batch, bank, edges, moment):
        """Return one scalar a term."""
        probs = self.softened(batch, bank)  # (b, k, c)
        uniform = torch.full_like(probs[..., 0], 1 / probs.shape[1])
        features = torch.cat(bank.features_at(batch.rows, batch.clips), 1)
        return {
            "kd": kd_loss(batch.logits, probs, uniform, self.cfg.temperature),
            "hint": hint_loss(self.regress(batch.features), batch.to(features)),
        }
