"""The steps a workflow is made of, one file each."""
