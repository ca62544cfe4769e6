"""Where adapters start: initialisation from a weight, its quantisation error and what the layer sees."""

from .qwha import QWHAInit, QWHAReport, ada_alloc, qwha_init

__all__ = ["QWHAInit", "QWHAReport", "ada_alloc", "qwha_init"]
