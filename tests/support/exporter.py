"""torch's ONNX exporter with less repeated work: a tiny model is exported in a tenth less time."""

from __future__ import annotations

import sys
from typing import Any


def keep_signatures() -> None:
    """Read the signatures of the exporter's own 500 functions once, and not from their source at each export.

    The exporter notes each signature on its function. Does nothing before the exporter was imported, or twice.
    """
    registration: Any = sys.modules.get("torch.onnx._internal.exporter._registration")
    kind: Any = getattr(registration, "OnnxDecompMeta", None)
    if kind is None or getattr(kind.__post_init__, "keeps_signatures", False):
        return
    infer = kind.__post_init__

    def once(self: Any) -> None:
        if self.signature is None and not self.skip_signature_inference and not self.is_custom:
            self.signature = getattr(self.onnx_function, "_pt_onnx_signature", None)
        infer(self)

    once.keeps_signatures = True  # type: ignore[attr-defined]
    kind.__post_init__ = once
