"""Take an open language model from base to aligned, and know what every weight was made from."""

__version__ = "0.1.0"
