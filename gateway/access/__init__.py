"""Who may use the doors, and how much: API keys, tenants, their limits, and the audit log."""

from gateway.access.audit import Audit
from gateway.access.doorkeeper import Doorkeeper
from gateway.access.visit import Visit

__all__ = ["Audit", "Doorkeeper", "Visit"]
