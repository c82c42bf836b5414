"""At both doors: whose call is it?"""

from __future__ import annotations

import datetime

from gateway.access import keys
from gateway.access.audit import Audit
from gateway.access.keys import Tenant, Tenants
from gateway.access.visit import Account, Visit
from gateway.types import MAX_PRIORITY
from stageline.errors import PermissionDeniedError, UnauthenticatedError
from stages.reloaded import Reloaded

_SCHEME = "bearer "
_EVERYBODY = Tenant(max_priority=MAX_PRIORITY, operator=True)


class Doorkeeper:
    """Knows the tenants by their keys, as the file is now; without a file everybody is one tenant, without limits.

    What a tenant has used is kept here, so one Doorkeeper stands at both doors of a gateway.
    """

    def __init__(self, keys_file: str | None = None, audit: Audit | None = None) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self.audit = audit or Audit()
        self._file: Reloaded[Tenants] | None = None
        if keys_file is not None:
            self._file = Reloaded("API keys", [keys_file], keys.parse)
        self._seen: Tenants | None = None
        self._accounts: dict[str, Account] = {}

    def visit(self, authorization: str | bytes | None) -> Visit:
        """The call that carries this `authorization` header. Raises UnauthenticatedError, without the key in it."""
        prompts: list[str] | None = [] if self.audit.prompts else None
        if self._file is None:
            return Visit(self._account("", _EVERYBODY), prompts=prompts)
        if not authorization:
            raise UnauthenticatedError(
                "API_KEY_MISSING", "an API key is required: send the header `authorization: Bearer KEY`"
            )
        text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
        if text[: len(_SCHEME)].lower() != _SCHEME:
            raise UnauthenticatedError("API_KEY_MISSING", "the authorization header must be `Bearer KEY`")
        tenants = self._file.get()
        if tenants is not self._seen:
            self._change(tenants)
        holder = tenants.holder(text[len(_SCHEME) :].strip(), datetime.datetime.now(datetime.UTC))
        account = self._account(holder.tenant, tenants.tenants[holder.tenant])
        return Visit(account, holder.key_id, prompts)

    def visit_of(self, tenant: str) -> Visit:
        """A call made for a tenant that was let in before, when it left work here. Raises PermissionDeniedError where there
        is no such tenant any more."""
        if self._file is None:
            return Visit(self._account("", _EVERYBODY))
        tenants = self._file.get()
        if tenants is not self._seen:
            self._change(tenants)
        if tenant not in tenants.tenants:
            raise PermissionDeniedError("TENANT_GONE", f"tenant {tenant!r} has no keys here any more", tenant=tenant)
        return Visit(self._account(tenant, tenants.tenants[tenant]))

    def _account(self, name: str, policy: Tenant) -> Account:
        if (account := self._accounts.get(name)) is None:
            account = self._accounts[name] = Account.opened(name, policy)
        return account

    def _change(self, tenants: Tenants) -> None:
        for name, account in self._accounts.items():
            if (policy := tenants.tenants.get(name)) is not None:
                account.change(policy)
        self._seen = tenants
