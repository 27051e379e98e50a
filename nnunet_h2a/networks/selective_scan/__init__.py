"""Selective scan (S6) without a compiled extension: one function, several backends."""

from nnunet_h2a.networks.selective_scan.dispatch import selective_scan

__all__ = ["selective_scan"]
