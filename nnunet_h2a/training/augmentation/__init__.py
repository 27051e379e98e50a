"""Transforms for PET/CT patches, and changes to nnU-Net's list of transforms."""
