"""Importing this package registers every attention backend. Optional libraries are looked for, not imported, until
they are used."""

from . import flash3, reference, sdpa

__all__ = ["flash3", "reference", "sdpa"]
