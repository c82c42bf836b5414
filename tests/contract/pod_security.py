"""The `restricted` profile of the Pod Security Standards (kubernetes.io/docs/concepts/security/pod-security-standards),
which contains the `baseline` profile, as a check of a pod's spec."""

from __future__ import annotations

from typing import Any

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip
_SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_SECCOMP = {"RuntimeDefault", "Localhost"}


def violations(spec: dict[str, Any]) -> list[str]:
    """Sentences that name what `restricted` forbids in a pod; empty for a pod that is admitted."""
    pod = spec.get("securityContext") or {}
    found = [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    found += [
        f"volume {volume.get('name')} is of a kind that is not allowed: {', '.join(kinds)}"
        for volume in spec.get("volumes") or []
        if (kinds := volume.keys() - {"name"} - _VOLUMES)
    ]
    found += [f"sysctl {item['name']}" for item in pod.get("sysctls") or [] if item["name"] not in _SYSCTLS]
    found += _context(pod, "the pod")
    if pod.get("runAsUser") == 0:
        found.append("the pod runs as user 0")
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind) or []:
            found += _container(container, pod)
    return found


def _container(container: dict[str, Any], pod: dict[str, Any]) -> list[str]:
    name = container["name"]
    own = container.get("securityContext") or {}
    found = _context(own, name)
    if own.get("privileged"):
        found.append(f"{name} is privileged")
    if own.get("allowPrivilegeEscalation") is not False:
        found.append(f"{name}: allowPrivilegeEscalation is not false")
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        found.append(f"{name}: runAsNonRoot is not true")
    if own.get("runAsUser") == 0:
        found.append(f"{name} runs as user 0")
    if "type" not in (own.get("seccompProfile") or pod.get("seccompProfile") or {}):
        found.append(f"{name} has no seccomp profile")
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        found.append(f"{name} does not drop ALL capabilities")
    added = set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}
    if added:
        found.append(f"{name} adds capabilities {', '.join(sorted(added))}")
    if own.get("procMount", "Default") != "Default":
        found.append(f"{name}: procMount")
    found += [f"{name} uses a host port" for port in container.get("ports") or [] if port.get("hostPort")]
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        for action in ("httpGet", "tcpSocket"):
            if ((container.get(probe) or {}).get(action) or {}).get("host"):
                found.append(f"{name}: {probe} names a host")
    return found


def _context(context: dict[str, Any], who: str) -> list[str]:
    """What pods and containers have in common."""
    found = []
    if (context.get("seccompProfile") or {}).get("type", "RuntimeDefault") not in _SECCOMP:
        found.append(f"{who}: seccomp profile {context['seccompProfile']['type']}")
    if context.get("runAsNonRoot") is False:
        found.append(f"{who}: runAsNonRoot is false")
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        found.append(f"{who} is a host process")
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in _SECCOMP:
        found.append(f"{who}: AppArmor profile")
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in _SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        found.append(f"{who}: SELinux options")
    return found
