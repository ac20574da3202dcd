"""Rivals that need an environment of their own. Each runs as a process that times itself when it is told to.

Protocol, one JSON object a line: the rival prints {"ready": {name: seconds to load}}; for every line {"run": name} on
its standard input it prints {"seconds": s}; it ends with its input.
"""
