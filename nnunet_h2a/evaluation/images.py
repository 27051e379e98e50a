"""HD95 of every axial image of a case in pixels, as CIPA is evaluated."""

from __future__ import annotations

import numpy as np

from nnunet_h2a.evaluation.surfaces import distances_between, surface_points

#: Row and column of the pixel that CIPA's published script puts into an empty prediction.
DUMMY_PIXEL = (256, 256)


def image_distances(truth: np.ndarray, predicted: np.ndarray, as_published: bool = False) -> list[float | None]:
    """HD95 of each axial image.

    Both directions' distances between border pixels (foreground with one of four neighbours that is background) are
    pooled, and the 95th percentile is taken, in pixels, as in the medpy library that the published script calls.

    Args:
        truth: (z, y, x) bool; a 2D case is one image.
        predicted: likewise.
        as_published: count an empty prediction as the pixel (256, 256).

    Returns:
        One number per image: 0 where both masks are empty; None where one is, for then there is no distance. Also as
        published, an image with a prediction and no truth has None: the published script stops there.
    """
    true_points, predicted_points = (surface_points(mask, axes=(1, 2)) for mask in (truth, predicted))
    images = np.arange(len(truth) + 1)
    true_starts, predicted_starts = (np.searchsorted(p[:, 0], images) for p in (true_points, predicted_points))
    result: list[float | None] = []
    for image in range(len(truth)):
        one = true_points[true_starts[image] : true_starts[image + 1], 1:]
        other = predicted_points[predicted_starts[image] : predicted_starts[image + 1], 1:]
        if as_published and len(one) and not len(other) and min(truth.shape[1:]) > max(DUMMY_PIXEL):
            other = np.array([DUMMY_PIXEL])
        if len(one) and len(other):
            result.append(distances_between(one, other, (1.0, 1.0)).pooled_hausdorff95)
        else:
            result.append(None if len(one) or len(other) else 0.0)
    return result
