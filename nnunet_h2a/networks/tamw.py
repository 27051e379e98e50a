"""H2ASeg's target-aware modality weighting, and the foreground probability that steers it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_h2a.networks.precision import wide, without_autocast


def foreground_probability(logits: Tensor, independent_classes: bool) -> Tensor:
    """Probability that a voxel belongs to any foreground class.

    Args:
        logits: (batch, classes, spatial...).
        independent_classes: one sigmoid per class (regions, or a single class): 1 - prod(1 - sigmoid), as
            -expm1(-sum(softplus)), which keeps its digits and its gradient where the product would underflow.
            Otherwise a softmax over all classes, of which the first is background: 1 - softmax_0.

    Returns:
        (batch, 1, spatial...), float32 (float64 for float64 logits).
    """
    logits = wide(logits)
    if independent_classes:
        return -torch.expm1(-nn.functional.softplus(logits).sum(dim=1, keepdim=True))
    return 1 - torch.softmax(logits, dim=1)[:, :1]


class TAMW(nn.Module):
    """Target-aware modality weighting: channel weights for what lies in and outside the predicted foreground.

    Lu et al., "H2ASeg", MICCAI 2024, section 2.2, equations 2 to 4. For a level's features F (PET, CT and
    up-sampled decoder features side by side) and the foreground probability P of the next deeper level's prediction:

        F_fore = P * F, F_back = (1 - P) * F;   I = mean over the map;   W = tanh(MLP(I));
        F_enh = F + W_fore * F_fore + W_back * F_back

    with one MLP for the foreground and one for the background (hidden width channels / 4 and inner tanh: released
    code). Same numbers, cheaper: mean(F_back) = mean(F) - mean(F_fore), and F_enh is one pass over F,
    F * (1 + W_back + (W_fore - W_back) * P). The means, the MLPs and their weights stay in float32 under autocast.

    Differs from the released code, which subtracts the background term and multiplies P into the PET and CT
    features only; the paper adds it, and F is all of them.

    Args:
        channels: of F.

    Shapes:
        ``features`` (batch, channels, spatial...), ``foreground`` (batch, 1, spatial...); returns ``features``' shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.foreground_mlp = self._mlp(channels, hidden)
        self.background_mlp = self._mlp(channels, hidden)

    @staticmethod
    def _mlp(channels: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(channels, hidden), nn.Tanh(), nn.Linear(hidden, channels), nn.Tanh())

    def modality_weights(self, features: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
        """W_fore and W_back of equation 3, each (batch, channels), in (-1, 1): how a channel is emphasised.

        Channels are those of ``features``: PET's first, then CT's, then the decoder's.
        """
        axes = tuple(range(2, features.dim()))
        mean_type = wide(features[:0]).dtype
        with without_autocast(features):
            mean = features.mean(axes, dtype=mean_type)
            mean_fore = (features * foreground.to(features.dtype)).mean(axes, dtype=mean_type)
            weight_type = self.foreground_mlp[0].weight.dtype
            return (
                self.foreground_mlp(mean_fore.to(weight_type)),
                self.background_mlp((mean - mean_fore).to(weight_type)),
            )

    def forward(self, features: Tensor, foreground: Tensor) -> Tensor:
        fore, back = self.modality_weights(features, foreground)
        shape = (*fore.shape, *[1] * (features.dim() - 2))
        base, slope = (1 + back).reshape(shape), (fore - back).reshape(shape)
        return features * torch.addcmul(
            base.to(features.dtype), slope.to(features.dtype), foreground.to(features.dtype)
        )
