"""
What a model did inside: the routers' expert weights, and the attention of an answer over the pictures.

`healthgpt.explain.plots` draws both, with matplotlib. Everything works from outside, by hooks: any checkpoint, quantised or
not, any task. Neither tells why a model said what it said: attention shows what was read, not what decided.
"""

from .attention import attention_over_pictures
from .inside import look_inside
from .routing import trace_routing

__all__ = ["attention_over_pictures", "look_inside", "trace_routing"]
