"""Scores of segmentations, and comparisons of models."""

#: To be raised when the same files give other measures or scores, so that kept ones are not taken for today's.
MEASURES_VERSION = 2
