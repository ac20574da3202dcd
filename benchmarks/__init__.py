"""Measurements: `make bench WHAT=sign`. Each checks that answers are equal before it times anything."""
