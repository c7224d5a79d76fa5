"""How the suite compiles: how well does not matter here, how long it takes does.

tests/parity runs what users run: .ci/run gives it --xla_backend_optimization_level=3.
"""

from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # a later one does not know it, and ends
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int, given: str = "") -> str:
    """Return XLA_FLAGS for so many CPU devices; `given` ones go before."""
    quick = "" if "--xla_backend_optimization_level" in given else QUICK
    return f"{given} {quick} --xla_force_host_platform_device_count={devices}"
