"""How a codebook learns (van den Oord et al. 2017).

1. Each vector of the encoder becomes its nearest code; gradients pass straight through to the vector.
2. Codes follow: as moving averages of the vectors that chose them (its Appendix A.1), or pulled by a loss.
3. A commitment loss keeps vectors near their codes.
4. A code that is hardly used is moved onto a random vector of the batch (Lancucki et al. 2020); at the first step most of them are.

Several processes count together, and revive by vectors of the first one: their codes stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.autoencoders.config import CodebookLearning
from continuar.tokenizers.vq import nearest_codes
from continuar.training.parallel import Single


@dataclass(frozen=True)
class Quantised:
    """Vectors and the codes they became."""

    codes_BCHW: Tensor
    """Codes, with the gradient of the vectors."""
    loss: Tensor
    """Commitment and, where codes learn by gradient, the codebook's loss."""
    vectors_MC: Tensor
    ids_M: Tensor


class CodebookLearner(nn.Module):
    """Quantises and moves codes; its buffers belong into a checkpoint.

    Args:
        codebook_VC: the parameter that holds the codes.
        config: how they learn.
        parallel: the processes that train together; one if not given.
    """

    uses_V: Tensor
    sums_VC: Tensor
    seen_V: Tensor

    def __init__(self, codebook_VC: nn.Parameter, config: CodebookLearning, parallel: Single | None = None) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel or Single()
        # In a tuple, so that it is not registered here a second time.
        self._codebook = (codebook_VC,)
        codebook_VC.requires_grad_(config.update == "gradient")
        self.register_buffer("uses_V", torch.zeros(len(codebook_VC)))
        self.register_buffer("sums_VC", torch.zeros_like(codebook_VC, dtype=torch.float32))
        self.register_buffer("seen_V", torch.zeros(len(codebook_VC)))
        self.to(codebook_VC.device)

    def forward(self, vectors_BCHW: Tensor) -> Quantised:
        """Vectors [B, C, h, w] to codes, in float32."""
        x_BCHW = vectors_BCHW.float()
        b, c, h, w = x_BCHW.shape
        x_MC = x_BCHW.permute(0, 2, 3, 1).reshape(-1, c)
        (codebook,) = self._codebook
        ids_M = nearest_codes(x_MC.detach(), codebook.detach())
        codes_MC = F.embedding(ids_M, codebook)
        loss = self.config.commitment * F.mse_loss(x_MC, codes_MC.detach())
        if self.config.update == "gradient":
            loss = loss + F.mse_loss(codes_MC, x_MC.detach())
        straight_MC = x_MC + (codes_MC - x_MC).detach()
        return Quantised(straight_MC.view(b, h, w, c).permute(0, 3, 1, 2).contiguous(), loss, x_MC.detach(), ids_M)

    @torch.no_grad()
    def update(self, done: Quantised, keep: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the optimizer's step: averages, codes, dead codes. No host synchronisation.

        Args:
            keep: a bool tensor; where it is False nothing changes (a bad step).
            optimizer: of a codebook that learns by gradient; a revived code's moments begin anew.
        """
        (codebook,) = self._codebook
        codes, decay, even = len(codebook), self.config.decay, self.parallel.world * len(done.ids_M) / len(codebook)
        # Not `bincount`, which reads the largest id on the host.
        counts_V = torch.zeros_like(self.uses_V).index_add_(0, done.ids_M, torch.ones_like(done.ids_M, dtype=torch.float32))
        counts_V = self.parallel.total(counts_V)
        uses_V = decay * self.uses_V + (1 - decay) * counts_V
        batch_sums_VC = torch.zeros_like(self.sums_VC).index_add_(0, done.ids_M, done.vectors_MC)
        sums_VC = decay * self.sums_VC + (1 - decay) * self.parallel.total(batch_sums_VC)
        if self.config.update == "ema":
            # A code that nobody ever chose has no average: it stays until it is revived.
            moved = (sums_VC / uses_V.clamp_min(1e-12).unsqueeze(1)).to(codebook.dtype)
            new_VC = torch.where((uses_V > 1e-6).unsqueeze(1), moved, codebook)
        else:
            new_VC = codebook.clone()
        if self.config.revive_below > 0:
            dead_V = uses_V < self.config.revive_below * even
            chosen_VC = done.vectors_MC[torch.randint(len(done.vectors_MC), (codes,), device=codebook.device)]
            self.parallel.share([chosen_VC])
            new_VC = torch.where(dead_V.unsqueeze(1), chosen_VC.to(codebook.dtype), new_VC)
            uses_V = torch.where(dead_V, even, uses_V)
            sums_VC = torch.where(dead_V.unsqueeze(1), chosen_VC * even, sums_VC)
            for moment in _moments(optimizer, codebook):
                moment.mul_(~(dead_V & keep).unsqueeze(1))
        codebook.copy_(torch.where(keep, new_VC, codebook))
        self.uses_V.copy_(torch.where(keep, uses_V, self.uses_V))
        self.sums_VC.copy_(torch.where(keep, sums_VC, self.sums_VC))
        self.seen_V.add_(counts_V)

    @torch.no_grad()
    def read_usage(self) -> tuple[float, float]:
        """(share of codes in use, perplexity) since the last read; synchronises and starts anew."""
        found = usage(self.seen_V)
        self.seen_V.zero_()
        return found


def usage(counts_V: Tensor) -> tuple[float, float]:
    """(share of codes that occur, perplexity = exp of the entropy of their frequencies), 0 for no counts."""
    total = counts_V.sum()
    p = counts_V.double() / total.clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum()
    return (counts_V > 0).double().mean().item(), entropy.exp().item() if total > 0 else 0.0


def _moments(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
