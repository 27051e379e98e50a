"""``h2a_demo``: from images to ensembled segmentations and scores, with nnU-Net's own commands."""
