"""Us and the others on the same change, in the same run, in turn: `make bench`; see `__main__.py`."""
