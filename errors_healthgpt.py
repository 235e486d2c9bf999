# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""The one class of errors that are meant for users; whatever else is raised is a mistake of programming."""


class HealthGPTError(ValueError):
    """Input that cannot be used. The message says in a sentence what was wrong and what is accepted."""


__all__ = ["HealthGPTError"]
