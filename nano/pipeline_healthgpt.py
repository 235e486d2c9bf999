# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""The any-to-any pipeline for HealthGPT: transformers' own, which however will not start without torchvision."""

from transformers.pipelines import AnyToAnyPipeline, Pipeline


class HealthGPTPipeline(AnyToAnyPipeline):
    """`pipeline("any-to-any")` as in transformers. HealthGPT reads no video, hence needs no torchvision."""

    def __init__(self, *args, **kwargs):
        Pipeline.__init__(self, *args, **kwargs)


__all__ = ["HealthGPTPipeline"]
