"""Who decides, and remembers."""

import resilver  # noqa: F401 - before every import of gRPC: it says there why
