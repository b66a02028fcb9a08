"""`resilver demo`: a real cluster on this machine, broken and brought back.

`ground.py` gives it a place (a directory, a file system, an image), `processes.py` starts and stops its programs,
`story.py` tells what happens, `cleanup.py` sees to it that nothing stays. No module here imports gRPC: children are
forked from this process, and everything is asked through the `resilver` command, as an operator would.
"""
