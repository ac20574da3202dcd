"""Processes that run one op each, for `predictor.processes`: messages, shared memory, and both ends."""
