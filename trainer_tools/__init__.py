"""trainer_tools: from a trained program to what is served."""

__all__: list[str] = []
