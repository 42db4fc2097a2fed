"""The networks: restorer UNet, structure encoder, personalization blocks, autoencoder, base.

diffusers imports bitsandbytes where it is installed, which takes 2 seconds. With the package `kernels`, bitsandbytes
then downloads compiled code and runs it. Only 8-bit optimizers need bitsandbytes; they import it themselves.
"""

import sys

_hidden = sys.modules.setdefault("bitsandbytes", None) is None  # type: ignore[arg-type]
try:
    import diffusers.models.modeling_utils  # noqa: F401  the module that imports bitsandbytes
finally:
    if _hidden:
        del sys.modules["bitsandbytes"]
