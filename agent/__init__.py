"""One node's part: its replicas, and what they send and receive."""

import resilver  # noqa: F401 - before every import of gRPC: it says there why
