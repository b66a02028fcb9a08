"""What coordinator, agent and command share."""

from __future__ import annotations

import os

# gRPC for Python has no setting for the lowest version of TLS, but reads at its import which suites of TLS 1.2 it may
# use: with only one that needs a secret which nobody has, TLS 1.3 is what is left, for servers and diallers. This
# package comes before every import of gRPC, also in the two that stand on it; `tests/trust` sees to it.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES128-CBC-SHA"
