"""
Pictures as they lie in hospitals and archives: plain files, DICOM and NIfTI, as 8-bit pictures for the processor.

Nothing but pixels leaves a file: of a DICOM data set only the tags that pixels need are read, sequences among them whole; error
messages quote no value of a tag, and the pictures carry no metadata. DICOM and NIfTI need `pip install healthgpt[dicom]`.
"""

from .pictures import count_frames, open_picture

__all__ = ["count_frames", "open_picture"]
