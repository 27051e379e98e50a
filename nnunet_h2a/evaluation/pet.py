"""What clinics take from PET: volumes and uptake of lesions, for a patient and lesion by lesion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.spatial.distance import pdist

from nnunet_h2a.evaluation.lesions import Lesions

#: Radius of a sphere of 1 ml in mm.
PEAK_RADIUS = (3 * 1000 / (4 * math.pi)) ** (1 / 3)
#: Quantities of a patient; :func:`patient_quantities` says what they are.
QUANTITIES = ("tmtv_ml", "tlg", "suv_max", "suv_mean", "suv_peak", "suv_peak_global", "lesions", "dmax_mm")

#: Quantities of a lesion that are compared; :func:`lesion_quantities` says what they are.
LESION_QUANTITIES = ("volume_ml", "tlg", "suv_max", "suv_mean", "suv_peak", "suv_peak_global")

Quantities = dict[str, float | int | None]


@dataclass(frozen=True)
class _Peaks:
    """Means over spheres of 1 ml around voxels.

    A voxel belongs to the sphere where its centre lies within the radius, as in the Image Biomarker Standardisation
    Initiative's intensity peaks; of a sphere that sticks out of the volume the inner part counts.
    """

    pet: np.ndarray
    offsets: np.ndarray

    @classmethod
    def on(cls, pet: np.ndarray, spacing: Sequence[float]) -> _Peaks:
        reach = [range(-int(PEAK_RADIUS / s), int(PEAK_RADIUS / s) + 1) for s in spacing]
        offsets = [o for o in product(*reach) if math.dist((0, 0, 0), np.multiply(o, spacing)) <= PEAK_RADIUS]
        return cls(pet, np.array(offsets))

    def around(self, points: np.ndarray) -> np.ndarray:
        """Mean around each of some voxels, (n, 3) indices; float64."""
        shape, reach = np.array(self.pet.shape), self.offsets.max(0)
        result = np.empty(len(points))
        inner = ((points >= reach) & (points < shape - reach)).all(1)
        # Spheres that lie wholly in the volume take the same steps from their centres in memory.
        flat, centres = self.pet.reshape(-1), np.ravel_multi_index(points[inner].T, self.pet.shape)
        total = np.zeros(len(centres))
        for step in self.offsets @ (shape[1] * shape[2], shape[2], 1):
            total += flat[centres + step]
        result[inner] = total / len(self.offsets)
        result[~inner] = self._at_the_edge(points[~inner])
        return result

    def _at_the_edge(self, points: np.ndarray) -> np.ndarray:
        total, count = np.zeros(len(points)), np.zeros(len(points), np.int64)
        shape = np.array(self.pet.shape)
        for offset in self.offsets:
            moved = points + offset
            inside = ((moved >= 0) & (moved < shape)).all(1)
            total[inside] += self.pet[tuple(moved[inside].T)]
            count += inside
        return total / count


def lesion_quantities(pet: np.ndarray, lesions: Lesions, spacing: Sequence[float]) -> list[Quantities]:
    """Volume and uptake of each lesion.

    Args:
        pet: (z, y, x), SUV.
        lesions: of a mask of its shape, with labels.
        spacing: mm, (z, y, x).

    Returns:
        For each lesion: ``volume_ml``; ``suv_max``, ``suv_mean``; ``suv_peak``, the mean over the 1 ml sphere around
        the hottest voxel (around the one with the highest mean where several are equally hot); ``suv_peak_global``,
        the highest such mean around any voxel of the lesion; ``tlg``, volume times mean SUV in ml; ``z``, ``y``,
        ``x``, the centroid in voxels; ``found``, whether the other mask has a voxel in it; ``partner``, a place for
        the number of the lesion of the other mask that belongs to it.
    """
    if not len(lesions):
        return []
    points = np.stack(np.unravel_index(lesions.positions, pet.shape), axis=1)
    values, labels = pet.reshape(-1)[lesions.positions].astype(np.float64), lesions.labels
    count = len(lesions)
    hottest = np.full(count, -np.inf)
    np.maximum.at(hottest, labels, values)
    means = _Peaks.on(pet, spacing).around(points)
    peaks, best = np.full(count, -np.inf), np.full(count, -np.inf)
    is_hottest = values == hottest[labels]
    np.maximum.at(peaks, labels[is_hottest], means[is_hottest])
    np.maximum.at(best, labels, means)
    sums = np.bincount(labels, values, count)
    centroids = np.stack([np.bincount(labels, axis, count) for axis in points.T], axis=1) / lesions.voxels[:, None]
    voxel_ml = float(np.prod(spacing)) / 1000
    return [
        {
            "volume_ml": int(lesions.voxels[i]) * voxel_ml,
            "suv_max": float(hottest[i]),
            "suv_mean": float(sums[i] / lesions.voxels[i]),
            "suv_peak": float(peaks[i]),
            "suv_peak_global": float(best[i]),
            "tlg": float(sums[i]) * voxel_ml,
            "z": float(centroids[i, 0]), "y": float(centroids[i, 1]), "x": float(centroids[i, 2]),
            "found": bool(lesions.touched[i]), "partner": None,
        }
        for i in range(count)
    ]  # fmt: skip


def patient_quantities(lesions: Sequence[Quantities], spacing: Sequence[float]) -> Quantities:
    """What is said of a patient.

    Args:
        lesions: from :func:`lesion_quantities`.
        spacing: mm, (z, y, x).

    Returns:
        ``tmtv_ml`` total metabolic tumour volume; ``tlg`` total lesion glycolysis, the sum of SUV times volume, in
        ml; ``suv_max``, ``suv_mean`` over all tumour voxels; ``suv_peak`` and ``suv_peak_global`` the highest of all
        lesions; ``lesions`` their number; ``dmax_mm`` the largest distance between two lesions' centroids (Cottereau
        et al., Ann Oncol 2020), 0 for one lesion. Without lesions: 0 for volume, glycolysis and number, None for the
        others.
    """
    if not lesions:
        return {key: 0 if key in ("tmtv_ml", "tlg", "lesions") else None for key in QUANTITIES}
    volume, glycolysis = (math.fsum(lesion[key] for lesion in lesions) for key in ("volume_ml", "tlg"))
    centroids = np.array([[lesion[axis] for axis in "zyx"] for lesion in lesions]) * np.asarray(spacing)
    return {
        "tmtv_ml": volume,
        "tlg": glycolysis,
        "suv_mean": glycolysis / volume,
        **{key: max(lesion[key] for lesion in lesions) for key in ("suv_max", "suv_peak", "suv_peak_global")},
        "lesions": len(lesions),
        "dmax_mm": float(pdist(centroids).max()) if len(lesions) > 1 else 0.0,
    }


def agreement(truth: Sequence[float | None], predicted: Sequence[float | None]) -> dict[str, float | int | None]:
    """Bland and Altman's comparison of a quantity over patients.

    Returns:
        ``n`` patients for whom both are defined; ``bias``, mean of predicted minus true; ``lower`` and ``upper`` limits
        of agreement, bias ± 1.96 standard deviations of the differences (n - 1; None for fewer than two patients).
    """
    pairs = [(t, p) for t, p in zip(truth, predicted, strict=True) if t is not None and p is not None]
    differences = np.array([p - t for t, p in pairs], float)
    if not len(differences):
        return {"n": 0, "bias": None, "lower": None, "upper": None}
    bias = float(differences.mean())
    if len(differences) < 2:
        return {"n": 1, "bias": bias, "lower": None, "upper": None}
    spread = 1.96 * float(differences.std(ddof=1))
    return {"n": len(differences), "bias": bias, "lower": bias - spread, "upper": bias + spread}
