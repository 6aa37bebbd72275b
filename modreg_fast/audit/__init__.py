"""Who does a model listen to: shares, information and missing modalities, measured on data; as text, picture, JSON and page."""

from modreg_fast.audit.measure import audit
from modreg_fast.audit.result import Audit, Estimate

__all__ = ["Audit", "Estimate", "audit"]
