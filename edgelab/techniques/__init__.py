"""The techniques: importing this package enters every one of them into `edgelab.recipes.TECHNIQUES`."""

from edgelab.techniques.quantization import floats, rtn

__all__ = ["floats", "rtn"]
