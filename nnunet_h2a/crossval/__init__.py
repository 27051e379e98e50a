"""Cross-validation of several trainers with nnU-Net's own commands."""
